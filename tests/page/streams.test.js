// Server-sent events, however they are cut; and the parts of both endpoints' streams.

import assert from "node:assert/strict";
import test from "node:test";
import { pieceOf } from "../../service/page/static/api.js";
import { EventSplitter, readEvents } from "../../service/page/static/sse.js";

const STREAM = ': waiting\n\ndata: {"a": "ü日🙂"}\n\ndata: one\ndata:two\r\n\r\nevent: x\n\ndata: [DONE]\n\ndata: after\n\n';

function streamOf(bytes, size) {
  const chunks = [];
  for (let at = 0; at < bytes.length; at += size) chunks.push(bytes.slice(at, at + size));
  return new ReadableStream({
    start(controller) {
      for (const chunk of chunks) controller.enqueue(chunk);
      controller.close();
    },
  });
}

async function collect(stream) {
  const events = readEvents(stream);
  const data = [];
  for (;;) {
    const { value, done } = await events.next();
    if (done) return [data, value];
    data.push(value);
  }
}

test("events are the same wherever the stream is cut, also within a character", async () => {
  const bytes = new TextEncoder().encode(STREAM);
  for (let size = 1; size <= bytes.length; size += 1) {
    const [data, isComplete] = await collect(streamOf(bytes, size));
    assert.deepEqual(data, ['{"a": "ü日🙂"}', "one\ntwo"], `cut every ${size} bytes`);
    assert.equal(isComplete, true);
  }
});

test("a stream that breaks off is told apart from one that ends", async () => {
  assert.deepEqual(await collect(streamOf(new TextEncoder().encode("data: a\n\ndata: b"), 4)), [["a"], false]);
});

test("an unfinished event is kept for later", () => {
  const splitter = new EventSplitter();
  assert.deepEqual(splitter.push("data: a\n"), []);
  assert.deepEqual(splitter.push("\ndata: b"), ["a"]);
  assert.deepEqual(splitter.push("\n\n"), ["b"]);
});

test("parts of chats and of completions become the same", () => {
  const chat = { delta: { content: "Hi" }, finish_reason: null, logprobs: { content: [{ token: "Hi", logprob: -0.5, bytes: [], top_logprobs: [{ token: "Hi", logprob: -0.5 }, { token: "No", logprob: -2 }] }] } };
  const completion = { text: "Hi", finish_reason: null, logprobs: { tokens: ["Hi"], token_logprobs: [-0.5], top_logprobs: [{ No: -2, Hi: -0.5 }] } };
  const expected = { text: "Hi", tokens: [{ text: "Hi", logprob: -0.5, top: [{ text: "Hi", logprob: -0.5 }, { text: "No", logprob: -2 }] }], finish: null };
  assert.deepEqual(pieceOf(chat), expected);
  assert.deepEqual(pieceOf(completion), expected);
});

test("parts without log-probabilities and ends are parts too", () => {
  assert.deepEqual(pieceOf({ delta: { role: "assistant" }, logprobs: null, finish_reason: null }), { text: "", tokens: [], finish: null });
  assert.deepEqual(pieceOf({ delta: {}, finish_reason: "length" }), { text: "", tokens: [], finish: "length" });
});
