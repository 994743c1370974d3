// Compares two texts for the same prompt: speed, and whether they are identical.

/**
 * Return the comparison in words, and mark the first difference in both texts.
 * @param {Pane} drafted
 * @param {Pane} plain
 * @param {string} method of the drafted text
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
    `The texts differ after ${same} characters, as marked: in a precision below float32, ` +
    "the choice between nearly equally probable tokens depends on rounding."
  );
}
