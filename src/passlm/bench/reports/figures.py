"""Makes the figures of a benchmark's results, each with a title that states its main number.

Each figure has a table of its numbers below it, and is None if the results have no data for it.
`charts.py` draws the charts; `html.py` makes the page around the figures.
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

GROUP = ("suite", "temperature")  # column headings of the cells that `group_cells` returns
_PARTS = ("prefill", "model's forward", "decoding outside the forward", "not broken down")
_LISTED = 4  # maximum number of items listed in a title
_DRAFTING = "root with a look-ahead group"

Entry = tuple[Markup, str]  # entry of a legend: picture and label


class View:
    """The runs as charts show them: grouped by conditions, with one colour for each method."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.groups = grouped(runs)
        others = dict.fromkeys(run["method"] for run in runs if run["method"] != BASELINE)
        self._colours = {BASELINE: 0}
        for index, name in enumerate(others):
            self._colours[name] = 1 + index % (COLOURS - 1)
        pairs = {(run["method"], steps(run)) for run in runs}
        self._steps = {name: sorted(n for other, n in pairs if other == name) for name, _ in pairs}

    def look(self, run: Run, hollow: bool = False) -> Look:
        """Return the look of a run: its method's colour, and a dash for its number of steps."""
        dash = self._steps[run["method"]].index(steps(run))
        return Look(self._colours[run["method"]], dash, hollow)

    def method_look(self, name: str) -> Look:
        """Return the look of all runs of a method."""
        return Look(self._colours[name])

    def run_keys(self, runs: Sequence[Run]) -> list[Entry]:
        """Return legend entries for runs: one for each method and number of steps."""
        first = {run_label(run): run for run in reversed(runs)}
        labels = dict.fromkeys(map(run_label, runs))
        return [(line_key(self.look(first[label])), label) for label in labels]


def group_cells(group: Conditions) -> tuple[str, str]:
    """Return the cells of a table that name a run's conditions; their headings are `GROUP`."""
    return group.place, NONE if group.temperature is None else f"{group.temperature:g}"


def percent(values: Sequence[float]) -> str:
    """Return the range of some shares in percent."""
    low, high = (f"{100 * end:.0f}" for end in (min(values), max(values)))
    return f"{low} %" if low == high else f"{low} to {high} %"


def several(items: Sequence[str]) -> str:
    """List the items of a title; of more than four, the first four and the number of others."""
    more = len(items) - _LISTED
    rest = [f"and {more} more below"] if more > 0 else []
    return "; ".join([*items[:_LISTED], *rest])


def legend(items: Sequence[Entry]) -> Markup:
    """Return a legend."""
    return element("ul", *(element("li", *item) for item in items), class_="legend")


def speedups(view: View) -> Markup | None:
    """Return the figure of speed-ups over plain decoding with their intervals."""
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
            "New tokens per second relative to plain decoding on the same prompts, prefill "
            "included. The line at 1 is plain decoding; whiskers are 95 % intervals."
        ),
        bars(panels, "times plain decoding", 1),
        folded_table(("run", *GROUP, "speed-up", "95 % interval"), rows, "speed-up"),
    )


def tokens_by_steps(view: View) -> Markup | None:
    """Return the figure of throughput by number of look-ahead steps, as in the PaSS paper.

    None if no method ran with several numbers of steps.
    """
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
        paragraph("More steps draft more tokens per pass but make the pass slower."),
        legend([*((k, m) for m, k in entries.items()), (reference_key(), "plain decoding")]),
        lines(panels, "look-ahead steps L", "tokens per second", levels),
        folded_table(("method", *GROUP, "L", "tokens/s"), rows, "tokens per second by steps"),
    )


def tokens_by(view: View, sweep: Sweep) -> Markup | None:
    """Return the figure of throughput by a setting of all methods; None if it was not varied."""
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
        f"Most tokens per second by {sweep.values}: {several(best)}",
        paragraph(
            "New tokens of all sequences divided by their total time, prefill included. Methods "
            "without a line ran with one value only."
        ),
        legend(view.run_keys(shown)),
        lines(panels, sweep.values, "tokens per second", at_values=True),
        folded_table(
            ("run", *GROUP, sweep.values, "tokens/s", "speed-up"),
            rows,
            f"tokens per second by {sweep.values}",
        ),
    )


