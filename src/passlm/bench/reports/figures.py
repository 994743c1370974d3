"""The charts of a benchmark's results, each under a title that its numbers make.

Every figure has its numbers in a table below; a figure is None where results have nothing for it.
How charts are drawn is left to `charts.py`, the page around them to `html.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from passlm.bench.reports.charts import (
    COLOURS,
    Bar,
    Look,
    Series,
    Stack,
    bars,
    line_key,
    lines,
    marker_key,
    part_key,
    reference_key,
)
from passlm.bench.reports.markup import (
    NONE,
    Markup,
    Row,
    count_cell,
    element,
    finite,
    folded_table,
    interval_ends,
    number_cell,
    paragraph,
    rounded,
    section,
    share_cell,
    shares_cell,
    span_cell,
)
from passlm.bench.reports.sweeps import (
    BASELINE,
    STEPS,
    Conditions,
    Run,
    Sweep,
    fastest,
    grouped,
    run_label,
    steps,
)
from passlm.planning.cost_curve import CostCurve

GROUP = ("suite", "temperature")  # heads of the cells that `group_cells` gives
_PARTS = ("prefill", "inside the model's forward", "outside of it", "not divided")
_TOLD = 4  # parts of a title at most
_DRAFTING = "root with a look-ahead group"

Entry = tuple[Markup, str]  # of a legend: a picture and what it stands for


class View:
    """The runs as charts show them: those of a suite together, each method in its colour."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.groups = grouped(runs)
        others = dict.fromkeys(run["method"] for run in runs if run["method"] != BASELINE)
        self._colours = {BASELINE: 0}
        for index, name in enumerate(others):
            self._colours[name] = 1 + index % (COLOURS - 1)
        met = {(run["method"], steps(run)) for run in runs}
        self._steps = {name: sorted(n for other, n in met if other == name) for name, _ in met}

    def look(self, run: Run, hollow: bool = False) -> Look:
        """Of a run: its method's colour, and a dash for its number of steps."""
        dash = self._steps[run["method"]].index(steps(run))
        return Look(self._colours[run["method"]], dash, hollow)

    def method_look(self, name: str) -> Look:
        """Of all runs of a method."""
        return Look(self._colours[name])

    def run_keys(self, runs: Sequence[Run]) -> list[Entry]:
        """Of a legend: runs by method and number of steps, each once."""
        first = {run_label(run): run for run in reversed(runs)}
        labels = dict.fromkeys(map(run_label, runs))
        return [(line_key(self.look(first[label])), label) for label in labels]


def group_cells(group: Conditions) -> tuple[str, str]:
    """For tables; see `GROUP`."""
    return group.place, NONE if group.temperature is None else f"{group.temperature:g}"


def percent(values: Sequence[float]) -> str:
    """From the least to the most of some shares."""
    low, high = (f"{100 * end:.0f}" for end in (min(values), max(values)))
    return f"{low} %" if low == high else f"{low} to {high} %"


def several(told: Sequence[str]) -> str:
    """Parts of a title: some, where there are many."""
    more = len(told) - _TOLD
    rest = [f"and {more} more below"] if more > 0 else []
    return "; ".join([*told[:_TOLD], *rest])


def legend(items: Sequence[Entry]) -> Markup:
    """What the pictures stand for."""
    return element("ul", *(element("li", *item) for item in items), class_="legend")


