// Perplexity over the rank, as far as it was measured.

import { svg } from "./dom.js";
import { number } from "./format.js";

const HEIGHT = 168;
const LEFT = 48;
const RIGHT = 16;
const TOP = 14;
const BOTTOM = 30;

/**
 * Round numbers that divide a range into a few steps.
 * @param {number} least
 * @param {number} most
 * @param {number} numSteps about so many
 * @returns {number[]}
 */
export function ticks(least, most, numSteps) {
  const raw = (most - least) / numSteps;
  if (!(raw > 0) || !Number.isFinite(raw)) return [least];
  const size = 10 ** Math.floor(Math.log10(raw));
  const step = size * ([1, 2, 5, 10].find((factor) => factor * size >= raw) ?? 10);
  const first = Math.ceil(least / step - 1e-9);
  const last = Math.floor(most / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, at) => (first + at) * step);
}

/**
 * @param {[number, number][]} points rank and perplexity, ascending
 * @param {{full: number, current: number, dense: number | null, width: number}} options
 * @returns {SVGSVGElement}
 */
export function drawCurve(points, { full, current, dense, width }) {
  const values = points.map(([, value]) => value).concat(dense === null ? [] : [dense]).filter(Number.isFinite);
  const least = Math.min(...values);
  const most = Math.max(...values);
  const room = (most - least || Math.abs(most) || 1) * 0.12;
  const [low, high] = [least - room, most + room];
  const x = (/** @type {number} */ rank) => LEFT + (rank / Math.max(full, 1)) * (width - LEFT - RIGHT);
  const y = (/** @type {number} */ value) => TOP + ((high - value) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const chart = svg("svg", { class: "curve", viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img", "aria-label": describe(points, dense) });

  for (const value of ticks(low, high, 4)) {
    chart.append(
      svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }),
      svg("text", { class: "tick", x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, number(value)),
    );
  }
  const quarters = [0, full / 4, full / 2, (3 * full) / 4, full];
  for (const rank of full % 4 === 0 ? quarters : ticks(0, full, 4)) {
    chart.append(svg("text", { class: "tick", x: x(rank), y: HEIGHT - 10, "text-anchor": "middle" }, String(rank)));
  }
  if (dense !== null) {
    chart.append(
      svg("line", { class: "dense", x1: LEFT, x2: width - RIGHT, y1: y(dense), y2: y(dense) }),
      svg("text", { class: "tick", x: width - RIGHT, y: y(dense) - 5, "text-anchor": "end" }, `dense ${number(dense)}`),
    );
  }
  const drawn = points.filter(([, value]) => Number.isFinite(value));
  chart.append(svg("polyline", { class: "line", points: drawn.map(([rank, value]) => `${x(rank)},${y(value)}`).join(" ") }));
  for (const [rank, value] of drawn) {
    const isCurrent = rank === current;
    chart.append(svg("circle", { class: isCurrent ? "dot current" : "dot", cx: x(rank), cy: y(value), r: isCurrent ? 5 : 3 }));
  }
  return chart;
}

/**
 * @param {[number, number][]} points
 * @param {number | null} dense
 * @returns {string}
 */
function describe(points, dense) {
  const texts = points.map(([rank, value]) => `${number(value)} at rank ${rank}`);
  return `Perplexity by rank: ${texts.join(", ")}${dense === null ? "" : `; dense network ${number(dense)}`}`;
}
