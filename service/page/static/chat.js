// The conversation: turns of a message and its answers, the latest of which the conversation goes on from.

import { byId, button, el } from "./dom.js";
import { isAbort } from "./api.js";
import { Answer } from "./answer.js";

/** @import { Api } from "./api.js" */
/** @import { Notice } from "./notice.js" */
/** @import { Rank } from "./rank.js" */
/** @import { Sampling } from "./sampling.js" */

const STARTERS = [
  "Explain in three sentences why the sky is blue.",
  "Write a short letter that declines an invitation politely.",
  "What are the differences between a violin and a viola?",
];

/**
 * @typedef {object} Turn
 * @property {string} message
 * @property {Answer[]} answers
 * @property {HTMLElement} element
 * @property {HTMLElement} place of the answers, beside each other where there is room: they are there to be compared
 */

/** The chat tab. */
export class Chat {
  /** @type {Turn[]} */
  #turns = [];
  /** @type {AbortController | null} */
  #running = null;
  #log = byId("chat-log", HTMLElement);
  #input = byId("chat-input", HTMLTextAreaElement);
  #send = byId("chat-send", HTMLButtonElement);
  #stop = byId("chat-stop", HTMLButtonElement);
  #again = button("", () => this.#regenerate());
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
    byId("chat-form", HTMLFormElement).addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.#input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#submit();
    });
    this.#stop.addEventListener("click", () => this.#running?.abort());
    byId("chat-new", HTMLButtonElement).addEventListener("click", () => this.#clear());
    this.#clear();
  }

  /** The slider was moved. */
  rankChanged() {
    this.#showAgain();
  }

  /** The choice of shading has changed. */
  shadingChanged() {
    for (const turn of this.#turns) for (const answer of turn.answers) answer.shadeBy(this.#sampling.shading);
  }

  #clear() {
    this.#running?.abort();
    this.#turns = [];
    this.#notice.clear();
    const starters = STARTERS.map((text) =>
      button(text, () => {
        this.#input.value = text;
        this.#input.focus();
      }, "starter"),
    );
    this.#log.replaceChildren(el("div", { class: "empty" }, el("p", { class: "hint" }, "Nothing of a conversation is kept once this page is left. Something to begin with:"), el("div", { class: "starters" }, ...starters)));
  }

  #submit() {
    const message = this.#input.value.trim();
    if (message === "" || this.#running || !this.#sampling.check()) return;
    this.#input.value = "";
    if (this.#turns.at(-1)?.answers.length === 0) this.#turns.pop()?.element.remove(); // it failed, and was not tried again
    const place = el("div", { class: "answers" });
    const element = el("div", { class: "turn" }, el("div", { class: "message" }, el("span", { class: "visually-hidden" }, "You: "), message), place);
    if (this.#turns.length === 0) this.#log.replaceChildren();
    this.#log.append(element);
    const turn = { message, answers: [], element, place };
    this.#turns.push(turn);
    void this.#answer(turn);
  }

  #regenerate() {
    const turn = this.#turns.at(-1);
    if (turn && !this.#running && this.#sampling.check()) void this.#answer(turn);
  }

  /** @param {Turn} turn */
  async #answer(turn) {
    const messages = this.#messages();
    const answer = new Answer("Assistant", this.#sampling.shading);
    const running = new AbortController();
    this.#running = running;
    this.#notice.clear();
    this.#show();
    this.#again.remove();
    turn.place.append(answer.element);
    this.#scroll(true);
    try {
      const body = { messages, ...this.#sampling.fields("chat"), ...this.#rank.field };
      const onStart = (/** @type {number | null} */ rank) => answer.setRank(rank, this.#rank.full);
      await answer.take(this.#api.generate("v1/chat/completions", body, running.signal, onStart), () => this.#scroll(false));
    } catch (error) {
      if (!isAbort(error) && this.#turns.includes(turn)) this.#notice.show(error, () => this.#regenerate());
    } finally {
      if (answer.text === "") answer.element.remove();
      else turn.answers.push(answer);
      if (this.#running === running) this.#running = null;
      this.#show();
      this.#showAgain();
      this.#scroll(false);
    }
  }

  /** @returns {{role: string, content: string}[]} */
  #messages() {
    const { system } = this.#sampling;
    const messages = system === "" ? [] : [{ role: "system", content: system }];
    for (const [at, turn] of this.#turns.entries()) {
      messages.push({ role: "user", content: turn.message });
      const answer = turn.answers.at(-1);
      if (answer && at < this.#turns.length - 1) messages.push({ role: "assistant", content: answer.text });
    }
    return messages;
  }

  /** The button that answers the last message once more. */
  #showAgain() {
    const turn = this.#turns.at(-1);
    if (!turn || turn.answers.length === 0 || this.#running) {
      this.#again.remove();
      return;
    }
    const { value, full } = this.#rank;
    this.#again.textContent = full === 0 ? "Answer again" : `Answer again at rank ${value}`;
    if (this.#again.parentElement !== turn.element) turn.element.append(this.#again);
  }

  /** The button that has the focus is replaced: the focus goes on to what takes its place. */
  #show() {
    const focused = document.activeElement;
    this.#send.hidden = this.#running !== null;
    this.#stop.hidden = this.#running === null;
    if (focused === this.#send && this.#running) this.#stop.focus({ preventScroll: true });
    if ((focused === this.#stop && !this.#running) || focused === this.#again) this.#input.focus({ preventScroll: true });
  }

  /** @param {boolean} isForced also when the user looks at something further up */
  #scroll(isForced) {
    const log = this.#log;
    const distance = log.scrollHeight - log.scrollTop - log.clientHeight;
    if (isForced || distance < 120) log.scrollTop = log.scrollHeight;
  }
}
