// Server-sent events from a fetch body.

/** Takes text in pieces that may be cut anywhere; gives the data of each whole event. */
export class EventParser {
  #rest = "";
  #data = [];
  #skipNewline = false;
  #isFirst = true;

  /** Data of the events that `text` completes. */
  push(text) {
    if (this.#isFirst && text) {
      this.#isFirst = false;
      if (text.charCodeAt(0) === 0xfeff) text = text.slice(1);
    }
    if (this.#skipNewline && text) {
      // A piece ended with CR: its LF belongs to the same line end.
      if (text[0] === "\n") text = text.slice(1);
      this.#skipNewline = false;
    }
    const events = [];
    const ends = /\r\n|\r|\n/g;
    let start = 0;
    for (let match = ends.exec(text); match !== null; match = ends.exec(text)) {
      this.#line(this.#rest + text.slice(start, match.index), events);
      this.#rest = "";
      start = ends.lastIndex;
      this.#skipNewline = match[0] === "\r" && start === text.length;
    }
    this.#rest += text.slice(start);
    return events;
  }

  /** The stream is over: an event without its empty line counts as well. */
  end() {
    const events = [];
    if (this.#rest) this.#line(this.#rest, events);
    this.#rest = "";
    this.#line("", events);
    return events;
  }

  #line(line, events) {
    if (line === "") {
      if (this.#data.length) events.push(this.#data.join("\n"));
      this.#data = [];
      return;
    }
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon); // a comment has an empty field name
    if (field !== "data") return;
    const value = colon < 0 ? "" : line.slice(colon + 1);
    this.#data.push(value.startsWith(" ") ? value.slice(1) : value);
  }
}

/** Data of each event of a response, as it comes. */
export async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  const parser = new EventParser();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
    yield* parser.push(decoder.decode());
    yield* parser.end();
  } finally {
    // Whoever stops reading also ends the request.
    reader.cancel().catch(() => {});
  }
}
