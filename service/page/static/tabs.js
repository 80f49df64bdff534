// Tabs as the ARIA practices describe them: one is in the tab order, arrow keys go to the others.

/**
 * @param {HTMLElement} list with buttons of role tab, each of which controls a panel
 * @param {(id: string) => void} onChange id of the panel that is shown now
 */
export function startTabs(list, onChange) {
  const tabs = [...list.querySelectorAll("button")];

  /** @param {HTMLButtonElement} chosen */
  const show = (chosen) => {
    for (const tab of tabs) {
      const isChosen = tab === chosen;
      tab.setAttribute("aria-selected", String(isChosen));
      tab.tabIndex = isChosen ? 0 : -1;
      const panel = document.getElementById(tab.getAttribute("aria-controls") ?? "");
      if (panel) panel.hidden = !isChosen;
    }
    onChange(chosen.getAttribute("aria-controls") ?? "");
  };

  tabs.forEach((tab, at) => {
    tab.addEventListener("click", () => show(tab));
    tab.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: -1 };
      if (!(event.key in steps)) return;
      event.preventDefault();
      const next = tabs.at(steps[/** @type {keyof typeof steps} */ (event.key)] % tabs.length) ?? tab;
      show(next);
      next.focus();
    });
  });
}
