"""Turn files and folders of text into token sequences.

Reads documents, holds some of them out, and cuts the others into windows of equal length. Windows
are accessed by number, so that training resumes at any step without replaying earlier ones.
Tokenizing and rendering chats are left to functions passed in: nothing here sees a tokenizer.
Anchors and look-ahead groups are left to `loop.py`.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from passlm.errors import InputError

Tokenize = Callable[[list[str]], list[list[int]]]
Report = Callable[[str], None]
RenderChat = Callable[[list[dict[str, str]]], str]
Ids = NDArray[np.uint32]

MIN_CHARACTERS = 32
"""Shorter texts are skipped: they have no anchor followed by enough tokens to predict."""

# fmt: off
TEXT_SUFFIXES = frozenset(
    [
        ".txt", ".text", ".md", ".markdown", ".rst", ".org", ".tex", ".py", ".pyi", ".c", ".h",
        ".cc", ".cpp", ".hpp", ".cs", ".go", ".java", ".js", ".jsx", ".ts", ".tsx", ".kt", ".lua",
        ".php", ".pl", ".r", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift", ".html", ".css",
        ".jsonl",
    ]
)
# fmt: on
"""Suffixes of the files read from a folder. A file given by its own path may have any suffix."""

_BATCH_CHARACTERS = 1_000_000  # per tokenizer call: enough to keep its threads busy
_CYCLE = 1000  # draws in which each source of a mixture gets its exact share


class DataError(InputError):
    """Text that training cannot use; a one-line message that says what to do."""


@dataclass(frozen=True)
class Document:
    """Text of one file or of one record of a JSONL file.

    Attributes:
        path: The file, followed by `:line` for a record of a JSONL file.
        text: The whole text.
        source: Index of the path given to `read_documents` that it came from.
    """

    path: Path
    text: str
    source: int = 0


def read_documents(
    paths: Sequence[Path],
    report: Report,
    render_chat: RenderChat | None = None,
    skip_bad: bool = False,
) -> list[Document]:
    """Read all documents in files and folders, in a fixed order.

    Folders are read recursively and sorted; hidden files are ignored. A JSONL record has a `text`
    (other fields are then ignored), `messages`, or a `prompt` with an optional `completion` or
    `answer`.

    Args:
        paths: Files and folders.
        report: Called with one line for everything that is skipped, including the reason.
        render_chat: Function from `messages` to text; None if the model has no chat template.
        skip_bad: Skip and count broken lines of JSONL files instead of raising an error.

    Raises:
        DataError: A path does not exist, a line is broken, or no readable text is left.
    """
    documents: list[Document] = []
    bad = Broken(report, skip_bad)
    for source, path in enumerate(paths):
        for file in _files(path, report):
            for name, text in _texts(file, report, render_chat, bad):
                if len(text.strip()) < MIN_CHARACTERS:
                    report(f"skipped {name}: shorter than {MIN_CHARACTERS} characters")
                else:
                    documents.append(Document(name, text, source))
    if bad.count:
        report(f"skipped {bad.count} broken lines in all")
    if not documents:
        named = ", ".join(map(str, paths)) or "no path"
        raise DataError(f"no text to train on in {named}: give UTF-8 text files, folders or JSONL")
    return documents


@dataclass
class Broken:
    """Broken lines of JSONL files: counted if `allowed`, an error otherwise."""

    report: Report
    allowed: bool
    count: int = 0

    def line(self, name: Path, reason: str) -> None:
        """Record one broken line.

        Raises:
            DataError: Broken lines are not allowed.
        """
        if not self.allowed:
            raise DataError(
                f"{name}: {reason}; correct the line, or skip such lines with --skip-bad"
            )
        self.count += 1
        self.report(f"skipped {name}: {reason}")


def _files(path: Path, report: Report) -> Iterator[Path]:
    if not path.exists():
        raise DataError(f"{path} does not exist: give a file or a folder of text")
    if path.is_file():
        yield path
        return
    others: Counter[str] = Counter()
    for file in _walk(path, report):
        if file.suffix.lower() in TEXT_SUFFIXES:
            yield file
        else:
            others[file.suffix or file.name] += 1
    if others:
        kinds = ", ".join(sorted(others))
        report(f"skipped {others.total()} files in {path} with suffixes not known as text: {kinds}")


def _walk(folder: Path, report: Report) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        report(f"skipped {error.filename}: {error.strerror}")

    for root, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))


def _texts(
    file: Path, report: Report, render_chat: RenderChat | None, bad: Broken
) -> Iterator[tuple[Path, str]]:
    try:
        content = file.read_bytes()
    except OSError as error:
        report(f"skipped {file}: {error.strerror}")
        return
    if b"\0" in content:
        report(f"skipped {file}: binary")
        return
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        report(f"skipped {file}: not UTF-8 (byte {error.start})")
        return
    if file.suffix.lower() == ".jsonl":
        yield from _records(file, text, render_chat, bad)
    else:
        yield file, text


def _records(
    file: Path, content: str, render_chat: RenderChat | None, bad: Broken
) -> Iterator[tuple[Path, str]]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        name = file.with_name(f"{file.name}:{number}")
        try:
            yield name, _record_text(json.loads(line), render_chat)
        except DataError as error:
            bad.line(name, str(error))
        except json.JSONDecodeError as error:
            bad.line(name, f"not JSON ({error.msg})")
        except (ValueError, RecursionError) as error:  # too many digits, or nested too deeply
            bad.line(name, f"cannot be read as JSON ({error})")


def _record_text(record: Any, render_chat: RenderChat | None) -> str:
    if not isinstance(record, dict):
        raise DataError("not a JSON object")
    if "text" in record:  # answers of `distill-data` hold it next to the prompt
        parts = [record["text"]]
    elif "messages" in record:
        return _chat_text(record["messages"], render_chat)
    elif "prompt" in record:
        parts = [record["prompt"], record.get("completion", record.get("answer", ""))]
    else:
        raise DataError("has none of 'text', 'prompt' and 'messages'")
    if not all(isinstance(part, str) for part in parts):
        raise DataError("its text is not a string")
    return _encodable("".join(parts))


def _encodable(text: str) -> str:
    """Return the text; refuse half a surrogate pair, which JSON allows but no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError("its text holds half a surrogate pair") from error
    return text


