// How well the model predicts a text, token by token, and what its correction has to do with it.

import { announce, byId, button, el } from "./dom.js";
import { isAbort } from "./api.js";
import { comparePerplexity } from "./compare.js";
import { drawCurve } from "./curve.js";
import { change, count, fixed } from "./format.js";
import { shiftLegend, surpriseLegend } from "./heat.js";
import { TokenText } from "./tokens.js";

/** @import { Api } from "./api.js" */
/** @import { Notice } from "./notice.js" */
/** @import { Rank } from "./rank.js" */
/** @import { Scored, Token } from "./types.js" */

const PAUSE_MS = 120;
const MAX_SHOWN = 4000;
const EXAMPLE = `Bread is one of the oldest foods that people prepare. At its simplest it is flour and water, mixed to a dough and baked; most bread also has salt in it, and something that makes it rise. Yeast does that: it feeds on the sugar in the flour and gives off carbon dioxide, and the gas is held in the dough by a net of proteins called gluten. Kneading makes the net stronger. When the loaf goes into the oven, the gas expands, the starch sets, and the crust turns brown.

For a long time every village had an oven of its own. People brought their dough on the day when it was heated, and marked each loaf with a sign so that they could tell it from the others. In the cities there were bakers, who worked at night so that there would be fresh bread in the morning. Their work was watched closely: the weight and the price of a loaf were set by law, and a baker who sold loaves that were too light could be fined or put in the stocks. Some added a thirteenth loaf to every dozen to be on the safe side, which is where the expression "a baker's dozen" is said to come from.`;

/**
 * Ranks at which the curve is measured: 0, powers of two, and all of it.
 * @param {number} full
 * @returns {number[]}
 */
export function ranksToMeasure(full) {
  const ranks = [0];
  for (let rank = 1; rank < full; rank *= 2) ranks.push(rank);
  return full > 0 ? [...ranks, full] : ranks;
}

/** The perplexity tab. */
export class Perplexity {
  /** @type {{text: string} | {probe: true} | null} what is scored */
  #source = null;
  /** @type {Map<number, Scored>} by rank */
  #results = new Map();
  /** @type {AbortController | null} */
  #running = null;
  #isSweeping = false;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;
  /** @type {"surprise" | "change"} */
  #view = "surprise";
  #input = byId("perplexity-input", HTMLTextAreaElement);
  #probe = byId("perplexity-probe", HTMLButtonElement);
  #place = byId("perplexity-result", HTMLElement);
  #api;
  #rank;
  #notice;

