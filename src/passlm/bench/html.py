"""The results of `bench` as one HTML page that needs nothing else: charts, tables, a sample.

Every number comes from the results' own entries, and titles are made from them; what older results
lack is left out. There are no scripts. The charts are made in `figures.py`.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from passlm.bench.figures import (
    BASELINE,
    GROUP,
    Group,
    Run,
    View,
    costs,
    group_cells,
    group_name,
    percent,
    positions,
    run_label,
    speedups,
    times,
    tokens_by_steps,
)
from passlm.bench.markup import (
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

_KINDS = ("accepted", "refused", "drawn")  # of tokens, by what became of them
_DEEPEST = 6  # candidates behind it share its colour in samples


def page(results: Mapping[str, Any]) -> str:
    """The document.

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
        positions(view),
        costs(view, results.get("cost_curve")),
        times(view),
        _predictability(runs),
        _samples(results.get("samples") or ()),
        _all_runs(runs),
        _source(results),
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(_STYLE)),
    )
    header = element("header", element("h1", title), *_headline(view), *_warnings(results))
    body = element("body", header, element("main", *filter(None, sections)))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _headline(view: View) -> Iterator[Markup]:
    """The best method of each suite, its interval beside it."""
    best = [(group, _fastest(runs)) for group, runs in view.groups.items()]
    found = [(group, run) for group, run in best if run is not None]
    if not found:
        what = "Only plain decoding was measured." if view.groups else "Nothing was measured."
        yield element("p", what, class_="headline")
        return
    faster = [(group, run) for group, run in found if run["speedup_vs_ar"] > 1]
    if faster:
        faster.sort(key=lambda pair: -pair[1]["speedup_vs_ar"])
        told = "; ".join(_achieved(group, run) for group, run in faster)
        yield element("p", f"Times as fast as plain decoding: {told}.", class_="headline")
    slower = [(group, run) for group, run in found if run["speedup_vs_ar"] <= 1]
    if slower:
        told = "; ".join(_achieved(group, run) for group, run in slower)
        begun = "Nothing is faster than plain decoding" + (" elsewhere" if faster else "")
        yield element("p", f"{begun}. Nearest: {told}.", class_="headline")
    told = "The intervals (95 %) resample prompts."
    if any(len({run_label(run) for run in runs} - {BASELINE}) > 1 for runs in view.groups.values()):
        told += (
            " The best of several methods is picked after measuring, which flatters it a little."
        )
    yield paragraph(told)


def _fastest(runs: Sequence[Run]) -> Run | None:
    found = [
        run
        for run in runs
        if run["method"] != BASELINE and finite(run.get("speedup_vs_ar")) is not None
    ]
    return max(found, key=lambda run: float(run["speedup_vs_ar"]), default=None)


def _achieved(group: Group, run: Run) -> str:
    interval = interval_ends(run.get("speedup_interval"))
    spread = "no interval"
    if interval is not None:
        spread = f"{interval[0]:.2f} to {interval[1]:.2f}"
        if interval[0] <= 1 <= interval[1]:
            spread += ", which leaves open whether it is faster"
    return f"{run_label(run)} {rounded(run['speedup_vs_ar'])} on {group_name(group)} ({spread})"


def _warnings(results: Mapping[str, Any]) -> Iterator[Markup]:
    """What a reader must know before believing the rest."""
    settings = results.get("settings") or {}
    if results.get("complete") is False:
        yield element("p", "Not complete: suites were still to come.", class_="warning")
    for name, why in (results.get("missing_suites") or {}).items():
        yield element("p", f"Suite {name} left out: {why}", class_="warning")
    skipped = len(results.get("skipped") or ())
    if skipped:
        yield element("p", f"Prompts skipped as too long: {skipped}.", class_="warning")
    if settings.get("quantize"):
        told = (
            f"Methods of passlm compute with weights rounded to {settings['quantize']}, so another "
            "model than that of hf and hf-prompt-lookup."
        )
        yield element("p", told, class_="warning")


