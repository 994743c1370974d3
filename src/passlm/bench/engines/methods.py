"""The methods that `bench` compares: each decodes one prompt, ids to ids, and is timed.

All of them are timed alike: from the prompt's ids to the last new id, prefill included and no text
decoded. Those of ours also decode several prompts as one batch. How they do it is left to
`decoding.py`, how others decode to `hugging_face.py` and `external.py`; which prompts they meet, in
which order, to `bench/measuring/measure.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from passlm.bench.engines.decoding import Decode, MethodError, PlanDecoding, Record, TimedTarget
from passlm.bench.engines.external import ENGINES, Engine, EngineDecoding
from passlm.bench.engines.hugging_face import (
    ASSISTED,
    LOOKUP_TOKENS,
    TransformersGenerate,
    check_assistant,
)
from passlm.decoding.strategies import ByHead, strategy
from passlm.generate import Generator, Options
from passlm.layers.int8 import quantized
from passlm.lookahead.trained import LookAhead
from passlm.model.target import Target
from passlm.params import SamplingParams, StopParams
from passlm.planning.cost_curve import CostCurve
from passlm.planning.kept_costs import Costs

BASELINE = "ar"
# Ours decode several prompts as one batch, too.
OURS = (BASELINE, "fixed-token", "two-pass", "one-pass", "draft-head", "auto", "lookup")
THEIRS = ("hf", "hf-prompt-lookup", ASSISTED)
METHODS = (*OURS, *THEIRS, *ENGINES)
# The others run for each number of look-ahead tokens.
_ONCE_PER_TEMPERATURE = (BASELINE, "auto", "lookup", *THEIRS, *ENGINES)


@dataclass(frozen=True)
class Method:
    """One way of decoding, with everything that tells it from the others.

    Attributes:
        name: one of `METHODS`.
        plan: its strategy in words; None for methods that are not ours.
        sampling: how tokens are drawn; the seed is given with each prompt.
        lookahead_tokens: length of the look-ahead groups, `L`; 0 without.
        decode: what does it.
        other_weights: it decodes another model than the baseline: only one of them is rounded, or
            another engine computes with its own kernels.
        batch_size: prompts that are decoded as one batch.
        engine: another engine's name, version and precision; None for this process.
    """

    name: str
    plan: str | None
    sampling: SamplingParams
    lookahead_tokens: int
    decode: Decode
    other_weights: bool = False
    batch_size: int = 1
    engine: str | None = None

    def __call__(self, prompt: Sequence[int], seed: int, max_new_tokens: int) -> Record:
        """Decode one prompt."""
        return self.decode(prompt, replace(self.sampling, seed=seed), max_new_tokens)

    def prepare(self, tokens: Iterable[int]) -> None:
        """Measure what passes cost behind so many tokens, where plans are chosen by it."""
        if isinstance(self.decode, PlanDecoding):
            for count in tokens:
                self.decode.plans(self.batch_size, count)

    def batch(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_new_tokens: int
    ) -> list[Record]:
        """Decode as many prompts as `batch_size` says as one batch, each with its own seed."""
        if self.batch_size == 1:
            return [self(prompts[0], seeds[0], max_new_tokens)]
        assert isinstance(self.decode, PlanDecoding), "only our methods decode batches"
        sampling = [replace(self.sampling, seed=seed) for seed in seeds]
        return self.decode.batch(prompts, sampling, max_new_tokens)

    @property
    def repeats_plain(self) -> bool:
        """Whether its tokens must equal plain decoding's with the same seed, up to rounding."""
        if self.other_weights:
            return False
        if self.sampling.temperature == 0 or self.name == BASELINE:
            return True
        return self.plan is not None and self.sampling.judge == "coupled"


def check_names(names: Sequence[str], batch_sizes: Sequence[int] = (1,)) -> None:
    """Make sure that the methods exist and each can run at one of the batch sizes.

    Raises:
        MethodError: one does not, and names the nearest; or cannot.
    """
    for name in names:
        if name not in METHODS:
            near = difflib.get_close_matches(name, METHODS, 1)
            hint = f"did you mean {near[0]!r}?" if near else "give one of them"
            raise MethodError(f"there is no method {name!r} ({', '.join(METHODS)}): {hint}")
    if min(batch_sizes) < 1:
        raise MethodError(f"batch size is {min(batch_sizes)}: it must be 1 or more")
    alone = [name for name in names if name not in OURS]
    if alone and 1 not in batch_sizes:
        raise MethodError(
            f"{', '.join(alone)} decode one prompt at a time: add 1 to --batch-size, or name "
            "--methods without them"
        )


@dataclass(frozen=True)
class Asked:
    """Which methods to compare.

    Attributes:
        names: of `METHODS`.
        temperatures: each method runs at each.
        lookahead_tokens: each drafting method runs with each.
        sampling: everything about drawing but temperature and seed.
        stopping: when texts end; stop strings are not looked at.
        batch_sizes: our methods run at each, the others at 1.
    """

    names: tuple[str, ...]
    temperatures: tuple[float, ...]
    lookahead_tokens: tuple[int, ...]
    sampling: SamplingParams
    stopping: StopParams
    batch_sizes: tuple[int, ...] = (1,)

    @property
    def variants(self) -> list[tuple[str, int]]:
        """Names, each with its numbers of look-ahead tokens; 0 where it has none."""
        return [
            (name, tokens)
            for name in self.names
            for tokens in ((0,) if name in _ONCE_PER_TEMPERATURE else self.lookahead_tokens)
        ]


@dataclass(frozen=True)
class Others:
    """What methods that are not ours decode with.

    Attributes:
        assistant: the draft model of `hf-assistant`; None without that method.
        engines: those that run, each by the name of its method.
    """

    assistant: PreTrainedModel | None = None
    engines: Mapping[str, Engine] = field(default_factory=dict)


