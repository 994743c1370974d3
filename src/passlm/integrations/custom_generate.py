"""PaSS inside transformers: a callable for `model.generate(..., custom_generate=...)`.

Transformers prepares ids, processors and stopping criteria and then calls it in the place of its
own sampling loop. Here that loop's bookkeeping is repeated token by token; the passes themselves
are left to `decoding/decoder.py`, and refusing what cannot be honoured to `checks.py`.
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
from passlm.decoding.text import Request, Row
from passlm.integrations.checks import GenerateError, refuse, seen_ids
from passlm.lookahead.card import LookAheadError
from passlm.lookahead.trained import LookAhead, load_for
from passlm.model.target import Target
from passlm.params import METHODS, Draft, Judge, ParameterError, SamplingParams
from passlm.plan import Adaptive, Strategy, strategy
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
    """PaSS for transformers: `model.generate(..., custom_generate=passlm.custom_generate())`.

    The result is `generate`'s own: greedy text token for token (in 16-bit types but for ties, which
    passes of several rows may round the other way), sampled text of the same distribution. Several
    threads may decode one model with it, pass by pass in turn; what else uses the model meanwhile
    may meet it altered. Left-padded batches, processors, stopping criteria, `num_return_sequences`,
    `streamer` and `return_dict_in_generate` work as they do there, with these differences:

    - Transformers takes no `stop_strings` beside a callable: give
      `stopping_criteria=[StopStringCriteria(tokenizer, [...])]`, which does the same.
    - Processors must be functions of their arguments, and treat the batch's rows apart.
    - A text ends, with a warning, where the model's context does.
    - Of `output_scores` and `output_logits`, rows that hold padding give it with certainty.
      The result holds no key-value cache.

    Args:
        lookahead: a folder, the name of shipped files, a hub id, or look-ahead rows in memory;
            None takes what ships for the model; where nothing does, `auto` drafts from the text
            alone.
        method: `auto` chooses plans by what passes cost on this machine, which is measured once;
            `two-pass`, `one-pass`, or `ar` for plain decoding without look-ahead files.
        lookahead_tokens: length of the look-ahead groups, of the longest for `auto`; None takes
            the method's default.
        judge: `coupled` or `rejection`.
        draft: `greedy` or `sampled`.
        seed: of all draws; None draws one from torch's global generator when sampling, so that
            `torch.manual_seed` and `transformers.set_seed` make the text reproducible. Every row
            of a batch gets a seed of its own from it.

    Returns:
        The callable; it may be kept for further calls and other models, and loads the look-ahead
        files once for each model.

    Raises:
        InputError: an argument is outside its range.
    """
    if method not in METHODS:  # now, and not in the middle of `generate`
        raise ParameterError(f"method is {method!r}: it must be one of {', '.join(METHODS)}")
    if method == "ar" and (lookahead is not None or lookahead_tokens is not None):
        raise ParameterError("method ar drafts nothing: leave lookahead and lookahead_tokens out")
    sampling = SamplingParams(judge=judge, draft=draft, seed=seed)
    return CustomGenerate(lookahead, method, lookahead_tokens, sampling)


@dataclass(frozen=True, eq=False)
class CustomGenerate:
    """What `custom_generate` gives; see there for the fields."""

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
        """Decode what transformers' `generate` has prepared; it is the one that calls this.

        The model computes as it is: unlike `passlm.load`, this packs no second copy of its weights.

        Raises:
            UnsupportedModelError: the model cannot be decoded by plans.
            GenerateError: an option of `generate` cannot be honoured.
            LookAheadError: the look-ahead files are missing, damaged or made for another model.
            PromptError: a prompt is empty or longer than the model's context.
        """
        target = Target(model)
        handed_on = {"synced_gpus": synced_gpus, "streamer": streamer}
        given = _withheld(model) | {k: v for k, v in handed_on.items() if v is not None}
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
                "no look-ahead files ship for this model: drafting from the text alone; 'passlm "
                "train' makes some"
            )
        elif rows is None:
            raise LookAheadError(
                "no look-ahead files ship for this model: name some as lookahead=..., train some "
                "with 'passlm train', or take method='ar'"
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
    """A seed for each row: the first has the given one, the others are hashed from it."""
    first = int(torch.randint(2**63 - 1, ())) if seed is None else seed
    others = [np.random.SeedSequence([first, row]) for row in range(1, rows)]
    return [first, *(int(other.generate_state(1, np.uint64)[0]) for other in others)]


def _withheld(model: PreTrainedModel) -> dict[str, Any]:
    """What the `generate` call under way was given and does not hand on to a callable.

    Transformers 5 takes `streamer`, `synced_gpus` and `assistant_model` beside a callable and
    then drops them: whoever reads the streamer would wait for ever. They are read from the frame
    of the call, the one place where they are.
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
    """What one call of `generate` has prepared.

    Attributes:
        ids: the prompts, padded on the left, `[B, P]`.
        seen: False for padding, `[B, P]` bool.
        processors: for the whole batch, warpers included.
        criteria: when a row is finished.
        config: every option, prepared.
        streamer: gets each token.
    """

    ids: Tensor
    seen: Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    streamer: BaseStreamer | None

    @property
    def room(self) -> int:
        """How many tokens each row may write."""
        limit = self.criteria.max_length  # a user's own criterion replaces the configuration's
        length = self.config.max_length if limit is None else limit
        return max(1, int(length) - self.ids.shape[1])  # the criteria are asked after a token

    @property
    def pads(self) -> bool:
        """Whether finished rows get padding; as in `_sample`, they go on to write otherwise."""
        return any(hasattr(criterion, "eos_token_id") for criterion in self.criteria)

    @property
    def pad(self) -> int | None:
        """The padding token, if there is one."""
        token = self.config._pad_token_tensor
        return None if token is None else int(token)

    @property
    def eos(self) -> frozenset[int]:
        """Ids that surely finish a row, so that its decoding may end with them."""
        criteria = [c for c in self.criteria if isinstance(c, EosTokenCriteria)]
        return frozenset(token for c in criteria for token in c.eos_token_id.flatten().tolist())

    @property
    def keeps(self) -> list[str]:
        """Which of `scores` and `logits` are wanted beside the ids."""
        if not self.config.return_dict_in_generate:
            return []
        return [kind for kind in ("scores", "logits") if getattr(self.config, f"output_{kind}")]

    def check_padding(self, context: int | None) -> None:
        """Make sure that there is a padding token where one may be needed."""
        longest = int(self.seen.sum(-1).max()) + self.room
        unequal = self.pads or (context is not None and longest > context)
        if self.pad is None and unequal and len(self.ids) > 1:
            raise GenerateError(
                "rows of this batch may end at different lengths and there is no padding token: "
                "give generate a pad_token_id"
            )

    def requests(self, plans: Strategy | Adaptive, sampling: SamplingParams) -> list[Request]:
        """Each row's text, for the decoder."""
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
        """The prepared processors, each as it is for one row of the batch."""
        padding = self.ids[row][~self.seen[row]][None]
        chosen = LogitsProcessorList()
        for one in self.processors:
            reads_ids = TokenDistribution(LogitsProcessorList([one]), greedy=True).reads_history
            chosen.append(_InBatch(one, padding, row, len(self.ids)) if reads_ids else one)
        return chosen


