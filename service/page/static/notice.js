// What went wrong, where it went wrong, and when it can be tried again.

import { button, el } from "./dom.js";
import { ApiError } from "./api.js";

/** @type {Record<number, string>} */
const TITLES = {
  0: "No connection",
  400: "The server cannot do that",
  401: "A key is needed",
  404: "Not found",
  408: "It took too long",
  413: "Too long",
  429: "Too many requests",
  500: "The server failed on this request",
  503: "The server does not take requests now",
};

/** A place for one message at a time. */
export class Notice {
  /** @type {ReturnType<typeof setInterval> | undefined} */
  #timer;

  /**
   * @param {HTMLElement} place
   * @param {() => void} askForKey
   */
  constructor(place, askForKey) {
    this.#place = place;
    this.#askForKey = askForKey;
  }

  #place;
  #askForKey;

  /** Takes the message away. */
  clear() {
    clearInterval(this.#timer);
    this.#place.replaceChildren();
  }

  /**
   * @param {unknown} error
   * @param {() => void} again what to do when the user wants to try again
   */
  show(error, again) {
    this.clear();
    const status = error instanceof ApiError ? error.status : -1;
    const message = error instanceof Error ? error.message : String(error);
    const title = TITLES[status] ?? "Something went wrong";
    const actions = el("div", { class: "notice-actions" });
    this.#place.append(el("div", { class: "notice", role: "alert" }, el("strong", {}, title), el("p", {}, message), actions));
    if (status === 401) {
      actions.append(button("Enter a key", this.#askForKey));
      return;
    }
    if (status === 400 || status === 413) return;
    const retry = button("Try again", () => {
      this.clear();
      again();
    });
    actions.append(retry);
    if (error instanceof ApiError && error.retrySeconds !== null) this.#countDown(retry, error.retrySeconds);
  }

  /**
   * @param {HTMLButtonElement} retry
   * @param {number} seconds
   */
  #countDown(retry, seconds) {
    const tick = () => {
      retry.disabled = seconds > 0;
      retry.textContent = seconds > 0 ? `Try again in ${seconds} s` : "Try again";
      if (seconds <= 0) clearInterval(this.#timer);
      seconds -= 1;
    };
    tick();
    this.#timer = setInterval(tick, 1000);
  }
}
