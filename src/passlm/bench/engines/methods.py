"""Build the methods that `bench` compares; each decodes token ids to token ids and is timed.

All methods are timed in the same way: from the prompt's ids to the last new id, including prefill
and excluding detokenization. passlm's own methods can also decode several prompts as one batch.
`decoding.py`, `hugging_face.py` and `external.py` implement the decoding;
`bench/measuring/measure.py` decides the order of the prompts.
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
# passlm's own methods, which can decode several prompts as one batch.
OURS = (BASELINE, "fixed-token", "two-pass", "one-pass", "draft-head", "auto", "lookup")
THEIRS = ("hf", "hf-prompt-lookup", ASSISTED)
METHODS = (*OURS, *THEIRS, *ENGINES)
# All other methods run once for each number of look-ahead tokens.
_ONCE_PER_TEMPERATURE = (BASELINE, "auto", "lookup", *THEIRS, *ENGINES)


@dataclass(frozen=True)
class Method:
    """One way of decoding, with all its settings.

    Attributes:
        name: one of `METHODS`.
        plan: its strategy in words; None for methods other than passlm's own.
        sampling: sampling parameters; the seed is given with each prompt.
        lookahead_tokens: length of the look-ahead groups, `L`; 0 if there are none.
        decode: the function that decodes.
        other_weights: whether its weights or kernels differ from the baseline's, because only one
            of the two is quantized or because another engine computes.
        batch_size: number of prompts decoded as one batch.
        engine: name, version and precision of another engine; None for methods that run in this
            process.
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
        """Measure the cost curves that the method chooses plans from, if it does.

        Args:
            tokens: context lengths to measure at.
        """
        if isinstance(self.decode, PlanDecoding):
            for count in tokens:
                self.decode.plans(self.batch_size, count)

    def batch(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_new_tokens: int
    ) -> list[Record]:
        """Decode `batch_size` prompts as one batch, each with its own seed."""
        if self.batch_size == 1:
            return [self(prompts[0], seeds[0], max_new_tokens)]
        assert isinstance(self.decode, PlanDecoding), "only our methods decode batches"
        sampling = [replace(self.sampling, seed=seed) for seed in seeds]
        return self.decode.batch(prompts, sampling, max_new_tokens)

    @property
    def repeats_plain(self) -> bool:
        """True if its tokens must equal those of plain decoding with the same seed.

        Rounding may still make them differ where two tokens nearly tie.
        """
        if self.other_weights:
            return False
        if self.sampling.temperature == 0 or self.name == BASELINE:
            return True
        return self.plan is not None and self.sampling.judge == "coupled"


