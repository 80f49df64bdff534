// Dark and light: as the system has it, or as chosen here.

import { byId } from "./dom.js";

const PLACE = "qerve-theme";

/** Follows the choice, now and from here on. */
export function startTheme() {
  const choice = byId("theme", HTMLFieldSetElement);
  let kept = "auto";
  try {
    kept = localStorage.getItem(PLACE) ?? "auto";
  } catch {
    // Nothing may be kept: it is as the system has it.
  }
  for (const input of choice.querySelectorAll("input")) {
    input.checked = input.value === kept;
    input.addEventListener("change", () => choose(input.value));
  }
  apply(kept);
}

/** @param {string} theme */
function choose(theme) {
  apply(theme);
  try {
    localStorage.setItem(PLACE, theme);
  } catch {
    // It holds until the page is left.
  }
}

/** @param {string} theme */
function apply(theme) {
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}
