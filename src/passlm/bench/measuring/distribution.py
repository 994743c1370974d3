"""Test whether two ways of decoding sample from the same distribution, and estimate the power.

Uses two-sample permutation tests, which only assume that the continuations are drawn independently.
There is a test for the token at each position, one for the length, and one for all the first tokens
together. The two samples must have different seeds: with the coupled judge the same seed gives the
same continuation, so the comparison would prove nothing. `recipes/same_distribution.py` decides
which ways of decoding are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from passlm.decoding.decoder import Decoder, Observer
from passlm.decoding.request import Request
from passlm.decoding.strategies import Adaptive, Strategy
from passlm.decoding.text import Row
from passlm.model.pass_records import LookAheadRows
from passlm.model.target import Target
from passlm.params import SamplingParams

END = -1  # padding after the end of a sequence
LEVEL = 0.05  # probability that a run rejects any hypothesis although all are true
CHANCE = 0.8  # power at which the smallest detectable shift is stated
_RARE = 10  # tokens that occur less often in both samples together share one cell
_AT_A_TIME = 1000  # permutations computed at a time
_TOLERANCE = 1e-9  # statistics this close are equal up to rounding
_HALVINGS = 8  # bisection steps when searching the smallest detectable share
_DRAWS = 1000  # simulated runs for each share
_RIGHT_RUNS = 20  # expected number of simulated correct runs beyond the critical value

Texts: TypeAlias = NDArray[np.int64]
"""Token ids of one prompt's continuations, `[texts, tokens]`, padded with `END`."""
Numbers: TypeAlias = NDArray[np.float64]
"""Counts, shares or statistics."""


@dataclass(frozen=True)
class Sampler:
    """Draws continuations of a prompt in batches.

    Attributes:
        target: the target model.
        look_ahead: the look-ahead rows; None for plans without them.
        sampling: sampling parameters; the seed is given with each continuation.
        plans: the strategy that chooses the plan of each pass.
        eos: token ids that end a sequence.
        tokens: length in tokens at which continuations are cut.
        at_once: batch size.
        observer: observer of the decoder, or None.
    """

    target: Target
    look_ahead: LookAheadRows | None
    sampling: SamplingParams
    plans: Strategy | Adaptive
    eos: frozenset[int]
    tokens: int
    at_once: int = 32
    observer: Observer | None = None

    def draw(self, prompt: Sequence[int], seeds: Sequence[int]) -> Texts:
        """Return a continuation for each seed, `[seeds, tokens]`.

        Raises:
            PromptError: the prompt is empty, contains unknown ids or fills the model's context.
        """
        drawn = np.full((len(seeds), self.tokens), END)
        for start in range(0, len(seeds), self.at_once):
            for at, ids in enumerate(self._batch(prompt, seeds[start : start + self.at_once])):
                drawn[start + at, : len(ids)] = ids
        return drawn

    def _batch(self, prompt: Sequence[int], seeds: Sequence[int]) -> list[list[int]]:
        decoder = Decoder(self.target, self.look_ahead, self.observer)
        known = self.target.prefill(prompt[:-1])  # once for all continuations
        rows = []
        for seed in seeds:
            # One token more than is compared, so that candidates for the last ones are not cut.
            request = Request.of(
                prompt,
                replace(self.sampling, seed=seed),
                self.tokens + 1,
                self.plans,
                self.eos,
            )
            reading = decoder.begin(request, known.copied(0, len(prompt) - 1))
            rows.append(decoder.admit(reading))
        while decoder.rows:
            decoder.step()
            decoder.leave([row for row in decoder.rows if self._is_whole(row)])
        return [row.tokens[len(prompt) :][: self.tokens] for row in rows]

    def _is_whole(self, row: Row) -> bool:
        return len(row.tokens) - len(row.request.prompt) >= self.tokens


# Statistics. Each is built from the pooled texts of both samples, and is then computed from the
# number of times that each text occurs in either sample.