def _predictability(runs: Sequence[Run]) -> Markup | None:
    """How likely the target found the tokens that were accepted, refused and drawn."""
    rows: list[Row] = []
    differences: list[float] = []
    for run in runs:
        kinds = run.get("predictability")
        if not kinds:
            continue
        told = [kinds.get(kind) or {} for kind in _KINDS]
        accepted, refused = (finite(figures.get("logprob")) for figures in told[:2])
        if accepted is not None and refused is not None:
            differences.append(accepted - refused)
        rows.append(
            (
                run_label(run),
                *group_cells((run["suite"], run["temperature"])),
                *(number_cell(figures.get("logprob")) for figures in told),
                *(number_cell(figures.get("entropy")) for figures in told),
                *(count_cell(figures.get("count")) for figures in told),
            )
        )
    if not rows:
        return None
    likelier, compared = sum(d > 0 for d in differences), len(differences)
    title = f"Accepted candidates are likelier than refused ones in {likelier} of {compared} runs"
    measures = ("log-probability", "entropy", "count")
    head = ("run", *GROUP, *(f"{measure}, {kind}" for measure in measures for kind in _KINDS))
    return section(
        "predictability",
        title if compared else "How predictable the tokens were",
        paragraph(
            "Means over tokens, in nats, by the target's own distribution at each token's place: "
            "of accepted candidates, of refused ones, and of what the target drew."
        ),
        table(head, rows, "predictability"),
    )


def _samples(samples: Sequence[Mapping[str, Any]]) -> Markup | None:
    if not samples:
        return None
    shares = [accepted / written for accepted, written in map(_accepted, samples) if written]
    depths = [element("mark", f" {at} ", class_=f"p{at}") for at in range(1, 1 + _DEEPEST)]
    told = ["Accepted drafts by their position behind the root: ", *depths, " and beyond. "]
    title = f"Accepted drafts are {percent(shares)} of the tokens" if shares else "Sample texts"
    return section(
        "samples",
        f"{title} of the sample{'s' if len(samples) > 1 else ''}" if shares else title,
        paragraph(*told, "The rest was drawn by the target; a prompt is grey."),
        *map(_sample, samples),
    )


def _accepted(sample: Mapping[str, Any]) -> tuple[int, int]:
    """How many of the new pieces are accepted drafts."""
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
    told = f"{sample['suite']} {sample['prompt']}, {sample['method']}: {accepted} of {written} "
    return element(
        "figure",
        element("figcaption", f"{told}tokens are accepted drafts"),
        element("div", *pieces, class_="text"),
        class_="sample",
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
        return NONE  # noise decides beside the logits
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
    ("temperature", _cell("temperature", "{:g}".format)),
    ("tokens/s", _cell("tokens_per_second", number_cell)),
    ("speed-up", _cell("speedup_vs_ar", number_cell)),
    ("95 % interval", _cell("speedup_interval", span_cell)),
    ("tokens/pass", _cell("tokens_per_pass", number_cell)),
    ("accepted length", _length),
    ("rows/token", _cell("rows_per_token", number_cell)),
    ("identical to ar", _cell("identical_to_ar", share_cell)),
    ("differing texts", _differing),
    ("logits apart there: median, most", _margins),
    ("first token, s (median)", _cell("first_token_seconds", lambda s: number_cell(s, 3))),
    ("spread over prompts", _spread("prompts")),
    ("spread over repeats", _spread("repeats")),
    ("prompts", _cell("prompts", count_cell)),
    ("repeats", _cell("repeats", count_cell)),
    ("new tokens", _cell("tokens", count_cell)),
    ("passes", _cell("passes", count_cell)),
    ("seconds", _cell("seconds", number_cell)),
    ("plan", _text_cell("plan")),
    ("judge", _text_cell("judge")),
    ("draft", _text_cell("draft")),
    ("programs run", _programs),
)


