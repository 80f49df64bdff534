// A text made of tokens: each can be shaded, and looked at with the pointer or the arrow keys.

import { announce, byId, el } from "./dom.js";
import { change, fixed, percent, visible } from "./format.js";
import { shift, surprise } from "./heat.js";

/** @import { Token } from "./types.js" */

/**
 * "surprise": by the token's probability; "change": by how that differs from the one at full rank.
 * @typedef {"none" | "surprise" | "change"} Shading
 */

const MARGIN = 8;
/** @type {TokenText | null} whose token the card shows */
let shownBy = null;

/** The tokens of one text. */
export class TokenText {
  /** @type {Token[]} */
  #tokens = [];
  /** @type {HTMLElement[]} */
  #spans = [];
  /** @type {Shading} */
  #shading;
  #current = -1;

  /**
   * @param {string} label what the text is
   * @param {Shading} [shading]
   */
  constructor(label, shading = "none") {
    this.#shading = shading;
    const instructions = `${label}. Arrow keys go through its tokens.`;
    this.element = el("div", { class: "tokens", tabindex: 0, role: "group", "aria-label": instructions });
    this.element.addEventListener("pointerover", (event) => this.#point(event));
    this.element.addEventListener("pointerleave", () => this.#select(-1));
    this.element.addEventListener("blur", () => this.#select(-1));
    this.element.addEventListener("keydown", (event) => this.#press(event));
  }

  /** @param {string} text without log-probabilities */
  addText(text) {
    this.element.append(text);
  }

  /** @param {Token[]} tokens */
  add(tokens) {
    for (const token of tokens) {
      const span = el("span", { class: "token", "data-at": this.#spans.length }, token.text);
      this.#tokens.push(token);
      this.#spans.push(span);
      this.#shade(token, span);
      this.element.append(span);
    }
  }

  /** @param {Shading} shading */
  shadeBy(shading) {
    this.#shading = shading;
    this.#tokens.forEach((token, at) => this.#shade(token, this.#spans[at]));
  }

  /**
   * @param {Token} token
   * @param {HTMLElement} span
   */
  #shade(token, span) {
    const by = { none: () => null, surprise: () => surprise(token.logprob), change: () => shift(token.logprob, token.reference) };
    const shade = by[this.#shading]();
    const letter = this.#shading === "change" ? "c" : "s";
    if (shade === null) delete span.dataset.shade;
    else span.dataset.shade = `${letter}${shade}`;
    span.classList.toggle("blank", token.text === "");
  }

  /** @param {PointerEvent} event */
  #point(event) {
    const { target } = event;
    if (target instanceof HTMLElement && target.dataset.at !== undefined) this.#select(Number(target.dataset.at));
  }

  /** @param {KeyboardEvent} event */
  #press(event) {
    const last = this.#spans.length - 1;
    const places = {
      ArrowRight: Math.min(this.#current + 1, last),
      ArrowLeft: Math.max(this.#current - 1, 0),
      Home: 0,
      End: last,
      Escape: -1,
    };
    if (!(event.key in places) || last < 0) return;
    event.preventDefault();
    const at = places[/** @type {keyof typeof places} */ (event.key)];
    this.#spans[at]?.scrollIntoView({ block: "nearest" }); // before the card is placed beside it
    this.#select(at);
    if (at >= 0) announce(spoken(this.#tokens[at]));
  }

  /** @param {number} at -1: none */
  #select(at) {
    this.#spans[this.#current]?.classList.remove("current");
    this.#current = at;
    const card = byId("token-card", HTMLElement);
    if (at < 0) {
      if (shownBy === this) card.hidden = true;
      return;
    }
    shownBy = this;
    this.#spans[at].classList.add("current");
    card.replaceChildren(...cardOf(this.#tokens[at]));
    card.hidden = false;
    place(card, this.#spans[at]);
  }
}

/**
 * Below the token, or above it where there is no room; within the window.
 * @param {HTMLElement} card
 * @param {HTMLElement} span
 */
function place(card, span) {
  const boxes = span.getClientRects();
  const box = boxes[0] ?? span.getBoundingClientRect();
  const { clientWidth: width, clientHeight: height } = document.documentElement;
  const left = Math.max(MARGIN, Math.min(box.left, width - card.offsetWidth - MARGIN));
  const below = box.bottom + MARGIN;
  const top = below + card.offsetHeight > height ? Math.max(MARGIN, box.top - card.offsetHeight - MARGIN) : below;
  card.style.left = `${left}px`;
  card.style.top = `${top}px`;
}

/**
 * @param {Token} token
 * @returns {HTMLElement[]}
 */
function cardOf(token) {
  const head = el("p", { class: "token-name" }, visible(token.text));
  if (token.logprob === null) return [head, el("p", { class: "hint" }, "Begins a window: nothing predicts it")];
  const figures = el("p", { class: "token-figures" }, `${percent(Math.exp(token.logprob))}`, el("span", {}, `log ${fixed(token.logprob, 3)}`));
  /** @type {HTMLElement[]} */
  const parts = [head, figures];
  if (token.reference !== null && token.reference !== undefined) {
    const text = `${percent(Math.exp(token.reference))} at full rank, log ${change(token.logprob - token.reference, 3)}`;
    parts.push(el("p", { class: "hint" }, text));
  }
  if (token.top.length > 0) parts.push(alternatives(token));
  return parts;
}

/**
 * @param {Token} token
 * @returns {HTMLElement}
 */
function alternatives(token) {
  const list = el("ol", { class: "alternatives" });
  for (const other of token.top) {
    const bar = el("span", { class: "bar" });
    bar.style.inlineSize = `${Math.exp(other.logprob) * 100}%`;
    const isOwn = other.text === token.text || (token.text === "" && other.logprob === token.logprob);
    list.append(
      el("li", { class: isOwn ? "own" : null }, el("code", {}, visible(other.text)), el("span", { class: "track" }, bar), el("span", { class: "share" }, percent(Math.exp(other.logprob)))),
    );
  }
  return list;
}

/**
 * @param {Token} token
 * @returns {string}
 */
function spoken(token) {
  if (token.logprob === null) return `${visible(token.text)}, not predicted`;
  const others = token.top.filter((other) => other.text !== token.text).slice(0, 3);
  const instead = others.map((other) => `${visible(other.text)} ${percent(Math.exp(other.logprob))}`).join(", ");
  return `${visible(token.text)}, ${percent(Math.exp(token.logprob))}${instead ? `; instead ${instead}` : ""}`;
}
