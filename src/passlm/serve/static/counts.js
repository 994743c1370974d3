// Counts the tokens of one text by how they were obtained.

export class Counts {
  /** Number of tokens by position: drawn, accepted at position 1, 2, ... */
  byPosition = [0];
  tokens = 0;
  passes = 0;
  #open = false; // the current pass may add further tokens: its last one was accepted
  #first = null; // arrival time and size of the first chunk
  #last = 0;
  #measured = null; // tokens per second, measured by the server

  /**
   * Add the tokens of a chunk.
   * @param {number[]} positions 0 for a drawn token, k for one accepted at position k
   * @param {number} now milliseconds
   */
  add(positions, now) {
    for (const position of positions) {
      // In a pass the accepted tokens come first, and a drawn token ends it.
      if (!this.#open || position === 1) this.passes += 1;
      this.#open = position !== 0;
      while (this.byPosition.length <= position) this.byPosition.push(0);
      this.byPosition[position] += 1;
      this.tokens += 1;
    }
    this.#first ??= { at: now, tokens: positions.length };
    this.#last = now;
  }

  /** Take over what the server counted, at the end of the text. */
  settle(usage) {
    this.passes = usage.passlm.passes;
    const seconds = usage.passlm.decode_seconds;
    if (seconds > 0) this.#measured = usage.completion_tokens / seconds;
  }

  /** Tokens per second of decoding; null before the second chunk. */
  get rate() {
    if (this.#measured !== null) return this.#measured;
    const seconds = this.#first ? (this.#last - this.#first.at) / 1000 : 0;
    return seconds > 0 ? (this.tokens - this.#first.tokens) / seconds : null;
  }

  get perPass() {
    return this.passes ? this.tokens / this.passes : null;
  }

  /** Share of the tokens that are accepted drafts, 0 to 1. */
  get share() {
    return this.tokens ? 1 - this.byPosition[0] / this.tokens : null;
  }
}
