// Plain completion: the model continues a prompt.

import { byId } from "./dom.js";
import { isAbort } from "./api.js";
import { Answer } from "./answer.js";

/** @import { Api } from "./api.js" */
/** @import { Notice } from "./notice.js" */
/** @import { Rank } from "./rank.js" */
/** @import { Sampling } from "./sampling.js" */

/** The completion tab. Continuations of one prompt stay below each other, to be compared. */
export class Completion {
  /** @type {Answer[]} */
  #answers = [];
  /** @type {AbortController | null} */
  #running = null;
  #prompt = "";
  #input = byId("completion-input", HTMLTextAreaElement);
  #output = byId("completion-output", HTMLElement);
  #send = byId("completion-send", HTMLButtonElement);
  #stop = byId("completion-stop", HTMLButtonElement);
  #api;
  #rank;
  #sampling;
  #notice;

  /**
   * @param {Api} api
   * @param {Rank} rank
   * @param {Sampling} sampling
   * @param {Notice} notice
   */
  constructor(api, rank, sampling, notice) {
    this.#api = api;
    this.#rank = rank;
    this.#sampling = sampling;
    this.#notice = notice;
    byId("completion-form", HTMLFormElement).addEventListener("submit", (event) => {
      event.preventDefault();
      void this.#continue();
    });
    this.#stop.addEventListener("click", () => this.#running?.abort());
  }

  /** The choice of shading has changed. */
  shadingChanged() {
    for (const answer of this.#answers) answer.shadeBy(this.#sampling.shading);
  }

  async #continue() {
    const prompt = this.#input.value;
    if (prompt === "" || this.#running || !this.#sampling.check()) return;
    if (prompt !== this.#prompt) this.#output.replaceChildren();
    this.#prompt = prompt;
    const answer = new Answer("Continuation", this.#sampling.shading);
    const running = new AbortController();
    this.#running = running;
    this.#notice.clear();
    this.#show();
    this.#answers.push(answer);
    this.#output.prepend(answer.element);
    try {
      const body = { prompt, ...this.#sampling.fields("completion"), ...this.#rank.field };
      const onStart = (/** @type {number | null} */ rank) => answer.setRank(rank, this.#rank.full);
      await answer.take(this.#api.generate("v1/completions", body, running.signal, onStart), () => {});
    } catch (error) {
      if (!isAbort(error)) this.#notice.show(error, () => void this.#continue());
    } finally {
      if (answer.text === "") answer.element.remove();
      this.#running = null;
      this.#show();
    }
  }

  /** The button that has the focus is replaced by the other. */
  #show() {
    const focused = document.activeElement;
    this.#send.hidden = this.#running !== null;
    this.#stop.hidden = this.#running === null;
    if (focused === this.#send && this.#running) this.#stop.focus({ preventScroll: true });
    if (focused === this.#stop && !this.#running) this.#send.focus({ preventScroll: true });
  }
}
