"""Text in, text out: load a model with its look-ahead files, stream or generate.

The one place where ids and text meet; `generate` is `stream`, joined. The step itself is left to
`decoding/decoder.py`.
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
from passlm.decoding.stopping import StopStrings
from passlm.decoding.text import Request, Row
from passlm.layers.int8 import quantized
from passlm.loading.detokenize import Detokenizer
from passlm.loading.models import DEFAULT_MODEL, load_model
from passlm.lookahead.trained import LookAhead, load_for
from passlm.model.target import Target
from passlm.outputs import Chunk, FinishReason, Output, Stats, Step
from passlm.params import METHODS, ParameterError, SamplingParams, StopParams
from passlm.plan import Adaptive, Strategy, strategy
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
    """Load a model and the look-ahead files for it.

    Args:
        model: the packaged default, a folder, a hub id or a `.gguf` file.
        lookahead: a folder, the name of shipped files, or a hub id; `"none"` does without, where
            `auto` still drafts from the text itself (plain decoding is `method="ar"`). None takes
            what ships for the model, and says so in the log where nothing does.
        dtype: `bfloat16`, `float16` or `float32`.
        device: where the model goes, as torch names it.
        pack: on a CPU, in bfloat16 or float32, keep a second copy of the weights in a faster
            layout, where that pays.
        compile: on a CPU, run passes that are compiled once, which takes minutes and a C++
            compiler, and kept in the user's cache folder. Where that fails, a warning says so and
            passes run eagerly.
        quantize: `"int8"` rounds the linear layers of a model on a CPU and decodes the rounded
            model, losslessly with respect to it; see `quantized`. None takes the model as it is.

    Raises:
        ModelError: the model cannot be found or loaded.
        QuantizeError: it cannot be rounded here.
        UnsupportedModelError: it cannot be decoded by plans.
        LookAheadError: the files are missing, damaged or made for another model.
    """
    loaded = load_model(model, dtype=dtype, device=device)
    decoded = loaded.model if quantize is None else quantized(loaded.model, quantize)
    target = Target(decoded, pack=pack, compiled=compiled_folder() if compile else None)
    return Generator(target, loaded.tokenizer, _look_ahead(lookahead, target))


def compiled_folder() -> Path:
    """Where compiled passes are kept."""
    return cache_folder() / "compiled"


def _look_ahead(name: str | Path | None, target: Target) -> LookAhead | None:
    if name == "none":
        return None
    rows = load_for(target, name)
    if rows is None:
        _log.warning(
            "no look-ahead files ship for this model: drafting from the text alone; 'passlm train' "
            "makes some"
        )
    return rows


@dataclass(frozen=True)
class Options:
    """Everything one call asks for.

    Attributes:
        sampling: how tokens are drawn.
        stopping: when the text ends.
        method: `auto`, `ar`, `two-pass` or `one-pass`.
        lookahead_tokens: length of the look-ahead groups, `L`; of the longest for `auto`, where 0
            drafts from the text alone.
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
        """Make sure that method and look-ahead files fit together; None takes the default.

        Raises:
            ParameterError: a drafting method without look-ahead files, or more look-ahead tokens
                than they have rows.
        """
        if method is None:
            method = DEFAULT_METHOD
        tokens = _checked_tokens(method, lookahead_tokens, look_ahead)
        return cls(sampling, stopping, method, tokens)

    @classmethod
    def of(cls, look_ahead: LookAhead | None, given: Mapping[str, Any]) -> Options:
        """Sort keyword arguments into their groups.

        Raises:
            ParameterError: an unknown name or a value outside its range.
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
            raise ParameterError("method ar drafts nothing: leave lookahead_tokens out")
        return 0
    if method == "auto" and (look_ahead is None or tokens == 0):
        if tokens:
            raise ParameterError(
                f"lookahead_tokens is {tokens} and no look-ahead files are loaded: name some, or "
                "leave it out"
            )
        return 0
    if look_ahead is None:
        raise ParameterError(
            f"method {method} drafts with look-ahead files and none are loaded: name some, or "
            "train some with 'passlm train', or take method ar"
        )
    return look_ahead.group_length(tokens, method)


class Generator:
    """A target, its tokenizer and its look-ahead rows.

    Args:
        target: the frozen model.
        tokenizer: the model's own.
        look_ahead: rows trained for it; None does without.

    Attributes:
        rows: what decoding takes of the look-ahead files; None without.
        costs: what passes cost here.
        eos: ids that end a text.
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
        """Continue one prompt, a pass at a time.

        Args:
            prompt: text, token ids, or chat messages.
            **options: fields of `SamplingParams` and `StopParams`, `method`, `lookahead_tokens`.

        Yields:
            What each pass settled; the texts of all chunks joined are the completion.

        Raises:
            ParameterError: an option is unknown or outside its range.
            PromptError: the prompt is empty or longer than the model's context.
        """
        return self.stream_ids(self.encode(prompt), Options.of(self.look_ahead, options), Stats())

    def stream_ids(self, prompt: Sequence[int], options: Options, stats: Stats) -> Iterator[Chunk]:
        """`stream` of token ids with checked options; counts go into `stats` on the way."""
        return (chunk for _, chunk in self._run([prompt], options, [stats]))

    def generate(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> list[Output]:
        """Continue prompts as one batch, in order; arguments and errors are those of `stream`."""
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
        """Token ids of a prompt; chats go through the model's own template.

        Raises:
            PromptError: it is empty, or a chat for a model without a chat template.
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
            raise PromptError("the prompt is not valid Unicode text: mend its encoding") from error
        ids: Sequence[int] = self.tokenizer(text)["input_ids"]
        return ids

    def _encode_chat(self, messages: Sequence[Any]) -> list[int]:
        if not self.tokenizer.chat_template:
            raise PromptError("this model has no chat template: give the prompt as text")
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise PromptError(f"the model's chat template refuses this chat: {error}") from error
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        text = self.tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    def _run(
        self, prompts: Sequence[Sequence[int]], options: Options, stats: Sequence[Stats]
    ) -> Iterator[tuple[int, Chunk]]:
        """Decode a batch, giving each pass's chunk of each prompt; counts go into `stats`."""
        plans = self._plans(options, prompts)
        decoder = Decoder(self.target, self.rows)
        texts: dict[Row, StreamedText] = {}
        for index, (prompt, counts) in enumerate(zip(prompts, stats, strict=True)):
            begun = time.perf_counter()
            row = decoder.join(self._request(prompt, options, plans))
            counts.prompt_tokens = len(prompt)
            counts.prefill_seconds = time.perf_counter() - begun
            detokenizer = Detokenizer(self.decode, prompt)
            texts[row] = StreamedText(index, detokenizer, StopStrings(options.stopping.stop))
        seconds = 0.0  # of passes alone: whoever reads the stream takes time of their own
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
    """One text on its way from ids to what is shown.

    Attributes:
        index: which of the texts asked for.
        detokenizer: its ids to text.
        stops: where its text ends.
        kept: the last pass's step, as far as it belongs to the text.
    """

    index: int
    detokenizer: Detokenizer
    stops: StopStrings
    kept: Step = field(default_factory=lambda: Step((), 0, 0))

    def push(self, step: Step) -> Chunk:
        """The chunk of one pass, cut where a stop string begins; `kept` is the step so cut."""
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
        """What was held back, once the text is at its end."""
        text, stopped = self.stops.push(self.detokenizer.flush())
        return text if stopped else text + self.stops.flush()


def _listed(prompts: Prompt | Sequence[Prompt]) -> Sequence[Any]:
    """One prompt or several, as a list of several."""
    single = isinstance(prompts, str) or (
        len(prompts) > 0 and isinstance(prompts[0], int | Mapping)
    )
    return [prompts] if single else list(prompts)


def _joined(chunks: Sequence[Chunk], stats: Stats) -> Output:
    reason: FinishReason | None = chunks[-1].finish_reason
    assert reason is not None, "a text left the batch without a reason"
    tokens = tuple(token for chunk in chunks for token in chunk.tokens)
    return Output("".join(chunk.text for chunk in chunks), tokens, reason, stats)


def _eos_ids(target: Target, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """What the model's generation settings call its end, and what its tokenizer does."""
    config = target.model.generation_config
    stated = None if config is None else config.eos_token_id
    ids = stated if isinstance(stated, list) else [stated]
    return frozenset(int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None)


def set_threads(threads: int | None) -> None:
    """Let torch compute with so many threads; None leaves its own choice."""
    if threads is not None:
        if threads < 1:
            raise ParameterError(f"threads is {threads}: it must be 1 or more")
        torch.set_num_threads(threads)
