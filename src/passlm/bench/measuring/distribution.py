"""Whether two ways of decoding draw their texts from one distribution, and what would be noticed.

Two-sample tests by permutation, which need no assumption but that texts are drawn independently:
for the token at one position, for the length, and for the first tokens together. The two sides
must have different seeds: with the coupled judge the same seed gives the same text, which proves
nothing. What is compared is left to `recipes/same_distribution.py`.
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

END = -1  # stands in the places behind the end of a text
LEVEL = 0.05  # chance that a run refuses anything although nothing differs
CHANCE = 0.8  # of being noticed, that a shift is stated for
_RARE = 10  # tokens met less often on both sides together count as one
_AT_A_TIME = 1000  # relabellings computed together
_TOLERANCE = 1e-9  # statistics this close are the same, up to rounding
_HALVINGS = 8  # of the interval that holds the smallest share noticed
_DRAWS = 1000  # simulated runs for each share
_RIGHT_RUNS = 20  # of simulated right ones, how many lie beyond the bar

Texts: TypeAlias = NDArray[np.int64]
"""Token ids of one prompt's continuations, `[texts, tokens]`, `END` behind the end of a text."""
Numbers: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Sampler:
    """Draws continuations of a prompt, many at a time.

    Attributes:
        target: the model.
        look_ahead: what drafts; None for plans without look-ahead rows.
        sampling: how tokens are drawn; the seed is given with each text.
        plans: which plan each pass takes.
        eos: ids that end a text.
        tokens: length at which texts are cut.
        at_once: texts decoded as one batch.
        observer: looks on; None lets nobody.
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
        """A text for each seed.

        Raises:
            PromptError: the prompt is empty, holds unknown ids, or fills the model's context.
        """
        drawn = np.full((len(seeds), self.tokens), END)
        for start in range(0, len(seeds), self.at_once):
            for at, ids in enumerate(self._batch(prompt, seeds[start : start + self.at_once])):
                drawn[start + at, : len(ids)] = ids
        return drawn

    def _batch(self, prompt: Sequence[int], seeds: Sequence[int]) -> list[list[int]]:
        decoder = Decoder(self.target, self.look_ahead, self.observer)
        known = self.target.prefill(prompt[:-1])  # once for all texts
        rows = []
        for seed in seeds:
            # A token more than is looked at, so that no candidate for these is cut off.
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


# Statistics: of texts that were put together, and how often each is on either side


class Statistic(Protocol):
    """How far two sides differ, for many ways of choosing the sides at once."""

    def __call__(self, left: Numbers, right: Numbers) -> Numbers:
        """The statistic of each choice, `[R]`.

        Args:
            left: how often each text stands on that side, `[R, texts]`.
            right: the same of the other side.
        """
        ...


@dataclass(frozen=True)
class TokenCells:
    """Pearson's chi-squared of the two-sample problem, `sum (observed - expected)^2 / expected`.

    Attributes:
        cells: which token each text has, one-hot, `[texts, cells]`.
    """

    cells: Numbers

    @classmethod
    def at(cls, texts: Texts, position: int) -> TokenCells:
        """Of the token at one position, from 0; rare ones are one cell."""
        _, cell, counts = np.unique(texts[:, position], return_inverse=True, return_counts=True)
        common = np.flatnonzero(counts >= _RARE)
        one_hot = (cell[:, None] == common).astype(np.float64)
        return cls(np.hstack([one_hot, 1 - one_hot.sum(1, keepdims=True)]))

    def __call__(self, left: Numbers, right: Numbers) -> Numbers:
        """See `Statistic`."""
        sides = np.stack([left @ self.cells, right @ self.cells])  # [2, R, cells]
        together = sides.sum(0)
        expected = together * (sides.sum(2, keepdims=True) / together.sum(1)[None, :, None])
        with np.errstate(invalid="ignore"):
            parts = (sides - expected) ** 2 / expected
        whole: Numbers = np.nan_to_num(parts).sum((0, 2))
        return whole


@dataclass(frozen=True)
class LengthSteps:
    """Kolmogorov and Smirnov's largest difference between two cumulative distributions.

    Attributes:
        steps: whether each text has at most so many tokens, `[texts, lengths]`.
    """

    steps: Numbers

    @classmethod
    def of(cls, texts: Texts) -> LengthSteps:
        """Of the lengths; a text that is not over at its cut is longer than all others."""
        lengths = text_lengths(texts)
        return cls((lengths[:, None] <= np.unique(lengths)).astype(np.float64))

    def __call__(self, left: Numbers, right: Numbers) -> Numbers:
        """See `Statistic`."""
        largest: Numbers = np.abs(_shares(left) @ self.steps - _shares(right) @ self.steps).max(1)
        return largest


@dataclass(frozen=True)
class Energy:
    """The energy distance, `2 E d(X, Y) - E d(X, X') - E d(Y, Y')`.

    Székely and Rizzo, "Energy statistics: A class of statistics based on distances" (2013). The
    distance of two texts is the share of places where their tokens differ (Hamming), which is of
    negative type, so the expectation is 0 for equal distributions alone.

    Attributes:
        distances: of every two texts, `[texts, texts]`.
    """

    distances: Numbers

    @classmethod
    def of(cls, texts: Texts) -> Energy:
        """Of the tokens of all places together."""
        places = texts.T[:, :, None] != texts.T[:, None, :]
        return cls(places.mean(0))

    def __call__(self, left: Numbers, right: Numbers) -> Numbers:
        """See `Statistic`."""
        difference = _shares(left) - _shares(right)
        # Written out, the three expectations are this one form of the difference.
        energy: Numbers = -((difference @ self.distances) * difference).sum(1)
        return energy


def _shares(counts: Numbers) -> Numbers:
    shares: Numbers = counts / counts.sum(1, keepdims=True)
    return shares


def text_lengths(texts: Texts) -> Texts:
    """Tokens of each text, its end included; one more than all places where it goes on.

    Args:
        texts: `[texts, tokens]`; a text that ends with its last place is not told from one that
            goes on, so it counts as longer.
    """
    lengths: Texts = (texts != END).sum(1)
    return np.where(lengths == texts.shape[1], lengths + 1, lengths)


class Question(Protocol):
    """What of two samples of texts is compared."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    def seen(self, texts: Texts) -> Texts:
        """The part of each text that it looks at, `[texts, places]`."""
        ...

    def statistic(self, texts: Texts) -> Statistic:
        """Its statistic, given the texts of both sides together."""
        ...


