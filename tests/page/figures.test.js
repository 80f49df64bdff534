// Shades, comparisons, axes, lines and numbers.

import assert from "node:assert/strict";
import test from "node:test";
import { comparePerplexity } from "../../service/page/static/compare.js";
import { ticks } from "../../service/page/static/curve.js";
import { bytes, change, duration, fixed, number, percent, visible } from "../../service/page/static/format.js";
import { CHANCES, FACTORS, shift, shiftLegend, surprise, surpriseLegend } from "../../service/page/static/heat.js";
import { schemeText } from "../../service/page/static/model.js";
import { ranksToMeasure } from "../../service/page/static/perplexity.js";
import { linePath } from "../../service/page/static/sparkline.js";

test("a token's shade is the number of thresholds that its probability is below", () => {
  const shades = [1, 0.6, 0.3, 0.1, 0.02, 0.005, 0.0001].map((chance) => surprise(Math.log(chance)));
  assert.deepEqual(shades, [0, 0, 1, 2, 3, 4, 5]);
  assert.equal(surprise(null), null);
  assert.deepEqual(surpriseLegend().map(({ shade }) => shade), CHANCES.concat(0).map((_, at) => `s${at}`));
});

test("a change's shade goes by the factor, and its sign by who is likelier", () => {
  const from = (factor) => shift(Math.log(0.1), Math.log(0.1 * factor));
  assert.deepEqual([1, 1.05, 1.2, 2, 5].map(from), [0, 0, 1, 2, 3]);
  assert.deepEqual([1 / 1.05, 1 / 1.2, 1 / 2, 1 / 5].map(from), [0, -1, -2, -3]);
  assert.equal(shift(null, -1), null);
  assert.equal(shift(-1, undefined), null);
  assert.equal(shiftLegend().length, 2 * FACTORS.length + 1);
});

test("two scores are compared token by token", () => {
  const scored = (...nlls) => nlls.map((nll) => ({ nll }));
  // Differences 1, 2, 3 (the first token is not scored): mean 2, standard deviation 1.
  const { ratio, margin } = comparePerplexity(scored(null, 2, 4, 6), scored(null, 1, 2, 3));
  assert.ok(Math.abs(ratio - Math.exp(2)) < 1e-12);
  assert.ok(Math.abs(margin - (1.96 / Math.sqrt(3)) * Math.exp(2)) < 1e-12);
  assert.deepEqual(comparePerplexity(scored(null, 5, 5), scored(null, 5, 5)), { ratio: 1, margin: 0 });
});

test("axes have round numbers within their range", () => {
  assert.deepEqual(ticks(0, 32, 4), [0, 10, 20, 30]);
  assert.deepEqual(ticks(23.2, 28.9, 4), [24, 26, 28]);
  assert.deepEqual(ticks(5, 5, 4), [5]);
});

test("a line has gaps where there is nothing, and a dot for what stands alone", () => {
  assert.equal(linePath([0, 5, 10], 3, 10, 20, 10), "M0.0 10.0L10.0 5.0L20.0 0.0");
  assert.equal(linePath([0, null, 10], 3, 10, 20, 10), "M0.0 10.0h0.01M20.0 0.0h0.01");
  assert.equal(linePath([0, 0], 3, 0, 20, 10), "M10.0 10.0L20.0 10.0", "the latest is at the right edge");
  assert.equal(linePath([], 3, 10, 20, 10), "");
});

test("numbers are as people read them", () => {
  assert.deepEqual([0, 1.234, 12.34, 123.4, -0.001, -2, null, NaN, Infinity].map(number), ["0", "1.23", "12.3", "123", "0.00", "−2.00", "–", "–", "∞"]);
  assert.deepEqual([change(1.25, 1), change(-1.25, 1), change(-0.01, 1)], ["+1.3", "−1.3", "0.0"]);
  assert.equal(fixed(Infinity, 2), "∞");
  assert.deepEqual([0, 999, 1024, 133169152, 3 * 2 ** 40].map(bytes), ["0 B", "999 B", "1.00 KiB", "127 MiB", "3.00 TiB"]);
  assert.deepEqual([null, 0.0123, 0.5, 2.5].map(duration), [["–", ""], ["12.3", "ms"], ["500", "ms"], ["2.50", "s"]]);
  assert.deepEqual([0, 0.00001, 0.0123, 0.309, 0.9999, 1].map(percent), ["0 %", "< 0.01 %", "1.23 %", "30.9 %", "100 %", "100 %"]);
});

test("what cannot be seen in a token is shown", () => {
  assert.equal(visible(" a\n\tb"), "␣a↵⇥b");
  assert.notEqual(visible(""), "");
});

test("schemes are told in words", () => {
  const scheme = { num_bits: 4, group_size: 64, is_symmetric: false, format: "int" };
  assert.equal(schemeText(scheme), "INT4, groups of 64, asymmetric");
  assert.equal(schemeText({ ...scheme, num_bits: 8, group_size: -1, is_symmetric: true }), "INT8, one group per channel, symmetric");
  assert.equal(schemeText({ ...scheme, format: "mxint", group_size: 32 }), "MXINT4, groups of 32");
});

test("the curve is measured from no correction to all of it", () => {
  assert.deepEqual(ranksToMeasure(32), [0, 1, 2, 4, 8, 16, 32]);
  assert.deepEqual(ranksToMeasure(6), [0, 1, 2, 4, 6]);
  assert.deepEqual(ranksToMeasure(0), [0]);
});
