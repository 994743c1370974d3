"""Compares two results of `bench`: differences in settings and environment, and in speed.

`bench/measuring/measure.py` does the measuring; `markdown.py` writes the tables of one result.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from passlm.bench.measuring.folder import RESULTS
from passlm.bench.reports.sweeps import Conditions, Run
from passlm.errors import InputError
from passlm.params import SamplingParams, StopParams

Verdict = Literal["faster", "slower", "within noise", "unknown"]

_NORMAL = 1.96  # 95 % of a normal distribution lie within this many standard errors of its mean
_BASELINE = "ar"  # speed-ups are ratios to this method
_SAME_PACE = 0.1  # relative change of plain decoding's own speed that needs no warning
_COUNTED = (
    *("lookahead_tokens", "batch_size", "prompt_tokens", "prompts", "tokens", "tokens_per_second"),
    *("tokens_per_pass", "accepted_length", "identical_to_ar"),
)
_MODEL_SETTINGS = ("model", "quantize")
# Settings that change the generated text. The seed is not among them: with another seed the text
# is drawn from the same distribution.
_TEXT_SETTINGS = (
    "strip_prompts",
    *(
        field.name
        for kind in (SamplingParams, StopParams)
        for field in fields(kind)
        if field.name not in ("temperature", "seed", "judge", "draft")
    ),
)
_RULE = (
    "A speed-up counts as changed beyond noise if each of the two values lies outside the other's "
    "95 % interval and the logarithm of their ratio exceeds 1.96 standard errors, computed from "
    "the widths of the intervals. Up to 5 % of rows reach this by chance. The intervals cover the "
    "variation between prompts of one run, but not what differs between the two runs as a whole."
)
_NONE = "\N{EN DASH}"


class ResultsError(InputError):
    """A file is not a result of `bench`. The one-line message says what was expected."""


# Reading


def load_results(path: Path) -> dict[str, Any]:
    """Read a `results.json` of this version or an older one.

    Args:
        path: the file, or the folder that `bench --out` wrote.

    Raises:
        ResultsError: the file is missing, is not JSON or has another structure.
    """
    file = path / RESULTS if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        _check(content)
    except OSError as error:
        raise ResultsError(
            f"{file} cannot be read ({error.strerror}): "
            f"pass a folder written by bench --out, or its {RESULTS}"
        ) from None
    except ResultsError as error:
        raise ResultsError(f"{file} is not a result of bench: {error}") from None
    except ValueError as error:  # invalid JSON or invalid UTF-8
        raise ResultsError(f"{file} is not JSON: {error}") from None
    return dict(content)


def _check(content: Any) -> None:
    if not isinstance(content, dict):
        raise ResultsError("expected a JSON object")
    for name, kind in (("provenance", dict), ("settings", dict), ("runs", list)):
        if not isinstance(content.get(name), kind):
            raise ResultsError(f"{name!r} is missing or is not a {kind.__name__}")
    for name, kind in (("missing_suites", dict), ("skipped", list)):
        if not isinstance(content.get(name, kind()), kind):
            raise ResultsError(f"{name!r} is not a {kind.__name__}")
    seen = set()
    for number, run in enumerate(content["runs"], start=1):
        wrong = "not a JSON object" if not isinstance(run, dict) else _wrong_field(run)
        if wrong:
            raise ResultsError(f"run {number}: {wrong}")
        if _key(run) in seen:
            raise ResultsError(f"run {number}: duplicate of {_title(run)}, {_name(run)}")
        seen.add(_key(run))


def _wrong_field(run: Run) -> str | None:
    for name in ("suite", "method"):
        if not isinstance(run.get(name), str):
            return f"{name!r} is not a string"
    for name in ("temperature", *_COUNTED):
        value = run.get(name)
        if not (isinstance(value, int | float) or (value is None and name != "temperature")):
            return f"{name!r} is not a number"
    if not _is_ratio(run.get("speedup_vs_ar")):
        return "'speedup_vs_ar' is not a positive number"
    interval = run.get("speedup_interval")
    if interval is None:
        return None
    if not isinstance(interval, list) or len(interval) != 2 or not all(map(_is_ratio, interval)):
        return "'speedup_interval' is not a pair of positive numbers"
    return None


def _is_ratio(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def _key(run: Run) -> tuple[Any, ...]:
    """Return a key that is unique among the runs of a file."""
    return Conditions.of(run), run["method"], run.get("lookahead_tokens") or 0


# Judging


def verdict(a: Run, b: Run) -> Verdict:
    """Compare the speed-up of B with that of A.

    A difference counts if two conditions hold: each estimate lies outside the other's 95 %
    interval, and the logarithm of their ratio exceeds 1.96 of its standard errors. Each interval is
    taken to reach 1.96 standard errors to either side of the logarithm. The squares of the two
    standard errors are added, as for independent measurements. Runs on the same prompts are not
    independent, since prompts that are easy to draft are easy in both; the true error is then
    smaller, and the rule is conservative. It is conservative for few prompts too: their intervals
    come from Student's t distribution and are wider than 1.96 standard errors.

    Returns:
        "faster" or "slower" (B against A), "within noise", or "unknown" if a result has no
        interval, as with a single prompt.
    """
    around_a, around_b = a.get("speedup_interval"), b.get("speedup_interval")
    if around_a is None or around_b is None:
        return "unknown"
    first, second = a["speedup_vs_ar"], b["speedup_vs_ar"]
    apart = not _within(first, around_b) and not _within(second, around_a)
    error = math.hypot(_log_error(around_a), _log_error(around_b))
    if not apart or abs(math.log(second / first)) <= _NORMAL * error:
        return "within noise"
    return "faster" if second > first else "slower"


def _log_error(interval: Sequence[float]) -> float:
    return math.log(interval[1] / interval[0]) / (2 * _NORMAL)


def _within(value: float, interval: Sequence[float]) -> bool:
    return interval[0] <= value <= interval[1]


# Writing


def compare(a: Mapping[str, Any], b: Mapping[str, Any], names: tuple[str, str]) -> str:
    """Return a Markdown report: differences in settings, changed speed-ups, all runs side by side.

    Args:
        a: the content of a `results.json`, as `load_results` returns it.
        b: the result to compare with `a`; "faster" means that B is faster than A.
        names: the names of A and B in the report, such as their folders.
    """
    groups = _groups(a, b)
    parts = [
        "# passlm bench: A and B",
        f"- A: `{names[0]}`\n- B: `{names[1]}`",
        "## Settings and environment that differ",
        _table(("", "A", "B"), list(_differing(a, b))) or "No recorded differences.",
        *_listed(f"**Warning:** {text}" for text in _warnings(a, b, groups)),
        "## Changed speed-ups",
        *_changes(groups),
    ]
    for pairs in groups.values():
        parts += [f"## {_title(pairs[0][0])}", *_side_by_side(pairs)]
    alone = [*_alone("A", a, b), *_alone("B", b, a)]
    if alone:
        parts += ["## Runs in one result only", *_listed(alone)]
    return "\n\n".join(parts) + "\n"


def _groups(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[Conditions, list[tuple[Run, Run]]]:
    """Return the runs that are in both results, grouped by suite, temperature and the like."""
    others = {_key(run): run for run in b["runs"]}
    groups: dict[Conditions, list[tuple[Run, Run]]] = {}
    for run in a["runs"]:
        if _key(run) in others:
            pairs = groups.setdefault(Conditions.of(run), [])
            pairs.append((run, others[_key(run)]))
    return groups


def _facts(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings and environment of a result by name, in the order of the report."""
    stamp = dict(results["provenance"])
    last = {name: stamp.pop(name, None) for name in ("arguments", "time")}
    words = last["arguments"] if isinstance(last["arguments"], list) else []
    arguments = shlex.join(map(str, words))
    return {
        **dict(_flat(results["settings"])),
        "judge": _values(results, "judge"),
        "draft": _values(results, "draft"),
        "suites left out": ", ".join(results.get("missing_suites") or ()) or None,
        "prompts skipped": len(results.get("skipped") or ()) or None,
        **dict(_flat(stamp)),
        "arguments": f"`{arguments}`" if arguments else None,
        "time": last["time"],
    }


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _values(results: Mapping[str, Any], name: str) -> str | None:
    return ", ".join(sorted({str(run[name]) for run in results["runs"] if run.get(name)})) or None


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    facts = _facts(a), _facts(b)
    for name in dict.fromkeys([*facts[0], *facts[1]]):
        values = [fact.get(name) for fact in facts]
        if _set(values[0]) != _set(values[1]):
            yield (name, *map(_shown, values))


