// Where the memory goes: weights by component, the key-value cache, the process within its limit, GPUs.

import { el } from "./dom.js";
import { bytes } from "./format.js";

/** @import { Scrape } from "./prometheus.js" */

const NUM_COLOURS = 7;
/** @type {Record<string, {name: string, colour: string}>} in the order in which they are drawn */
const COMPONENTS = {
  packed: { name: "codes", colour: "m1" },
  scale: { name: "scales", colour: "m2" },
  zero_point: { name: "zero points", colour: "m3" },
  lowrank_a: { name: "correction, down", colour: "m4" },
  lowrank_b: { name: "correction, up", colour: "m5" },
  unquantized: { name: "16-bit tensors", colour: "m6" },
};

/**
 * @typedef {object} Part
 * @property {string} name
 * @property {string} colour
 * @property {number} size in bytes
 */

/**
 * A bar of parts within a whole.
 * @param {string} title
 * @param {string} figure
 * @param {Part[]} parts
 * @param {number} whole bytes of the full width
 * @param {string} note
 * @returns {HTMLElement}
 */
function bar(title, figure, parts, whole, note) {
  const track = el("div", { class: "stack", "aria-hidden": "true" });
  const legend = el("ul", { class: "stack-legend" });
  for (const { name, colour, size } of parts) {
    const share = el("span", { class: colour });
    share.style.inlineSize = `${whole > 0 ? Math.min((100 * size) / whole, 100) : 0}%`;
    if (size > 0) track.append(share);
    legend.append(el("li", {}, el("span", { class: `dot ${colour}`, "aria-hidden": "true" }), name, el("span", { class: "amount" }, bytes(size))));
  }
  return el("div", { class: "memory-bar" }, el("div", { class: "memory-head" }, el("h3", {}, title), el("span", { class: "amount" }, figure)), track, legend, note !== "" && el("p", { class: "hint" }, note));
}

/**
 * @param {Scrape} scrape
 * @param {number | null} denseBytes size of the network before it was quantized
 * @returns {HTMLElement | null}
 */
function weights(scrape, denseBytes) {
  const sizes = scrape.by("qerve_model_weight_bytes", "component");
  const names = [...Object.keys(COMPONENTS).filter((name) => name in sizes), ...Object.keys(sizes).filter((name) => !(name in COMPONENTS))];
  if (names.length === 0) return null;
  const parts = names.map((name) => ({ ...(COMPONENTS[name] ?? { name: name.replaceAll("_", " "), colour: "m7" }), size: sizes[name] }));
  const total = parts.reduce((sum, part) => sum + part.size, 0);
  const note = denseBytes === null ? "" : `Full width: 16 bits, ${bytes(denseBytes)}`;
  return bar("Weights", bytes(total), parts, denseBytes ?? total, note);
}

/**
 * @param {Scrape} scrape
 * @returns {HTMLElement | null}
 */
function cache(scrape) {
  const { capacity, used = 0, cached = 0 } = scrape.by("qerve_kv_cache_bytes", "kind");
  if (capacity === undefined) return null;
  const parts = [
    { name: "in use", colour: "m1", size: used },
    { name: "kept for later prompts", colour: "m3", size: cached },
  ];
  return bar("Key-value cache", `${bytes(used)} of ${bytes(capacity)}`, parts, capacity, "");
}

/**
 * What the resident memory consists of, as exactly as the server says.
 * @param {Scrape} scrape
 * @returns {Part[]}
 */
function partsOfProcess(scrape) {
  const components = Object.entries(scrape.by("qerve_memory_component_bytes", "component")).filter(([, size]) => size > 0);
  if (components.length > 0) {
    components.sort((a, b) => b[1] - a[1]);
    return components.map(([name, size], at) => ({ name: name.replaceAll("_", " "), colour: `m${(at % NUM_COLOURS) + 1}`, size }));
  }
  const kinds = scrape.by("qerve_process_memory_bytes", "kind");
  const parts = [
    { name: "own", colour: "m1", size: kinds.rss_anon },
    { name: "files", colour: "m3", size: kinds.rss_file },
    { name: "shared", colour: "m2", size: kinds.rss_shmem },
  ].filter((part) => part.size > 0);
  const resident = scrape.value("process_resident_memory_bytes");
  return parts.length > 0 || resident === null ? parts : [{ name: "resident", colour: "m1", size: resident }];
}

/**
 * @param {Scrape} scrape
 * @returns {HTMLElement | null}
 */
function memoryOfProcess(scrape) {
  const parts = partsOfProcess(scrape);
  if (parts.length === 0) return null;
  const total = parts.reduce((sum, part) => sum + part.size, 0);
  const peak = scrape.by("qerve_process_memory_bytes", "kind").peak;
  const headroom = scrape.value("qerve_oom_headroom_bytes");
  const limit = scrape.by("qerve_cgroup_memory_bytes", "kind").max ?? (headroom === null ? undefined : total + headroom);
  const notes = [
    peak === undefined ? "" : `peak ${bytes(peak)}`,
    headroom === null ? "" : `${bytes(headroom)} can still be had`,
    limit === undefined ? "no limit is set" : "",
  ];
  const figure = limit === undefined ? bytes(total) : `${bytes(total)} of ${bytes(limit)}`;
  return bar("Process", figure, parts, limit ?? Math.max(peak ?? 0, total), sentence(notes));
}

/**
 * @param {string[]} notes empty ones are left out
 * @returns {string}
 */
function sentence(notes) {
  const text = notes.filter((note) => note !== "").join("; ");
  return text.charAt(0).toUpperCase() + text.slice(1);
}

/**
 * @param {Scrape} scrape
 * @returns {HTMLElement[]} one per GPU
 */
function devices(scrape) {
  const numbers = new Set(scrape.samples("qerve_cuda_memory_bytes").map((sample) => sample.labels.device));
  return [...numbers].map((device) => {
    const size = (/** @type {string} */ kind) => scrape.value("qerve_cuda_memory_bytes", { device, kind }) ?? 0;
    const total = size("total");
    const parts = [
      { name: "in use", colour: "m1", size: size("allocated") },
      { name: "reserved besides", colour: "m3", size: Math.max(size("reserved") - size("allocated"), 0) },
      { name: "other processes", colour: "m7", size: Math.max(total - size("free") - size("reserved"), 0) },
    ];
    return bar(`GPU ${device}`, `${bytes(total - size("free"))} of ${bytes(total)}`, parts, total, "");
  });
}

/**
 * @param {HTMLElement} place
 * @param {Scrape} scrape
 * @param {number | null} denseBytes
 */
export function showMemory(place, scrape, denseBytes) {
  const bars = [weights(scrape, denseBytes), cache(scrape), memoryOfProcess(scrape), ...devices(scrape)];
  const shown = bars.filter((made) => made !== null);
  place.replaceChildren(...(shown.length > 0 ? shown : [el("p", { class: "hint" }, "The server exports nothing about its memory here.")]));
}