class Statistic(Protocol):
    """A measure of how far two samples differ, computed for many pairs of samples at once."""

    def __call__(self, left: Numbers, right: Numbers) -> Numbers:
        """Return the statistic of each pair of samples, `[R]`.

        Args:
            left: number of times that each pooled text occurs in the left sample, `[R, texts]`.
            right: the same for the right sample.
        """
        ...


@dataclass(frozen=True)
class TokenCells:
    """Pearson's chi-squared statistic of two samples, `sum (observed - expected)^2 / expected`.

    Attributes:
        cells: the cell of each text's token, one-hot, `[texts, cells]`.
    """

    cells: Numbers

    @classmethod
    def at(cls, texts: Texts, position: int) -> TokenCells:
        """Return the statistic of the token at a position, from 0; rare tokens share one cell."""
        _, cell, counts = np.unique(texts[:, position], return_inverse=True, return_counts=True)
        common = np.flatnonzero(counts >= _RARE)
        one_hot = (cell[:, None] == common).astype(np.float64)
        return cls(np.hstack([one_hot, 1 - one_hot.sum(1, keepdims=True)]))

    def __call__(self, left: Numbers, right: Numbers) -> Numbers:
        """Return the statistic of each pair of samples; see `Statistic`."""
        sides = np.stack([left @ self.cells, right @ self.cells])  # [2, R, cells]
        together = sides.sum(0)
        expected = together * (sides.sum(2, keepdims=True) / together.sum(1)[None, :, None])
        with np.errstate(invalid="ignore"):
            parts = (sides - expected) ** 2 / expected
        whole: Numbers = np.nan_to_num(parts).sum((0, 2))
        return whole


@dataclass(frozen=True)
class LengthSteps:
    """Kolmogorov-Smirnov statistic: the largest difference of two cumulative distributions.

    Attributes:
        steps: 1 where the text is at most as long as the column's length, `[texts, lengths]`.
    """

    steps: Numbers

    @classmethod
    def of(cls, texts: Texts) -> LengthSteps:
        """Return the statistic of the lengths; a text that is cut counts as longer than others."""
        lengths = text_lengths(texts)
        return cls((lengths[:, None] <= np.unique(lengths)).astype(np.float64))

    def __call__(self, left: Numbers, right: Numbers) -> Numbers:
        """Return the statistic of each pair of samples; see `Statistic`."""
        largest: Numbers = np.abs(_shares(left) @ self.steps - _shares(right) @ self.steps).max(1)
        return largest


@dataclass(frozen=True)
class Energy:
    """The energy distance, `2 E d(X, Y) - E d(X, X') - E d(Y, Y')`.

    Székely and Rizzo, "Energy statistics: A class of statistics based on distances" (2013). The
    distance of two texts is the share of positions at which their tokens differ (Hamming). With it,
    the energy distance equals the mean over positions of the squared differences between the two
    distributions of the token there, `mean_t sum_v (p_t(v) - q_t(v))^2`. It is never negative, and
    is 0 exactly if the distributions are equal at every position. It does not compare how tokens at
    different positions depend on each other.

    Attributes:
        distances: distance of each pair of texts, `[texts, texts]`.
    """

    distances: Numbers

    @classmethod
    def of(cls, texts: Texts) -> Energy:
        """Return the statistic of the tokens of all positions together."""
        places = texts.T[:, :, None] != texts.T[:, None, :]
        return cls(places.mean(0))

    def __call__(self, left: Numbers, right: Numbers) -> Numbers:
        """Return the statistic of each pair of samples; see `Statistic`."""
        difference = _shares(left) - _shares(right)
        # The three expectations add up to this quadratic form of the difference.
        energy: Numbers = -((difference @ self.distances) * difference).sum(1)
        return energy


def _shares(counts: Numbers) -> Numbers:
    shares: Numbers = counts / counts.sum(1, keepdims=True)
    return shares


