// The playground: reads the form, runs the request and shows the result, one request at a time.

import { Pane, ending } from "./pane.js";
import { ApiError, Server, ServerUnreachable } from "./server.js";
import { comparison } from "./verdict.js";

const RETRY_INTERVAL = 3000; // milliseconds between two attempts to reach the server
const SEEDS = 2 ** 31;
const NEAR_BOTTOM = 160; // distance in pixels within which the page scrolls along

const byId = (id) => document.getElementById(id);

class Playground {
  #server = new Server();
  #model = null;
  #running = null; // AbortController of the running request
  #reconnecting = false; // waiting for an unreachable server
  #chat = []; // messages so far
  #answer = null; // the pane of the chat's latest answer
  #form = byId("ask");
  #input = byId("input");

  start() {
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#run(false);
    });
    this.#form.addEventListener("change", () => this.#adapt());
    byId("compare").addEventListener("click", () => this.#run(true));
    byId("stop").addEventListener("click", () => this.#running?.abort());
    byId("new-chat").addEventListener("click", () => this.#newChat());
    byId("key-form").addEventListener("submit", (event) => this.#useKey(event));
    document.addEventListener("keydown", (event) => this.#key(event));
    for (const example of document.querySelectorAll(".examples button")) {
      example.addEventListener("click", () => this.#example(example));
    }
    if (/Mac|iPhone|iPad/.test(navigator.userAgent)) {
      byId("keys").querySelector("kbd").textContent = "⌘";
    }
    this.#adapt();
    this.#showModel();
  }

  get #mode() {
    return this.#form.elements.mode.value;
  }

  // The form

  /** Adapt the page to the kind of request and the method. */
  #adapt() {
    const chat = this.#mode === "chat";
    const plain = this.#form.elements.method.value === "ar";
    byId("input-label").textContent = chat ? "Message" : "Prompt";
    byId("new-chat").hidden = !chat || this.#chat.length === 0;
    this.#form.elements.tokens.disabled = plain;
    this.#disable(byId("compare"), plain || this.#running !== null);
    byId("compare").title = plain ? "Choose a method other than plain decoding" : "";
    for (const mode of ["prompt", "chat"]) {
      const results = byId(`${mode}-results`);
      results.hidden = mode !== this.#mode || !results.querySelector(".pane, .turns > *");
    }
    byId("intro").hidden = !byId(`${this.#mode}-results`).hidden;
  }

  /** Disable a button, but keep it focusable, so that the focus is not lost. */
  #disable(button, off) {
    button.setAttribute("aria-disabled", String(off));
  }

  #example(button) {
    this.#form.elements.mode.value = button.dataset.mode;
    this.#input.value = button.textContent;
    this.#adapt();
    this.#input.focus();
  }

  #settings() {
    const { temperature, max_tokens, seed } = this.#form.elements;
    return {
      model: this.#model,
      temperature: temperature.valueAsNumber,
      max_tokens: max_tokens.valueAsNumber,
      seed: seed.value === "" ? Math.floor(Math.random() * SEEDS) : seed.valueAsNumber,
    };
  }

  #lookahead(method) {
    const { tokens } = this.#form.elements;
    const given = method !== "ar" && tokens.value !== "" ? { tokens: tokens.valueAsNumber } : {};
    return { method, ...given, show: true };
  }

  // Running requests

  async #run(compare) {
    if (this.#running || (compare && this.#form.elements.method.value === "ar")) return;
    if (!this.#form.reportValidity()) return;
    this.#running = new AbortController();
    this.#setRunning(true);
    this.#showError("");
    try {
      if (this.#model === null) await this.#connect();
      await (this.#mode === "chat" ? this.#runChat(compare) : this.#runPrompt(compare));
    } catch (error) {
      this.#handleError(error);
    } finally {
      this.#running = null;
      this.#setRunning(false);
    }
  }

  #setRunning(on) {
    byId("run").textContent = on ? "Running…" : "Run";
    this.#disable(byId("run"), on);
    this.#disable(byId("stop"), !on);
    this.#adapt();
  }

  async #runPrompt(compare) {
    const prompt = this.#input.value;
    await this.#runRequest(byId("prompt-results"), "completions", { prompt }, compare, prompt);
  }

  async #runChat(compare) {
    const message = { role: "user", content: this.#input.value };
    this.#keepAnswer();
    this.#turn("user", message.content);
    this.#chat.push(message);
    this.#input.value = "";
    const results = byId("chat-results");
    try {
      await this.#runRequest(results, "chat/completions", { messages: [...this.#chat] }, compare);
    } finally {
      const pane = results.querySelector(".pane")?.pane;
      if (pane && !pane.empty) {
        this.#answer = pane;
        this.#chat.push({ role: "assistant", content: pane.written });
      } else {
        this.#restoreInput(message);
      }
    }
  }

  /** Run the request, and for a comparison run it again by plain decoding. */
  async #runRequest(results, path, question, compare, given = "") {
    const method = this.#form.elements.method.value;
    const asked = { ...question, ...this.#settings() };
    const panes = results.querySelector(".panes");
    const verdict = results.querySelector(".verdict");
    panes.replaceChildren();
    verdict.hidden = true;
    const first = this.#pane(panes, method, given);
    const second = compare ? this.#pane(panes, "ar", given) : null;
    second?.wait("Runs after the first request, so that neither slows the other down.");
    this.#adapt();
    this.#scrollToBottom();
    try {
      await this.#streamPanes(first, second, path, asked, method);
    } catch (error) {
      if (first.empty) panes.replaceChildren(); // rejected: the error message is shown instead
      throw error;
    } finally {
      if (second?.empty && !second.whole) second.wait("Not run.");
    }
    if (second?.whole) this.#show(verdict, comparison(first, second, method));
  }

  async #streamPanes(first, second, path, asked, method) {
    await this.#stream(first, path, { ...asked, lookahead: this.#lookahead(method) });
    if (first.whole && second) {
      await this.#stream(second, path, { ...asked, lookahead: this.#lookahead("ar") });
    }
  }

  #show(verdict, text) {
    const follow = this.#atBottom();
    verdict.textContent = text;
    verdict.hidden = false;
    if (follow) this.#scrollToBottom();
    this.#announce(text);
  }

  #pane(parent, method, given) {
    const pane = new Pane(parent, method === "ar" ? "plain decoding" : method, given);
    pane.element.pane = pane;
    return pane;
  }

  async #stream(pane, path, body) {
    const begun = performance.now();
    let first = null;
    let reason = null;
    this.#announce("Generating…");
    pane.begin();
    try {
      for await (const chunk of this.#server.stream(path, body, this.#running.signal)) {
        const choice = chunk.choices[0];
        if (choice?.passlm) {
          first ??= performance.now() - begun;
          const follow = this.#atBottom();
          pane.push(choice.passlm);
          if (follow) this.#scrollToBottom();
        }
        reason = choice?.finish_reason ?? reason;
        if (chunk.usage) pane.counts.settle(chunk.usage);
      }
    } catch (error) {
      const stopped = error.name === "AbortError";
      pane.end(false, stopped ? `Stopped after ${pane.counts.tokens} tokens.` : "Interrupted.");
      if (!stopped) throw error;
      this.#announce("Stopped.");
      return;
    }
    const note = ending(pane, reason, body.seed, first);
    const follow = this.#atBottom();
    pane.end(true, note);
    if (follow) this.#scrollToBottom();
    this.#announce(note);
  }

  // The chat

  /** Move the latest answer into the transcript. */
  #keepAnswer() {
    if (this.#answer) this.#turn("assistant", "").append(...this.#answer.release());
    this.#answer = null;
  }

  #turn(role, content) {
    const turn = document.createElement("li");
    turn.className = role;
    const speaker = document.createElement("b");
    speaker.textContent = role === "user" ? "You" : "Model";
    turn.append(speaker);
    if (content) {
      const words = document.createElement("p");
      words.textContent = content;
      turn.append(words);
    }
    byId("chat-results").querySelector(".turns").append(turn);
    return turn;
  }

  /** Put a message that got no answer back into the input field. */
  #restoreInput(message) {
    this.#chat.pop();
    byId("chat-results").querySelector(".turns").lastElementChild.remove();
    byId("chat-results").querySelector(".panes").replaceChildren();
    if (!this.#input.value) this.#input.value = message.content;
  }

  #newChat() {
    if (this.#running) return;
    this.#chat = [];
    this.#answer = null;
    const results = byId("chat-results");
    results.querySelectorAll(".turns, .panes").forEach((part) => part.replaceChildren());
    results.querySelector(".verdict").hidden = true;
    this.#adapt();
    this.#input.focus();
  }

  // Status and errors

  #announce(text) {
    byId("status").textContent = text;
  }

  #showError(text) {
    byId("problem").hidden = text === "";
    byId("problem").textContent = text;
  }

  #handleError(error) {
    this.#announce("");
    this.#showError(error.message);
    if (error instanceof ApiError && error.status === 401) this.#showKeyForm();
    else if (error instanceof ServerUnreachable) this.#reconnect(error.message);
    else if (!(error instanceof ApiError)) throw error;
  }

  /** Try to reach an unreachable server until it answers. */
  async #reconnect(message) {
    if (this.#reconnecting) return;
    this.#reconnecting = true;
    byId("model").textContent = "not answering";
    this.#showError(`${message} Trying again every ${RETRY_INTERVAL / 1000} seconds.`);
    do {
      await new Promise((resolve) => setTimeout(resolve, RETRY_INTERVAL));
    } while (!(await this.#server.alive()));
    this.#reconnecting = false;
    this.#showError("");
    this.#announce("The server answers again.");
    this.#showModel();
  }

  // The server

  async #connect() {
    this.#model = (await this.#server.models())[0];
    byId("model").textContent = this.#model;
    document.title = `${this.#model} · passlm`;
    byId("metrics").hidden = this.#server.locked; // a link cannot send the key
  }

  async #showModel() {
    try {
      await this.#connect();
    } catch (error) {
      this.#handleError(error);
    }
  }

  #showKeyForm() {
    byId("key-form").hidden = false;
    byId("key").focus();
  }

  #useKey(event) {
    event.preventDefault();
    const given = byId("key").value;
    byId("key").value = "";
    try {
      this.#server.use(given);
    } catch (error) {
      this.#handleError(error);
      return;
    }
    byId("key-form").hidden = true;
    this.#showError("");
    this.#input.focus();
    this.#showModel();
  }

  // Keys and scrolling

  #key(event) {
    if (event.key === "Escape") {
      this.#running?.abort();
    } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      this.#run(event.shiftKey);
    }
  }

  #atBottom() {
    const page = document.documentElement;
    return page.scrollHeight - page.scrollTop - page.clientHeight < NEAR_BOTTOM;
  }

  #scrollToBottom() {
    document.documentElement.scrollTop = document.documentElement.scrollHeight;
  }
}

new Playground().start();
