// How the tokens of one text came, counted as they come.

export class Counts {
  /** Tokens by position: how many were drawn, accepted at position 1, 2, ... */
  byPosition = [0];
  tokens = 0;
  passes = 0;
  #open = false; // a pass whose last token is an accepted one so far
  #first = null; // when tokens began to come, and how many came at once
  #last = 0;
  #measured = null; // tokens a second by the server's clock

  /**
   * Add the tokens of a chunk.
   * @param {number[]} positions 0 for a drawn token, k for one accepted at position k
   * @param {number} now milliseconds
   */
  add(positions, now) {
    for (const position of positions) {
      // Accepted tokens come first in a pass and a drawn one ends it.
      if (!this.#open || position === 1) this.passes += 1;
      this.#open = position !== 0;
      while (this.byPosition.length <= position) this.byPosition.push(0);
      this.byPosition[position] += 1;
      this.tokens += 1;
    }
    this.#first ??= { at: now, tokens: positions.length };
    this.#last = now;
  }

  /** What the server counted, once the text is at its end. */
  settle(usage) {
    this.passes = usage.passlm.passes;
    const seconds = usage.passlm.decode_seconds;
    if (seconds > 0) this.#measured = usage.completion_tokens / seconds;
  }

  /** Tokens a second of decoding, or null before there is a time to divide by. */
  get rate() {
    if (this.#measured !== null) return this.#measured;
    const seconds = this.#first ? (this.#last - this.#first.at) / 1000 : 0;
    return seconds > 0 ? (this.tokens - this.#first.tokens) / seconds : null;
  }

  get perPass() {
    return this.passes ? this.tokens / this.passes : null;
  }

  /** Share of the tokens that are accepted guesses, 0 to 1. */
  get share() {
    return this.tokens ? 1 - this.byPosition[0] / this.tokens : null;
  }
}