def text_lengths(texts: Texts) -> Texts:
    """Return the number of tokens of each text, `[texts]`, or `tokens + 1` if it is cut.

    Args:
        texts: token ids, `[texts, tokens]`. A text that ends exactly at its last position cannot be
            distinguished from one that is cut, so it counts as cut.
    """
    lengths: Texts = (texts != END).sum(1)
    return np.where(lengths == texts.shape[1], lengths + 1, lengths)


class Question(Protocol):
    """A property of texts in which two samples are compared."""

    @property
    def name(self) -> str:
        """Name of the question in reports."""
        ...

    def seen(self, texts: Texts) -> Texts:
        """Return the part of each text that is compared, `[texts, parts]`."""
        ...

    def statistic(self, texts: Texts) -> Statistic:
        """Return the statistic, given the pooled texts of both samples."""
        ...


@dataclass(frozen=True)
class OfToken:
    """The token at one position, from 0."""

    position: int

    @property
    def name(self) -> str:
        """Name of the question, counting positions from 1."""
        return f"token {self.position + 1}"

    def seen(self, texts: Texts) -> Texts:
        """Return the part of each text that is compared; see `Question`."""
        return texts[:, self.position, None]

    def statistic(self, texts: Texts) -> Statistic:
        """Return the statistic; see `Question`."""
        return TokenCells.at(texts, self.position)


@dataclass(frozen=True)
class OfLength:
    """The length of each text, up to the cut."""

    name: str = "length"

    def seen(self, texts: Texts) -> Texts:
        """Return the part of each text that is compared; see `Question`."""
        return text_lengths(texts)[:, None]

    def statistic(self, texts: Texts) -> Statistic:
        """Return the statistic; see `Question`."""
        return LengthSteps.of(texts)


@dataclass(frozen=True)
class OfWhole:
    """All tokens of each text together, up to the cut."""

    name: str = "whole text"

    def seen(self, texts: Texts) -> Texts:
        """Return the part of each text that is compared; see `Question`."""
        return texts

    def statistic(self, texts: Texts) -> Statistic:
        """Return the statistic; see `Question`."""
        return Energy.of(texts)


def questions(positions: int) -> list[Question]:
    """Return the questions: the token at each of the first positions, length, and whole text."""
    return [*map(OfToken, range(positions)), OfLength(), OfWhole()]


# Tests


def p_values(
    sides: Sequence[tuple[Texts, Texts]], asked: Sequence[Question], shuffles: int, seed: int
) -> list[float]:
    """Return the p-value of each question, by permutation.

    The statistics are summed over the prompts, so that a fault that affects every prompt is found
    even if it is small in each. Texts are only exchanged between the two samples of their own
    prompt. The test is exact: under the null hypothesis, a p-value of at most `x` has a probability
    of at most `x` (Phipson and Smyth, "Permutation p-values should never be zero", 2010).

    Args:
        sides: for each prompt, the texts of both ways of decoding.
        asked: the questions.
        shuffles: number of random permutations.
        seed: seed of the permutations.

    Returns:
        A p-value for each question.
    """
    rng = np.random.default_rng(seed)
    observed, shuffled = np.zeros(len(asked)), np.zeros((len(asked), shuffles))
    for left, right in sides:
        own = [question.statistic(np.vstack([left, right])) for question in asked]
        label = np.repeat([1.0, 0.0], [len(left), len(right)])
        observed += [float(statistic(label[None], 1 - label[None])[0]) for statistic in own]
        for part in _parts(shuffles):
            labels = rng.permuted(np.tile(label, (part.stop - part.start, 1)), axis=1)
            for at, statistic in enumerate(own):
                shuffled[at, part] += statistic(labels, 1 - labels)
    reached = (shuffled >= observed[:, None] - _TOLERANCE).sum(1)
    return [float(chance) for chance in (1 + reached) / (1 + shuffles)]


def _parts(count: int) -> Iterator[slice]:
    for start in range(0, count, _AT_A_TIME):
        yield slice(start, min(start + _AT_A_TIME, count))


