// Server-sent events, as far as the API uses them: `data` lines, comments, a blank line after each event.

/** Takes text as it comes and gives the data of every event that is complete. */
export class EventSplitter {
  #rest = "";

  /**
   * @param {string} text
   * @returns {string[]}
   */
  push(text) {
    const parts = (this.#rest + text).replaceAll("\r\n", "\n").split("\n\n");
    this.#rest = parts.pop() ?? "";
    return parts.map(dataOf).filter((data) => data !== "");
  }
}

/**
 * @param {string} event
 * @returns {string}
 */
function dataOf(event) {
  const lines = event.split("\n").filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
}

/**
 * The data of each event of a stream, up to its end mark.
 * @param {ReadableStream<Uint8Array>} stream
 * @returns {AsyncGenerator<string, boolean>} true: the end mark came; false: the stream broke off before it
 */
export async function* readEvents(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  const splitter = new EventSplitter();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return false;
      for (const data of splitter.push(decoder.decode(value, { stream: true }))) {
        if (data === "[DONE]") return true;
        yield data;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