def _chat_text(messages: Any, render_chat: RenderChat | None) -> str:
    if render_chat is None:
        raise DataError("has 'messages', and the model has no chat template")
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise DataError("'messages' is not a list of objects with string 'role' and 'content'")
    return render_chat(messages)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(key), str) for key in ("role", "content")
    )


def split_held_out(
    documents: Sequence[Document], share: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Split documents into `(train, held_out)`; about `share` of them are held out.

    A hash of seed and text decides for each document. So the split does not change when documents
    are added, moved or reordered, and copies of a text fall on the same side. Both sides contain
    text of every source; a source of a single document is cut in two at a line near its end.

    Raises:
        DataError: `share` is not between 0 and 1, or there is nothing to split.
    """
    if not 0.0 < share < 1.0:
        raise DataError(f"the held-out share is {share}: give a number between 0 and 1")
    if not documents:
        raise DataError("there are no documents to hold out from: give more text")
    sources = sorted({document.source for document in documents})
    parts = [
        _split_source([d for d in documents if d.source == source], share, seed)
        for source in sources
    ]
    held_out = [document for _, held in parts for document in held]
    # A small source may hold out a text that a large one would train on.
    texts, train = {document.text for document in held_out}, list[Document]()
    for documents_of_it, _ in parts:
        others = [document for document in documents_of_it if document.text not in texts]
        train += others or documents_of_it
    trained = {document.text for document in train}
    return train, [document for document in held_out if document.text not in trained]


def _split_source(
    documents: Sequence[Document], share: float, seed: int
) -> tuple[list[Document], list[Document]]:
    places = [_place(document.text, seed) for document in documents]
    if len(set(places)) < 2:
        return _cut(documents, share)
    # Clamp, so that each side gets a document even if there are few.
    bound = min(max(share, min(places)), max(places) - 2.0**-53)
    train = [d for d, place in zip(documents, places, strict=True) if place > bound]
    held_out = [d for d, place in zip(documents, places, strict=True) if place <= bound]
    return train, held_out


def _place(text: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}:".encode() + text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48  # [0, 1), exact in a float


def _cut(documents: Sequence[Document], share: float) -> tuple[list[Document], list[Document]]:
    first = documents[0]
    middle = int(len(first.text) * (1 - share))
    line_end = first.text.rfind("\n", 1, middle)
    middle = max(line_end + 1 if line_end > middle // 2 else middle, 1)
    parts = first.text[:middle], first.text[middle:]
    if not all(part.strip() for part in parts):
        raise DataError(f"{first.path} is too short to hold out a part of it: give more text")
    train, held_out = (Document(first.path, part, first.source) for part in parts)
    return [train], [held_out]


class TokenWindows:
    """Token windows of equal length, accessed by number.

    Every document ends with the end-of-sequence id. A document of at least `length` tokens is cut
    separately, so that its windows contain nothing else; shorter ones are concatenated. Each epoch
    yields every window once, in an order drawn from seed and epoch. The cuts move by a random
    offset, so that tokens at the end of a document are used as well.

    No state is kept between calls: `window(n)` is the same after a restart.

    Args:
        documents: Documents from `read_documents`.
        tokenize: Function from texts to ids, without special tokens.
        end_of_sequence: Id appended to each document.
        length: Tokens per window.
        seed: Seed of the order and the offsets.
        weights: One weight for each path given to `read_documents`; windows are drawn from the
            sources in these proportions. If None, every window is equally likely.

    Raises:
        DataError: There is too little text for one window, or the weights do not fit the sources.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        tokenize: Tokenize,
        end_of_sequence: int,
        length: int,
        seed: int = 0,
        weights: Sequence[float] | None = None,
    ) -> None:
        """Tokenize all documents; see the class."""
        if length < 1:
            raise DataError(f"window length is {length}: give a length of at least 1")
        self.length = length
        self._seed = seed
        ids = _tokenized([d.text for d in documents], tokenize, end_of_sequence)
        members = [0 if weights is None else document.source for document in documents]
        self._sources = _sources(ids, members, length, 1 if weights is None else len(weights))
        self._slots = _slots([1.0] if weights is None else weights)
        self._check(weights)

    def _check(self, weights: Sequence[float] | None) -> None:
        for number, source in enumerate(self._sources):
            if source.windows or not self._slots[number]:
                continue
            where = "the text" if weights is None else f"source {number + 1}"
            raise DataError(
                f"{where} has {source.tokens} tokens and a window needs {self.length}: "
                "give more text or shorter windows"
            )

    def __len__(self) -> int:
        """Return the number of windows in one epoch of all sources."""
        return sum(source.windows for source in self._sources)

    @property
    def tokens(self) -> int:
        """Number of tokens in all documents, including the end-of-sequence ids."""
        return sum(source.tokens for source in self._sources)

    def fingerprint(self) -> str:
        """Return a hash that determines all windows; if it is unchanged, training can resume."""
        digest = hashlib.sha256(repr((self.length, self._seed, self._slots)).encode())
        for source in self._sources:
            for span in source.spans:
                digest.update(len(span).to_bytes(8, "big"))
                digest.update(span.tobytes())
        return digest.hexdigest()

    def window(self, index: int) -> Tensor:
        """Return window `index`, counted from 0 without upper limit: ids, int64 `[length]`."""
        if index < 0:
            raise IndexError(f"window {index}: windows are counted from 0")
        number, draw = self._source_of(index)
        source = self._sources[number]
        epoch, place = divmod(draw, source.windows)
        order = np.random.default_rng([self._seed, number, epoch]).permutation(source.windows)
        ids = source.window(int(order[place]), self._seed, epoch, self.length)
        return torch.from_numpy(ids.astype(np.int64))

    def frequent(self, count: int) -> Tensor:
        """Return the ids of the `count` most frequent tokens, in descending order, int64.

        Sources count by their weights. Ids that do not occur are left out, so there may be fewer.
        """
        longest = 1 + max(int(span.max()) for s in self._sources for span in s.spans)
        shares = np.zeros(longest)
        for source, slots in zip(self._sources, self._slots, strict=True):
            for span in source.spans:
                shares += np.bincount(span, minlength=longest) * (slots / source.tokens)
        order = np.argsort(-shares, kind="stable")[:count]
        return torch.from_numpy(order[shares[order] > 0])

    def batch(self, step: int, size: int) -> Tensor:
        """Return the windows of training step `step`, from 0: ids, int64 `[size, length]`."""
        return torch.stack([self.window(step * size + row) for row in range(size)])

    def _source_of(self, index: int) -> tuple[int, int]:
        """Return the source of draw `index`, and how often that source was drawn before."""
        if len(self._sources) == 1:
            return 0, index
        cycle, place = divmod(index, _CYCLE)
        turns = np.repeat(np.arange(len(self._slots)), self._slots)
        turns = np.random.default_rng([self._seed, cycle]).permutation(turns)
        number = int(turns[place])
        before = int(np.count_nonzero(turns[:place] == number))
        return number, cycle * self._slots[number] + before