@dataclass(frozen=True)
class OfToken:
    """The token at one position, from 0."""

    position: int

    @property
    def name(self) -> str:
        """See `Question`."""
        return f"token {self.position + 1}"

    def seen(self, texts: Texts) -> Texts:
        """See `Question`."""
        return texts[:, self.position, None]

    def statistic(self, texts: Texts) -> Statistic:
        """See `Question`."""
        return TokenCells.at(texts, self.position)


@dataclass(frozen=True)
class OfLength:
    """How long texts are, up to the cut."""

    name: str = "length"

    def seen(self, texts: Texts) -> Texts:
        """See `Question`."""
        return text_lengths(texts)[:, None]

    def statistic(self, texts: Texts) -> Statistic:
        """See `Question`."""
        return LengthSteps.of(texts)


@dataclass(frozen=True)
class OfWhole:
    """All tokens up to the cut, together."""

    name: str = "whole text"

    def seen(self, texts: Texts) -> Texts:
        """See `Question`."""
        return texts

    def statistic(self, texts: Texts) -> Statistic:
        """See `Question`."""
        return Energy.of(texts)


def questions(positions: int) -> list[Question]:
    """The tokens at the first positions, the length, and the whole text up to its cut."""
    return [*map(OfToken, range(positions)), OfLength(), OfWhole()]


# Tests


def p_values(
    sides: Sequence[tuple[Texts, Texts]], asked: Sequence[Question], shuffles: int, seed: int
) -> list[float]:
    """The chance of statistics as large as these if both sides have one distribution.

    Statistics are summed over the prompts, and texts change sides within their prompt alone: what
    a way of decoding does wrong with every prompt is found together. The test is exact: a p-value
    of at most `x` has a chance of at most `x` (Phipson and Smyth, "Permutation p-values should
    never be zero", 2010).

    Args:
        sides: for each prompt, the texts of both ways of decoding.
        asked: what is compared.
        shuffles: how often texts change sides.
        seed: of the shuffles.

    Returns:
        One for each question.
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
    """P-values corrected for their number; refusing those up to `LEVEL` errs so often in all.

    Holm, "A simple sequentially rejective multiple test procedure" (1979); valid however the tests
    depend on each other.
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
    """The smallest shift that a test notices with a chance of `CHANCE`.

    Attributes:
        share: of texts that a wrong way of decoding replaces by the greedy one; None where not
            even all of them are enough.
        total_variation: how far that moves the distribution which the test looks at, mean over the
            prompts; None likewise.
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
    """What each test would notice, by simulation.

    The wrong way of decoding is one whose distance is known exactly: a share of its texts are the
    greedy one, the others are drawn rightly. Right texts are drawn from `plain` with replacement,
    as many for each side; statistics count as noticed beyond what `level` of right runs reach.

    Args:
        plain: texts drawn by plain decoding, for each prompt.
        greedy: the greedy text of each prompt, `[1, tokens]`.
        asked: what is compared.
        level: at which each test is refused.
        seed: of the simulation.

    Returns:
        One for each question.
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
    """Simulated runs of one test, on texts of which a share is replaced by the greedy one."""

    plain: Sequence[Texts]
    greedy: Sequence[Texts]
    question: Question
    rng: np.random.Generator

    def least_share(self, bar: float) -> float | None:
        """The share at which the statistic exceeds the bar with a chance of `CHANCE`."""
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
        """The statistic of each run, summed over the prompts, `[runs]`."""
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
        """Total variation between right texts and the greedy one, in what the test looks at."""
        same = [
            (self.question.seen(plain) == self.question.seen(greedy)).all(1).mean()
            for plain, greedy in zip(self.plain, self.greedy, strict=True)
        ]
        return float(1 - np.mean(same))
