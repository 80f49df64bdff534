// The server's API: requests with the key, answers, streams, and errors that say what to do.

import { readEvents } from "./sse.js";

/** @import { Card, Piece, Scored, Token } from "./types.js" */

/** An answer other than success, or none at all. */
export class ApiError extends Error {
  /**
   * @param {number} status 0: the server was not reached
   * @param {string} message
   * @param {number | null} [retrySeconds] after which it may be tried again
   */
  constructor(status, message, retrySeconds = null) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.retrySeconds = retrySeconds;
  }
}

/**
 * @param {unknown} error
 * @returns {boolean} the request was given up by the user
 */
export function isAbort(error) {
  return error instanceof DOMException && error.name === "AbortError";
}

/** Where requests go: paths are relative to the page, which may be served below any prefix. */
export class Api {
  /** @type {string | null} */
  key = null;

  /**
   * @param {string} path
   * @param {{body?: object, signal?: AbortSignal}} [options] with a body: POST
   * @returns {Promise<Response>} a success
   */
  async request(path, { body, signal } = {}) {
    /** @type {Record<string, string>} */
    const headers = this.key === null ? {} : { Authorization: `Bearer ${this.key}` };
    if (body) headers["Content-Type"] = "application/json";
    const options = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal };
    let response;
    try {
      response = await fetch(path, { ...options, cache: "no-store", credentials: "omit" });
    } catch (error) {
      if (isAbort(error)) throw error;
      throw new ApiError(0, "The server cannot be reached.");
    }
    if (!response.ok) throw await errorOf(response);
    return response;
  }

  /**
   * @param {string} path
   * @param {AbortSignal} [signal]
   * @returns {Promise<string>}
   */
  async text(path, signal) {
    return (await this.request(path, { signal })).text();
  }

  /** @returns {Promise<Card>} of the one model that is served */
  async card() {
    const { data } = await (await this.request("v1/models")).json();
    return (await this.request(`v1/models/${encodeURIComponent(data[0].id)}`)).json();
  }

  /**
   * @param {object} body
   * @param {AbortSignal} signal
   * @returns {Promise<Scored>}
   */
  async score(body, signal) {
    const response = await this.request("v1/perplexity", { body: { ...body, return_tokens: true }, signal });
    const answer = await response.json();
    return {
      rank: rankOf(response) ?? 0,
      nll: answer.nll,
      perplexity: answer.perplexity ?? Infinity,
      numTokens: answer.num_tokens,
      tokens: answer.tokens,
      probe: answer.probe ?? null,
    };
  }

  /**
   * A stream of an answer.
   * @param {"v1/chat/completions" | "v1/completions"} path
   * @param {object} body
   * @param {AbortSignal} signal aborted: the connection is closed, by which the server knows
   * @param {(rank: number | null) => void} onStart the rank that the answer is made with
   * @returns {AsyncGenerator<Piece>}
   */
  async *generate(path, body, signal, onStart) {
    const response = await this.request(path, { body: { ...body, stream: true }, signal });
    onStart(rankOf(response));
    if (!response.body) throw new ApiError(0, "The answer has no content.");
    const events = readEvents(response.body);
    for (;;) {
      const next = await events.next();
      if (next.done) {
        if (!next.value) throw new ApiError(0, "The connection ended before the answer was complete.");
        return;
      }
      const event = JSON.parse(next.value);
      if (event.error) throw new ApiError(event.error.code ?? 500, event.error.message);
      for (const choice of event.choices) yield pieceOf(choice);
    }
  }
}

/**
 * @param {Response} response
 * @returns {number | null}
 */
function rankOf(response) {
  const value = response.headers.get("x-qerve-rank");
  return value === null ? null : Number(value);
}

/**
 * @param {Response} response
 * @returns {Promise<ApiError>}
 */
async function errorOf(response) {
  let message = `The server answered with status ${response.status}.`;
  try {
    message = (await response.json()).error.message ?? message;
  } catch {
    // Something between here and the server answered: its text is for nobody.
  }
  const seconds = Number(response.headers.get("retry-after") ?? NaN);
  return new ApiError(response.status, message, Number.isFinite(seconds) ? seconds : null);
}

/**
 * A part of a stream, of either endpoint.
 * @param {any} choice
 * @returns {Piece}
 */
export function pieceOf(choice) {
  const text = choice.delta ? (choice.delta.content ?? "") : (choice.text ?? "");
  const finish = choice.finish_reason ?? null;
  const { logprobs } = choice;
  if (!logprobs) return { text, tokens: [], finish };
  const tokens = logprobs.content ? logprobs.content.map(chatToken) : completionTokens(logprobs);
  return { text, tokens, finish };
}

/**
 * @param {{token: string, logprob: number, top_logprobs?: {token: string, logprob: number}[]}} item
 * @returns {Token}
 */
function chatToken(item) {
  const top = (item.top_logprobs ?? []).map((other) => ({ text: other.token, logprob: other.logprob }));
  return { text: item.token, logprob: item.logprob, top };
}

/**
 * @param {{tokens: string[], token_logprobs: (number | null)[], top_logprobs: (Record<string, number> | null)[]}} lists
 * @returns {Token[]}
 */
function completionTokens(lists) {
  return lists.tokens.map((text, place) => {
    const top = Object.entries(lists.top_logprobs?.[place] ?? {}).map(([other, logprob]) => ({ text: other, logprob }));
    top.sort((a, b) => b.logprob - a.logprob);
    return { text, logprob: lists.token_logprobs[place], top };
  });
}
