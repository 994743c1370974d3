"""The methods that `bench` compares: each decodes one prompt, ids to ids, and is timed.

All of them are timed alike: from the prompt's ids to the last new id, prefill included and no text
decoded. Which prompts they meet, in which order, is left to `measure.py`.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from passlm.cache import RowCache
from passlm.compiled import CompiledPasses
from passlm.costs import Costs
from passlm.decode import Decoder, Request
from passlm.errors import InputError
from passlm.generate import Generator, Options
from passlm.lookahead import LookAhead
from passlm.outputs import Stats
from passlm.params import SamplingParams, StopParams
from passlm.passes import LookAheadRows, PassOutput, PassRow
from passlm.plan import Adaptive, Strategy, strategy
from passlm.planner import CostCurve
from passlm.quantize import quantized
from passlm.target import Target

BASELINE = "ar"
METHODS = (
    *(BASELINE, "fixed-token", "two-pass", "one-pass", "auto", "lookup"),
    *("hf", "hf-prompt-lookup"),
)
LOOKUP_TOKENS = 10  # candidates of transformers' prompt lookup
# The others run for each number of look-ahead tokens.
_ONCE_PER_TEMPERATURE = (BASELINE, "auto", "lookup", "hf", "hf-prompt-lookup")


class MethodError(InputError):
    """A method that does not exist or cannot run with this model; one line."""


@dataclass(frozen=True)
class Record:
    """One prompt decoded by one method.

    Attributes:
        tokens: the new ids.
        seconds: from the prompt's ids to the last new id, prefill included.
        stats: counts of the passes; None for methods that are not ours.
        forward_seconds: time of the decoding passes inside the target's forward; None where it
            cannot be told without disturbing the run.
        first_token_seconds: until the first new id, prefill included.
        rows: that were computed after the prompt, for each text as many as for the longest; None
            for methods that are not ours.
        turns: of a chat, for each turn behind the first, its ids and how many new ids lie before
            its answer.
        positions: of each new id, where it stood among the candidates, 0 for one that was drawn;
            none for methods that are not ours.
    """

    tokens: tuple[int, ...]
    seconds: float
    stats: Stats | None = None
    forward_seconds: float | None = None
    first_token_seconds: float | None = None
    rows: int | None = None
    turns: tuple[tuple[tuple[int, ...], int], ...] = ()
    positions: tuple[int, ...] = ()

    @property
    def answers(self) -> list[tuple[int, ...]]:
        """The new ids of each turn."""
        starts = [0, *(start for _, start in self.turns), len(self.tokens)]
        return [self.tokens[start:end] for start, end in pairwise(starts)]

    def then(self, prompt: Sequence[int], later: Record) -> Record:
        """This and a further turn of the chat as one record.

        Args:
            prompt: ids of the further turn, those of this one included.
            later: what was made of it.
        """
        stats = None
        if self.stats is not None and later.stats is not None:
            stats = Stats.total([self.stats, later.stats])
        return Record(
            self.tokens + later.tokens,
            self.seconds + later.seconds,
            stats,
            _sum(self.forward_seconds, later.forward_seconds),
            self.first_token_seconds,
            _sum(self.rows, later.rows),
            (*self.turns, (tuple(prompt), len(self.tokens))),
            self.positions + later.positions,
        )


N = TypeVar("N", int, float)


def _sum(a: N | None, b: N | None) -> N | None:
    return None if a is None or b is None else a + b


Decode = Callable[[Sequence[int], SamplingParams, int], Record]
"""Decodes one prompt: its ids, how to draw, and at most how many new tokens."""


@dataclass(frozen=True)
class Method:
    """One way of decoding, with everything that tells it from the others.

    Attributes:
        name: one of `METHODS`.
        plan: its strategy in words; None for methods that are not ours.
        sampling: how tokens are drawn; the seed is given with each prompt.
        lookahead_tokens: length of the look-ahead groups, `L`; 0 without.
        decode: what does it.
        other_weights: it decodes another model than the baseline, since that one's is rounded.
    """

    name: str
    plan: str | None
    sampling: SamplingParams
    lookahead_tokens: int
    decode: Decode
    other_weights: bool = False

    def __call__(self, prompt: Sequence[int], seed: int, max_new_tokens: int) -> Record:
        """Decode one prompt."""
        return self.decode(prompt, replace(self.sampling, seed=seed), max_new_tokens)

    @property
    def repeats_plain(self) -> bool:
        """Whether its tokens must equal plain decoding's with the same seed, up to rounding."""
        if self.other_weights:
            return False
        if self.sampling.temperature == 0 or self.name == BASELINE:
            return True
        return self.plan is not None and self.sampling.judge == "coupled"