@dataclass(frozen=True)
class _WindowSource:
    """Token spans of one source, from which its windows are cut."""

    spans: tuple[Ids, ...]
    first: NDArray[np.int64]  # [spans + 1]: number of each span's first window, then the total
    tokens: int

    @property
    def windows(self) -> int:
        return int(self.first[-1])

    def window(self, number: int, seed: int, epoch: int, length: int) -> Ids:
        at = int(np.searchsorted(self.first, number, side="right")) - 1
        span = self.spans[at]
        slack = len(span) % length
        offset = int(np.random.default_rng([seed, epoch, at]).integers(slack + 1))
        start = offset + (number - int(self.first[at])) * length
        return span[start : start + length]


def _tokenized(texts: Sequence[str], tokenize: Tokenize, end_of_sequence: int) -> list[Ids]:
    documents: list[Ids] = []
    for batch in _batches(texts):
        for ids in tokenize(batch):
            documents.append(np.array([*ids, end_of_sequence], dtype=np.uint32))
    return documents


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _sources(
    ids: Sequence[Ids], members: Sequence[int], length: int, count: int
) -> list[_WindowSource]:
    grouped: list[list[Ids]] = [[] for _ in range(count)]
    for document, source in zip(ids, members, strict=True):
        if source >= count:
            raise DataError(f"{count} weights for at least {source + 1} paths: give one for each")
        grouped[source].append(document)
    return [_source(group, length) for group in grouped]


def _source(documents: Sequence[Ids], length: int) -> _WindowSource:
    spans = [document for document in documents if len(document) >= length]
    short = [document for document in documents if len(document) < length]
    if short:
        spans.append(np.concatenate(short))
    counts = np.array([len(span) // length for span in spans], dtype=np.int64)
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    return _WindowSource(tuple(spans), first, sum(map(len, spans)))


def _slots(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the draws per `_CYCLE` of each source: largest remainders, at least 1 if weighted."""
    if not all(0.0 <= weight < float("inf") for weight in weights) or not sum(weights):
        raise DataError(
            f"weights are {list(weights)}: give numbers of at least 0, one of them above 0"
        )
    wanted = np.array(weights) / sum(weights) * _CYCLE
    slots = np.where(wanted > 0, np.maximum(np.floor(wanted), 1), 0).astype(int)
    while (missing := _CYCLE - int(slots.sum())) != 0:
        short = wanted - slots
        slots[int(np.argmax(short) if missing > 0 else np.argmin(short))] += np.sign(missing)
    return tuple(int(slot) for slot in slots)
