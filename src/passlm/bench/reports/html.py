"""Writes the results of `bench` as one self-contained HTML page with charts, tables and a sample.

All numbers, also those in titles, come from the entries of the results. Parts that older results
have no data for are left out. The page has no scripts. `figures.py` makes the charts; `style.py`
has the style sheet.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from passlm.bench.reports.figures import (
    GROUP,
    View,
    costs,
    group_cells,
    percent,
    positions,
    several,
    speedups,
    times,
    tokens_by,
    tokens_by_steps,
)
from passlm.bench.reports.markup import (
    NONE,
    Markup,
    Row,
    count_cell,
    element,
    finite,
    interval_ends,
    joined,
    number_cell,
    paragraph,
    rounded,
    section,
    share_cell,
    span_cell,
    table,
)
from passlm.bench.reports.notes import (
    FIRST_RUNS,
    Kinds,
    by_category,
    first_run_label,
    first_runs,
    left_out,
    loading,
    rules,
)
from passlm.bench.reports.style import STYLE
from passlm.bench.reports.sweeps import BASELINE, SWEEPS, Conditions, Run, run_label

# Kinds of tokens in "predictability" of results.json, with their names in the report.
_KINDS = {"accepted": "accepted", "refused": "rejected", "drawn": "drawn"}
_BATCH = "batch"  # heading of a column
_DEEPEST = 6  # in samples, candidates at later positions have the colour of this one


def page(results: Mapping[str, Any]) -> str:
    """Return the HTML document.

    Args:
        results: the content of `results.json`.
    """
    settings = results.get("settings") or {}
    title = f"passlm bench: {settings.get('model') or 'unknown model'}"
    runs: list[Run] = list(results.get("runs") or ())
    view = View(runs)
    sections = (
        speedups(view),
        tokens_by_steps(view),
        *(tokens_by(view, sweep) for sweep in SWEEPS[1:]),
        _categories(runs),
        positions(view),
        costs(view, results.get("cost_curve")),
        times(view),
        _predictability(runs),
        _samples(results.get("samples") or ()),
        _start(results),
        _all_runs(results),
        _source(results),
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    header = element("header", element("h1", title), *_headline(view), *_warnings(results))
    body = element("body", header, element("main", *filter(None, sections)))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _headline(view: View) -> Iterator[Markup]:
    """Yield paragraphs on the best method of each suite, with its interval."""
    best = [(group, _fastest(runs)) for group, runs in view.groups.items()]
    found = [(group, run) for group, run in best if run is not None]
    if not found:
        what = "Only plain decoding was measured." if view.groups else "Nothing was measured."
        yield element("p", what, class_="headline")
        return
    faster = [(group, run) for group, run in found if run["speedup_vs_ar"] > 1]
    if faster:
        faster.sort(key=lambda pair: -pair[1]["speedup_vs_ar"])
        best_runs = several([_achieved(group, run) for group, run in faster])
        yield element("p", f"Speed relative to plain decoding: {best_runs}.", class_="headline")
    slower = [(group, run) for group, run in found if run["speedup_vs_ar"] <= 1]
    if slower:
        slower.sort(key=lambda pair: -pair[1]["speedup_vs_ar"])
        best_runs = several([_achieved(group, run) for group, run in slower])
        verdict = "Nothing is faster than plain decoding" + (" elsewhere" if faster else "")
        yield element("p", f"{verdict}. Nearest: {best_runs}.", class_="headline")
    note = "The 95 % intervals come from resampling prompts."
    if any(len({run_label(run) for run in runs} - {BASELINE}) > 1 for runs in view.groups.values()):
        note += (
            " The best method is selected after measuring, which biases its speed-up slightly "
            "upwards."
        )
    yield paragraph(note)


def _fastest(runs: Sequence[Run]) -> Run | None:
    found = [
        run
        for run in runs
        if run["method"] != BASELINE and finite(run.get("speedup_vs_ar")) is not None
    ]
    return max(found, key=lambda run: float(run["speedup_vs_ar"]), default=None)


def _achieved(group: Conditions, run: Run) -> str:
    interval = interval_ends(run.get("speedup_interval"))
    spread = "no interval"
    if interval is not None:
        spread = f"{interval[0]:.2f} to {interval[1]:.2f}"
        if interval[0] <= 1 <= interval[1]:
            spread += ", so the difference is not significant"
    return f"{run_label(run)} {rounded(run['speedup_vs_ar'])} on {group.name} ({spread})"


def _warnings(results: Mapping[str, Any]) -> Iterator[Markup]:
    """Yield warnings that the reader must know to interpret the results."""
    settings = results.get("settings") or {}
    if results.get("complete") is False:
        yield element("p", "Not complete: not all suites were run.", class_="warning")
    for name, why in (results.get("missing_suites") or {}).items():
        yield element("p", f"Suite {name} left out: {why}", class_="warning")
    for why in (results.get("missing_methods") or {}).values():
        yield element("p", why, class_="warning")
    for name, facts in (results.get("engines") or {}).items():
        warning = f"{name} is another engine in a separate process: {facts['engine']}."
        yield element("p", warning, class_="warning")
    skipped = len(results.get("skipped") or ())
    if skipped:
        yield element("p", f"Prompts skipped because too long: {skipped}.", class_="warning")
    if settings.get("quantize"):
        warning = (
            f"Methods of passlm use weights rounded to {settings['quantize']}; hf and "
            "hf-prompt-lookup run the model with its original weights."
        )
        yield element("p", warning, class_="warning")


def _predictability(runs: Sequence[Run]) -> Markup | None:
    """Return the log-probability and entropy of accepted, rejected and drawn tokens."""
    rows: list[Row] = []
    differences: list[float] = []
    for run in runs:
        kinds = run.get("predictability")
        if not kinds:
            continue
        by_kind = [kinds.get(kind) or {} for kind in _KINDS]
        accepted, rejected = (finite(figures.get("logprob")) for figures in by_kind[:2])
        if accepted is not None and rejected is not None:
            differences.append(accepted - rejected)
        rows.append(
            (
                run_label(run),
                *group_cells(Conditions.of(run)),
                *(number_cell(figures.get("logprob")) for figures in by_kind),
                *(number_cell(figures.get("entropy")) for figures in by_kind),
                *(count_cell(figures.get("count")) for figures in by_kind),
            )
        )
    if not rows:
        return None
    likelier, compared = sum(d > 0 for d in differences), len(differences)
    title = f"Accepted candidates are likelier than rejected ones in {likelier} of {compared} runs"
    measures = ("log-probability", "entropy", "count")
    head = (
        "run",
        *GROUP,
        *(f"{measure}, {kind}" for measure in measures for kind in _KINDS.values()),
    )
    return section(
        "predictability",
        title if compared else "Predictability of the tokens",
        paragraph(
            "Mean log-probability and entropy in nats, under the target's own distribution at each "
            "token's position: of accepted candidates, of rejected ones, and of tokens that the "
            "target drew."
        ),
        table(head, rows, "predictability"),
    )


def _samples(samples: Sequence[Mapping[str, Any]]) -> Markup | None:
    if not samples:
        return None
    shares = [accepted / written for accepted, written in map(_accepted, samples) if written]
    depths = [element("mark", f" {at} ", class_=f"p{at}") for at in range(1, 1 + _DEEPEST)]
    key = ["Accepted draft tokens by position after the root: ", *depths, " and beyond. "]
    title = f"Accepted drafts are {percent(shares)} of the tokens" if shares else "Samples"
    return section(
        "samples",
        f"{title} of the sample{'s' if len(samples) > 1 else ''}" if shares else title,
        paragraph(*key, "Tokens without colour were drawn by the target; prompts are grey."),
        *map(_sample, samples),
    )


def _accepted(sample: Mapping[str, Any]) -> tuple[int, int]:
    """Return the number of accepted draft tokens and of all new tokens of a sample."""
    kinds = [piece["kind"] for piece in sample["pieces"] if piece["kind"] != "prompt"]
    return kinds.count("accepted"), len(kinds)


def _sample(sample: Mapping[str, Any]) -> Markup:
    pieces = []
    for piece in sample["pieces"]:
        if piece["kind"] == "accepted":
            at = int(piece.get("position") or 1)
            depth = min(max(at, 1), _DEEPEST)
            title = f"accepted, position {at}"
            pieces.append(element("mark", piece["text"], class_=f"p{depth}", title=title))
        else:
            kind = "prompt" if piece["kind"] == "prompt" else None
            pieces.append(element("span", piece["text"], class_=kind))
    accepted, written = _accepted(sample)
    name = f"{sample['suite']} {sample['prompt']}, {sample['method']}"
    return element(
        "figure",
        element("figcaption", f"{name}: {accepted} of {written} tokens are accepted drafts"),
        element("div", *pieces, class_="text"),
        class_="sample",
    )


def _categories(runs: Sequence[Run]) -> Markup | None:
    """Return speed-ups by category of prompt, for suites with more than one."""
    found = by_category(runs)
    if not found:
        return None
    content = [part for conditions, kinds in found.items() for part in _kinds(conditions, kinds)]
    spans = [_span(conditions, kinds) for conditions, kinds in found.items()]
    return section(
        "categories",
        f"Speed-ups by category: {several(list(filter(None, spans))) or NONE}",
        paragraph(
            "Speed-ups over plain decoding on the same prompts, with the accepted length in "
            "parentheses. The title names the method with the best median over the categories."
        ),
        *content,
    )


def _kinds(conditions: Conditions, kinds: Kinds) -> tuple[Markup, Markup]:
    labels = dict.fromkeys(label for entries in kinds.values() for label in entries)
    others = [label for label in labels if label != BASELINE]
    rows = []
    for category, entries in kinds.items():
        plain = entries.get(BASELINE, {})
        count = count_cell(max(entry["prompts"] for entry in entries.values()))
        cells = [_kind(entries.get(label, {})) for label in others]
        rows.append((category, count, number_cell(plain.get("tokens_per_second")), *cells))
    head = ("category", "prompts", f"{BASELINE}, tokens/s", *others)
    return element("h3", conditions.name), table(head, rows, f"categories of {conditions.name}")


def _kind(entry: Mapping[str, Any]) -> str:
    length = finite(entry.get("accepted_length"))
    length_part = [] if length is None else [" (", number_cell(length), ")"]
    return joined([number_cell(entry.get("speedup_vs_ar")), *length_part])


def _span(conditions: Conditions, kinds: Kinds) -> str | None:
    """Return the range of the best method's speed-up, with the categories at its ends."""
    ratios: dict[str, list[tuple[float, str]]] = {}
    for category, entries in kinds.items():
        for label, entry in entries.items():
            ratio = finite(entry.get("speedup_vs_ar"))
            if label != BASELINE and ratio is not None:
                ratios.setdefault(label, []).append((ratio, category))
    if not ratios:
        return None
    label, best = max(ratios.items(), key=lambda item: median(ratio for ratio, _ in item[1]))
    (low, least), (high, most) = min(best), max(best)
    return f"{label} {rounded(low)} ({least}) to {rounded(high)} ({most}) on {conditions.name}"


