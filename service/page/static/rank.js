// The slider that says how many components of the correction requests use.

import { byId, setText } from "./dom.js";

const HINTS = {
  none: "This model was built without a low-rank correction.",
  all: "All of the correction: the model as it was built.",
  some: "Only the components that matter most are used.",
  zero: "No correction: the quantized weights alone.",
};

/** The slider. */
export class Rank {
  #input = byId("rank", HTMLInputElement);
  #full = 0;

  /** @param {(rank: number) => void} onChange while it is moved */
  constructor(onChange) {
    this.#input.addEventListener("input", () => {
      this.#show();
      onChange(this.value);
    });
    this.#show();
  }

  /** @returns {number} */
  get value() {
    return Number(this.#input.value);
  }

  /** @returns {number} of the model */
  get full() {
    return this.#full;
  }

  /** @returns {{rank?: number}} for a request: all of the correction is left to the server, which may have less to give */
  get field() {
    return this.value < this.#full ? { rank: this.value } : {};
  }

  /** @param {number} full rank of the model that is served now */
  setFull(full) {
    if (full === this.#full && this.#input.max === String(full)) return;
    this.#full = full;
    this.#input.max = String(full);
    this.#input.value = String(full);
    this.#input.disabled = full === 0;
    this.#show();
  }

  #show() {
    const { value } = this;
    setText(byId("rank-value", HTMLElement), this.#full === 0 ? "–" : `${value} of ${this.#full}`);
    this.#input.setAttribute("aria-valuetext", `${value} of ${this.#full}`);
    this.#input.style.setProperty("--share", this.#full === 0 ? "0" : String(value / this.#full));
    const hint = this.#full === 0 ? "none" : value === this.#full ? "all" : value === 0 ? "zero" : "some";
    setText(byId("rank-hint", HTMLElement), HINTS[hint]);
  }
}