def positions(view: View) -> Markup | None:
    """Return the figure of acceptance by a candidate's position in its pass."""
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
            "Share of passes that accept the first candidate, the second and so on, of all passes "
            "that verify candidates. A pass with fewer candidates counts as not accepting the "
            "missing ones."
        ),
        legend(view.run_keys(shown)),
        lines(panels, "candidate's position", "% of passes with candidates", start=1),
        folded_table(
            ("run", *GROUP, "of passes with candidates", "of candidates verified there"),
            rows,
            "accepted share by position",
        ),
    )


def _accepted(run: Run) -> list[tuple[int, float]]:
    """Return positions, counted from 1, with their accepted shares; unknown shares left out."""
    values = enumerate(map(finite, run.get("accepted_by_position") or ()), start=1)
    return [(place, value) for place, value in values if value is not None]


def costs(view: View, given: Mapping[str, Any] | None) -> Markup | None:
    """Return the figure of the cost of passes, with the plans of the runs.

    Args:
        view: the runs.
        given: the fields of a `CostCurve`; None if it was not measured.
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
    listed = [(name, point) for name, points in measured.items() for point in points]
    for name, (_, points) in plans.items():
        listed += [(f"plan of {name}", point) for point in points]
    for run, point in means:
        listed.append((f"mean pass of {run_label(run)}, {Conditions.of(run).name}", point))
    hollow = " Hollow markers are the measured mean passes of the runs." if means else ""
    return section(
        "costs",
        title,
        paragraph(f"Filled markers are the passes of fixed plans, predicted by the curve.{hollow}"),
        legend([(line_key(one.look), one.label) for one in curves]),
        legend([(marker_key(view.method_look(method)), method) for method in methods]),
        lines({"cost of a pass": series}, "rows of a pass", "ms"),
        folded_table(
            ("pass", "rows", "ms"),
            [(name, number_cell(x), number_cell(ms)) for name, (x, ms) in listed],
            "cost of a pass",
        ),
    )


def _plan_points(run: Run, curve: CostCurve) -> list[tuple[float, float]]:
    """Return rows and predicted milliseconds of a fixed plan's passes; none if plans vary."""
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
    """Return the measured mean rows and milliseconds of a run's passes."""
    if (run.get("batch_size") or 1) > 1:
        return None  # the curve is of passes of one sequence
    rows, tokens = finite(run.get("rows_per_token")), finite(run.get("tokens_per_pass"))
    seconds, passes = finite(run.get("decode_seconds")), finite(run.get("passes"))
    if rows is None or tokens is None or seconds is None or not passes:
        return None
    return rows * tokens, 1e3 * seconds / passes


def times(view: View) -> Markup | None:
    """Return the figure of the time per token, broken down into parts."""
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
    known = [at for at in range(len(_PARTS)) if any(one.parts[at] is not None for one in shown)]
    inside = [
        forward / (forward + outside)
        for _, forward, outside, _ in (one.parts for one in shown)
        if forward is not None and outside is not None and forward + outside > 0
    ]
    title = f"The model's forward takes {percent(inside)} of the decoding time" if inside else ""
    return section(
        "time",
        title or "Time per new token",
        paragraph("Total time of a run divided by its new tokens; shorter is faster."),
        legend([(part_key(at), _PARTS[at]) for at in known]),
        bars(panels, "ms per new token"),
        folded_table(
            (
                "run",
                *GROUP,
                *(f"{part}, ms per token" for part in _PARTS),
                "outside, of decoding",
            ),
            rows,
            "time per new token",
        ),
    )


def _parts(run: Run) -> tuple[float | None, ...] | None:
    """Return the milliseconds per token of each of `_PARTS`."""
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