def speedups(view: View) -> Markup | None:
    """Speed-ups over plain decoding with their intervals."""
    panels: dict[str, list[Bar]] = {}
    rows: list[Row] = []
    for group, runs in view.groups.items():
        for run in runs:
            value, interval = run.get("speedup_vs_ar"), run.get("speedup_interval")
            rows.append(
                (run_label(run), *group_cells(group), number_cell(value), span_cell(interval))
            )
            speed = finite(value)
            if run["method"] != BASELINE and speed is not None:
                bar = Bar(run_label(run), view.look(run), speed, interval_ends(interval))
                panels.setdefault(group.name, []).append(bar)
    if not panels:
        return None
    lows = [bar.interval[0] for panel in panels.values() for bar in panel if bar.interval]
    clear = sum(low > 1 for low in lows)
    title = f"In {clear} of {len(lows)} runs the whole interval lies above plain decoding"
    return section(
        "speed-up",
        title if lows else "Speed-ups over plain decoding, without intervals",
        paragraph(
            "New tokens a second over those of plain decoding on the same prompts, prefill "
            "included. The line at 1 is plain decoding; whiskers are 95 % intervals."
        ),
        bars(panels, "times plain decoding", 1),
        folded_table(("run", *GROUP, "speed-up", "95 % interval"), rows, "speed-up"),
    )


def tokens_by_steps(view: View) -> Markup | None:
    """The paper's curve, where a method ran with several numbers of look-ahead steps."""
    panels: dict[str, list[Series]] = {}
    levels: dict[str, float] = {}
    best: list[str] = []
    rows: list[Row] = []
    for group, curves in STEPS.curves(view.runs).items():
        name = group.name
        for method, points in curves.items():
            speeds = [(count, float(run["tokens_per_second"])) for count, run in points]
            look = view.method_look(method)
            panels.setdefault(name, []).append(Series(method, look, speeds))
            cells = [(count_cell(count), number_cell(speed)) for count, speed in speeds]
            rows += [(method, *group_cells(group), *pair) for pair in cells]
        tops = {method: fastest(points)[0] for method, points in curves.items()}
        best.append(f"{', '.join(f'{m} {count:g}' for m, count in tops.items())} ({name})")
        plain = next((run for run in view.groups[group] if run["method"] == BASELINE), {})
        level = finite(plain.get("tokens_per_second"))
        if level is not None:
            levels[name] = level
            rows.append((BASELINE, *group_cells(group), count_cell(0), number_cell(level)))
    if not panels:
        return None
    entries = {s.label: line_key(s.look) for panel in panels.values() for s in panel}
    return section(
        "steps",
        f"Fastest number of look-ahead steps: {several(best)}",
        paragraph("More steps draft more tokens in a pass and make the pass longer."),
        legend([*((k, m) for m, k in entries.items()), (reference_key(), "plain decoding")]),
        lines(panels, "look-ahead steps L", "tokens a second", levels),
        folded_table(("method", *GROUP, "L", "tokens/s"), rows, "tokens a second by steps"),
    )


def tokens_by(view: View, sweep: Sweep) -> Markup | None:
    """Tokens a second by a setting that all methods have, where runs have several values of it."""
    panels: dict[str, list[Series]] = {}
    best: list[str] = []
    rows: list[Row] = []
    shown: list[Run] = []
    for group, curves in sweep.curves(view.runs).items():
        for label, points in curves.items():
            shown.append(points[0][1])
            speeds = [(value, float(run["tokens_per_second"])) for value, run in points]
            panels.setdefault(group.name, []).append(Series(label, view.look(shown[-1]), speeds))
            rows += [
                (
                    label,
                    *group_cells(group),
                    number_cell(value, 0 if value == int(value) else 2),
                    number_cell(run.get("tokens_per_second")),
                    number_cell(run.get("speedup_vs_ar")),
                )
                for value, run in points
            ]
        tops = {label: fastest(points) for label, points in curves.items()}
        label, (value, _) = max(tops.items(), key=lambda item: item[1][1]["tokens_per_second"])
        best.append(f"{label} at {value:g} ({group.name})")
    if not panels:
        return None
    return section(
        sweep.name,
        f"Most tokens a second by {sweep.values}: {several(best)}",
        paragraph(
            "New tokens of all texts over the time they took together, prefill included. Methods "
            "without a line ran with one value."
        ),
        legend(view.run_keys(shown)),
        lines(panels, sweep.values, "tokens a second", at_values=True),
        folded_table(
            ("run", *GROUP, sweep.values, "tokens/s", "speed-up"),
            rows,
            f"tokens a second by {sweep.values}",
        ),
    )