def build(
    lm: Generator,
    asked: Asked,
    base_model: str,
    pack: bool = False,
    compiled: Path | None = None,
    quantize: str | None = None,
    others: Others | None = None,
) -> list[Method]:
    """The methods, one for each batch size, temperature and number of look-ahead tokens.

    Args:
        lm: model and look-ahead files.
        asked: which methods.
        base_model: the model's name.
        pack: whether our methods compute with packed weights, see `Target`.
        compiled: where our methods find compiled passes, see `Target`; None to compute eagerly.
        quantize: what our methods' weights are rounded to, see `quantized`; None takes the model
            itself, as transformers' methods always do.
        others: a draft model and engines; None where no method needs them.

    Raises:
        MethodError: an unknown method, or a model without a token for `fixed-token`.
        InputError: a drafting method without look-ahead files, or with too few rows.
    """
    check_names(asked.names, asked.batch_sizes)
    others = others or Others()
    check_assistant(asked.names, others.assistant)
    model = lm.target.model
    target = TimedTarget(model if quantize is None else quantized(model, quantize), pack, compiled)
    target.expect(None if lm.look_ahead is None else lm.look_ahead.rows(target))
    made = []
    for name, tokens in asked.variants:
        if name in OURS:
            decode, plan = _decoding(name, tokens, lm, target, asked.stopping, base_model)
            made.append(Method(name, plan, asked.sampling, tokens, decode))
            continue
        decode = _other(name, lm, asked.stopping, others)
        engine = decode.engine.title if isinstance(decode, EngineDecoding) else None
        differs = engine is not None or quantize is not None
        made.append(Method(name, None, asked.sampling, 0, decode, differs, engine=engine))
    return [
        replace(one, sampling=replace(one.sampling, temperature=temperature), batch_size=size)
        for size, temperature, one in product(asked.batch_sizes, asked.temperatures, made)
        if size == 1 or one.name in OURS
    ]


def baseline_target(methods: Sequence[Method]) -> Target:
    """What plain decoding among the methods runs on, as all of ours do."""
    decode = next(method.decode for method in methods if method.name == BASELINE)
    assert isinstance(decode, PlanDecoding), "plain decoding is ours"
    return decode.target


def engine_facts(methods: Sequence[Method]) -> dict[str, dict[str, Any]]:
    """Of each other engine, what it is, how long it loaded, and the cores it kept busy at rest."""
    return {
        method.name: {
            "engine": method.engine,
            "load_seconds": method.decode.engine.load_seconds,
            "idle_cores": method.decode.engine.idle_cores,
        }
        for method in methods
        if isinstance(method.decode, EngineDecoding)
    }


def cost_curve(methods: Sequence[Method], context: int) -> CostCurve | None:
    """What passes cost, as `auto` knows it; None without that method."""
    for method in methods:
        if method.name == "auto" and isinstance(method.decode, PlanDecoding):
            costs = method.decode.costs
            return None if costs is None else costs.curve(method.batch_size, context)
    return None


def _decoding(
    name: str,
    tokens: int,
    lm: Generator,
    target: TimedTarget,
    stopping: StopParams,
    base_model: str,
) -> tuple[Decode, str | None]:
    """What decodes of ours, and its plan in words."""
    if name in ("auto", "lookup"):
        return _adaptive(name, lm, target, stopping), name
    rows: LookAhead | None = None
    kind = name
    if name == "fixed-token":
        kind = "two-pass"
        rows = _fixed_rows(lm, target, tokens, base_model)
    elif name == "draft-head":
        rows = lm.look_ahead
        check_head(rows, tokens)
    elif name != BASELINE:
        rows = lm.look_ahead
        Options.checked(rows, SamplingParams(), stopping, name, tokens)
    inputs = None if rows is None else rows.rows(target)
    fixed = ByHead(tokens) if name == "draft-head" else strategy(kind, tokens)
    decode = PlanDecoding(target, lambda *_: fixed, inputs, lm.eos, stopping.ignore_eos)
    return decode, kind if kind == BASELINE else f"{kind}({tokens})"


def check_head(rows: LookAhead | None, tokens: int) -> None:
    """Make sure that there is a draft head that guesses so many tokens.

    Raises:
        MethodError: there is none, or it guesses fewer.
    """
    if rows is None or rows.head is None:
        raise MethodError(
            "method draft-head drafts with a draft head and none is loaded: take other "
            "--lookahead files, or train one with 'passlm train --kind head'"
        )
    if not 1 <= tokens <= rows.head.depths:
        raise MethodError(
            f"method draft-head with {tokens} tokens: these files' head guesses 1 to "
            f"{rows.head.depths}, give so many with --lookahead-tokens"
        )


def _other(name: str, lm: Generator, stopping: StopParams, others: Others) -> Decode:
    """What decodes and is not ours."""
    if name in ENGINES:
        return EngineDecoding(others.engines[name], lm.eos, stopping.ignore_eos)
    lookup = LOOKUP_TOKENS if name == "hf-prompt-lookup" else None
    assistant = others.assistant if name == ASSISTED else None
    return TransformersGenerate(lm.target.model, lm.eos, stopping.ignore_eos, lookup, assistant)


def _adaptive(name: str, lm: Generator, target: TimedTarget, stopping: StopParams) -> PlanDecoding:
    """Plans chosen from measured costs; `lookup` has no look-ahead rows to choose."""
    look_ahead = lm.look_ahead if name == "auto" else None
    rows = None if look_ahead is None else look_ahead.rows(target)
    costs = Costs(target, look_ahead, rows)
    return PlanDecoding(target, costs.auto, rows, lm.eos, stopping.ignore_eos, costs)


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
