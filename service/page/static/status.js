// Asks the server how it is, every other second while the page is in view.

import { byId, setText } from "./dom.js";
import { ApiError } from "./api.js";
import { History } from "./history.js";
import { showMemory } from "./memory.js";
import { showModel } from "./model.js";
import { Scrape } from "./prometheus.js";
import { Tiles } from "./tiles.js";

/** @import { Api } from "./api.js" */
/** @import { Card } from "./types.js" */

const PERIOD_MS = 2000;
const PATIENCE_MS = 10000;

/** @type {Record<string, string>} */
const STATES = { ready: "Ready", loading: "Loading the model", refusing: "Not taking requests", unreachable: "Unreachable", locked: "Ready, key needed" };

/** The state of the server, and all that shows it. */
export class Status {
  /** @type {Card | null} */
  card = null;
  #history = new History();
  #tiles = new Tiles(byId("tiles", HTMLElement));
  #artifact = "";
  #isRunning = false;
  #api;
  #onCard;
  #onLocked;

  /**
   * @param {Api} api
   * @param {(card: Card) => void} onCard a model is served, or another one
   * @param {() => void} onLocked a key is needed
   */
  constructor(api, onCard, onLocked) {
    this.#api = api;
    this.#onCard = onCard;
    this.#onLocked = onLocked;
    this.#tiles.show(this.#history);
    document.addEventListener("visibilitychange", () => void this.run());
  }

  /** Asks now, and again and again. */
  async run() {
    if (this.#isRunning) return;
    this.#isRunning = true;
    while (!document.hidden) {
      await this.ask();
      await new Promise((resolve) => setTimeout(resolve, PERIOD_MS));
    }
    this.#isRunning = false;
  }

  /** Asks once. */
  async ask() {
    try {
      await this.#api.text("health/ready", AbortSignal.timeout(PATIENCE_MS));
      this.#show(await this.#look());
    } catch (error) {
      this.#history.skip();
      this.#tiles.show(this.#history);
      this.#showProblem(error);
    }
  }

  /** @returns {Promise<string>} a state */
  async #look() {
    try {
      await this.#takeCard();
      await this.#takeMetrics();
    } catch (error) {
      if (!(error instanceof ApiError) || error.status !== 401) throw error;
      this.#onLocked();
      return "locked";
    }
    return "ready";
  }

  async #takeCard() {
    const info = this.#history.latest?.samples("qerve_build_info")[0]?.labels.artifact_sha256;
    if (this.card && (info === undefined || info === this.#artifact)) return;
    this.card = await this.#api.card();
    this.#artifact = this.card.artifact.sha256;
    setText(byId("model-name", HTMLElement), this.card.id);
    document.title = `${this.card.id} – qerve`;
    showModel(byId("model", HTMLElement), this.card);
    this.#onCard(this.card);
  }

  async #takeMetrics() {
    let text;
    try {
      text = await this.#api.text("metrics", AbortSignal.timeout(PATIENCE_MS));
    } catch (error) {
      if (!(error instanceof ApiError) || error.status !== 404) throw error;
      setText(byId("poll-note", HTMLElement), "This server exports its metrics elsewhere: what they would show is missing here.");
      text = "";
    }
    this.#history.add(new Scrape(text, performance.now() / 1000));
    this.#tiles.show(this.#history);
    if (this.#history.latest) showMemory(byId("memory", HTMLElement), this.#history.latest, this.card?.artifact.dense_bytes ?? null);
  }

  /** @param {unknown} error */
  #showProblem(error) {
    const status = error instanceof ApiError ? error.status : 0;
    const message = error instanceof Error ? error.message : String(error);
    const state = status !== 503 ? "unreachable" : message.includes("loaded") ? "loading" : "refusing";
    this.#show(state, `${message} This page looks again every 2 seconds.`);
    if (status === 0 || status === 503) this.#artifact = ""; // what comes back may be another model
  }

  /**
   * @param {string} state
   * @param {string} [message]
   */
  #show(state, message = "") {
    const pill = byId("state", HTMLElement);
    pill.dataset.state = state;
    setText(pill, STATES[state]);
    const banner = byId("banner", HTMLElement);
    setText(banner, message);
    banner.hidden = message === "";
  }
}
