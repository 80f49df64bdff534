// One generated text: its tokens as they come, its speed, and how it ended.

import { announce, el, setText } from "./dom.js";
import { count, duration, number } from "./format.js";
import { isAbort } from "./api.js";
import { TokenText } from "./tokens.js";

/** @import { Piece } from "./types.js" */
/** @import { Shading } from "./tokens.js" */

/** @type {Record<string, string>} */
const ENDS = { stop: "complete", length: "reached the most tokens", stopped: "stopped" };

/** An answer while it is made and after. */
export class Answer {
  text = "";
  /** @type {number | null} */
  rank = null;
  #numTokens = 0;
  #started = 0;
  /** @type {number | null} */
  #first = null;
  #last = 0;
  #tokens;
  #stats = el("p", { class: "answer-stats hint" });
  #title = el("span", { class: "answer-title" });

  /**
   * @param {string} name
   * @param {Shading} shading
   */
  constructor(name, shading) {
    this.#tokens = new TokenText(name, shading);
    setText(this.#title, name);
    this.element = el("article", { class: "answer", "aria-label": name }, el("p", { class: "answer-head" }, this.#title), this.#tokens.element, this.#stats);
  }

  /** @param {Shading} shading */
  shadeBy(shading) {
    this.#tokens.shadeBy(shading);
  }

  /**
   * @param {number | null} rank
   * @param {number} full
   */
  setRank(rank, full) {
    this.rank = rank;
    if (rank !== null && full > 0) this.#title.after(el("span", { class: "tag" }, `rank ${rank} of ${full}`));
  }

  /**
   * Takes everything of a stream.
   * @param {AsyncGenerator<Piece>} pieces
   * @param {() => void} onPiece
   */
  async take(pieces, onPiece) {
    this.#started = performance.now();
    this.element.setAttribute("aria-busy", "true");
    setText(this.#stats, "Waiting for the first token");
    let end = "stopped";
    try {
      for await (const piece of pieces) {
        this.#add(piece);
        end = piece.finish ?? end;
        onPiece();
      }
    } catch (error) {
      if (!isAbort(error)) end = "broken off";
      throw error;
    } finally {
      this.element.removeAttribute("aria-busy");
      this.#show(ENDS[end] ?? end);
      announce(`Answer ${ENDS[end] ?? end}: ${this.#stats.textContent}`);
    }
  }

  /** @param {Piece} piece */
  #add(piece) {
    const isEmpty = piece.text === "" && piece.tokens.length === 0;
    if (isEmpty) return;
    this.text += piece.text;
    this.#last = performance.now();
    this.#first ??= this.#last;
    this.#numTokens += Math.max(1, piece.tokens.length);
    if (piece.tokens.length > 0) this.#tokens.add(piece.tokens);
    else this.#tokens.addText(piece.text);
    this.#show("");
  }

  /** @param {string} end */
  #show(end) {
    const parts = [count(this.#numTokens, "token")];
    const seconds = this.#first === null ? 0 : (this.#last - this.#first) / 1000;
    if (seconds > 0 && this.#numTokens > 1) parts.push(`${number((this.#numTokens - 1) / seconds)} tokens/s`);
    if (this.#first !== null) parts.push(`first after ${duration((this.#first - this.#started) / 1000).join(" ")}`);
    if (end) parts.push(end);
    setText(this.#stats, parts.join("  ·  "));
  }
}
