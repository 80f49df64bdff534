// The row of figures with their last minutes.

import { el, setText } from "./dom.js";
import { duration, number, percent } from "./format.js";
import { LENGTH } from "./history.js";
import { drawSparkline } from "./sparkline.js";

/** @import { History } from "./history.js" */
/** @import { Scrape } from "./prometheus.js" */

/** Values of a full width until there are more: a minute. */
const LEAST_LENGTH = 30;

/**
 * @typedef {object} Reading
 * @property {string} figure
 * @property {string} unit
 * @property {string} detail
 * @property {{values: (number | null)[], kind: string}[]} lines
 * @property {number} [most]
 */

/** One figure: its name, its value now, a word about it, and its line. */
class Tile {
  #figure = el("span", { class: "figure" });
  #unit = el("span", { class: "unit" });
  #detail = el("p", { class: "hint" });
  #place = el("div", { class: "spark-place" });

  /** @param {string} name */
  constructor(name) {
    const value = el("p", { class: "tile-value" }, this.#figure, this.#unit);
    this.element = el("div", { class: "tile" }, el("h3", {}, name), value, this.#detail, this.#place);
  }

  /** @param {Reading} reading */
  show({ figure, unit, detail, lines, most }) {
    setText(this.#figure, figure);
    setText(this.#unit, unit ? ` ${unit}` : "");
    setText(this.#detail, detail);
    const length = Math.max(LEAST_LENGTH, ...lines.map(({ values }) => values.length));
    this.#place.replaceChildren(drawSparkline(lines, length, most));
  }
}

/**
 * @param {History} history
 * @returns {Reading}
 */
function output(history) {
  const now = history.now;
  return {
    figure: number(now?.outputRate ?? null),
    unit: "tokens/s",
    detail: now?.promptRate ? `${number(now.promptRate)} prompt tokens/s` : "generated",
    lines: [{ values: history.series("outputRate"), kind: "line" }],
  };
}

/**
 * @param {History} history
 * @param {"ttft" | "gap"} kind
 * @returns {Reading}
 */
function latency(history, kind) {
  const now = history.now;
  const middle = kind === "ttft" ? "ttft50" : "gap50";
  const high = kind === "ttft" ? "ttft95" : "gap95";
  const isRecent = (now?.[middle] ?? null) !== null;
  const half = isRecent ? (now?.[middle] ?? null) : history.overall(kind, 0.5);
  const most = isRecent ? (now?.[high] ?? null) : history.overall(kind, 0.95);
  const [figure, unit] = duration(half);
  const detail = half === null ? "nothing asked yet" : `95 % in ${duration(most).join(" ")}${isRecent ? "" : ", since start"}`;
  const lines = [
    { values: history.series(high), kind: "line soft" },
    { values: history.series(middle), kind: "line" },
  ];
  return { figure, unit, detail, lines };
}

/**
 * @param {History} history
 * @returns {Reading}
 */
function requests(history) {
  const now = history.now;
  const waiting = now?.waiting ?? null;
  const rank = history.latest?.value("qerve_elastic_rank") ?? null;
  const full = Number(history.latest?.samples("qerve_build_info")[0]?.labels.rank ?? NaN);
  const shed = rank !== null && rank < full ? `, new ones get rank ${rank}` : "";
  return {
    figure: now?.running === null || !now ? "–" : String(now.running),
    unit: "running",
    detail: waiting === null ? "" : `${waiting === 0 ? "none waits" : `${waiting} waiting`}${shed}`,
    lines: [
      { values: history.series("waiting"), kind: "line soft" },
      { values: history.series("running"), kind: "line" },
    ],
  };
}

/**
 * @param {History} history
 * @returns {Reading}
 */
function cache(history) {
  const share = history.now?.cache ?? null;
  return {
    figure: share === null ? "–" : percent(share).replace(" %", ""),
    unit: share === null ? "" : "%",
    detail: "of the key-value cache in use",
    lines: [{ values: history.series("cache"), kind: "line" }],
    most: 1,
  };
}

/**
 * What the model thinks of its own probe, where the server looks.
 * @param {Scrape} scrape
 * @param {(number | null)[]} past
 * @returns {Reading}
 */
function quality(scrape, past) {
  const expected = scrape.value("qerve_canary_expected_perplexity");
  const isOff = scrape.value("qerve_canary_ok") === 0;
  return {
    figure: number(scrape.value("qerve_canary_perplexity")),
    unit: isOff ? "out of tolerance" : "",
    detail: expected === null ? "of the artifact's probe" : `${number(expected)} as built`,
    lines: [{ values: past, kind: "line" }],
  };
}

/** The row. */
export class Tiles {
  #output = new Tile("Throughput");
  #ttft = new Tile("Time to first token");
  #gap = new Tile("Between tokens");
  #requests = new Tile("Requests");
  #cache = new Tile("Cache");
  #quality = new Tile("Canary perplexity");
  /** @type {(number | null)[]} */
  #canary = [];

  /** @param {HTMLElement} place */
  constructor(place) {
    this.#quality.element.hidden = true;
    for (const tile of [this.#output, this.#ttft, this.#gap, this.#requests, this.#cache, this.#quality]) place.append(tile.element);
  }

  /** @param {History} history */
  show(history) {
    this.#output.show(output(history));
    this.#ttft.show(latency(history, "ttft"));
    this.#gap.show(latency(history, "gap"));
    this.#requests.show(requests(history));
    this.#cache.show(cache(history));
    const canary = history.latest?.value("qerve_canary_perplexity") ?? null;
    if (!history.latest || canary === null) return;
    this.#canary = [...this.#canary, Number.isNaN(canary) ? null : canary].slice(-LENGTH);
    this.#quality.element.hidden = false;
    this.#quality.show(quality(history.latest, this.#canary));
  }
}
