// What is served: how it was made, and which kernels run it and why.

import { announce, button, el } from "./dom.js";
import { bytes, count, fixed } from "./format.js";

/** @import { Card, Scheme } from "./types.js" */

/**
 * @param {Scheme} scheme
 * @returns {string}
 */
export function schemeText({ num_bits: bits, group_size: size, is_symmetric: isSymmetric, format }) {
  const name = { int: `INT${bits}`, mxint: `MXINT${bits}`, mxfp: `MXFP${bits}`, nf: `NF${bits}` }[format] ?? `${format.toUpperCase()} ${bits} bits`;
  const groups = size > 0 ? `groups of ${size}` : "one group per channel";
  return format === "int" ? `${name}, ${groups}, ${isSymmetric ? "symmetric" : "asymmetric"}` : `${name}, ${groups}`;
}

/**
 * @param {Card} card
 * @returns {string}
 */
function rankText({ artifact }) {
  if (artifact.rank === 0) return "none";
  const others = artifact.ranks.length > 1 ? `, ${artifact.ranks.length} ranks by layer` : "";
  return `${artifact.rank}${others}`;
}

/**
 * @param {Card} card
 * @returns {[string, string][]}
 */
function rows(card) {
  const { artifact } = card;
  const quality = artifact.evaluation;
  /** @type {[string, string | null | undefined | false][]} */
  const all = [
    ["Weights", artifact.schemes.map(schemeText).join("; ") || "16 bits"],
    ["Quantizer", artifact.quantizer],
    ["Correction", artifact.method],
    ["Rank", rankText(card)],
    ["Effective bits", `${fixed(artifact.effective_bits, 2)} a weight`],
    ["Activations", artifact.activations],
    ["Attention", artifact.attention],
    ["Transform", artifact.transform],
    ["Embedding", artifact.embedding?.format],
    ["Stored in", `${bytes(Object.values(artifact.component_bytes).reduce((sum, size) => sum + size, 0))}, dense ${bytes(artifact.dense_bytes)}`],
    ["Perplexity", quality.quantized_perplexity !== undefined && quality.dense_perplexity !== undefined && `${fixed(quality.quantized_perplexity, 2)}, dense ${fixed(quality.dense_perplexity, 2)} (held-out text of the build)`],
    ["Context", `${card.max_model_len.toLocaleString("en")} tokens`],
  ];
  return /** @type {[string, string][]} */ (all.filter(([, value]) => value));
}

/**
 * @param {Card} card
 * @returns {HTMLElement}
 */
function kernels(card) {
  const chosen = Object.entries(card.backends).map(([name, layers]) => `${name} for ${count(layers, "layer")}`);
  const list = el("dl", { class: "facts" }, el("dt", {}, "Backend"), el("dd", {}, chosen.join(", ") || "none"));
  for (const [name, value] of Object.entries(card.execution)) list.append(el("dt", {}, name.charAt(0).toUpperCase() + name.slice(1)), el("dd", {}, value));
  const why = card.passed_over.length === 0 ? "The preferred backend runs every layer." : "";
  const reasons = card.passed_over.map(({ backend, reason, num_layers: layers }) => el("li", {}, `${backend} passed over for ${count(layers, "layer")}: ${reason}`));
  return el("div", {}, el("h3", {}, "Kernels"), list, why !== "" && el("p", { class: "hint" }, why), reasons.length > 0 && el("ul", { class: "reasons" }, ...reasons));
}

/**
 * @param {string} sha256
 * @returns {HTMLElement}
 */
function hash(sha256) {
  const copy = button("Copy", () => void copyText(sha256), "quiet small");
  copy.setAttribute("aria-label", "Copy the artifact's SHA-256");
  return el("span", { class: "hash" }, el("code", { title: sha256 }, sha256.slice(0, 16)), copy);
}

/** @param {string} text */
async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    announce("Copied");
  } catch {
    announce("The browser does not allow copying here");
  }
}

/**
 * @param {HTMLElement} place
 * @param {Card} card
 */
export function showModel(place, card) {
  const facts = el("dl", { class: "facts" });
  for (const [name, value] of rows(card)) facts.append(el("dt", {}, name), el("dd", {}, value));
  facts.append(el("dt", {}, "Artifact"), el("dd", {}, hash(card.artifact.sha256)));
  place.replaceChildren(facts, kernels(card));
}