def _set(value: Any) -> Any:
    """Return a setting's value for comparison; an absent setting of an older file equals False."""
    return None if value is False else value


def _shown(value: Any) -> str:
    if value is None:
        return _NONE
    return value if isinstance(value, str) else json.dumps(value)


def _warnings(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    groups: Mapping[Conditions, Sequence[tuple[Run, Run]]],
) -> Iterator[str]:
    """Return reasons why the speed-ups of the two should not be compared."""
    for names, what in (
        (_MODEL_SETTINGS, "run different models"),
        (_TEXT_SETTINGS, "generate different text"),
    ):
        other = [
            name for name in names if _set(a["settings"].get(name)) != _set(b["settings"].get(name))
        ]
        if other:
            yield f"{', '.join(other)}: A and B {what}, which by itself changes speed-ups"
    for pairs in groups.values():
        yield from _unlike(*pairs[0])
        yield from (text for pair in pairs if _is_baseline(pair[0]) for text in _other_pace(*pair))
    for name, results in (("A", a), ("B", b)):
        if results.get("complete") is False:
            yield f"{name} is not complete: not all suites were run"
    if not groups:
        yield "A and B have no run with the same suite, method and temperature"


def _unlike(a: Run, b: Run) -> Iterator[str]:
    if a.get("prompts") != b.get("prompts"):
        yield (
            f"{_title(a)}: {_number(a.get('prompts'), 0)} prompts in A and "
            f"{_number(b.get('prompts'), 0)} in B, so the speed-ups are of different prompts"
        )