def holm(chances: Sequence[float]) -> list[float]:
    """Return p-values corrected for multiple testing.

    If hypotheses with a corrected p-value of at most `LEVEL` are rejected, the probability of any
    false rejection is at most `LEVEL`. Holm, "A simple sequentially rejective multiple test
    procedure" (1979); valid for any dependence between the tests.
    """
    corrected = [0.0] * len(chances)
    least = 0.0
    for rank, at in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        least = max(least, min(1.0, (len(chances) - rank) * chances[at]))
        corrected[at] = least
    return corrected


# Power


@dataclass(frozen=True)
class Noticed:
    """The smallest shift that a test detects with probability `CHANCE`.

    Attributes:
        share: share of texts that a faulty way of decoding replaces by the greedy text; None if
            even replacing all of them is not detected.
        total_variation: total variation distance by which that shifts the distribution that the
            test compares, mean over the prompts; None likewise.
    """

    share: float | None
    total_variation: float | None


def noticed(
    plain: Sequence[Texts],
    greedy: Sequence[Texts],
    asked: Sequence[Question],
    level: float,
    seed: int,
) -> list[Noticed]:
    """Return the smallest shift that each test would detect, found by simulation.

    The simulated faulty way of decoding replaces a share of its texts by the greedy text and draws
    the others correctly, so its distance is known exactly. Correct texts are drawn from `plain`
    with replacement, equally many for both samples. A shift counts as detected if the statistic
    exceeds a critical value, which a share `level` of correct runs exceeds.

    Args:
        plain: texts drawn by plain decoding, for each prompt.
        greedy: the greedy text of each prompt, `[1, tokens]`.
        asked: the questions.
        level: significance level of each test.
        seed: seed of the simulation.

    Returns:
        The smallest shift for each question.
    """
    rng = np.random.default_rng(seed)
    found = []
    for question in asked:
        runs = _Runs(plain, greedy, question, rng)
        bar = float(np.quantile(runs.statistics(0.0, int(_RIGHT_RUNS / level)), 1 - level))
        share = runs.least_share(bar)
        found.append(Noticed(share, None if share is None else share * runs.distance))
    return found


@dataclass(frozen=True)
class _Runs:
    """Simulated runs of one test in which a share of the texts is replaced by the greedy text."""

    plain: Sequence[Texts]
    greedy: Sequence[Texts]
    question: Question
    rng: np.random.Generator

    def least_share(self, bar: float) -> float | None:
        """Return the smallest share that is detected with probability `CHANCE`; None if none is.

        Args:
            bar: critical value of the statistic.
        """
        if not self._exceeds(bar, 1.0):
            return None
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if self._exceeds(bar, middle) else (middle, high)
        return high

    def _exceeds(self, bar: float, share: float) -> bool:
        return bool((self.statistics(share, _DRAWS) > bar).mean() >= CHANCE)

    def statistics(self, share: float, runs: int) -> Numbers:
        """Return the statistic of each simulated run, summed over the prompts, `[runs]`."""
        totals = np.zeros(runs)
        for plain, greedy in zip(self.plain, self.greedy, strict=True):
            texts = len(plain)
            right = np.append(np.full(texts, 1 / texts), 0.0)
            wrong = (1 - share) * right
            wrong[-1] = share
            statistic = self.question.statistic(np.vstack([plain, greedy]))
            for part in _parts(runs):
                drawn = [
                    self.rng.multinomial(texts, chances, part.stop - part.start).astype(np.float64)
                    for chances in (right, wrong)
                ]
                totals[part] += statistic(*drawn)
        return totals

    @property
    def distance(self) -> float:
        """Total variation distance between correct texts and the greedy text, as the test sees it.

        Mean over the prompts.
        """
        same = [
            (self.question.seen(plain) == self.question.seen(greedy)).all(1).mean()
            for plain, greedy in zip(self.plain, self.greedy, strict=True)
        ]
        return float(1 - np.mean(same))