def check_names(names: Sequence[str], batch_sizes: Sequence[int] = (1,)) -> None:
    """Check that the methods exist and that each can run at one of the batch sizes.

    Raises:
        MethodError: a method does not exist (the message suggests the closest name), a batch size
            is below 1, or a method needs batch size 1 and that is not among them.
    """
    for name in names:
        if name not in METHODS:
            near = difflib.get_close_matches(name, METHODS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            known = ", ".join(METHODS)
            raise MethodError(f"unknown method {name!r}: expected one of {known}{hint}")
    if min(batch_sizes) < 1:
        raise MethodError(f"batch size is {min(batch_sizes)}: it must be 1 or more")
    alone = [name for name in names if name not in OURS]
    if alone and 1 not in batch_sizes:
        raise MethodError(
            f"{', '.join(alone)} can only decode one prompt at a time: add 1 to --batch-size, or "
            "give --methods without them"
        )


@dataclass(frozen=True)
class Asked:
    """The methods and settings to compare.

    Attributes:
        names: names from `METHODS`.
        temperatures: each method runs at each temperature.
        lookahead_tokens: each drafting method runs with each number of look-ahead tokens.
        sampling: all other sampling parameters; its temperature and seed are ignored.
        stopping: when sequences end; stop strings are ignored.
        batch_sizes: passlm's own methods run at each batch size, the others only at 1.
    """

    names: tuple[str, ...]
    temperatures: tuple[float, ...]
    lookahead_tokens: tuple[int, ...]
    sampling: SamplingParams
    stopping: StopParams
    batch_sizes: tuple[int, ...] = (1,)

    @property
    def variants(self) -> list[tuple[str, int]]:
        """Pairs of name and number of look-ahead tokens, which is 0 for methods without them."""
        return [
            (name, tokens)
            for name in self.names
            for tokens in ((0,) if name in _ONCE_PER_TEMPERATURE else self.lookahead_tokens)
        ]


@dataclass(frozen=True)
class Others:
    """Models and engines that methods other than passlm's own need.

    Attributes:
        assistant: the draft model of `hf-assistant`; None without that method.
        engines: the running engines by method name.
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
    """Return the methods, one for each batch size, temperature and number of look-ahead tokens.

    `pack`, `compiled` and `quantize` apply to passlm's own methods only.

    Args:
        lm: the model, with its look-ahead files if it has any.
        asked: the methods and settings to compare.
        base_model: the model's name.
        pack: whether to compute with packed weights; see `Target`.
        compiled: folder of the compiled passes; see `Target`. None to compute eagerly.
        quantize: data type to quantize the weights to; see `quantized`. None to use the model as it
            is, which transformers' methods always do.
        others: the draft model and the engines; None if no method needs them.

    Raises:
        MethodError: a method is unknown, needs a draft model that is not given, or is `fixed-token`
            or `draft-head` and cannot run with this model and these look-ahead files.
        InputError: a drafting method has no look-ahead files, or they have too few rows.
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
    """Return the target of plain decoding, which all of passlm's own methods share."""
    decode = next(method.decode for method in methods if method.name == BASELINE)
    assert isinstance(decode, PlanDecoding), "plain decoding is one of passlm's own methods"
    return decode.target


def engine_facts(methods: Sequence[Method]) -> dict[str, dict[str, Any]]:
    """Return the title, loading time and idle processor use of each other engine, by method."""
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
    """Return the cost curve that `auto` uses at a context length; None without that method."""
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
    """Return the decoding of one of passlm's own methods, and its plan in words."""
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
    """Check that the look-ahead files have a draft head that can propose `tokens` tokens.

    Raises:
        MethodError: there is no draft head, or it proposes fewer tokens.
    """
    if rows is None or rows.head is None:
        raise MethodError(
            "method draft-head needs a draft head and none is loaded: give other --lookahead "
            "files, or train one with 'passlm train --kind head'"
        )
    if not 1 <= tokens <= rows.head.depths:
        raise MethodError(
            f"method draft-head cannot propose {tokens} tokens: the draft head of these files "
            f"proposes 1 to {rows.head.depths}; change --lookahead-tokens"
        )


def _other(name: str, lm: Generator, stopping: StopParams, others: Others) -> Decode:
    """Return the decoding of a method that is not one of passlm's own."""
    if name in ENGINES:
        return EngineDecoding(others.engines[name], lm.eos, stopping.ignore_eos)
    lookup = LOOKUP_TOKENS if name == "hf-prompt-lookup" else None
    assistant = others.assistant if name == ASSISTED else None
    return TransformersGenerate(lm.target.model, lm.eos, stopping.ignore_eos, lookup, assistant)


def _adaptive(name: str, lm: Generator, target: TimedTarget, stopping: StopParams) -> PlanDecoding:
    """Return decoding with plans chosen from measured costs; `lookup` has no look-ahead rows."""
    look_ahead = lm.look_ahead if name == "auto" else None
    rows = None if look_ahead is None else look_ahead.rows(target)
    costs = Costs(target, look_ahead, rows)
    return PlanDecoding(target, costs.auto, rows, lm.eos, stopping.ignore_eos, costs)


def _fixed_rows(lm: Generator, target: Target, tokens: int, base_model: str) -> LookAhead:
    if tokens < 1:
        raise MethodError(f"fixed-token needs at least 1 look-ahead token, not {tokens}")
    token: Any = lm.tokenizer.unk_token_id
    if token is None:
        token = lm.tokenizer.eos_token_id
    if token is None:
        raise MethodError(
            "method fixed-token needs an unknown or end token for its look-ahead rows, and this "
            "tokenizer has neither: leave the method out"
        )
    return LookAhead.fixed_token(target, int(token), tokens, base_model)
