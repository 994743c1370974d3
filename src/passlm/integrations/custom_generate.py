"""PaSS inside transformers: a callable for `model.generate(..., custom_generate=...)`.

Transformers prepares ids, logits processors and stopping criteria, and then calls it instead of its
own sampling loop. This module repeats that loop's bookkeeping token by token. The passes themselves
are left to `decoding/decoder.py`, and rejecting unsupported options to `checks.py`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.stopping_criteria import EosTokenCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from passlm.decoding.decoder import Decoder
from passlm.decoding.distribution import TokenDistribution
from passlm.decoding.request import Request
from passlm.decoding.strategies import Adaptive, Strategy, strategy
from passlm.decoding.text import Row
from passlm.integrations.checks import GenerateError, refuse, seen_ids
from passlm.lookahead.card import LookAheadError
from passlm.lookahead.trained import LookAhead, load_for
from passlm.model.target import Target
from passlm.params import METHODS, Draft, Judge, ParameterError, SamplingParams
from passlm.planning.kept_costs import Costs

_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__

_log = logging.getLogger(__name__)


def custom_generate(
    *,
    lookahead: str | Path | LookAhead | None = None,
    method: str = "auto",
    lookahead_tokens: int | None = None,
    judge: Judge = "coupled",
    draft: Draft = "sampled",
    seed: int | None = None,
) -> CustomGenerate:
    """Return a callable for `model.generate(..., custom_generate=passlm.custom_generate())`.

    Greedy decoding gives the same tokens as `generate` (in 16-bit types except where two tokens
    nearly tie, because a pass of several rows can round differently). Sampling gives the same
    distribution. Several threads may decode with one model; their passes take turns. Other code
    that uses the model at the same time may see it while its layers are temporarily replaced.
    Left-padded batches, logits processors, stopping criteria, `num_return_sequences`, `streamer`
    and `return_dict_in_generate` work as in transformers, with these differences:

    - Transformers does not accept `stop_strings` together with a callable. Use
      `stopping_criteria=[StopStringCriteria(tokenizer, [...])]` instead.
    - Logits processors must be stateless and must treat batch rows independently.
    - A sequence that reaches the model's context length ends there, with a warning.
    - In `output_scores` and `output_logits`, finished rows assign probability 1 to the padding
      token.
    - The result has no key-value cache.

    Args:
        lookahead: a folder, the name of shipped files, a hub id, or a `LookAhead` in memory. None
            loads what ships for the model; if nothing does, `auto` drafts by prompt lookup only.
        method: `auto` chooses plans by the measured cost of passes on this machine (measured once);
            `two-pass`, `one-pass`, or `ar` for plain decoding without look-ahead files.
        lookahead_tokens: length of the look-ahead groups, the maximum for `auto`; None for the
            method's default.
        judge: `coupled` or `rejection`.
        draft: `greedy` or `sampled`.
        seed: random seed. None draws one from torch's global generator when sampling, so that
            `torch.manual_seed` and `transformers.set_seed` make the output reproducible. Each batch
            row gets a seed of its own, derived from this one.

    Returns:
        The callable. It can be reused for further calls and other models, and loads the look-ahead
        files once per model.

    Raises:
        InputError: an argument is outside its valid range.
    """
    if method not in METHODS:  # checked here, so that the error does not come from `generate`
        raise ParameterError(f"method is {method!r}: it must be one of {', '.join(METHODS)}")
    if method == "ar" and (lookahead is not None or lookahead_tokens is not None):
        raise ParameterError("method ar does not draft: leave lookahead and lookahead_tokens out")
    sampling = SamplingParams(judge=judge, draft=draft, seed=seed)
    return CustomGenerate(lookahead, method, lookahead_tokens, sampling)


@dataclass(frozen=True, eq=False)
class CustomGenerate:
    """Callable returned by `custom_generate`, which describes the fields."""

    lookahead: str | Path | LookAhead | None
    method: str
    lookahead_tokens: int | None
    sampling: SamplingParams
    _loaded: WeakKeyDictionary[PreTrainedModel, LookAhead | None] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False
    )

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool | None = None,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """Decode what transformers' `generate` has prepared; called by `generate`.

        Unlike `passlm.load`, this does not keep a packed copy of the weights.

        Raises:
            UnsupportedModelError: the model's architecture is not supported.
            GenerateError: an option of `generate` is not supported.
            LookAheadError: the look-ahead files are missing, damaged or made for another model.
            PromptError: a prompt is empty or longer than the model's context.
        """
        target = Target(model)
        handed_on = {"synced_gpus": synced_gpus, "streamer": streamer}
        given = _dropped_arguments(model) | {k: v for k, v in handed_on.items() if v is not None}
        refuse(generation_config, logits_processor, given, model_kwargs)
        call = _Call(
            input_ids,
            seen_ids(input_ids, model_kwargs),
            logits_processor,
            stopping_criteria,
            generation_config,
            given.get("streamer"),
        )
        call.check_padding(target.context)
        look_ahead = self._look_ahead(target)
        drafting = None if look_ahead is None else look_ahead.rows(target)
        plans = self._strategy(Costs(target, look_ahead, drafting), call)
        decoder = Decoder(target, drafting)
        rows = [decoder.join(request) for request in call.requests(plans, self.sampling)]
        return _Loop(call, decoder, rows).run()

    def _look_ahead(self, target: Target) -> LookAhead | None:
        if self.method == "ar":
            return None
        if target.model not in self._loaded:
            self._loaded[target.model] = self._load(target)
        return self._loaded[target.model]

    def _load(self, target: Target) -> LookAhead | None:
        if isinstance(self.lookahead, LookAhead):
            self.lookahead.check(target)
            return self.lookahead
        rows = load_for(target, self.lookahead)
        if rows is None and self.method == "auto" and self.lookahead_tokens is None:
            _log.warning(
                "no look-ahead files are shipped for this model: drafting by prompt lookup only; "
                "create look-ahead files with 'passlm train'"
            )
        elif rows is None:
            raise LookAheadError(
                "no look-ahead files are shipped for this model: give lookahead, create look-ahead "
                "files with 'passlm train', or use method='ar'"
            )
        return rows

    def _strategy(self, costs: Costs, call: _Call) -> Strategy | Adaptive:
        rows, length = costs.look_ahead, 0
        if rows is not None:
            length = rows.group_length(self.lookahead_tokens, self.method)
        if self.method != "auto":
            return strategy(self.method, length)
        batch, context = call.ids.shape
        return costs.auto(batch, context, length)


def _seeds(seed: int | None, rows: int) -> list[int]:
    """Return one seed per batch row: the first is the given one, the others are hashed from it."""
    first = int(torch.randint(2**63 - 1, ())) if seed is None else seed
    others = [np.random.SeedSequence([first, row]) for row in range(1, rows)]
    return [first, *(int(other.generate_state(1, np.uint64)[0]) for other in others)]


def _dropped_arguments(model: PreTrainedModel) -> dict[str, Any]:
    """Return the arguments that the current `generate` call accepts but does not pass on.

    Transformers 5 accepts `streamer`, `synced_gpus` and `assistant_model` together with a callable
    and then drops them, so a reader of the streamer would wait forever. They are read from the
    frame of the call, because they are available nowhere else.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is _GENERATE and frame.f_locals["self"] is model:
            names = ("streamer", "synced_gpus", "assistant_model")
            return {name: frame.f_locals[name] for name in names}
        frame = frame.f_back
    return {}


