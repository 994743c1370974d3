"""The judges by exact enumeration: what they settle has the target's distribution.

Every chain of candidates that `q` can draw, every place at which it can be refused and every token
that can be drawn then are gone through, with their probabilities. These are not taken on trust:
`rejection` itself is fed numbers just under and just over each chance it must have. Nothing here
is drawn at random except the tables, and those from fixed seeds: no false alarms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from passlm.decoding import judge
from passlm.decoding.distribution import TokenDistribution
from passlm.decoding.judge import Verdict
from passlm.decoding.processors import processors
from passlm.params import SamplingParams

V = 4
MARGIN = 1e-5  # by how much noise is moved to either side of a tie
TOLERANCE = 1e-6

Chain = tuple[int, ...]
Table = Callable[[Chain], Tensor]  # the distribution that follows a prefix, `[V]`


# The enumeration


def check_exact(p_of: Table, q_of: Table, length: int) -> None:
    """Assert that each token settled in a pass has the distribution `p` given those before it.

    Args:
        p_of: the target's distribution after each prefix of candidates.
        q_of: the draft's.
        length: number of candidates, `M`.
    """
    mass: Counter[Chain] = Counter()
    for chain in product(range(V), repeat=length):
        drawn = prod(float(q_of(chain[:i])[token]) for i, token in enumerate(chain))
        if drawn > 0:
            p = torch.stack([p_of(chain[:i]) for i in range(length + 1)])
            q = torch.stack([q_of(chain[:i]) for i in range(length)]) if chain else None
            for settled, share in paths(p, q, chain):
                mass[settled] += drawn * share
    assert sum(mass.values()) == pytest.approx(1, abs=TOLERANCE)
    for prefix in (c for n in range(length + 1) for c in product(range(V), repeat=n)):
        starting = torch.zeros(V, dtype=torch.float64)
        for settled, share in mass.items():
            if len(settled) > len(prefix) and settled[: len(prefix)] == prefix:
                starting[settled[len(prefix)]] += share
        reached = starting.sum()
        if reached > TOLERANCE:
            torch.testing.assert_close(
                starting / reached, p_of(prefix).double(), rtol=0, atol=TOLERANCE
            )


def paths(p: Tensor, q: Tensor | None, chain: Chain) -> Iterator[tuple[Chain, float]]:
    """Each way in which a chain can be judged: the tokens it settles, and its probability."""
    reached = 1.0
    accepting: list[float] = []
    if q is not None:
        chances = judge.acceptance(p[:-1], q, torch.tensor(chain)).tolist()
        for place, chance in enumerate(chances):
            assert 0 <= chance <= 1
            # 0 behind the refusal: were the candidates there looked at, they would be accepted.
            uniform = [*accepting, chance, *[0.0] * (len(chain) - place - 1)]
            if chance < 1:
                last = judge.residual(p[place], q[place])
                for token, share in shares(p, q, chain, uniform, place, last):
                    yield (*chain[:place], token), reached * (1 - chance) * share
            if chance == 0:
                return
            reached *= chance
            accepting.append(chance * (1 - 1e-9))
    for token, share in shares(p, q, chain, accepting, len(chain), p[-1]):
        yield (*chain, token), reached * share


def shares(
    p: Tensor, q: Tensor | None, chain: Chain, uniform: list[float], place: int, last: Tensor
) -> Iterator[tuple[int, float]]:
    """Each token that can be drawn after `place` candidates, and its share in `last`.

    Noise of `last` itself makes every token tie in the exponential race, so a token wins it or
    not by the margin on either side. Were another distribution drawn from, some token would not.
    """

    def verdict(token: int, factor: float) -> Verdict:
        noise = torch.ones(len(chain) + 1, V, dtype=p.dtype)
        noise[:, (token + 1) % V] = 1e-20  # the noise of another position favours another token
        noise[place] = torch.where(last > 0, last, torch.ones_like(last))
        noise[place, token] *= factor if last[token] > 0 else 1e-20
        return judge.rejection(p, q, chain, torch.tensor(uniform, dtype=torch.float64), noise)

    for token in range(V):
        share = float(last[token])
        just_under, just_over = verdict(token, 1 - MARGIN), verdict(token, 1 + MARGIN)
        assert just_under.accepted == just_over.accepted == place
        assert (just_under.token == token) == (share > 0)
        if share < 1:
            assert just_over.token != token
        if share > 0:
            yield token, share


# The tables


def table(make: Callable[[torch.Generator], Tensor], seed: int) -> Table:
    """A table of rows that `make` gives, a different one after each prefix."""

    @cache
    def row(prefix: Chain) -> Tensor:
        number = seed
        for token in prefix:
            number = number * (V + 1) + token + 1
        return make(torch.Generator().manual_seed(number))

    return row


def dense(generator: torch.Generator) -> Tensor:
    """Every token has a chance."""
    return torch.rand(V, generator=generator, dtype=torch.float64).softmax(-1)


def sharp(generator: torch.Generator) -> Tensor:
    """Some tokens are far likelier than others."""
    return (4 * torch.randn(V, generator=generator, dtype=torch.float64)).softmax(-1)


def sparse(generator: torch.Generator) -> Tensor:
    """Two tokens of four have none."""
    row = dense(generator)
    row[torch.randperm(V, generator=generator)[:2]] = 0.0
    return row / row.sum()


def one_hot(generator: torch.Generator) -> Tensor:
    """One token has all."""
    return torch.eye(V, dtype=torch.float64)[torch.randint(V, (), generator=generator)]


def low(generator: torch.Generator) -> Tensor:
    """Tokens 0 and 1 alone."""
    row = dense(generator) * torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    return row / row.sum()


def high(generator: torch.Generator) -> Tensor:
    """Tokens 2 and 3 alone."""
    return low(generator).flip(0)


PAIRS = {
    "dense": (table(dense, 1), table(dense, 2)),
    "sharp": (table(sharp, 1), table(sharp, 2)),
    "zeros-in-both": (table(sparse, 1), table(sparse, 2)),
    "zeros-in-p": (table(sparse, 1), table(dense, 2)),
    "zeros-in-q": (table(dense, 1), table(sparse, 2)),
    "equal": (table(dense, 1), table(dense, 1)),
    "disjoint": (table(low, 1), table(high, 2)),
    "greedy-draft": (table(dense, 1), table(one_hot, 2)),
    "one-hot-target": (table(one_hot, 1), table(dense, 2)),
    "both-one-hot": (table(one_hot, 1), table(one_hot, 2)),
}


def processed(params: SamplingParams, seed: int, dtype: torch.dtype) -> Table:
    """Random logits through the real processors."""
    distribution = TokenDistribution(processors(params, 0, ()), greedy=params.temperature == 0)

    def make(generator: torch.Generator) -> Tensor:
        return distribution(torch.randn(1, V, generator=generator).to(dtype), [])[0]

    return table(make, seed)


# Rejection


@pytest.mark.parametrize("length", [0, 1, 2, 3])
@pytest.mark.parametrize("pair", PAIRS)
def test_rejection_settles_the_target_distribution(pair: str, length: int) -> None:
    """Catches any mistake in acceptance, residual, bonus, or in which row each is taken from."""
    check_exact(*PAIRS[pair], length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.8, top_k=2),
        SamplingParams(temperature=1.7, top_p=0.7),
        SamplingParams(temperature=0.3, min_p=0.2),
        SamplingParams(temperature=0.0),
    ],
    ids=str,
)
def test_rejection_is_exact_on_processed_float32_rows(
    params: SamplingParams, dtype: torch.dtype
) -> None:
    """Catches `p` or `q` left in a 16-bit type, or taken before a processor."""
    check_exact(processed(params, 1, dtype), processed(params, 2, dtype), 2)


def test_rejection_with_a_greedy_draft_of_a_sampled_target_in_float32() -> None:
    """Catches a one-hot `q` that is not what the candidate was drawn from."""
    sampled = SamplingParams(temperature=0.8, top_k=3)
    p, q = processed(sampled, 1, torch.float32), processed(SamplingParams(), 2, torch.float32)
    check_exact(p, q, 3)


# Wrong judges: does the enumeration notice?


def _draw_from_p(p: Tensor, q: Tensor) -> Tensor:
    return p


def _absolute_difference(p: Tensor, q: Tensor) -> Tensor:
    return (p - q).abs() / (p - q).abs().sum().clamp(min=1e-30)


def _other_way_round(p: Tensor, q: Tensor) -> Tensor:
    return judge_residual(q, p)


def _always(p: Tensor, q: Tensor, candidates: Tensor) -> Tensor:
    return torch.ones(len(candidates))


def _by_target_alone(p: Tensor, q: Tensor, candidates: Tensor) -> Tensor:
    return p.gather(1, candidates[:, None]).squeeze(1)


def _upside_down(p: Tensor, q: Tensor, candidates: Tensor) -> Tensor:
    return judge_acceptance(q, p, candidates)


def _count_all_accepted(p: Tensor, q: Tensor | None, *rest: Tensor) -> Verdict:
    """Goes on behind a refusal."""
    candidates, uniform, _ = rest
    if q is None or not len(candidates):
        return judge_rejection(p, q, *rest)
    passed = uniform < judge.acceptance(p[:-1], q, torch.tensor(candidates))
    return Verdict(int(passed.sum()), judge_rejection(p, q, *rest).token)


def _bonus_from_the_row_before(p: Tensor, q: Tensor | None, *rest: Tensor) -> Verdict:
    verdict = judge_rejection(p, q, *rest)
    if len(rest[0]) and verdict.accepted == len(rest[0]):
        return Verdict(verdict.accepted, int(judge.draw(p[-2:-1], rest[2][-1:])))
    return verdict


def _noise_of_the_first_row(p: Tensor, q: Tensor | None, *rest: Tensor) -> Verdict:
    candidates, uniform, noise = rest
    return judge_rejection(p, q, candidates, uniform, noise[:1].expand_as(noise))


def _unjudged_last_candidate(p: Tensor, q: Tensor | None, *rest: Tensor) -> Verdict:
    candidates, uniform, noise = rest
    return judge_rejection(p, q, candidates, torch.cat([uniform[:-1], uniform[-1:] * 0]), noise)


judge_residual, judge_acceptance, judge_rejection = (
    judge.residual,
    judge.acceptance,
    judge.rejection,
)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("residual", _draw_from_p),
        ("residual", _absolute_difference),
        ("residual", _other_way_round),
        ("acceptance", _always),
        ("acceptance", _by_target_alone),
        ("acceptance", _upside_down),
        ("rejection", _count_all_accepted),
        ("rejection", _bonus_from_the_row_before),
        ("rejection", _noise_of_the_first_row),
        ("rejection", _unjudged_last_candidate),
    ],
)
def test_enumeration_notices_a_wrong_judge(
    name: str, wrong: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an enumeration that would pass whatever the judge does."""
    monkeypatch.setattr(judge, name, wrong)
    with pytest.raises(AssertionError):
        check_exact(*PAIRS["sharp"], 2)


