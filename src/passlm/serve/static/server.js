// The server's API as the page uses it. What is shown of it is left to others.

import { events } from "./sse.js";

const STORED = "passlm-key";

/** The server answered, and the answer is an error. */
export class Refusal extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
  }
}

/** The server does not answer, or stopped in the middle of an answer. */
export class Away extends Error {}

export class Server {
  #key = stored();

  /** Whether requests need a key. */
  get locked() {
    return this.#key !== "";
  }

  /** Send this key from now on; it is kept until the tab is closed. */
  use(key) {
    const sent = key.trim();
    if (!/^[\x20-\x7e]*$/.test(sent)) {
      throw new Refusal(401, { message: "A key holds letters, digits and signs, this one more." });
    }
    this.#key = sent;
    try {
      sessionStorage.setItem(STORED, sent);
    } catch {
      // Where storage is forbidden the key lasts until the page is left.
    }
  }

  /** The ids of the models that are served. */
  async models() {
    const { data } = await (await this.#fetch("v1/models", {})).json();
    return data.map((model) => model.id);
  }

  /** Whether the server answers at all. */
  async alive() {
    try {
      return (await fetch("health", { cache: "no-store" })).ok;
    } catch {
      return false;
    }
  }

  /**
   * The chunks of one streamed request.
   * @param {string} path `completions` or `chat/completions`
   * @param {object} body of the request; streaming is added
   * @param {AbortSignal} signal ends it
   */
  async *stream(path, body, signal) {
    const response = await this.#fetch(`v1/${path}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
      signal,
    });
    let whole = false;
    try {
      for await (const data of events(response.body)) {
        // The body is read to its end all the same: hanging up now would look like impatience.
        if (data === "[DONE]") {
          whole = true;
          continue;
        }
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Refusal(500, chunk.error);
        yield chunk;
      }
    } catch (error) {
      throw error instanceof TypeError ? new Away("The answer broke off.") : error;
    }
    if (!whole) throw new Away("The answer broke off.");
  }

  async #fetch(path, options) {
    const headers = { ...options.headers };
    if (this.#key) headers.Authorization = `Bearer ${this.#key}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers, cache: "no-store" });
    } catch (error) {
      throw error instanceof TypeError ? new Away("The server does not answer.") : error;
    }
    if (!response.ok) throw new Refusal(response.status, await refusal(response));
    return response;
  }
}

/** The error of a response; a proxy in between may answer in a form of its own. */
async function refusal(response) {
  try {
    return (await response.json()).error;
  } catch {
    return { message: `The server answered ${response.status} ${response.statusText}`.trim() };
  }
}

function stored() {
  try {
    return sessionStorage.getItem(STORED) ?? "";
  } catch {
    return "";
  }
}