def _start(results: Mapping[str, Any]) -> Markup | None:
    """Return the loading time and the time to first token of first runs."""
    loaded = loading(results)
    rows = [
        (
            first_run_label(run),
            number_cell(run.get("first_run_first_token_seconds"), 3),
            number_cell(run.get("first_run_seconds"), 3),
        )
        for run in first_runs(results.get("runs") or ())
    ]
    if loaded is None or not rows:
        return None
    return section(
        "start",
        f"The model was loaded {results['start_seconds']:.1f} s after the process started",
        paragraph(f"{loaded} {FIRST_RUNS}"),
        table(("first run", "time to first token, s", "to last token, s"), rows, "first runs"),
    )


def _text_cell(name: str) -> Callable[[Run], str]:
    return lambda run: NONE if run.get(name) is None else str(run[name])


def _cell(name: str, show: Callable[[Any], str]) -> Callable[[Run], str]:
    return lambda run: show(run.get(name))


def _spread(name: str) -> Callable[[Run], str]:
    return lambda run: share_cell((run.get("speed_spread") or {}).get(name))


def _differing(run: Run) -> str:
    differences = run.get("differences")
    return NONE if differences is None else count_cell(len(differences))


def _margins(run: Run) -> str:
    if run["temperature"] > 0:
        return NONE  # sampling noise matters as well as the logits
    margins = [m for d in run.get("differences") or () if (m := finite(d["margin"])) is not None]
    return (
        joined([number_cell(median(margins)), ", ", number_cell(max(margins))]) if margins else NONE
    )


