// Prometheus's text format, and what can be computed from two scrapes of it.

const LINE = /^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+\S+)?$/;
const LABEL = /([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"/g;

/**
 * @typedef {object} Sample
 * @property {Record<string, string>} labels
 * @property {number} value
 */

/**
 * @param {string} text
 * @returns {number}
 */
function parseValue(text) {
  if (text === "+Inf" || text === "Inf") return Infinity;
  return text === "-Inf" ? -Infinity : Number(text);
}

/**
 * @param {string} text
 * @returns {Record<string, string>}
 */
function parseLabels(text) {
  /** @type {Record<string, string>} */
  const labels = {};
  for (const [, name, value] of text.matchAll(LABEL)) {
    labels[name] = value.replace(/\\(.)/g, (_, sign) => (sign === "n" ? "\n" : sign));
  }
  return labels;
}

/** All samples of one moment. A metric that is not exported has none: every question about it is answered with null. */
export class Scrape {
  /**
   * @param {string} text
   * @param {number} seconds when it was taken, on any clock
   */
  constructor(text, seconds) {
    this.seconds = seconds;
    /** @type {Map<string, Sample[]>} */
    this.families = new Map();
    for (const line of text.split("\n")) {
      const match = line.startsWith("#") ? null : LINE.exec(line);
      if (!match) continue;
      const samples = this.families.get(match[1]) ?? [];
      samples.push({ labels: parseLabels(match[2] ?? ""), value: parseValue(match[3]) });
      this.families.set(match[1], samples);
    }
  }

  /**
   * @param {string} name
   * @param {Record<string, string>} [labels] that samples must have
   * @returns {Sample[]}
   */
  samples(name, labels = {}) {
    const wanted = Object.entries(labels);
    return (this.families.get(name) ?? []).filter((sample) => wanted.every(([key, value]) => sample.labels[key] === value));
  }

  /**
   * The sum of the samples.
   * @param {string} name
   * @param {Record<string, string>} [labels]
   * @returns {number | null} null: there are none
   */
  value(name, labels = {}) {
    const found = this.samples(name, labels);
    return found.length === 0 ? null : found.reduce((total, sample) => total + sample.value, 0);
  }

  /**
   * Values by one label.
   * @param {string} name
   * @param {string} label
   * @returns {Record<string, number>}
   */
  by(name, label) {
    /** @type {Record<string, number>} */
    const values = {};
    for (const sample of this.samples(name)) {
      const key = sample.labels[label] ?? "";
      values[key] = (values[key] ?? 0) + sample.value;
    }
    return values;
  }

  /**
   * Cumulative counts of a histogram, by upper bound, ascending.
   * @param {string} name
   * @returns {Map<number, number>}
   */
  buckets(name) {
    const counts = Object.entries(this.by(`${name}_bucket`, "le"));
    return new Map(counts.map(([bound, total]) => /** @type {[number, number]} */ ([parseValue(bound), total])).sort((a, b) => a[0] - b[0]));
  }
}

/**
 * A counter's increase per second.
 * @param {Scrape} before
 * @param {Scrape} after
 * @param {string} name
 * @returns {number | null} null: not exported, no time passed, or the server was started again
 */
export function rate(before, after, name) {
  const first = before.value(name);
  const last = after.value(name);
  const seconds = after.seconds - before.seconds;
  if (first === null || last === null || seconds <= 0 || last < first) return null;
  return (last - first) / seconds;
}

/**
 * What a histogram counted between two scrapes; from its beginning without `before`.
 * @param {Scrape | null} before
 * @param {Scrape} after
 * @param {string} name
 * @returns {Map<number, number>} cumulative counts by upper bound
 */
export function increase(before, after, name) {
  const first = before === null ? new Map() : before.buckets(name);
  const last = after.buckets(name);
  const differences = new Map([...last].map(([bound, total]) => [bound, total - (first.get(bound) ?? 0)]));
  return [...differences.values()].some((total) => total < 0) ? last : differences;
}

/**
 * As Prometheus's `histogram_quantile`: linear within a bucket, and the last finite bound for what lies above it.
 * @param {number} share 0 to 1
 * @param {Map<number, number>} buckets cumulative counts by upper bound, ascending
 * @returns {number | null} null: nothing was counted
 */
export function quantile(share, buckets) {
  const bounds = [...buckets.keys()];
  const total = buckets.get(Infinity) ?? 0;
  if (total <= 0) return null;
  const rank = share * total;
  let lower = 0;
  let below = 0;
  for (const bound of bounds) {
    const upTo = buckets.get(bound) ?? 0;
    if (upTo >= rank && upTo > below) {
      return bound === Infinity ? lower : lower + ((bound - lower) * (rank - below)) / (upTo - below);
    }
    lower = bound === Infinity ? lower : bound;
    below = upTo;
  }
  return lower;
}
