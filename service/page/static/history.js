// The last minutes of a server, from one scrape of its metrics to the next.

import { Scrape, increase, quantile, rate } from "./prometheus.js";

/** Scrapes that a figure of the present looks back over: half a minute. */
const LOOK_BACK = 15;
/** Values that are kept of each figure: three minutes. */
export const LENGTH = 90;
const TTFT = "qerve_time_to_first_token_seconds";
const GAP = "qerve_inter_token_latency_seconds";

/**
 * One moment's figures; null: not exported, or nothing happened.
 * @typedef {Record<"outputRate" | "promptRate" | "ttft50" | "ttft95" | "gap50" | "gap95" | "running" | "waiting" | "cache", number | null>} Figures
 */

/** What was scraped, and what follows from it. */
export class History {
  /** @type {Scrape[]} */
  #scrapes = [];
  /** @type {Figures[]} */
  #figures = [];

  /** @param {Scrape} scrape */
  add(scrape) {
    const before = this.latest;
    if (before && hasRestarted(before, scrape)) this.#scrapes = [];
    this.#scrapes.push(scrape);
    this.#scrapes = this.#scrapes.slice(-LOOK_BACK - 1);
    this.#figures.push(this.#figuresOf(scrape));
    this.#figures = this.#figures.slice(-LENGTH);
  }

  /** Nothing could be scraped: a gap. */
  skip() {
    this.#scrapes = [];
    const none = /** @type {Figures} */ (Object.fromEntries(Object.keys(this.now ?? {}).map((name) => [name, null])));
    if (this.now) this.#figures.push(none);
    this.#figures = this.#figures.slice(-LENGTH);
  }

  /** @returns {Scrape | undefined} */
  get latest() {
    return this.#scrapes.at(-1);
  }

  /** @returns {Figures | undefined} */
  get now() {
    return this.#figures.at(-1);
  }

  /**
   * @param {keyof Figures} name
   * @returns {(number | null)[]} the latest last
   */
  series(name) {
    return this.#figures.map((figures) => figures[name] ?? null);
  }

  /**
   * A quantile since the server was started.
   * @param {"ttft" | "gap"} kind
   * @param {number} share
   * @returns {number | null}
   */
  overall(kind, share) {
    return this.latest ? quantile(share, increase(null, this.latest, kind === "ttft" ? TTFT : GAP)) : null;
  }

  /**
   * @param {Scrape} scrape
   * @returns {Figures}
   */
  #figuresOf(scrape) {
    const previous = this.#scrapes.at(-2);
    const first = this.#scrapes.length > 1 ? this.#scrapes[0] : null;
    const recent = (/** @type {string} */ name, /** @type {number} */ share) =>
      first ? quantile(share, increase(first, scrape, name)) : null;
    return {
      outputRate: previous ? rate(previous, scrape, "qerve_generation_tokens_total") : null,
      promptRate: previous ? rate(previous, scrape, "qerve_prompt_tokens_total") : null,
      ttft50: recent(TTFT, 0.5),
      ttft95: recent(TTFT, 0.95),
      gap50: recent(GAP, 0.5),
      gap95: recent(GAP, 0.95),
      running: scrape.value("qerve_num_requests_running"),
      waiting: scrape.value("qerve_queue_depth") ?? scrape.value("qerve_num_requests_waiting"),
      cache: scrape.value("qerve_kv_cache_usage_perc"),
    };
  }
}

/**
 * @param {Scrape} before
 * @param {Scrape} after
 * @returns {boolean} counters began anew
 */
function hasRestarted(before, after) {
  const started = "process_start_time_seconds";
  return before.value(started) !== after.value(started);
}