def _length(run: Run) -> str:
    return number_cell(run.get("accepted_length")) if run.get("accepted_by_position") else NONE


def _programs(run: Run) -> str:
    return count_cell((run.get("quality") or {}).get("samples"))


_COLUMNS: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("run", run_label),
    ("suite", _text_cell("suite")),
    ("prompt tokens", _cell("prompt_tokens", count_cell)),
    (_BATCH, _cell("batch_size", count_cell)),
    ("temperature", _cell("temperature", "{:g}".format)),
    ("tokens/s", _cell("tokens_per_second", number_cell)),
    ("speed-up", _cell("speedup_vs_ar", number_cell)),
    ("95 % interval", _cell("speedup_interval", span_cell)),
    ("tokens/pass", _cell("tokens_per_pass", number_cell)),
    ("accepted length", _length),
    ("rows/token", _cell("rows_per_token", number_cell)),
    ("identical to ar", _cell("identical_to_ar", share_cell)),
    ("outputs unlike ar", _differing),
    ("logit gap there: median, max", _margins),
    ("first token, s (median)", _cell("first_token_seconds", lambda s: number_cell(s, 3))),
    ("slow runs", _cell("slow_runs", count_cell)),
    ("spread over prompts", _spread("prompts")),
    ("spread over repeats", _spread("repeats")),
    ("prompts", _cell("prompts", count_cell)),
    ("repeats", _cell("repeats", count_cell)),
    ("new tokens", _cell("tokens", count_cell)),
    ("passes", _cell("passes", count_cell)),
    ("seconds", _cell("seconds", number_cell)),
    ("plan", _text_cell("plan")),
    ("engine", _text_cell("engine")),
    ("judge", _text_cell("judge")),
    ("draft", _text_cell("draft")),
    ("programs run", _programs),
)