def positions(view: View) -> Markup | None:
    """How many passes accept the first candidate, the second and so on."""
    panels: dict[str, list[Series]] = {}
    rows: list[Row] = []
    shown: list[Run] = []
    for group, runs in view.groups.items():
        for run in runs:
            accepted, judged = _accepted(run), run.get("accepted_of_judged_by_position")
            if accepted:
                shown.append(run)
                points = [(place, 100 * value) for place, value in accepted]
                series = Series(run_label(run), view.look(run), points)
                panels.setdefault(group.name, []).append(series)
                cells = shares_cell(run["accepted_by_position"]), shares_cell(judged)
                rows.append((run_label(run), *group_cells(group), *cells))
    if not panels:
        return None
    first, second = (
        [value for run in shown for at, value in _accepted(run) if at == place] for place in (1, 2)
    )
    title = f"The first candidate is accepted in {percent(first)} of passes" if first else ""
    title += f", the second in {percent(second)}" if first and second else ""
    return section(
        "positions",
        title or "Accepted candidates by position",
        paragraph(
            "Of the passes that verify candidates: how many accept the first, the second and so "
            "on. A pass that has fewer candidates accepts none behind them."
        ),
        legend(view.run_keys(shown)),
        lines(panels, "candidate's position", "% of passes with candidates", start=1),
        folded_table(
            ("run", *GROUP, "of passes with candidates", "of candidates judged there"),
            rows,
            "accepted share by position",
        ),
    )


def _accepted(run: Run) -> list[tuple[int, float]]:
    """Position, from 1, and accepted share."""
    values = enumerate(map(finite, run.get("accepted_by_position") or ()), start=1)
    return [(place, value) for place, value in values if value is not None]


def costs(view: View, given: Mapping[str, Any] | None) -> Markup | None:
    """What passes cost, and where the plans of the runs lie on that.

    Args:
        view: the runs.
        given: the fields of a `CostCurve`.
    """
    if not given:
        return None
    rows, seconds, groups, group_seconds = (
        tuple(given.get(name) or ()) for name in ("rows", "seconds", "groups", "group_seconds")
    )
    curve = CostCurve(rows, seconds, groups, group_seconds, given.get("row_seconds") or 0.0)
    longest = curve.rows[-1]
    ratio = rounded(curve.of(longest) / curve.of(1))
    title = f"A pass of {longest} rows takes {ratio} times a pass of one row"
    measured: dict[str, list[tuple[float, float]]] = {
        "real rows": [(n, 1e3 * curve.of(n)) for n in curve.rows],
        _DRAFTING: [(1 + n, 1e3 * curve.of(1, n, n)) for n in curve.groups],
    }
    curves = [Series(n, Look(0, i), p) for i, (n, p) in enumerate(measured.items()) if p]
    runs = [run for members in view.groups.values() for run in members]
    plans = {run_label(run): (run, _plan_points(run, curve)) for run in runs}
    means = [(run, point) for run in runs if (point := _mean_pass(run)) is not None]
    series = [
        *curves,
        *(Series(n, view.look(run), p, joined=False) for n, (run, p) in plans.items() if p),
        *(Series(run_label(run), view.look(run, True), [p], joined=False) for run, p in means),
    ]
    methods = dict.fromkeys(run["method"] for run, points in plans.values() if points)
    methods |= dict.fromkeys(run["method"] for run, _ in means)
    told = [(name, point) for name, points in measured.items() for point in points]
    told += [(f"plan of {name}", point) for name, (_, points) in plans.items() for point in points]
    for run, point in means:
        told.append((f"mean pass of {run_label(run)}, {Conditions.of(run).name}", point))
    hollow = " Hollow ones are the runs' mean passes, as they were timed." if means else ""
    return section(
        "costs",
        title,
        paragraph(f"Full markers are fixed plans, at what the curve foretells.{hollow}"),
        legend([(line_key(one.look), one.label) for one in curves]),
        legend([(marker_key(view.method_look(method)), method) for method in methods]),
        lines({"cost of a pass": series}, "rows of a pass", "ms"),
        folded_table(
            ("pass", "rows", "ms"),
            [(name, number_cell(x), number_cell(ms)) for name, (x, ms) in told],
            "cost of a pass",
        ),
    )


