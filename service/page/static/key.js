// The API key: kept in memory, or where the user wants it until the tab is closed; nowhere else.

import { byId, setText } from "./dom.js";

/** @import { Api } from "./api.js" */

const PLACE = "qerve-key";

/** @returns {Storage | null} null: the browser does not let this page keep anything */
function storage() {
  try {
    return window.sessionStorage;
  } catch {
    return null;
  }
}

/** The dialog that asks for it. */
export class KeyDialog {
  #dialog = byId("key-dialog", HTMLDialogElement);
  #input = byId("key-input", HTMLInputElement);
  #keep = byId("key-keep", HTMLInputElement);
  #api;
  #onChange;

  /**
   * @param {Api} api
   * @param {() => void} onChange there is another key
   */
  constructor(api, onChange) {
    this.#api = api;
    this.#onChange = onChange;
    api.key = storage()?.getItem(PLACE) ?? null;
    this.#keep.checked = api.key !== null;
    byId("key-open", HTMLButtonElement).addEventListener("click", () => this.ask(""));
    this.#dialog.addEventListener("close", () => this.#close());
  }

  /** @param {string} reason why it is asked for */
  ask(reason) {
    if (this.#dialog.open) return;
    const isSet = this.#api.key !== null;
    setText(byId("key-reason", HTMLElement), reason || (isSet ? "Requests are sent with a key." : "Requests are sent without a key."));
    byId("key-forget", HTMLButtonElement).hidden = !isSet;
    this.#input.value = "";
    this.#dialog.returnValue = "cancel"; // what Escape means
    this.#dialog.showModal();
    this.#input.focus();
  }

  #close() {
    const choice = this.#dialog.returnValue;
    const key = this.#input.value.trim();
    this.#input.value = "";
    if (choice === "forget") this.#set(null);
    else if (choice === "use" && key !== "") this.#set(key);
  }

  /** @param {string | null} key */
  #set(key) {
    this.#api.key = key;
    if (key !== null && this.#keep.checked) storage()?.setItem(PLACE, key);
    else storage()?.removeItem(PLACE);
    this.#onChange();
  }
}
