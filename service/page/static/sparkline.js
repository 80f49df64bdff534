// Small line charts of what the last minutes were like.

import { svg } from "./dom.js";

const WIDTH = 120;
const HEIGHT = 32;
const INSET = 1.5;

/**
 * A path through the values that are there; nothing is drawn across gaps.
 * @param {(number | null)[]} values the latest last
 * @param {number} length values of a full width
 * @param {number} most value at the upper edge
 * @param {number} width
 * @param {number} height
 * @returns {string}
 */
export function linePath(values, length, most, width, height) {
  const step = width / Math.max(length - 1, 1);
  const start = width - (values.length - 1) * step;
  let path = "";
  let isDown = false;
  values.forEach((value, at) => {
    if (value === null) {
      isDown = false;
      return;
    }
    const x = (start + at * step).toFixed(1);
    const y = (height - (most > 0 ? Math.min(value / most, 1) : 0) * height).toFixed(1);
    const isAlone = !isDown && (values[at + 1] ?? null) === null;
    path += isAlone ? `M${x} ${y}h0.01` : `${isDown ? "L" : "M"}${x} ${y}`;
    isDown = true;
  });
  return path;
}

/**
 * @param {{values: (number | null)[], kind: string}[]} lines drawn in this order
 * @param {number} length values of a full width
 * @param {number} [most] value at the upper edge; left out: the largest there is
 * @returns {SVGSVGElement}
 */
export function drawSparkline(lines, length, most) {
  const largest = Math.max(0, ...lines.flatMap((line) => line.values).map((value) => value ?? 0));
  const chart = svg("svg", { class: "spark", viewBox: `0 ${-INSET} ${WIDTH} ${HEIGHT + 2 * INSET}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  chart.append(svg("line", { class: "base", x1: 0, x2: WIDTH, y1: HEIGHT, y2: HEIGHT }));
  for (const { values, kind } of lines) {
    chart.append(svg("path", { class: kind, d: linePath(values, length, most ?? largest, WIDTH, HEIGHT) }));
  }
  return chart;
}