def _all_runs(runs: Sequence[Run]) -> Markup | None:
    """Everything that the charts do not break down further; columns without a value left out."""
    if not runs:
        return None
    tries = dict.fromkeys(k for run in runs for k in _solving(run))
    columns = [*_COLUMNS, *((f"pass@{k}", _solved(k)) for k in tries)]
    cells = [[show(run) for _, show in columns] for run in runs]
    kept = [at for at in range(len(columns)) if any(row[at] != NONE for row in cells)]
    head = [columns[at][0] for at in kept]
    told = "One run" if len(runs) == 1 else f"All {len(runs)} runs"
    return section(
        "runs",
        told,
        paragraph(
            "L is the number of look-ahead steps. Spread is the coefficient of variation of tokens "
            "a second. Where a text first differs from plain decoding's, the two best logits may "
            "lie so near that rounding decides."
        ),
        table(head, [[row[at] for at in kept] for row in cells], "all runs"),
        class_="wide",
    )


def _solving(run: Run) -> Mapping[str, Mapping[str, Any]]:
    """How many problems its programs solve: pass@k by k."""
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
    """Everything that the results say of themselves."""
    stamp = dict(results.get("provenance") or {})
    arguments = stamp.pop("arguments", None)
    rows = [*_flat(stamp), *_flat(results.get("settings") or {})]
    if results.get("start_seconds") is not None:
        rows.append(("seconds to start", number_cell(results["start_seconds"])))
    if results.get("peak_memory_bytes") is not None:
        rows.append(("peak memory, MiB", f"{results['peak_memory_bytes'] / 2**20:.0f}"))
    for one in results.get("skipped") or ():
        rows.append((f"skipped of {one['suite']}", f"{one['prompt']}, {one['tokens']} tokens"))
    command = []
    if arguments is not None:
        command.append(paragraph(element("code", f"passlm {shlex.join(map(str, arguments))}")))
    values = table(("of what", "value"), rows, "provenance")
    return section("source", "Where this comes from", *command, values)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        label = f"{prefix}{name.replace('_', ' ')}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{label}: ")
        else:
            yield label, NONE if value is None else str(value)


