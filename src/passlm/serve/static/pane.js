// One text on the page: its tokens, marked by how they were obtained, and its statistics.

import { Counts } from "./counts.js";

/** From this position on, all tokens have the same mark. */
const LAST_MARK = 5;
const ORDINALS = ["drawn", "first", "second", "third", "fourth", "fifth or later"];
const REFRESH = 200; // milliseconds between two updates of the statistics
const ENDINGS = { stop: "ended by itself", length: "reached the maximum length" };

export class Pane {
  counts = new Counts();
  whole = false; // the text is complete
  #readout;
  #tokens = []; // { span, text, position, pass }
  #picked = -1;
  #refreshed = 0;

  /**
   * @param {HTMLElement} parent the pane is appended to it
   * @param {string} title heading
   * @param {string} given prompt, shown before the generated text
   */
  constructor(parent, title, given = "") {
    const template = document.getElementById("pane-template");
    this.element = template.content.cloneNode(true).querySelector(".pane");
    this.text = this.#part(".text");
    this.#readout = this.#part(".readout");
    this.#part("h3").textContent = title;
    this.text.setAttribute("aria-label", `Text by ${title}; arrow keys show each token's origin`);
    if (given) this.text.append(span("given", given));
    this.text.addEventListener("click", (event) => this.#click(event));
    this.text.addEventListener("keydown", (event) => this.#key(event));
    parent.append(this.element);
  }

  /** The generated text. */
  get written() {
    return this.#tokens.map((token) => token.text).join("");
  }

  get empty() {
    return this.#tokens.length === 0;
  }

  /** Mark the text as being generated. */
  begin() {
    this.#note("");
    this.element.classList.add("writing");
    this.text.setAttribute("aria-busy", "true");
  }

  /** Show a note in place of the ending. */
  wait(note) {
    this.#note(note);
  }

  /**
   * Add the tokens of a chunk.
   * @param {{texts: string[], positions: number[]}} tokens
   */
  push({ texts, positions }) {
    const now = performance.now();
    texts.forEach((text, index) => {
      this.counts.add([positions[index]], now);
      this.#add(text, positions[index]);
    });
    if (now - this.#refreshed > REFRESH) {
      this.#refreshed = now;
      this.#refresh();
    }
  }

  /**
   * Mark the text as ended.
   * @param {boolean} whole the text is complete
   * @param {string} note how it ended
   */
  end(whole, note) {
    this.whole = whole;
    this.element.classList.remove("writing");
    this.text.removeAttribute("aria-busy");
    this.#refresh();
    this.#note(note);
  }

  /** Mark the first token that differs from another text. */
  part(offset) {
    let before = 0;
    for (const token of this.#tokens) {
      before += token.text.length;
      if (before > offset) {
        token.span.classList.add("parts");
        return;
      }
    }
  }

  /** Return the marked text and the description of its tokens, to be shown elsewhere. */
  release() {
    return [this.text, this.#readout];
  }

  #part(selector) {
    return this.element.querySelector(selector);
  }

  #note(note) {
    this.#part(".ending").textContent = note;
  }

  #add(text, position) {
    const token = { text, position, pass: this.counts.passes, span: span("token", text) };
    token.span.dataset.position = Math.min(position, LAST_MARK);
    token.span.dataset.index = this.#tokens.length;
    token.span.title = described(token);
    // Otherwise an accepted line break would be invisible.
    if (text.startsWith("\n")) token.span.classList.add("break");
    this.#tokens.push(token);
    this.text.append(token.span);
  }

  #refresh() {
    const { rate, perPass, share, tokens } = this.counts;
    this.#figure("rate", rate === null ? "–" : rate.toFixed(1));
    this.#figure("perPass", perPass === null ? "–" : perPass.toFixed(2));
    this.#figure("share", share === null ? "–" : `${Math.round(100 * share)} %`);
    this.#figure("tokens", tokens);
    this.#refreshCounts();
  }

  #figure(name, value) {
    this.#part(`[data-figure="${name}"]`).textContent = value;
  }

  #refreshCounts() {
    const counts = this.counts.byPosition.slice(0, LAST_MARK);
    const late = this.counts.byPosition.slice(LAST_MARK).reduce((sum, count) => sum + count, 0);
    if (late) counts.push(late);
    const bars = [];
    const items = [];
    counts.forEach((count, position) => {
      const bar = span("", "");
      bar.dataset.position = position;
      bar.style.flexGrow = count;
      bars.push(bar);
      const item = document.createElement("li");
      const name = span("token", ORDINALS[position]);
      name.dataset.position = position;
      item.append(name, ` ${count}`);
      items.push(item);
    });
    this.#part(".bar").replaceChildren(...bars);
    this.#part(".counts").replaceChildren(...items);
  }

  #click(event) {
    const token = event.target.closest(".token");
    if (token) this.#pick(Number(token.dataset.index));
  }

  #key(event) {
    const last = this.#tokens.length - 1;
    const to = {
      ArrowLeft: Math.max(this.#picked - 1, 0),
      ArrowRight: Math.min(this.#picked + 1, last),
      Home: 0,
      End: last,
    }[event.key];
    if (to === undefined || last < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.#pick(to);
  }

  #pick(index) {
    this.#tokens[this.#picked]?.span.classList.remove("picked");
    this.#picked = index;
    const token = this.#tokens[index];
    token.span.classList.add("picked");
    token.span.scrollIntoView({ block: "nearest" });
    this.#readout.textContent = `${JSON.stringify(token.text)}: ${described(token)}`;
  }
}

/** Describe how a text ended. */
export function ending(pane, reason, seed, firstAfter) {
  const { tokens, passes } = pane.counts;
  const first = firstAfter === null ? "" : `, the first after ${(firstAfter / 1000).toFixed(2)} s`;
  return (
    `${tokens} tokens in ${passes} passes${first}. ` +
    `The text ${ENDINGS[reason] ?? `ended (${reason})`}. Seed ${seed}.`
  );
}

function described({ position, pass }) {
  const how = position === 0 ? "drawn" : `accepted at position ${position}`;
  return `${how} in pass ${pass}`;
}

function span(kind, text) {
  const made = document.createElement("span");
  made.className = kind;
  made.textContent = text;
  return made;
}