def _plan_points(run: Run, curve: CostCurve) -> list[tuple[float, float]]:
    """Rows and milliseconds of a fixed plan's passes; none where plans change."""
    ahead, kind = steps(run), str(run.get("plan") or "").partition("(")[0]
    passes: list[tuple[int, int]] = []  # real rows, look-ahead rows
    if kind == BASELINE:
        passes = [(1, 0)]
    elif kind == "two-pass" and curve.groups:
        passes = [(1, ahead), (1 + ahead, 0)]
    elif kind == "one-pass" and curve.groups:
        passes = [(1 + ahead, (1 + ahead) * ahead)]
    return [(real + hung, 1e3 * curve.of(real, hung, ahead)) for real, hung in passes]


def _mean_pass(run: Run) -> tuple[float, float] | None:
    """Mean rows and milliseconds of a run's passes, as they were timed."""
    if (run.get("batch_size") or 1) > 1:
        return None  # its passes are of several texts, and those of the curve are not
    rows, tokens = finite(run.get("rows_per_token")), finite(run.get("tokens_per_pass"))
    seconds, passes = finite(run.get("decode_seconds")), finite(run.get("passes"))
    if rows is None or tokens is None or seconds is None or not passes:
        return None
    return rows * tokens, 1e3 * seconds / passes


def times(view: View) -> Markup | None:
    """Where the time of a token goes."""
    panels: dict[str, list[Stack]] = {}
    rows: list[Row] = []
    for group, runs in view.groups.items():
        for run in runs:
            parts = _parts(run)
            if parts is not None:
                panels.setdefault(group.name, []).append(Stack(run_label(run), parts))
                share = share_cell(run.get("seconds_outside_forward_share"))
                rows.append((run_label(run), *group_cells(group), *map(number_cell, parts), share))
    if not panels:
        return None
    shown = [stack for panel in panels.values() for stack in panel]
    met = [at for at in range(len(_PARTS)) if any(one.parts[at] is not None for one in shown)]
    inside = [
        forward / (forward + outside)
        for _, forward, outside, _ in (one.parts for one in shown)
        if forward is not None and outside is not None and forward + outside > 0
    ]
    title = f"The model's forward takes {percent(inside)} of the decoding time" if inside else ""
    return section(
        "time",
        title or "Time for each new token",
        paragraph("All seconds of a run over its new tokens; shorter is faster."),
        legend([(part_key(at), _PARTS[at]) for at in met]),
        bars(panels, "ms for each new token"),
        folded_table(
            ("run", *GROUP, *(f"{part}, ms a token" for part in _PARTS), "outside, of decoding"),
            rows,
            "where the time goes",
        ),
    )


def _parts(run: Run) -> tuple[float | None, ...] | None:
    """Milliseconds a token of each of `_PARTS`."""
    tokens, total = finite(run.get("tokens")), finite(run.get("seconds"))
    prefill, decode = finite(run.get("prefill_seconds")), finite(run.get("decode_seconds"))
    outside = finite(run.get("seconds_outside_forward_share"))
    forward = finite(run.get("forward_seconds"))
    if outside is None and forward is not None and decode:
        outside = 1 - forward / decode
    seconds: tuple[float | None, ...]
    if prefill is None or decode is None:
        seconds = (None, None, None, total)
    elif outside is None:
        seconds = (prefill, None, None, decode)
    else:
        seconds = (prefill, decode * (1 - outside), decode * outside, None)
    if not tokens or all(part is None for part in seconds):
        return None
    return tuple(None if part is None else 1e3 * part / tokens for part in seconds)