class _InBatch(LogitsProcessor):
    """Shows a processor one row's ids as `generate` would: padded, and at its place in the batch.

    Args:
        processor: the one that `generate` prepared for all rows.
        padding: the ids before the row's prompt, `[1, N]`.
        row: the row's place.
        size: number of rows; a processor may hold something for each of them.
    """

    def __init__(self, processor: Any, padding: Tensor, row: int, size: int) -> None:
        self.processor = processor
        self.padding = padding
        self.row = row
        self.size = size
        if isinstance(processor, PrefixConstrainedLogitsProcessor):
            # It would ask about the other places too, where this row's ids make no sense.
            allowed = processor._prefix_allowed_tokens_fn
            self.processor = PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), 1)
            self.row, self.size = 0, 1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Processed scores, `[1, V]`, of a text `[1, T]`."""
        ids = torch.cat([self.padding, input_ids.to(self.padding.device)], dim=1)
        shown = scores.to(self.padding.device).repeat(self.size, 1)
        processed: Tensor = self.processor(ids.repeat(self.size, 1), shown)
        return processed[self.row : self.row + 1].to(scores.device)


class _Recording(TokenDistribution):
    """Keeps the `logits` of each position as they came and the processed `scores`, `[V]` each.

    A draft writes ahead of the settled text and a later pass over it: what stands at a settled
    position was written by the pass that settled it.
    """

    def __init__(self, processors: LogitsProcessorList, greedy: bool) -> None:
        super().__init__(processors, greedy)
        self.takes_likeliest = False  # there is something to keep
        self.at: dict[int, dict[str, Tensor]] = {}

    def _processed(self, scores: Tensor, history: Sequence[int], tail: Sequence[int]) -> Tensor:
        processed = super()._processed(scores, history, tail)
        for row in range(len(scores)):
            self.at[len(history) + row] = {"logits": scores[row], "scores": processed[row]}
        return processed


class _Loop:
    """The loop of transformers' `_sample`, fed by a decoder whose rows may run ahead of it.

    A token counts once every row has come so far: then the criteria look at the batch's ids, once
    and in order, as they do in `generate`, and the streamer gets the tokens.
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
        """Write tokens until every row is finished; gives what `generate` returns."""
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
        """Where in the row's text the next token to write stands."""
        return len(row.request.prompt) + self.written

    def _next(self, row: Row) -> int | None:
        """The row's next token to write, once it is settled."""
        place = self._place(row)
        return row.tokens[place] if place < len(row.tokens) else None

    def _write(self) -> None:
        """One more token for every row, then the criteria, then the streamer."""
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
        """Mark the rows that are done; those that get padding from now on leave the decoder."""
        for index, row in enumerate(self.rows):
            self.unfinished[index] &= not done[index]
            used_up = row.room == 0 and self._next(row) is None
            if self.unfinished[index] and used_up:
                self.unfinished[index] = False
                _log.warning(
                    "row %d of the batch ends at the model's context of %s tokens, before "
                    "anything else stopped it",
                    index,
                    self.decoder.target.context,
                )
        if self.call.pads:
            pairs = zip(self.rows, self.unfinished, strict=True)
            self.decoder.leave([row for row, unfinished in pairs if not unfinished])

    def _record(self, own: Sequence[bool]) -> None:
        """Keep what the next tokens are chosen from, `[B, V]`.

        Args:
            own: whether each row writes a token of its own, and not padding.
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
        assert isinstance(recording, _Recording), "scores are wanted, but were not recorded"
        return recording