# Edges of the parts


def test_residual_of_equal_distributions_is_the_target_itself() -> None:
    """Catches a division by zero where `p` and `q` are one up to rounding."""
    p = torch.tensor([0.5, 0.5, 0.0])
    assert judge.residual(p, p.clone()).tolist() == p.tolist()


def test_a_candidate_the_target_excludes_is_never_accepted() -> None:
    """Catches `<=` in place of `<`: a uniform number of exactly 0 occurs."""
    p = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    q = torch.tensor([[1.0, 0.0]])
    uniform = torch.zeros(1, dtype=torch.float64)
    assert judge.rejection(p, q, [0], uniform, torch.ones(2, 2)) == Verdict(0, 1)


def test_a_candidate_as_likely_as_drafted_is_always_accepted() -> None:
    """Catches a comparison that refuses at the largest number below 1."""
    p = torch.tensor([[0.3, 0.7], [0.5, 0.5]])
    uniform = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert judge.rejection(p, p[:1].clone(), [0], uniform, torch.ones(2, 2)).accepted == 1


# Coupled


@st.composite
def judged_rows(draw: st.DrawFn) -> tuple[Tensor, list[int], Tensor]:
    """`p` of some rows, candidates for all but the last, and noise for each."""
    length = draw(st.integers(0, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    make = draw(st.sampled_from([dense, sharp, sparse, one_hot]))
    p = torch.stack([make(generator) for _ in range(length + 1)])
    noise = torch.empty(length + 1, V, dtype=torch.float64).exponential_(generator=generator)
    plain = judge.draw(p, noise).tolist()
    wrong = draw(st.lists(st.sampled_from([0, 0, 1, 2, 3]), min_size=length, max_size=length))
    candidates = [(token + by) % V for token, by in zip(plain[:-1], wrong, strict=True)]
    return p, candidates, noise


@given(judged_rows())
@settings(deadline=None, max_examples=200)
def test_coupled_settles_plain_sampling_whatever_the_candidates(
    rows: tuple[Tensor, list[int], Tensor],
) -> None:
    """Catches a candidate that changes the text, and one refused though it was right."""
    p, candidates, noise = rows
    plain = [int(judge.draw(row[None], own[None])) for row, own in zip(p, noise, strict=True)]
    verdict = judge.coupled(p, candidates, noise)
    settled = [*candidates[: verdict.accepted], verdict.token]
    assert settled == plain[: len(settled)]
    if verdict.accepted < len(candidates):
        assert candidates[verdict.accepted] != plain[verdict.accepted]


@given(judged_rows())
@settings(deadline=None, max_examples=100)
def test_judges_agree_at_temperature_zero(rows: tuple[Tensor, list[int], Tensor]) -> None:
    """Catches a second path for greedy decoding: one-hot rows need no noise and no uniforms."""
    scores, candidates, noise = rows
    p = torch.zeros_like(scores).scatter_(1, scores.argmax(-1, keepdim=True), 1.0)
    q = torch.eye(V, dtype=p.dtype)[candidates] if candidates else None
    uniform = torch.linspace(0, 0.999, len(candidates), dtype=torch.float64)
    coupled = judge.coupled(p, candidates, None)
    assert judge.rejection(p, q, candidates, uniform, None) == coupled
    assert judge.coupled(p, candidates, noise) == coupled
    assert judge.rejection(p, q, candidates, uniform, noise) == coupled


@pytest.mark.parametrize("make", [dense, sharp, sparse])
def test_coupled_draws_from_the_target(make: Callable[[torch.Generator], Tensor]) -> None:
    """Catches a race run on anything but `p / e`: each token wins by the margin alone."""
    p = make(torch.Generator().manual_seed(3))
    for token in range(V):
        tie = torch.where(p > 0, p, torch.ones_like(p))
        under, over = tie.clone(), tie.clone()
        under[token] *= 1 - MARGIN
        over[token] *= 1 + MARGIN
        assert (judge.coupled(p[None], [], under[None]).token == token) == bool(p[token] > 0)
        assert judge.coupled(p[None], [], over[None]).token != token