@dataclass(frozen=True)
class _Call:
    """Inputs that one call of `generate` has prepared.

    Attributes:
        ids: the prompts, padded on the left, `[B, P]`.
        seen: False for padding, `[B, P]` bool.
        processors: logits processors of the whole batch, including warpers.
        criteria: stopping criteria.
        config: the prepared generation configuration.
        streamer: receives each token.
    """

    ids: Tensor
    seen: Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    streamer: BaseStreamer | None

    @property
    def room(self) -> int:
        """Number of tokens that each row may generate."""
        limit = self.criteria.max_length  # a user's criterion overrides the configuration
        length = self.config.max_length if limit is None else limit
        # At least 1, because the criteria are only checked after a token.
        return max(1, int(length) - self.ids.shape[1])

    @property
    def pads(self) -> bool:
        """True if finished rows are padded; otherwise they keep generating, as in `_sample`."""
        return any(hasattr(criterion, "eos_token_id") for criterion in self.criteria)

    @property
    def pad(self) -> int | None:
        """Padding token; None if there is none."""
        token = self.config._pad_token_tensor
        return None if token is None else int(token)

    @property
    def eos(self) -> frozenset[int]:
        """Token ids that always finish a row, so that decoding can end with them."""
        criteria = [c for c in self.criteria if isinstance(c, EosTokenCriteria)]
        return frozenset(token for c in criteria for token in c.eos_token_id.flatten().tolist())

    @property
    def keeps(self) -> list[str]:
        """The requested ones of `scores` and `logits`."""
        if not self.config.return_dict_in_generate:
            return []
        return [kind for kind in ("scores", "logits") if getattr(self.config, f"output_{kind}")]

    def check_padding(self, context: int | None) -> None:
        """Raise an error if padding may be needed and there is no padding token."""
        longest = int(self.seen.sum(-1).max()) + self.room
        unequal = self.pads or (context is not None and longest > context)
        if self.pad is None and unequal and len(self.ids) > 1:
            raise GenerateError(
                "sequences of this batch may end at different lengths, but there is no padding "
                "token: pass pad_token_id to generate"
            )

    def requests(self, plans: Strategy | Adaptive, sampling: SamplingParams) -> list[Request]:
        """Return the decoder's request for each row."""
        greedy = not self.config.do_sample
        seeds = [0] * len(self.ids) if greedy else _seeds(sampling.seed, len(self.ids))
        kind = _Recording if self.keeps else TokenDistribution
        return [
            Request(
                prompt=self.ids[row][self.seen[row]].tolist(),
                max_new_tokens=self.room,
                distribution=kind(self._processors(row), greedy),
                eos=self.eos,
                strategy=plans,
                seed=seed,
                judge=sampling.judge,
                draft=sampling.draft,
            )
            for row, seed in enumerate(seeds)
        ]

    def _processors(self, row: int) -> LogitsProcessorList:
        """Return the prepared logits processors, adapted to one row of the batch."""
        padding = self.ids[row][~self.seen[row]][None]
        chosen = LogitsProcessorList()
        for one in self.processors:
            reads_ids = TokenDistribution(LogitsProcessorList([one]), greedy=True).reads_history
            chosen.append(_InBatch(one, padding, row, len(self.ids)) if reads_ids else one)
        return chosen