def _all_runs(results: Mapping[str, Any]) -> Markup | None:
    """Return a table of all runs; columns without any value are left out."""
    runs: Sequence[Run] = results.get("runs") or ()
    if not runs:
        return None
    tries = dict.fromkeys(k for run in runs for k in _solving(run))
    columns = [*_COLUMNS, *((f"pass@{k}", _solved(k)) for k in tries)]
    cells = [[show(run) for _, show in columns] for run in runs]
    kept = [at for at in range(len(columns)) if any(row[at] != NONE for row in cells)]
    if all(run.get("batch_size") == 1 for run in runs):
        kept = [at for at in kept if columns[at][0] != _BATCH]
    head = [columns[at][0] for at in kept]
    title = "One run" if len(runs) == 1 else f"All {len(runs)} runs"
    without = [element("li", line) for line in left_out(results)]
    return section(
        "runs",
        title,
        *map(paragraph, rules(results)),
        *([element("ul", *without, class_="notes")] if without else ()),
        paragraph(
            "L is the number of look-ahead steps. Spread is the coefficient of variation of tokens "
            "per second. The logit gap is the difference between the two best logits where an "
            "output first differs from plain decoding's; if it is tiny, rounding decides."
        ),
        table(head, [[row[at] for at in kept] for row in cells], "all runs"),
        class_="wide",
    )


def _solving(run: Run) -> Mapping[str, Mapping[str, Any]]:
    """Return pass@k by k for the programs that a run generated."""
    found: Mapping[str, Mapping[str, Any]] = (run.get("quality") or {}).get("pass_at_k") or {}
    return found


def _solved(tries: str) -> Callable[[Run], str]:
    def show(run: Run) -> str:
        figures = _solving(run).get(tries)
        if not figures:
            return NONE
        interval = interval_ends(figures.get("interval"))
        parts = [share_cell(figures.get("value"))]
        if interval is not None:
            parts += [" (", share_cell(interval[0]), " to ", share_cell(interval[1]), ")"]
        return joined(parts)

    return show


def _source(results: Mapping[str, Any]) -> Markup:
    """Return the command, versions, machine and settings of the results."""
    stamp = dict(results.get("provenance") or {})
    arguments = stamp.pop("arguments", None)
    rows = [*_flat(stamp), *_flat(results.get("settings") or {})]
    if results.get("start_seconds") is not None:
        rows.append(("seconds to start", number_cell(results["start_seconds"])))
    for one in results.get("resumed") or ():
        rows.append(("interrupted and resumed", str(one.get("time"))))
    if results.get("peak_memory_bytes") is not None:
        rows.append(("peak memory, MiB", f"{results['peak_memory_bytes'] / 2**20:.0f}"))
    for one in results.get("skipped") or ():
        rows.append((f"skipped of {one['suite']}", f"{one['prompt']}, {one['tokens']} tokens"))
    command = []
    if arguments is not None:
        command.append(paragraph(element("code", f"passlm {shlex.join(map(str, arguments))}")))
    values = table(("name", "value"), rows, "provenance")
    return section("source", "Command, machine and settings", *command, values)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        label = f"{prefix}{name.replace('_', ' ')}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{label}: ")
        else:
            yield label, NONE if value is None else str(value)
