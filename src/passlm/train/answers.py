"""Generate the target's own answers, as training text for its look-ahead rows.

Reads prompts from JSONL files and answers them by plain decoding, in a batch that is kept full.
Temperature and seed of a prompt come from a hash of its id, so that its answer depends neither on
the batch nor on interruptions. Storing answers is left to `answer_file.py`, training on them to
`data.py` and `loop.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from passlm.decoding.decoder import Decoder, PromptError
from passlm.decoding.request import Request
from passlm.decoding.text import Row
from passlm.errors import InputError
from passlm.generate import Generator
from passlm.loading.detokenize import text_behind
from passlm.outputs import FinishReason
from passlm.params import SamplingParams, StopParams

Record = dict[str, Any]

_NAMES = ("id", "name", "task_id")
_SEED_BYTES = 6  # JSON readers that parse numbers as floats keep only 53 bits

_log = logging.getLogger(__name__)


class AnswerError(InputError):
    """Prompts or answers that cannot be used; a one-line message that says what to do."""


@dataclass(frozen=True)
class Settings:
    """Settings common to all answers.

    Attributes:
        temperature: Temperatures to choose from, one per prompt; one that is listed twice is
            chosen twice as often.
        top_k: Sample from the k most likely tokens; 0 for all tokens.
        seed: Seed from which the temperature and seed of each prompt are derived.
        max_new_tokens: Maximum length of an answer; a prompt may set a lower limit.

    Raises:
        ParameterError: A value lies outside its range.
        AnswerError: There is no temperature.
    """

    temperature: tuple[float, ...] = (0.0, 0.0, 0.8)
    top_k: int = 50
    seed: int = 0
    max_new_tokens: int = 192

    def __post_init__(self) -> None:
        if not self.temperature:
            raise AnswerError("there is no temperature: give at least one")
        for temperature in self.temperature:
            SamplingParams(temperature=temperature, top_k=self.top_k, seed=self.seed)
        StopParams(max_new_tokens=self.max_new_tokens)

    def sampling(self, question: Question) -> SamplingParams:
        """Return the sampling parameters for the answer to a prompt."""
        temperature = question.temperature
        if temperature is None:
            place = self._hash("temperature", question.id) % len(self.temperature)
            temperature = self.temperature[place]
        seed = self._hash("seed", question.id)
        return SamplingParams(temperature=temperature, top_k=self.top_k, seed=seed)

    def length(self, question: Question) -> int:
        """Return the maximum number of tokens in the answer to a prompt."""
        return min(self.max_new_tokens, question.max_new_tokens or self.max_new_tokens)

    def _hash(self, purpose: str, name: str) -> int:
        digest = hashlib.sha256(f"{self.seed} {purpose} {name}".encode()).digest()
        return int.from_bytes(digest[:_SEED_BYTES], "big")


# Read prompts from files


@dataclass(frozen=True)
class Question:
    """One line of a prompt file.

    Attributes:
        id: Unique id.
        place: File and line, for messages.
        given: `prompt` or `messages`, and `kind` if present; copied into the answer's record.
        temperature: Temperature that the line sets; None for one of the settings.
        max_new_tokens: Limit that the line sets; None for that of the settings.
    """

    id: str
    place: str
    given: Record
    temperature: float | None = None
    max_new_tokens: int | None = None


@dataclass
class Skipped:
    """Counts of skipped prompts; a broken line is an error unless `allowed`."""

    allowed: bool = False
    bad: int = 0
    long: int = 0

    def broken(self, place: str, error: Exception) -> None:
        """Count a line that cannot be used.

        Raises:
            AnswerError: Broken lines are not allowed.
        """
        if not self.allowed:
            raise AnswerError(f"{place}: {error}; correct the line, or use --skip-bad") from None
        self.bad += 1
        _log.warning("skipped %s: %s", place, error)

    def too_long(self, place: str, tokens: int, context: int) -> None:
        """Count a prompt that leaves no room for an answer."""
        self.long += 1
        _log.warning(
            "skipped %s: it has %d tokens and the model's context is %d", place, tokens, context
        )


def read_questions(paths: Sequence[Path], skipped: Skipped) -> tuple[list[Question], str]:
    """Read the prompts of JSONL files, in order, and return them with a hash of the files.

    A line has a `prompt` or `messages`, and may have an `id` (or `name` or `task_id`), a `kind`,
    a `temperature` and `max_new_tokens`.

    Args:
        paths: JSONL files.
        skipped: Counts the broken lines.

    Raises:
        AnswerError: A file cannot be read, a line is broken, two lines have the same id, or there
            is no prompt.
    """
    digest = hashlib.sha256()
    questions: dict[str, Question] = {}
    for path in paths:
        content = _content(path)
        digest.update(f"{path.stem}\0{len(content)}\0".encode("utf-8", "surrogateescape"))
        digest.update(content)
        for question in _questions(path, content, skipped):
            other = questions.setdefault(question.id, question)
            if other is not question:
                raise AnswerError(
                    f"{other.place} and {question.place} have the same id, {question.id!r}: "
                    "give each prompt its own"
                )
    if not questions:
        raise AnswerError(
            f"no prompts in {', '.join(map(str, paths))}: "
            'give lines like {"prompt": "..."} or {"messages": [...]}'
        )
    return list(questions.values()), digest.hexdigest()


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AnswerError(
            f"cannot read --prompts {path}: {error.strerror}; name a JSONL file"
        ) from error


def _questions(path: Path, content: bytes, skipped: Skipped) -> Iterator[Question]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AnswerError(
            f"--prompts {path} is not UTF-8 text (byte {error.start}): give a JSONL file"
        ) from None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                question = _question(_parsed(line), f"{path.stem}:{number}", place)
            except (
                ValueError,
                OverflowError,
                RecursionError,
            ) as error:  # from JSON or raised below
                skipped.broken(place, error)
            else:
                yield question


def _parsed(line: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise AnswerError(f"not JSON ({error.msg})") from None
    if not isinstance(record, dict):
        raise AnswerError("not a JSON object")
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise AnswerError("it holds half a surrogate pair") from None
    return record


def _question(record: Record, default: str, place: str) -> Question:
    if ("prompt" in record) == ("messages" in record):
        raise AnswerError("expected either 'prompt' or 'messages'")
    kept = ("prompt", "messages", "kind")
    given = {key: record[key] for key in kept if key in record}
    if "messages" in given:
        _check_messages(given["messages"])
    elif not isinstance(given["prompt"], str) or not given["prompt"]:
        raise AnswerError("'prompt' is not a non-empty string")
    temperature, length = record.get("temperature"), record.get("max_new_tokens")
    for value in (temperature, length):
        if isinstance(value, bool):  # bool is a subclass of int
            raise AnswerError(f"{value} is not a number: give one, or leave it out")
    if temperature is not None:
        SamplingParams(temperature=temperature)
    if length is not None:
        StopParams(max_new_tokens=length)
    return Question(_name(record, default), place, given, temperature, length)


def _name(record: Record, default: str) -> str:
    name = next((record[key] for key in _NAMES if record.get(key) is not None), default)
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise AnswerError(f"its id is {name!r}: give a string or an integer")
    return str(name)


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise AnswerError("'messages' is not a non-empty list")
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise AnswerError("a message is not an object with string 'role' and 'content'")


# Answer prompts


@dataclass(frozen=True)
class Prompt:
    """Question encoded as token ids."""

    question: Question
    ids: array[int]


def prepare(
    lm: Generator, questions: Sequence[Question], skipped: Skipped, limit: int | None = None
) -> list[Prompt]:
    """Encode questions, and skip those that leave no room for an answer.

    All questions are encoded before the first is answered, so that a prompt that the model cannot
    take is reported at once and not after hours.

    Args:
        lm: Generator of the model.
        questions: Questions from `read_questions`.
        skipped: Counts those that do not fit or that the model's chat template rejects.
        limit: Maximum number of prompts; None for all.

    Raises:
        AnswerError: The template rejects a question and `skipped` does not allow it, or no prompt
            is left.
    """
    prompts: list[Prompt] = []
    context = lm.target.context
    for question in questions:
        if limit is not None and len(prompts) >= limit:
            break
        try:
            ids = lm.encode(question.given.get("prompt") or question.given["messages"])
        except PromptError as error:
            skipped.broken(question.place, error)
            continue
        if context is not None and len(ids) >= context:
            skipped.too_long(question.place, len(ids), context)
        else:
            prompts.append(Prompt(question, array("I", ids)))
    if not prompts:
        raise AnswerError(
            f"no prompt is left ({skipped.bad} broken, {skipped.long} too long): give others"
        )
    return prompts


@dataclass
class _Answer:
    """Answer in progress."""

    prompt: Prompt
    sampling: SamplingParams
    tokens: list[int] = field(default_factory=list)


class Answerer:
    """Plain decoding of answers, in a batch that is kept full.

    Args:
        lm: Generator of the model; its look-ahead files are not used.
        settings: Settings of all answers.

    Attributes:
        tokens: Number of tokens generated so far.
    """

    def __init__(self, lm: Generator, settings: Settings) -> None:
        self.lm = lm
        self.settings = settings
        self.tokens = 0

    def run(
        self, prompts: Sequence[Prompt], batch: int, stopping: Callable[[], bool]
    ) -> Iterator[list[Record]]:
        """Answer prompts in order, until all are answered or `stopping` returns True.

        Args:
            prompts: Prompts from `prepare`.
            batch: Number of prompts answered at once.
            stopping: Called before each pass and before each prompt that joins the batch.

        Yields:
            The answers that a pass finished, once per pass; often an empty list.

        Raises:
            AnswerError: `batch` is below 1.
        """
        if batch < 1:
            raise AnswerError(f"batch is {batch}: it must be 1 or more")
        decoder = Decoder(self.lm.target, None)
        waiting = iter(prompts)
        under_way: dict[Row, _Answer] = {}
        while not stopping():
            if len(under_way) < batch and (prompt := next(waiting, None)) is not None:
                answer = _Answer(prompt, self.settings.sampling(prompt.question))
                under_way[decoder.join(self._request(answer))] = answer
            elif under_way:
                yield self._step(decoder, under_way)
            else:
                return

    def _request(self, answer: _Answer) -> Request:
        length = self.settings.length(answer.prompt.question)
        return Request.of(answer.prompt.ids.tolist(), answer.sampling, length, eos=self.lm.eos)

    def _step(self, decoder: Decoder, under_way: dict[Row, _Answer]) -> list[Record]:
        finished = []
        for row, step in decoder.step():
            self.tokens += len(step.tokens)
            under_way[row].tokens += step.tokens
            if step.finish_reason:
                finished.append(self._record(under_way.pop(row), step.finish_reason))
        return finished

    def _record(self, answer: _Answer, reason: FinishReason) -> Record:
        ids, given = answer.prompt.ids, answer.prompt.question.given
        shown = answer.tokens[:-1] if reason == "eos" else answer.tokens
        completion = text_behind(self.lm.decode, ids, shown)
        return {
            "id": answer.prompt.question.id,
            **given,
            "completion": completion,
            "text": self._shown(given) + completion,
            "finish_reason": reason,
            "temperature": answer.sampling.temperature,
            "seed": answer.sampling.seed,
            "prompt_tokens": len(ids),
            "new_tokens": len(answer.tokens),
        }

    def _shown(self, given: Record) -> str:
        """Return a prompt as the text that the model received."""
        if "prompt" in given:
            return str(given["prompt"])
        tokenizer: Any = self.lm.tokenizer
        messages = [dict(message) for message in given["messages"]]
        return str(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        )


def unanswered(prompts: Sequence[Prompt], answered: Collection[str]) -> list[Prompt]:
    """Return the prompts that are not answered yet, in order."""
    return [prompt for prompt in prompts if prompt.question.id not in answered]
