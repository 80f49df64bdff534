// The form of sampling parameters, as fields of a request.

import { byId } from "./dom.js";

const NUM_ALTERNATIVES = 5;
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

/** What the form says now. */
export class Sampling {
  #form = byId("settings-form", HTMLFormElement);

  /** @param {() => void} onShading the choice of shading has changed */
  constructor(onShading) {
    this.#form.addEventListener("submit", (event) => event.preventDefault());
    this.#form.addEventListener("change", (event) => {
      if (event.target instanceof HTMLInputElement && event.target.name === "shade") onShading();
    });
  }

  /** @returns {FormData} */
  get #data() {
    return new FormData(this.#form);
  }

  /** @returns {string} */
  get system() {
    return String(this.#data.get("system") ?? "").trim();
  }

  /** @returns {"surprise" | "none"} */
  get shading() {
    return this.#data.has("shade") ? "surprise" : "none";
  }

  /** @returns {boolean} what is written can be sent; if not, the browser says what cannot */
  check() {
    if (this.#form.checkValidity()) return true;
    byId("settings", HTMLDetailsElement).open = true;
    this.#form.reportValidity();
    return false;
  }

  /**
   * @param {"chat" | "completion"} kind
   * @returns {Record<string, number | boolean>} fields that are left empty are left out
   */
  fields(kind) {
    const data = this.#data;
    /** @type {Record<string, number | boolean>} */
    const fields = {};
    for (const name of NUMBERS) {
      const text = String(data.get(name) ?? "").trim();
      if (text !== "") fields[name] = Number(text);
    }
    if (!data.has("logprobs")) return fields;
    return kind === "chat"
      ? { ...fields, logprobs: true, top_logprobs: NUM_ALTERNATIVES }
      : { ...fields, logprobs: NUM_ALTERNATIVES };
  }
}