class _InBatch(LogitsProcessor):
    """Processor for one row of a batch, which calls the batch's processor as `generate` would.

    The processor sees the row's ids with their padding and at the row's index in the batch.

    Args:
        processor: the processor that `generate` prepared for all rows.
        padding: ids before the row's prompt, `[1, N]`.
        row: batch index of the row.
        size: number of batch rows; the processor may hold per-row data.
    """

    def __init__(self, processor: Any, padding: Tensor, row: int, size: int) -> None:
        self.processor = processor
        self.padding = padding
        self.row = row
        self.size = size
        if isinstance(processor, PrefixConstrainedLogitsProcessor):
            # This processor calls the user's function for every batch row. Only `row` is valid
            # here, since the other rows would be shown this row's ids.
            allowed = processor._prefix_allowed_tokens_fn
            self.processor = PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), 1)
            self.row, self.size = 0, 1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the processed scores, `[1, V]`, for ids `[1, T]`."""
        ids = torch.cat([self.padding, input_ids.to(self.padding.device)], dim=1)
        shown = scores.to(self.padding.device).repeat(self.size, 1)
        processed: Tensor = self.processor(ids.repeat(self.size, 1), shown)
        return processed[self.row : self.row + 1].to(scores.device)


class _Recording(TokenDistribution):
    """Records the raw `logits` and the processed `scores` of each position, `[V]` each.

    A pass also records positions after a rejected candidate. A later pass overwrites them, so that
    the record of a settled position comes from the pass that settled it.
    """

    def __init__(self, processors: LogitsProcessorList, greedy: bool) -> None:
        super().__init__(processors, greedy)
        self.takes_likeliest = False  # the shortcut of greedy decoding would record nothing
        self.at: dict[int, dict[str, Tensor]] = {}

    def _processed(self, scores: Tensor, history: Sequence[int], tail: Sequence[int]) -> Tensor:
        processed = super()._processed(scores, history, tail)
        for row in range(len(scores)):
            self.at[len(history) + row] = {"logits": scores[row], "scores": processed[row]}
        return processed


class _Loop:
    """The loop of transformers' `_sample`, fed by a decoder whose rows may run ahead of it.

    A token counts once every row has reached its position. Then the criteria check the batch's ids,
    once and in order, as in `generate`, and the streamer receives the tokens.
    """

    def __init__(self, call: _Call, decoder: Decoder, rows: Sequence[Row]) -> None:
        self.call = call
        self.decoder = decoder
        self.rows = rows
        self.ids = call.ids
        self.written = 0
        self.unfinished = [True] * len(rows)
        self.kept: dict[str, tuple[Tensor, ...]] = {kind: () for kind in call.keeps}

    def run(self) -> GenerateDecoderOnlyOutput | Tensor:
        """Generate until every row is finished and return the result of `generate`."""
        while any(self.unfinished):
            while any(self._next(row) is None for row in self.decoder.rows):
                self.decoder.step()
            self._write()
        if self.call.streamer is not None:
            self.call.streamer.end()  # type: ignore[no-untyped-call]
        if not self.call.config.return_dict_in_generate:
            return self.ids
        return GenerateDecoderOnlyOutput(
            sequences=self.ids,  # type: ignore[arg-type]
            **self.kept,  # type: ignore[arg-type]
        )

    def _place(self, row: Row) -> int:
        """Return the position of the row's next token to write."""
        return len(row.request.prompt) + self.written

    def _next(self, row: Row) -> int | None:
        """Return the row's next token to write; None if it is not settled yet."""
        place = self._place(row)
        return row.tokens[place] if place < len(row.tokens) else None

    def _write(self) -> None:
        """Write one more token for every row, then apply the criteria, then call the streamer."""
        tokens = [
            self._next(row) if unfinished or not self.call.pads else None
            for row, unfinished in zip(self.rows, self.unfinished, strict=True)
        ]
        if self.kept:
            self._record([token is not None for token in tokens])
        padded = [self.call.pad if token is None else token for token in tokens]
        column = torch.tensor(padded, dtype=self.ids.dtype, device=self.ids.device)
        self.ids = torch.cat([self.ids, column[:, None]], dim=1)
        self.written += 1
        done = self.call.criteria(self.ids, self.kept.get("scores"))
        self._finish(done.tolist())
        if self.call.streamer is not None:
            self.call.streamer.put(column.cpu())  # type: ignore[no-untyped-call]

    def _finish(self, done: Sequence[bool]) -> None:
        """Mark the rows that are done; rows that will be padded from now on leave the decoder."""
        for index, row in enumerate(self.rows):
            self.unfinished[index] &= not done[index]
            used_up = row.room == 0 and self._next(row) is None
            if self.unfinished[index] and used_up:
                self.unfinished[index] = False
                _log.warning(
                    "sequence %d of the batch ends because it reached the model's context of %s "
                    "tokens",
                    index,
                    self.decoder.target.context,
                )
        if self.call.pads:
            pairs = zip(self.rows, self.unfinished, strict=True)
            self.decoder.leave([row for row, unfinished in pairs if not unfinished])

    def _record(self, own: Sequence[bool]) -> None:
        """Keep the logits and scores that the next tokens were chosen from, `[B, V]`.

        Args:
            own: whether each row writes a token of its own instead of padding.
        """
        taken = [
            self._recording(row).at.pop(self._place(row)) if wanted else None
            for row, wanted in zip(self.rows, own, strict=True)
        ]
        some = next(record for record in taken if record is not None)
        for kind in self.kept:
            padding = torch.full_like(some[kind], -torch.inf)
            if self.call.pad is not None:
                padding[self.call.pad] = 0.0
            rows = [padding if record is None else record[kind] for record in taken]
            self.kept[kind] += (torch.stack(rows).to(self.ids.device),)

    def _recording(self, row: Row) -> _Recording:
        recording = row.request.distribution
        assert isinstance(recording, _Recording), "scores were requested but not recorded"
        return recording
