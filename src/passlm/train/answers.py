"""Answers of the target itself, as text for its look-ahead rows to learn from.

Reads prompts from JSONL files, decodes them plainly in a batch that stays full, and appends each
finished answer to a file that an interrupted run goes on with. Temperature and seed of a prompt
come from a hash of its id, so its answer depends on neither the batch nor the resuming. Training
on the answers is left to `data.py` and `loop.py`.
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
from passlm.decoding.text import Request, Row
from passlm.errors import InputError
from passlm.generate import Generator
from passlm.loading.detokenize import text_behind
from passlm.outputs import FinishReason
from passlm.params import SamplingParams, StopParams

Record = dict[str, Any]

_NAMES = ("id", "name", "task_id")
_SEED_BYTES = 6  # readers of JSON that know only floats keep 53 bits

_log = logging.getLogger(__name__)


class AnswerError(InputError):
    """Prompts or answers that cannot be used; the message is one line and says what to do."""


@dataclass(frozen=True)
class Settings:
    """What all answers have in common.

    Attributes:
        temperature: each prompt takes one of these; one that is listed twice is taken twice as
            often.
        top_k: keep the k most likely tokens; 0 keeps all.
        seed: of the temperatures and the seeds of all prompts.
        max_new_tokens: of an answer; a prompt may ask for fewer.

    Raises:
        ParameterError: a value lies outside its range.
        AnswerError: there is no temperature.
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
        """How the answer to one prompt is drawn."""
        temperature = question.temperature
        if temperature is None:
            place = self._hash("temperature", question.id) % len(self.temperature)
            temperature = self.temperature[place]
        seed = self._hash("seed", question.id)
        return SamplingParams(temperature=temperature, top_k=self.top_k, seed=seed)

    def length(self, question: Question) -> int:
        """How many tokens the answer to one prompt may have."""
        return min(self.max_new_tokens, question.max_new_tokens or self.max_new_tokens)

    def _hash(self, purpose: str, name: str) -> int:
        digest = hashlib.sha256(f"{self.seed} {purpose} {name}".encode()).digest()
        return int.from_bytes(digest[:_SEED_BYTES], "big")


# Prompts from files


@dataclass(frozen=True)
class Question:
    """One line of a prompt file.

    Attributes:
        id: what tells it apart from all others.
        place: its file and line, for messages.
        given: `prompt` or `messages`, and `kind` where it has one: what the answer repeats.
        temperature: its own one, if it has one.
        max_new_tokens: its own limit, if it has one.
    """

    id: str
    place: str
    given: Record
    temperature: float | None = None
    max_new_tokens: int | None = None


@dataclass
class Skipped:
    """What is left out, counted; a broken line is an error unless `allowed`."""

    allowed: bool = False
    bad: int = 0
    long: int = 0

    def broken(self, place: str, error: Exception) -> None:
        """Count a line that cannot be used.

        Raises:
            AnswerError: such lines are not allowed.
        """
        if not self.allowed:
            raise AnswerError(f"{place}: {error}; mend the line, or use --skip-bad") from None
        self.bad += 1
        _log.warning("skipped %s: %s", place, error)

    def too_long(self, place: str, tokens: int, context: int) -> None:
        """Count a prompt that leaves no room for an answer."""
        self.long += 1
        _log.warning(
            "skipped %s: it has %d tokens and the model's context is %d", place, tokens, context
        )


def read_questions(paths: Sequence[Path], skipped: Skipped) -> tuple[list[Question], str]:
    """The prompts of JSONL files, in order, and a hash of the files.

    A line has a `prompt` or `messages`, and may have an `id` (or `name` or `task_id`), a `kind`,
    a `temperature` and `max_new_tokens`.

    Args:
        paths: the files.
        skipped: takes the broken lines.

    Raises:
        AnswerError: a file cannot be read, a line is broken, two lines have one id, or there is
            no prompt.
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
                    f"{other.place} and {question.place} have one id, {question.id!r}: "
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
            except (ValueError, OverflowError, RecursionError) as error:  # of JSON, or ours
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
        raise AnswerError("'prompt' is not a string with something in it")
    temperature, length = record.get("temperature"), record.get("max_new_tokens")
    for value in (temperature, length):
        if isinstance(value, bool):  # a number, to python
            raise AnswerError(f"{value} is not a number: give one, or leave it out")
    if temperature is not None:
        SamplingParams(temperature=temperature)
    if length is not None:
        StopParams(max_new_tokens=length)
    return Question(_name(record, default), place, given, temperature, length)


def _name(record: Record, default: str) -> str:
    name = next((record[key] for key in _NAMES if record.get(key) is not None), default)
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise AnswerError(f"its id is {name!r}: give a text or a whole number")
    return str(name)


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise AnswerError("'messages' is not a list with something in it")
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise AnswerError("a message is not an object with string 'role' and 'content'")


# Answering


@dataclass(frozen=True)
class Prompt:
    """A question as the model meets it."""

    question: Question
    ids: array[int]


def prepare(
    lm: Generator, questions: Sequence[Question], skipped: Skipped, limit: int | None = None
) -> list[Prompt]:
    """Encode questions, without those that leave no room for an answer.

    Everything is encoded before anything is answered, so that a prompt which the model cannot
    take is found at once and not after hours.

    Args:
        lm: the model.
        questions: from `read_questions`.
        skipped: takes those that do not fit, or that the model's chat template refuses.
        limit: at most so many; None takes all.

    Raises:
        AnswerError: the template refuses one, or none is left.
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
    """One answer under way."""

    prompt: Prompt
    sampling: SamplingParams
    tokens: list[int] = field(default_factory=list)


class Answerer:
    """Answers prompts by plain decoding, in a batch that stays full.

    Args:
        lm: the model; look-ahead rows of it are not used.
        settings: how answers are drawn.

    Attributes:
        tokens: how many have been drawn.
    """

    def __init__(self, lm: Generator, settings: Settings) -> None:
        self.lm = lm
        self.settings = settings
        self.tokens = 0

    def run(
        self, prompts: Sequence[Prompt], batch: int, stopping: Callable[[], bool]
    ) -> Iterator[list[Record]]:
        """Answer prompts in order, until all are answered or it is told to stop.

        Args:
            prompts: from `prepare`.
            batch: how many are answered at once.
            stopping: asked before each pass and each prompt that joins.

        Yields:
            After each pass the answers that it finished, often none.

        Raises:
            AnswerError: the batch is empty.
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
        """A prompt as text, the way the model saw it."""
        if "prompt" in given:
            return str(given["prompt"])
        tokenizer: Any = self.lm.tokenizer
        messages = [dict(message) for message in given["messages"]]
        return str(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        )


def unanswered(prompts: Sequence[Prompt], answered: Collection[str]) -> list[Prompt]:
    """The prompts without an answer, in order."""
    return [prompt for prompt in prompts if prompt.question.id not in answered]
