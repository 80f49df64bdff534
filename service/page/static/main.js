// Puts the page together.

import { Api } from "./api.js";
import { Chat } from "./chat.js";
import { Completion } from "./completion.js";
import { byId } from "./dom.js";
import { KeyDialog } from "./key.js";
import { Notice } from "./notice.js";
import { Perplexity } from "./perplexity.js";
import { Rank } from "./rank.js";
import { Sampling } from "./sampling.js";
import { Status } from "./status.js";
import { startTabs } from "./tabs.js";
import { startTheme } from "./theme.js";

const WHY = "This server answers only requests with a key.";

/** @param {string} tab whose requests the settings are for */
function showSettings(tab) {
  byId("system-prompt", HTMLElement).hidden = tab !== "panel-chat";
  byId("settings", HTMLElement).hidden = tab === "panel-perplexity";
}

startTheme();
const api = new Api();
let hasAsked = false;
const keys = new KeyDialog(api, () => void status.ask());
const askForKey = () => keys.ask(WHY);
const notice = (/** @type {string} */ id) => new Notice(byId(id, HTMLElement), askForKey);

const rank = new Rank(() => {
  chat.rankChanged();
  perplexity.rankChanged();
});
const sampling = new Sampling(() => {
  chat.shadingChanged();
  completion.shadingChanged();
});
const chat = new Chat(api, rank, sampling, notice("chat-notice"));
const completion = new Completion(api, rank, sampling, notice("completion-notice"));
const perplexity = new Perplexity(api, rank, notice("perplexity-notice"));
const status = new Status(
  api,
  (card) => {
    rank.setFull(card.artifact.rank);
    perplexity.setProbe(card.artifact.has_probe);
    chat.rankChanged();
  },
  () => {
    if (!hasAsked) askForKey();
    hasAsked = true;
  },
);

const tabs = document.querySelector('[role="tablist"]');
if (tabs instanceof HTMLElement) startTabs(tabs, showSettings);
void status.run();