_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1f24; --muted: #57606a; --grid: #dfe3e8; --soft: #f4f6f8;
  --warn: #8a4b00;
  --c0: #5c6773; --c1: #0072b2; --c2: #d55e00; --c3: #008f68;
  --c4: #b8588f; --c5: #b37700; --c6: #3d9ad1; --c7: #8a8000;
  --t0: #7f8c99; --t1: #33475b; --t2: #c2732f; --t3: transparent;
  --p1: #d3efe2; --p2: #b3e2ce; --p3: #92d4b9; --p4: #72c6a4; --p5: #55b78f; --p6: #3ca67c;
  --on: #10241c;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #14171c; --ink: #e7eaee; --muted: #a4adb8; --grid: #333a44; --soft: #1d2229;
    --warn: #f0ae1f;
    --c0: #9aa5b1; --c1: #4a9fe0; --c2: #f07a30; --c3: #1fc496;
    --c4: #df8fbf; --c5: #f0ae1f; --c6: #a3dcff; --c7: #f0e442;
    --t0: #66717d; --t1: #b9c7d6; --t2: #d08a4f;
    --p1: #1f4738; --p2: #205442; --p3: #22624d; --p4: #247058; --p5: #267e63; --p6: #278364;
    --on: #ffffff;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.25rem clamp(0.75rem, 3vw, 2.5rem) 3rem; max-width: 82rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
}
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 0.75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; line-height: 1.3; margin: 0 0 0.35rem; overflow-wrap: anywhere; }
p { margin: 0.35rem 0; max-width: 46rem; overflow-wrap: anywhere; }
header p, main > section > p { color: var(--muted); }
header p.headline { color: var(--ink); font-size: 1.1rem; }
header p.warning { color: var(--warn); border-left: 4px solid; padding-left: 0.6rem; }
section { margin-top: 2.5rem; }
.panels {
  display: grid; gap: 1.25rem 2rem; margin-top: 0.75rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr));
}
figure { margin: 0; min-width: 0; max-width: 27rem; }
figcaption { font-weight: 600; font-size: 0.95rem; margin-bottom: 0.25rem; }
.chart { display: block; width: 100%; height: auto; overflow: visible; }
.chart text { fill: var(--ink); font-size: 11px; }
.chart .axis { fill: var(--muted); }
.chart .middle { text-anchor: middle; }
.chart .end { text-anchor: end; }
.chart .strong { font-weight: 600; }
.grid { stroke: var(--grid); fill: none; }
.reference { stroke: var(--ink); stroke-width: 1.3; stroke-dasharray: 5 3; fill: none; }
.whisker { stroke: var(--ink); stroke-width: 1.3; fill: none; }
.bar { fill: currentColor; fill-opacity: 0.4; stroke: currentColor; }
.marker { fill: currentColor; }
.marker { stroke: var(--paper); stroke-width: 0.8; }
.hollow { fill: var(--paper); stroke: currentColor; stroke-width: 1.5; }
.line { stroke: currentColor; stroke-width: 2; fill: none; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.c6 { color: var(--c6); } .c7 { color: var(--c7); }
.t0 { fill: var(--t0); } .t1 { fill: var(--t1); } .t2 { fill: var(--t2); }
.t3 { fill: var(--t3); stroke: var(--muted); stroke-dasharray: 3 2; }
.legend {
  display: flex; flex-wrap: wrap; gap: 0.15rem 1.1rem; margin: 0.5rem 0 0; padding: 0;
  list-style: none; font-size: 0.875rem;
}
.legend li { display: flex; align-items: center; gap: 0.35rem; overflow-wrap: anywhere; }
.key { width: 24px; height: 14px; flex: none; }
details { margin-top: 0.75rem; }
summary { cursor: pointer; color: var(--muted); font-size: 0.875rem; }
.scroll { overflow-x: auto; margin-top: 0.5rem; }
table { border-collapse: collapse; font-size: 0.8125rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid var(--grid); }
td { white-space: nowrap; }
thead th { vertical-align: bottom; color: var(--muted); font-weight: 600; line-height: 1.25; }
thead th + th { min-width: 5.2rem; }
th:first-child { text-align: left; background: var(--paper); position: sticky; left: 0; }
tbody th { font-weight: 500; white-space: nowrap; }
#source tbody th { white-space: normal; }
#source th, #source td { text-align: left; }
#source td { white-space: normal; overflow-wrap: anywhere; }
code { font-size: 0.85em; overflow-wrap: anywhere; }
.sample { max-width: 46rem; margin-top: 1rem; }
.text {
  white-space: pre-wrap; overflow-wrap: anywhere; padding: 0.75rem 0.9rem; border-radius: 6px;
  background: var(--soft); font: 0.875rem/1.7 ui-monospace, "DejaVu Sans Mono", Menlo, monospace;
}
.text .prompt { color: var(--muted); }
mark {
  color: var(--on); border-radius: 2px; padding: 0.1em 0; white-space: pre-wrap;
  print-color-adjust: exact;
}
.p1 { background: var(--p1); } .p2 { background: var(--p2); } .p3 { background: var(--p3); }
.p4 { background: var(--p4); } .p5 { background: var(--p5); } .p6 { background: var(--p6); }
@media (max-width: 40rem) {
  th, td { padding: 0.25rem 0.4rem; }
  thead th + th { min-width: 4.2rem; }
}
@page { margin: 14mm; }
@page wide { size: landscape; }
@media print {
  body { padding: 0; max-width: none; font-size: 10pt; }
  section { margin-top: 1.5rem; }
  h2, figcaption { break-after: avoid; }
  figure, tr, .legend { break-inside: avoid; }
  thead { display: table-header-group; }
  .panels { grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); }
  .scroll { overflow: visible; }
  details::details-content { content-visibility: visible; block-size: auto; }
  summary { list-style: none; }
  table { font-size: 7pt; }
  th, td { padding: 0.15rem 0.3rem; white-space: normal; }
  thead th + th { min-width: 0; }
  th:first-child { position: static; }
  .wide { page: wide; }
  .wide table { font-size: 6pt; }
  .wide td { white-space: nowrap; }
  .wide th, .wide td { padding: 0.15rem 0.2rem; }
  .text { background: none; border: 1px solid var(--grid); }
}
"""
