// Client of the server's API.

import { events } from "./sse.js";

const STORAGE_KEY = "passlm-key";
const INTERRUPTED = "The connection was lost during the response.";

/** An error response of the API. */
export class ApiError extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
  }
}

/** The server does not answer, or the connection broke during a response. */
export class ServerUnreachable extends Error {}

export class Server {
  #key = storedKey();

  /** Whether requests need a key. */
  get locked() {
    return this.#key !== "";
  }

  /** Send this key with every request; it is kept until the tab is closed. */
  use(key) {
    const sent = key.trim();
    if (!/^[\x20-\x7e]*$/.test(sent)) {
      const message = "The key may contain only ASCII letters, digits and punctuation.";
      throw new ApiError(401, { message });
    }
    this.#key = sent;
    try {
      sessionStorage.setItem(STORAGE_KEY, sent);
    } catch {
      // Without permission to store it, the key lasts until the page is left.
    }
  }

  /** Return the ids of the served models. */
  async models() {
    const { data } = await (await this.#fetch("v1/models", {})).json();
    return data.map((model) => model.id);
  }

  /** Return whether the server answers. */
  async alive() {
    try {
      return (await fetch("health", { cache: "no-store" })).ok;
    } catch {
      return false;
    }
  }

  /**
   * Yield the chunks of one streamed request.
   * @param {string} path `completions` or `chat/completions`
   * @param {object} body of the request; the fields for streaming are added
   * @param {AbortSignal} signal aborts the request
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
        // Read the body to its end: to the server, closing it here would be a disconnected client.
        if (data === "[DONE]") {
          whole = true;
          continue;
        }
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(500, chunk.error);
        yield chunk;
      }
    } catch (error) {
      throw error instanceof TypeError ? new ServerUnreachable(INTERRUPTED) : error;
    }
    if (!whole) throw new ServerUnreachable(INTERRUPTED);
  }

  async #fetch(path, options) {
    const headers = { ...options.headers };
    if (this.#key) headers.Authorization = `Bearer ${this.#key}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers, cache: "no-store" });
    } catch (error) {
      throw error instanceof TypeError ? new ServerUnreachable("The server does not answer.") : error;
    }
    if (!response.ok) throw new ApiError(response.status, await errorOf(response));
    return response;
  }
}

/** Return the error of a response; one of a proxy may have another format. */
async function errorOf(response) {
  try {
    return (await response.json()).error;
  } catch {
    return { message: `The server answered ${response.status} ${response.statusText}`.trim() };
  }
}

function storedKey() {
  try {
    return sessionStorage.getItem(STORAGE_KEY) ?? "";
  } catch {
    return "";
  }
}
