// The text format and what follows from two scrapes, against figures worked out by hand.

import assert from "node:assert/strict";
import test from "node:test";
import { Scrape, increase, quantile, rate } from "../../service/page/static/prometheus.js";

const TEXT = `# HELP a_total Things
# TYPE a_total counter
a_total{kind="x",note="with \\"quotes\\", commas, a \\\\ and a\\nline"} 3.0
a_total{kind="y",note=""} 4e+00
plain 1.5 1700000000000
h_bucket{le="0.1"} 1.0
h_bucket{le="+Inf"} 10.0
h_bucket{le="1.0"} 6.0
odd NaN
`;

test("labels are read with what is escaped in them", () => {
  const [first, second] = new Scrape(TEXT, 0).samples("a_total");
  assert.deepEqual(first, { labels: { kind: "x", note: 'with "quotes", commas, a \\ and a\nline' }, value: 3 });
  assert.deepEqual(second, { labels: { kind: "y", note: "" }, value: 4 });
});

test("values are sums over what is asked for, and null where there is nothing", () => {
  const scrape = new Scrape(TEXT, 0);
  assert.equal(scrape.value("a_total"), 7);
  assert.equal(scrape.value("a_total", { kind: "y" }), 4);
  assert.equal(scrape.value("a_total", { kind: "z" }), null);
  assert.equal(scrape.value("absent"), null);
  assert.equal(scrape.value("plain"), 1.5);
  assert.ok(Number.isNaN(scrape.value("odd")));
  assert.deepEqual(scrape.by("a_total", "kind"), { x: 3, y: 4 });
  assert.deepEqual(scrape.by("absent", "kind"), {});
});

test("buckets come in the order of their bounds", () => {
  assert.deepEqual([...new Scrape(TEXT, 0).buckets("h")], [[0.1, 1], [1, 6], [Infinity, 10]]);
});

test("a rate is what was counted over the time between", () => {
  const [before, after] = [new Scrape("c 10\n", 100), new Scrape("c 40\n", 104)];
  assert.equal(rate(before, after, "c"), 7.5);
  assert.equal(rate(after, before, "c"), null);
  assert.equal(rate(before, new Scrape("c 3\n", 104), "c"), null, "the counter began anew");
  assert.equal(rate(before, after, "absent"), null);
});

const buckets = (...counts) => new Map([[1, counts[0]], [2, counts[1]], [4, counts[2]], [Infinity, counts[3]]]);

test("quantiles are those of Prometheus's own rule", () => {
  // 4 observations up to 1, 4 between 1 and 2, 2 between 2 and 4: the median is a quarter into the second bucket.
  assert.equal(quantile(0.5, buckets(4, 8, 10, 10)), 1.25);
  assert.equal(quantile(0.4, buckets(4, 8, 10, 10)), 1);
  assert.equal(quantile(0.95, buckets(4, 8, 10, 10)), 3.5);
  assert.equal(quantile(0.1, buckets(4, 8, 10, 10)), 0.25);
  assert.equal(quantile(0.99, buckets(0, 0, 0, 5)), 4, "beyond the last bound there is nothing but that bound");
  assert.equal(quantile(0.5, buckets(0, 0, 6, 6)), 3, "empty buckets are passed over");
  assert.equal(quantile(0.5, buckets(0, 0, 0, 0)), null);
  assert.equal(quantile(0.5, new Map()), null);
});

test("a histogram's increase leaves out what came before, unless the server began anew", () => {
  const scrape = (low, all) => new Scrape(`h_bucket{le="1"} ${low}\nh_bucket{le="+Inf"} ${all}\n`, 0);
  assert.deepEqual([...increase(scrape(3, 5), scrape(4, 9), "h")], [[1, 1], [Infinity, 4]]);
  assert.deepEqual([...increase(null, scrape(4, 9), "h")], [[1, 4], [Infinity, 9]]);
  assert.deepEqual([...increase(scrape(30, 50), scrape(4, 9), "h")], [[1, 4], [Infinity, 9]]);
});
