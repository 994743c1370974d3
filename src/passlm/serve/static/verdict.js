// Two texts of the same question side by side: how much faster one is, and whether they are equal.

/**
 * The comparison in words; where the texts part is marked in both.
 * @param {Pane} drafted
 * @param {Pane} plain
 * @param {string} method of the drafted one
 */
export function comparison(drafted, plain, method) {
  return [speed(drafted, plain, method), texts(drafted, plain)].filter(Boolean).join(" ");
}

function speed(drafted, plain, method) {
  const rates = [drafted.counts.rate, plain.counts.rate];
  if (rates.some((rate) => !rate)) return "";
  const ratio = (rates[0] / rates[1]).toFixed(2);
  const saved = plain.counts.passes - drafted.counts.passes;
  return (
    `Decoding by ${method} is ${ratio} times as fast as plain decoding` +
    (saved > 0 ? `, with ${saved} passes fewer.` : ".")
  );
}

function texts(drafted, plain) {
  const [one, other] = [drafted.written, plain.written];
  if (one === other) return "The texts are identical.";
  let same = 0;
  while (one[same] === other[same]) same += 1;
  drafted.part(same);
  plain.part(same);
  return (
    `The texts part after ${same} characters, as marked: in a precision below float32, ` +
    "tokens that lie next to each other may fall either way."
  );
}