  /**
   * @param {Api} api
   * @param {Rank} rank
   * @param {Notice} notice
   */
  constructor(api, rank, notice) {
    this.#api = api;
    this.#rank = rank;
    this.#notice = notice;
    byId("perplexity-form", HTMLFormElement).addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#input.value !== "") this.#begin({ text: this.#input.value });
    });
    this.#probe.addEventListener("click", () => this.#begin({ probe: true }));
    byId("perplexity-example", HTMLButtonElement).addEventListener("click", () => {
      this.#input.value = EXAMPLE;
      this.#begin({ text: EXAMPLE });
    });
    new ResizeObserver(() => this.#drawCurve()).observe(this.#place);
  }

  /** @param {boolean} hasProbe the artifact's build measured a text of its own */
  setProbe(hasProbe) {
    this.#probe.hidden = !hasProbe;
  }

  /** The slider is being moved: what is not known yet is measured once it rests for a moment. */
  rankChanged() {
    if (this.#source === null) return;
    clearTimeout(this.#timer);
    if (this.#results.has(this.#rank.value)) this.#render();
    else this.#timer = setTimeout(() => void this.#measure([this.#rank.value]), PAUSE_MS);
  }

  /** @param {{text: string} | {probe: true}} source */
  #begin(source) {
    this.#source = source;
    this.#results.clear();
    void this.#measure([this.#rank.full, this.#rank.value]);
  }

  /** @param {number[]} ranks */
  async #measure(ranks) {
    this.#running?.abort();
    const running = new AbortController();
    this.#running = running;
    this.#notice.clear();
    this.#place.setAttribute("aria-busy", "true");
    try {
      for (const rank of ranks) {
        if (this.#results.has(rank)) continue;
        this.#results.set(rank, await this.#api.score({ ...this.#source, rank }, running.signal));
        this.#render();
      }
      const shown = this.#results.get(this.#rank.value);
      if (shown) announce(`Perplexity ${fixed(shown.perplexity, 2)} at rank ${this.#rank.value}`);
    } catch (error) {
      if (!isAbort(error)) this.#notice.show(error, () => void this.#measure(ranks));
    } finally {
      if (this.#running === running) {
        this.#running = null;
        this.#isSweeping = false;
        this.#place.removeAttribute("aria-busy");
        this.#render();
      }
    }
  }

  #sweep() {
    if (this.#isSweeping) {
      this.#running?.abort();
      return;
    }
    this.#isSweeping = true;
    void this.#measure(ranksToMeasure(this.#rank.full));
  }

  #render() {
    const full = this.#results.get(this.#rank.full);
    const shown = this.#results.get(this.#rank.value) ?? full;
    this.#place.hidden = shown === undefined;
    if (!shown) return;
    const parts = [this.#figures(shown, full)];
    if (this.#rank.full > 0) parts.push(this.#curveBox());
    parts.push(this.#heatMap(shown, full));
    this.#place.replaceChildren(...parts);
    this.#drawCurve();
  }

  /**
   * @param {Scored} shown
   * @param {Scored | undefined} full
   * @returns {HTMLElement}
   */
  #figures(shown, full) {
    const list = el("dl", { class: "figures" });
    const add = (/** @type {string} */ name, /** @type {string} */ value, /** @type {string} */ detail) =>
      list.append(el("div", {}, el("dt", {}, name), el("dd", {}, el("span", { class: "figure" }, value), el("span", { class: "hint" }, detail))));
    const hasRank = this.#rank.full > 0;
    add(hasRank ? `Perplexity at rank ${shown.rank}` : "Perplexity", fixed(shown.perplexity, 2), `${fixed(shown.nll, 4)} nats a token, ${count(shown.numTokens, "token")}`);
    if (full && hasRank) {
      add(`At full rank, ${full.rank}`, fixed(full.perplexity, 2), shown === full ? "all of the correction" : "");
    }
    if (full && shown !== full) {
      const { ratio, margin } = comparePerplexity(shown.tokens, full.tokens);
      add("Against full rank", `${change((ratio - 1) * 100, 1)} %`, `± ${fixed(margin * 100, 1)} % (95 % interval of this text)`);
    }
    if (shown.probe) {
      add("Dense network", fixed(shown.probe.dense_perplexity, 2), `${change(shown.probe.delta_to_dense, 2)} here, ${change((shown.probe.ratio_to_dense - 1) * 100, 1)} %`);
    }
    return list;
  }

  /** @returns {HTMLElement} */
  #curveBox() {
    const sweep = button(this.#isSweeping ? "Stop measuring" : "Measure the curve", () => this.#sweep(), "quiet");
    const title = el("h3", {}, "Perplexity by rank");
    return el("div", { class: "curve-box" }, el("div", { class: "box-head" }, title, sweep), el("div", { class: "curve-place" }));
  }

  #drawCurve() {
    const place = this.#place.querySelector(".curve-place");
    if (!(place instanceof HTMLElement) || place.clientWidth === 0) return;
    const points = [...this.#results].map(([rank, scored]) => /** @type {[number, number]} */ ([rank, scored.perplexity]));
    points.sort((a, b) => a[0] - b[0]);
    const dense = [...this.#results.values()].find((scored) => scored.probe)?.probe?.dense_perplexity ?? null;
    place.replaceChildren(drawCurve(points, { full: this.#rank.full, current: this.#rank.value, dense, width: place.clientWidth }));
  }

  /**
   * @param {Scored} shown
   * @param {Scored | undefined} full
   * @returns {HTMLElement}
   */
  #heatMap(shown, full) {
    const text = new TokenText("The scored text", this.#view);
    text.add(shown.tokens.slice(0, MAX_SHOWN).map((token, at) => withReference(token, full === shown ? undefined : full?.tokens[at])));
    const legend = el("ul", { class: "legend", "aria-label": "Legend" });
    for (const { shade, text: meaning } of this.#view === "surprise" ? surpriseLegend() : shiftLegend()) {
      legend.append(el("li", {}, el("span", { class: "token swatch", "data-shade": shade, "aria-hidden": "true" }), meaning));
    }
    const title = el("h3", {}, this.#view === "surprise" ? "Probability of each token" : "Each token against full rank");
    const box = el("div", { class: "heat" }, el("div", { class: "box-head" }, title, this.#rank.full > 0 && this.#viewSwitch()), legend, text.element);
    if (shown.tokens.length > MAX_SHOWN) box.append(el("p", { class: "hint" }, `The first ${count(MAX_SHOWN, "token")} of ${count(shown.tokens.length, "token")} are shown; the figures are those of all.`));
    return box;
  }

  /** @returns {HTMLElement} */
  #viewSwitch() {
    const choose = (/** @type {"surprise" | "change"} */ view) => {
      this.#view = view;
      this.#render();
      const made = this.#place.querySelector(`button[data-view="${view}"]`); // the one that was pressed is gone
      if (made instanceof HTMLElement) made.focus({ preventScroll: true });
    };
    const make = (/** @type {"surprise" | "change"} */ view, /** @type {string} */ text) => {
      const made = button(text, () => choose(view));
      made.dataset.view = view;
      made.setAttribute("aria-pressed", String(this.#view === view));
      return made;
    };
    return el("div", { class: "choice", role: "group", "aria-label": "What the shades show" }, make("surprise", "Probability"), make("change", "Against full rank"));
  }
}

/**
 * @param {{text: string, nll: number | null}} token
 * @param {{nll: number | null} | undefined} reference
 * @returns {Token}
 */
function withReference(token, reference) {
  const logprob = token.nll === null ? null : -token.nll;
  const other = reference === undefined || reference.nll === null ? null : -reference.nll;
  return { text: token.text, logprob, top: [], reference: other };
}