def _other_pace(a: Run, b: Run) -> Iterator[str]:
    """Return a warning if the speed of plain decoding changed, which changes all ratios to it."""
    first, second = (run.get("tokens_per_second") for run in (a, b))
    if first and second and abs(second / first - 1) > _SAME_PACE:
        yield (
            f"{_title(a)}: {_BASELINE} itself runs at {first:.1f} tokens/s in A and {second:.1f} "
            f"in B ({100 * (second / first - 1):+.0f} %), so compare tokens/s as well as speed-ups"
        )


def _changes(groups: Mapping[Conditions, Sequence[tuple[Run, Run]]]) -> list[str]:
    pairs = [pair for group in groups.values() for pair in group if not _is_baseline(pair[0])]
    if not pairs:
        return ["No comparison is possible: A and B have no method with a speed-up in common."]
    changed = [
        f"{_title(a)}: {_name(a)} is {verdict(a, b)}: "
        f"{a['speedup_vs_ar']:.2f} to {b['speedup_vs_ar']:.2f} ({_change(a, b)})"
        for a, b in pairs
        if verdict(a, b) in ("faster", "slower")
    ]
    count = f"{len(changed)} of {len(pairs)} speed-ups changed beyond noise from A to B"
    return [f"{count}{':' if changed else '.'}", *_listed(changed), _RULE]


def _side_by_side(pairs: Sequence[tuple[Run, Run]]) -> Iterator[str]:
    """Return the table of a suite at a temperature, and below it the figures of plain decoding."""
    head = (
        *("method", "L", "speed-up A (95 %)", "speed-up B (95 %)", "change", "verdict"),
        *("tokens/s A, B", "tokens/pass A, B", "accepted length A, B", "identical to ar A, B"),
    )
    rows = [_row(a, b) for a, b in pairs if not _is_baseline(a)]
    if rows:
        yield _table(head, rows)
    for a, b in pairs:
        if _is_baseline(a):
            yield f"- {_BASELINE}, the baseline of speed-ups: {_plain(a)} in A; {_plain(b)} in B"


def _row(a: Run, b: Run) -> tuple[str, ...]:
    shares = [
        None if run.get("identical_to_ar") is None else 100 * run["identical_to_ar"]
        for run in (a, b)
    ]
    return (
        a["method"],
        str(a.get("lookahead_tokens") or _NONE),
        _speedup(a),
        _speedup(b),
        _change(a, b),
        verdict(a, b),
        ", ".join(_number(run.get("tokens_per_second"), 1) for run in (a, b)),
        ", ".join(_number(run.get("tokens_per_pass"), 2) for run in (a, b)),
        ", ".join(_number(run.get("accepted_length"), 2) for run in (a, b)),
        ", ".join(_number(share, 1, " %") for share in shares),
    )


def _plain(run: Run) -> str:
    return (
        f"{_number(run.get('tokens_per_second'), 1)} tokens/s, "
        f"{_number(run.get('prompts'), 0)} prompts, {_number(run.get('tokens'), 0)} new tokens"
    )


def _alone(name: str, own: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    seen = {_key(run) for run in other["runs"]}
    groups: dict[str, list[str]] = {}
    for run in own["runs"]:
        if _key(run) not in seen:
            groups.setdefault(_title(run), []).append(_name(run))
    for title, runs in groups.items():
        yield f"{name}, {title}: {'; '.join(runs)}"


def _is_baseline(run: Run) -> bool:
    return bool(run["method"] == _BASELINE)


def _title(run: Run) -> str:
    greedy = " (greedy)" if run["temperature"] == 0 else ""
    return f"{Conditions.of(run).place}, temperature {run['temperature']:g}{greedy}"


def _name(run: Run) -> str:
    steps = run.get("lookahead_tokens")
    return f"{run['method']}, L {steps}" if steps else str(run["method"])


def _speedup(run: Run) -> str:
    interval = run.get("speedup_interval")
    spread = f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
    return f"{run['speedup_vs_ar']:.2f}{spread}"


def _change(a: Run, b: Run) -> str:
    return f"{100 * (b['speedup_vs_ar'] / a['speedup_vs_ar'] - 1):+.1f} %"


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return _NONE if value is None else f"{value:.{digits}f}{unit}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table, or an empty string if there are no rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _listed(lines: Any) -> list[str]:
    """Return one part with a bullet for each line, or no part if there are no lines."""
    text = "\n".join(f"- {line}" for line in lines)
    return [text] if text else []