class TimedTarget(Target):
    """A target that adds up the `seconds` spent in the model's own forward, and the `rows`."""

    def __init__(self, model: PreTrainedModel, pack: bool, compiled: Path | None = None) -> None:
        super().__init__(model, pack, compiled)
        self.seconds = 0.0
        self.rows = 0

    def run(
        self, cache: RowCache, rows: Sequence[PassRow], look_ahead: LookAheadRows | None
    ) -> PassOutput:
        """See `Target`."""
        self.rows += len(rows) * max(row.plan.rows for row in rows)
        return super().run(cache, rows, look_ahead)

    @property
    def can_time(self) -> bool:
        """Whether a pass is over when `run` returns; elsewhere waiting for it would slow it."""
        return self.device.type == "cpu"

    def _call_model(self, **inputs: Any) -> Any:
        begun = time.perf_counter()
        output = super()._call_model(**inputs)
        self.seconds += time.perf_counter() - begun
        return output

    def _call_compiled(self, compiled: CompiledPasses, *inputs: Any) -> Tensor:
        begun = time.perf_counter()
        output = super()._call_compiled(compiled, *inputs)
        self.seconds += time.perf_counter() - begun
        return output


@dataclass(frozen=True)
class PlanDecoding:
    """Decoding by plans: every method of ours."""

    target: TimedTarget
    plans: Callable[[int], Strategy | Adaptive]  # given how many tokens a text has half-way
    look_ahead: LookAheadRows | None
    eos: frozenset[int]
    ignore_eos: bool
    costs: Costs | None = None

    def __call__(
        self, prompt: Sequence[int], sampling: SamplingParams, max_new_tokens: int
    ) -> Record:
        """See `Decode`."""
        stats = Stats(prompt_tokens=len(prompt))
        tokens: list[int] = []
        positions: list[int] = []
        plans = self.plans(len(prompt) + max_new_tokens // 2)  # may measure what passes cost
        begun = time.perf_counter()
        decoder = Decoder(self.target, self.look_ahead)
        decoder.join(Request.of(prompt, sampling, max_new_tokens, plans, self.eos, self.ignore_eos))
        in_forward, rows = self.target.seconds, self.target.rows
        prefilled = time.perf_counter()
        first = None
        while decoder.rows:
            for _, step in decoder.step():
                tokens += step.tokens
                positions += range(1, 1 + step.accepted)
                positions += [0] * (len(step.tokens) - step.accepted)
                stats.count(step)
            first = first or time.perf_counter() - begun
        ended = time.perf_counter()
        stats.prefill_seconds, stats.decode_seconds = prefilled - begun, ended - prefilled
        forward = self.target.seconds - in_forward if self.target.can_time else None
        rows = self.target.rows - rows
        return Record(
            tuple(tokens),
            ended - begun,
            stats,
            forward,
            first,
            rows,
            positions=tuple(positions),
        )


class _FirstToken(BaseStreamer):
    """Looks at the clock when the first new id comes."""

    told: float | None = None
    _prompt = True

    def put(self, value: Tensor) -> None:
        """The prompt comes first."""
        if self._prompt:
            self._prompt = False
        elif self.told is None:
            self.told = time.perf_counter()

    def end(self) -> None:
        """Nothing is kept."""


@dataclass(frozen=True)
class TransformersGenerate:
    """Transformers' own `generate` with the same settings, on the model as it was loaded."""

    model: PreTrainedModel
    eos: frozenset[int]
    ignore_eos: bool
    lookup_tokens: int | None = None

    def __call__(
        self, prompt: Sequence[int], sampling: SamplingParams, max_new_tokens: int
    ) -> Record:
        """See `Decode`."""
        options = self._options(sampling)
        model: Any = self.model
        torch.manual_seed(sampling.seed or 0)
        first = _FirstToken()
        begun = time.perf_counter()
        ids = torch.tensor([list(prompt)], device=self.model.device)
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            streamer=first,
            **options,
        )
        tokens = tuple(written[0, len(prompt) :].tolist())
        seconds = time.perf_counter() - begun
        return Record(tokens, seconds, first_token_seconds=first.told and first.told - begun)

    def _options(self, sampling: SamplingParams) -> dict[str, Any]:
        """Every setting named, since `generate` fills gaps from the model's own settings."""
        options: dict[str, Any] = {
            "do_sample": sampling.temperature > 0,
            "num_beams": 1,
            "use_cache": True,
            "repetition_penalty": sampling.repetition_penalty,
            "min_new_tokens": sampling.min_new_tokens or None,
            "eos_token_id": None if self.ignore_eos else sorted(self.eos) or None,
            "pad_token_id": min(self.eos, default=0),  # unused in a batch of one
        }
        if self.lookup_tokens is not None:
            options["prompt_lookup_num_tokens"] = self.lookup_tokens
        if sampling.temperature > 0:
            options |= {
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
                "min_p": sampling.min_p or None,
            }
        return options


def check_names(names: Sequence[str]) -> None:
    """Make sure that the methods exist.

    Raises:
        MethodError: one does not; names the nearest.
    """
    for name in names:
        if name not in METHODS:
            near = difflib.get_close_matches(name, METHODS, 1)
            hint = f"did you mean {near[0]!r}?" if near else "give one of them"
            raise MethodError(f"there is no method {name!r} ({', '.join(METHODS)}): {hint}")


