// Figures of the present from scrapes of the past.

import assert from "node:assert/strict";
import test from "node:test";
import { History, LENGTH } from "../../service/page/static/history.js";
import { Scrape } from "../../service/page/static/prometheus.js";

/** A scrape of a server that has made `tokens` tokens, the first of `slow` requests after 3 seconds, of `fast` after 0.05. */
function scrape(seconds, tokens, slow, fast, start = 1) {
  const ttft = "qerve_time_to_first_token_seconds_bucket";
  return new Scrape(
    `process_start_time_seconds ${start}
qerve_generation_tokens_total ${tokens}
qerve_num_requests_running 2
${ttft}{le="0.1"} ${fast}
${ttft}{le="4"} ${fast + slow}
${ttft}{le="+Inf"} ${fast + slow}
`,
    seconds,
  );
}

test("one scrape has no rates, but the present and what is known since the start", () => {
  const history = new History();
  history.add(scrape(0, 100, 0, 4));
  assert.equal(history.now.outputRate, null);
  assert.equal(history.now.ttft50, null);
  assert.equal(history.now.running, 2);
  assert.equal(history.now.cache, null);
  assert.equal(history.overall("ttft", 0.5), 0.05);
  assert.equal(history.overall("gap", 0.5), null);
});

test("rates go by the last two scrapes, latencies by the last half minute", () => {
  const history = new History();
  history.add(scrape(0, 0, 50, 0)); // slow requests of long ago
  for (let at = 1; at <= 20; at += 1) history.add(scrape(2 * at, 10 * at, 50, at));
  assert.equal(history.now.outputRate, 5);
  assert.equal(history.now.ttft95, 0.095);
  assert.ok(history.overall("ttft", 0.5) > 0.1);
});

test("a server that was started again is not compared with the former one", () => {
  const history = new History();
  history.add(scrape(0, 1000, 0, 9));
  history.add(scrape(2, 1010, 0, 9, 2));
  assert.equal(history.now.outputRate, null);
});

test("what could not be asked is a gap, and the length is bounded", () => {
  const history = new History();
  history.skip();
  assert.equal(history.now, undefined);
  history.add(scrape(0, 0, 0, 0));
  history.skip();
  assert.deepEqual(history.series("running"), [2, null]);
  assert.equal(history.latest, undefined);
  for (let at = 0; at < 2 * LENGTH; at += 1) history.add(scrape(at, at, 0, 0));
  assert.equal(history.series("running").length, LENGTH);
});