@dataclass(frozen=True)
class Asked:
    """Which methods to compare.

    Attributes:
        names: of `METHODS`.
        temperatures: each method runs at each.
        lookahead_tokens: each drafting method runs with each.
        sampling: everything about drawing but temperature and seed.
        stopping: when texts end; stop strings are not looked at.
    """

    names: tuple[str, ...]
    temperatures: tuple[float, ...]
    lookahead_tokens: tuple[int, ...]
    sampling: SamplingParams
    stopping: StopParams


def build(
    lm: Generator,
    asked: Asked,
    base_model: str,
    pack: bool = False,
    compiled: Path | None = None,
    quantize: str | None = None,
) -> list[Method]:
    """The methods, one for each temperature and number of look-ahead tokens.

    Args:
        lm: model and look-ahead files.
        asked: which methods.
        base_model: the model's name.
        pack: whether our methods compute with packed weights, see `Target`.
        compiled: where our methods find compiled passes, see `Target`; None to compute eagerly.
        quantize: what our methods' weights are rounded to, see `quantized`; None takes the model
            itself, as transformers' methods always do.

    Raises:
        MethodError: an unknown method, or a model without a token for `fixed-token`.
        InputError: a drafting method without look-ahead files, or with too few rows.
    """
    check_names(asked.names)
    model = lm.target.model
    target = TimedTarget(model if quantize is None else quantized(model, quantize), pack, compiled)
    made = []
    for temperature in asked.temperatures:
        sampling = replace(asked.sampling, temperature=temperature)
        for name in asked.names:
            for tokens in (0,) if name in _ONCE_PER_TEMPERATURE else asked.lookahead_tokens:
                decode, plan = _decoding(name, tokens, lm, target, asked.stopping, base_model)
                other = plan is None and quantize is not None
                made.append(Method(name, plan, sampling, tokens, decode, other))
    return made


def baseline_target(methods: Sequence[Method]) -> Target:
    """What plain decoding among the methods runs on, as all of ours do."""
    decode = next(method.decode for method in methods if method.name == BASELINE)
    assert isinstance(decode, PlanDecoding), "plain decoding is ours"
    return decode.target


def cost_curve(methods: Sequence[Method], context: int) -> CostCurve | None:
    """What passes cost, as `auto` knows it; None without that method."""
    for method in methods:
        if method.name == "auto" and isinstance(method.decode, PlanDecoding):
            costs = method.decode.costs
            return None if costs is None else costs.curve(1, context)
    return None


def _decoding(
    name: str,
    tokens: int,
    lm: Generator,
    target: TimedTarget,
    stopping: StopParams,
    base_model: str,
) -> tuple[Decode, str | None]:
    """What decodes, and its plan in words."""
    if name in ("hf", "hf-prompt-lookup"):
        count = None if name == "hf" else LOOKUP_TOKENS
        return TransformersGenerate(lm.target.model, lm.eos, stopping.ignore_eos, count), None
    if name in ("auto", "lookup"):
        return _adaptive(name, lm, target, stopping), name
    rows: LookAhead | None = None
    kind = name
    if name == "fixed-token":
        kind = "two-pass"
        rows = _fixed_rows(lm, target, tokens, base_model)
    elif name != BASELINE:
        rows = lm.look_ahead
        Options.checked(rows, SamplingParams(), stopping, name, tokens)
    inputs = None if rows is None else rows.rows(target)
    fixed = strategy(kind, tokens)
    decode = PlanDecoding(target, lambda _: fixed, inputs, lm.eos, stopping.ignore_eos)
    return decode, kind if kind == BASELINE else f"{kind}({tokens})"


def _adaptive(name: str, lm: Generator, target: TimedTarget, stopping: StopParams) -> PlanDecoding:
    """Plans chosen from measured costs; `lookup` has no look-ahead rows to choose."""
    look_ahead = lm.look_ahead if name == "auto" else None
    rows = None if look_ahead is None else look_ahead.rows(target)
    costs = Costs(target, look_ahead, rows)
    return PlanDecoding(
        target, lambda context: costs.auto(1, context), rows, lm.eos, stopping.ignore_eos, costs
    )


def _fixed_rows(lm: Generator, target: Target, tokens: int, base_model: str) -> LookAhead:
    if tokens < 1:
        raise MethodError(f"fixed-token needs 1 or more look-ahead tokens, not {tokens}")
    token: Any = lm.tokenizer.unk_token_id
    if token is None:
        token = lm.tokenizer.eos_token_id
    if token is None:
        raise MethodError(
            "method fixed-token puts the unknown or end token in every look-ahead row, and this "
            "tokenizer has neither: leave the method out"
        )
    return LookAhead.fixed_token(target, int(token), tokens, base_model)
