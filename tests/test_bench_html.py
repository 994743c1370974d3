"""The report as a page: what it shows of results, old and new, and what no input may do to it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from copy import deepcopy
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest

from passlm.bench.reports.charts import WIDTH, ticks
from passlm.bench.reports.html import page
from passlm.bench.reports.markup import NONE
from passlm.planning.cost_curve import CostCurve

RESULTS = sorted((Path(__file__).parents[1] / "docs" / "results").glob("*/results.json"))
CURVE = {
    "rows": [1, 2, 5, 9, 25],
    "seconds": [0.02, 0.021, 0.025, 0.033, 0.07],
    "groups": [1, 2, 4],
    "group_seconds": [0.001, 0.0015, 0.002],
    "row_seconds": 0.0002,
}
HOSTILE = '<script>alert("1")</script>&amp;\x00\x1b[31m\ud800</td>"\' onload=x'
SHOWN = '<script>alert("1")</script>&amp;\ufffd\ufffd[31m\ufffd</td>"\' onload=x'
OPTIONAL = (
    "cost_curve",
    "start_seconds",
    "load_seconds",
    "resumed",
    "too_short",
    "no_batch",
    "first_turn_only",
    "samples",
    "settings",
    "provenance",
    "missing_suites",
)
OPTIONAL_OF_RUNS = (
    *("rows_per_token", "first_token_seconds", "forward_seconds", "predictability"),
    *("speed_spread", "quality", "judge", "draft", "differences", "speedup_interval", "passes"),
    *("prefill_seconds", "seconds_outside_forward_share", "accepted_by_position"),
    *("batch_size", "prompt_tokens", "prompts_left_out", "slow_runs", "categories"),
    *("first_run_seconds", "first_run_first_token_seconds"),
)


def made_run(method: str, steps: int = 0, suite: str = "text", **more: Any) -> dict[str, Any]:
    """A run of ours with every field that there is."""
    return {
        "suite": suite,
        "method": method,
        "plan": f"{method}({steps})" if steps else method,
        "lookahead_tokens": steps,
        "temperature": 0.0,
        "judge": "coupled",
        "draft": "sampled",
        "prompts": 3,
        "tokens": 100,
        "passes": 50,
        "seconds": 2.5,
        "prefill_seconds": 0.5,
        "decode_seconds": 2.0,
        "tokens_per_second": 40.0 + steps,
        "tokens_per_pass": 2.0,
        "accepted_length": 1.25,
        "accepted_by_position": [0.75, 0.5],
        "accepted_of_judged_by_position": [0.75, None],
        "seconds_outside_forward_share": 0.125,
        "speedup_vs_ar": 1.375,
        "speedup_interval": [1.2, 1.51],
        "identical_to_ar": 2 / 3,
        "differences": [{"prompt": "a", "index": 1, "margin": 0.0625}],
        "rows_per_token": 3.5,
        "first_token_seconds": 0.123,
        "forward_seconds": 1.75,
        "predictability": {
            "accepted": {"logprob": -0.25, "entropy": 0.5, "count": 41},
            "refused": {"logprob": -2.75, "entropy": 1.5, "count": 42},
            "drawn": {"logprob": -1.125, "entropy": 1.0, "count": 43},
        },
        "speed_spread": {"prompts": 0.11, "repeats": None},
        "repeats": 1,
        "batch_size": 1,
        "prompt_tokens": None,
        "prompts_left_out": 0,
        "slow_runs": 0,
        "first_run_seconds": 0.75,
        "first_run_first_token_seconds": 0.5,
        "categories": [
            {
                "category": name,
                "prompts": count,
                "tokens_per_second": 30.0 + count,
                "speedup_vs_ar": 1.0 + count / 8,
                "accepted_length": count / 4,
            }
            for name, count in (("coding", 2), ("writing", 1))
        ],
        "quality": {
            "samples": 30,
            "pass_at_k": {
                "1": {"value": 0.3, "interval": [0.2, 0.4]},
                "10": {"value": 0.6, "interval": None},
            },
        },
        **more,
    }


def plain_run(**more: Any) -> dict[str, Any]:
    """Plain decoding."""
    own = {"speedup_vs_ar": 1.0, "speedup_interval": [1.0, 1.0], "tokens_per_second": 32.5}
    own |= {"accepted_by_position": [], "accepted_of_judged_by_position": []}
    return made_run("ar", **{**own, "tokens_per_pass": 1.0, "rows_per_token": 1.0, **more})


def made_results(*runs: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Results with every field that there is."""
    theirs = dict.fromkeys(("plan", "passes", "prefill_seconds", "decode_seconds"))
    theirs |= dict.fromkeys(("predictability", "speed_spread", "accepted_by_position", "judge"))
    usual = (
        plain_run(),
        *(made_run(method, steps) for method in ("two-pass", "one-pass") for steps in (1, 2)),
        made_run("auto", speedup_vs_ar=1.9, speedup_interval=[1.6, 2.2]),
        made_run("hf", speedup_vs_ar=0.5, speedup_interval=[0.4, 0.6], **theirs),
    )
    pieces = (
        ("Say it.\n\n", "prompt", 0),
        *((" a", "drawn", 0), (" <b>", "accepted", 1), ("\n  c", "accepted", 2)),
        *((" d", "drawn", 0), (" e", "accepted", 11)),
    )
    named = [dict(zip(("text", "kind", "position"), piece, strict=True)) for piece in pieces]
    return {
        "provenance": {
            "passlm": "0.1.0",
            "machine": {"processor": "a CPU", "gpu": None},
            "arguments": ["bench", "--model", "a b"],
        },
        "settings": {"model": "tiny", "quantize": None, "lookahead": {"name": "shipped"}},
        "complete": True,
        "peak_memory_bytes": 3 * 2**20,
        "missing_suites": {"code": "networkx is not installed"},
        "skipped": [{"suite": "text", "prompt": "long", "tokens": 9000}],
        "cost_curve": CURVE,
        "start_seconds": 1.5,
        "load_seconds": 1.25,
        "resumed": [{"time": "2026-01-02", "commit": None}],
        "too_short": [{"suite": "text", "prompt_tokens": 64, "prompts": 5}],
        "no_batch": [{"suite": "text", "prompt_tokens": None, "prompts": 3, "batch_size": 8}],
        "first_turn_only": ["chat"],
        "samples": [{"suite": "text", "prompt": "p", "method": "auto", "pieces": named}],
        "runs": list(runs or usual),
        **more,
    }


def parsed(results: dict[str, Any]) -> Element:
    """The page, read strictly."""
    text = page(results)
    text.encode()
    doctype, _, rest = text.partition("\n")
    assert doctype == "<!DOCTYPE html>"
    return ElementTree.fromstring(rest)


def section(root: Element, name: str) -> Element:
    """A section by its name, which has to be there."""
    found = root.find(f".//section[@id='{name}']")
    assert found is not None, name
    return found


def text(element: Element | None) -> str:
    assert element is not None
    return "".join(element.itertext())


def cells(part: Element) -> list[list[Any]]:
    """The rows of its table: a number where a cell is one, a list where it holds several."""
    rows = []
    for row in part.findall(".//tbody/tr"):
        found: list[Any] = []
        for cell in row:
            values = [float(data.attrib["value"]) for data in cell.iter("data")]
            found.append(values if len(values) > 1 else values[0] if values else text(cell))
        rows.append(found)
    return rows


def column(part: Element, name: str) -> list[Any]:
    heads = [text(head) for head in part.findall(".//thead/tr/th")]
    return [row[heads.index(name)] for row in cells(part)]


def charts(part: Element) -> list[Element]:
    return [svg for svg in part.iter("svg") if svg.get("class") == "chart"]


def style(results: dict[str, Any] | None = None) -> str:
    return text(parsed(results or made_results()).find(".//style"))


def every_page() -> Iterator[Any]:
    for path in RESULTS:
        yield pytest.param(json.loads(path.read_text()), id=path.parent.name)
    yield pytest.param(made_results(), id="every-field")
    yield pytest.param(made_results(made_run(HOSTILE, 2, HOSTILE)), id="hostile")


class Balance(HTMLParser):
    """Fails where an end does not close what was opened last."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_there_are_real_results() -> None:
    """Catches tests over real results that run over none."""
    assert len(RESULTS) >= 5


@pytest.mark.parametrize("results", list(every_page()))
def test_page_is_well_formed(results: dict[str, Any]) -> None:
    """Catches elements left open or crossed, which browsers repair in ways of their own."""
    parsed(results)
    balance = Balance()
    balance.feed(page(results))
    balance.close()
    assert balance.open == []


@pytest.mark.parametrize("results", list(every_page()))
def test_page_needs_nothing_else(results: dict[str, Any]) -> None:
    """Catches a page that asks the network for something, or runs scripts."""
    root = parsed(results)
    forbidden = {"script", "link", "img", "iframe", "object", "image", "use", "base", "a"}
    for element in root.iter():
        assert element.tag not in forbidden
        assert not {"src", "href", "srcset", "style"} & set(element.attrib)
        assert not [name for name in element.attrib if name.startswith("on")]
    assert not re.search(r"@import|url\(|https?:", style(results))


def test_hostile_text_stays_text() -> None:
    """Catches a name, prompt or argument that becomes markup, or that no file can hold."""
    results = made_results(
        plain_run(suite=HOSTILE),
        *(made_run(HOSTILE, steps, HOSTILE, judge=HOSTILE) for steps in (1, 2)),
        settings={"model": HOSTILE, "quantize": HOSTILE},
        provenance={"machine": {HOSTILE: HOSTILE}, "arguments": [HOSTILE]},
        missing_suites={HOSTILE: HOSTILE},
        skipped=[{"suite": HOSTILE, "prompt": HOSTILE, "tokens": 1}],
    )
    results["samples"][0] |= {"suite": HOSTILE, "prompt": HOSTILE, "method": HOSTILE}
    results["samples"][0]["pieces"][1]["text"] = HOSTILE
    root = parsed(results)
    assert "<script" not in page(results).lower()
    assert not [element for element in root.iter() if "onload" in element.attrib]
    for part in ("speed-up", "steps", "positions", "costs", "time", "samples", "runs", "source"):
        assert SHOWN in text(section(root, part)), part
    assert SHOWN in text(root.find(".//h1"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_every_run_is_shown_with_its_numbers(path: Path) -> None:
    """Catches a run that is left out or doubled, and a number that belongs to another run."""
    results = json.loads(path.read_text())
    runs, table = results["runs"], section(parsed(results), "runs")
    assert [row[1] for row in cells(table)] == [run["suite"] for run in runs]
    assert all(row[0].startswith(r["method"]) for row, r in zip(cells(table), runs, strict=True))
    for head, name in (
        ("tokens/s", "tokens_per_second"),
        ("speed-up", "speedup_vs_ar"),
        ("95 % interval", "speedup_interval"),
        ("tokens/pass", "tokens_per_pass"),
        ("identical to ar", "identical_to_ar"),
        ("seconds", "seconds"),
        ("new tokens", "tokens"),
    ):
        assert column(table, head) == [NONE if r[name] is None else r[name] for r in runs], head


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_chart_tables_have_the_numbers(path: Path) -> None:
    """Catches a chart's table that rounds, mixes up or forgets what the chart is made of."""
    results = json.loads(path.read_text())
    root, runs = parsed(results), results["runs"]
    speeds = column(section(root, "speed-up"), "speed-up")
    assert speeds == [run["speedup_vs_ar"] for run in runs]
    accepted = [run["accepted_by_position"] for run in runs if run["accepted_by_position"]]
    shares = column(section(root, "positions"), "of passes with candidates")
    assert [share if isinstance(share, list) else [share] for share in shares] == accepted
    for run, row in zip(runs, cells(section(root, "time")), strict=True):
        total = sum(part for part in row[3:7] if part != NONE)
        assert total == pytest.approx(1e3 * run["seconds"] / run["tokens"], rel=1e-3)
        share = run["seconds_outside_forward_share"]
        assert row[7] == (NONE if share is None else share)


def test_bars_are_as_long_as_their_values() -> None:
    """Catches charts of one figure with scales of their own, and bars that do not start at 0."""
    runs = (plain_run(), made_run("auto", speedup_vs_ar=2.0, speedup_interval=[1.5, 4.0]))
    other = made_run("auto", suite="code", speedup_vs_ar=0.5, speedup_interval=None)
    long, short = charts(section(parsed(made_results(*runs, other)), "speed-up"))
    (bar,), (small,) = long.findall("rect"), short.findall("rect")
    assert float(bar.attrib["width"]) == pytest.approx(4 * float(small.attrib["width"]), abs=0.5)
    whisker = long.find("path[@class='whisker']")
    reference = long.find("path[@class='reference']")
    assert whisker is not None
    assert reference is not None
    start, unit = float(bar.attrib["x"]), float(bar.attrib["width"]) / 2
    ends_of_it = [x for x, _ in places(whisker)]
    ends = [start + 1.5 * unit, start + 4 * unit]
    assert [min(ends_of_it), max(ends_of_it)] == pytest.approx(ends, abs=0.5)
    assert places(reference)[0][0] == pytest.approx(start + unit, abs=0.5)
    values = [t for t in long.iter("text") if text(t) == "2.00"]
    assert max(ends_of_it) < WIDTH - 6 * len(text(values[0]))
    assert short.find("path[@class='whisker']") is None


def test_only_whole_intervals_count_as_faster() -> None:
    """Catches a title that counts gains which the interval does not bear out."""
    intervals = ([1.1, 1.3], [0.9, 1.3], [0.5, 0.9], None)
    runs = [made_run(f"m{n}", speedup_interval=ends) for n, ends in enumerate(intervals)]
    part = section(parsed(made_results(plain_run(), *runs)), "speed-up")
    assert text(part.find("h2")).startswith("In 1 of 3 runs the whole interval lies above")


def test_points_lie_where_their_values_are() -> None:
    """Catches a line chart that is upside down, or that does not begin at 0."""
    runs = [made_run("two-pass", n, tokens_per_second=speed) for n, speed in ((1, 10.0), (3, 40.0))]
    part = section(parsed(made_results(plain_run(tokens_per_second=20.0), *runs)), "steps")
    (chart,) = charts(part)
    (line,) = (path for path in chart.iter("path") if path.get("class") == "line")
    level = next(path for path in chart.iter("path") if path.get("class") == "reference")
    marks = {
        text(t): float(t.attrib["y"]) - 4 for t in chart.iter("text") if t.get("class") == "end"
    }
    (x1, y1), (x3, y3) = places(line)
    assert [y1, y3] == pytest.approx([marks["10"], marks["40"]], abs=0.2)
    assert places(level)[0][1] == pytest.approx(marks["20"], abs=0.2)
    assert marks["0"] > y1 > y3
    assert x3 <= WIDTH
    names = {
        text(t): float(t.attrib["x"]) for t in chart.iter("text") if t.get("class") == "middle"
    }
    assert [x1, x3] == pytest.approx([names["1"], names["3"]], abs=0.2)
    assert cells(part)[-1][-2:] == [0, 20.0]


def places(path: Element) -> list[tuple[float, float]]:
    found = re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path.attrib["d"])
    return [(float(x), float(y)) for x, y in found]


def test_methods_keep_their_colours() -> None:
    """Catches colours that are given anew for each chart or suite."""
    runs = [plain_run(), made_run("two-pass", 4), made_run("auto")]
    runs += [made_run("auto", suite="code"), made_run("lookup", suite="code")]
    root = parsed(made_results(*runs))
    speed, code = charts(section(root, "speed-up"))
    first = [bar.attrib["class"] for bar in speed.iter("rect")]
    second = [bar.attrib["class"] for bar in code.iter("rect")]
    assert first[1] == second[0]
    assert len({*first, *second}) == 3
    entries = section(root, "positions").findall(".//ul[@class='legend']/li")
    colours = {text(entry): entry[0].attrib["class"].split()[-1] for entry in entries}
    assert [f"bar {colours[name]}" for name in ("two-pass, L 4", "auto")] == first
    lines = [g.attrib["class"] for g in charts(section(root, "positions"))[1].iter("g")]
    assert lines == [colours["auto"], colours["lookup"]]


def test_many_methods_have_colours() -> None:
    """Catches a method behind the last colour, which would be drawn without any."""
    runs = [made_run(f"m{number}", suite="text") for number in range(20)]
    root = parsed(made_results(plain_run(), *runs))
    drawn = {bar.attrib["class"] for bar in charts(section(root, "speed-up"))[0].iter("rect")}
    assert drawn == {f"bar c{colour}" for colour in range(1, 8)}


@pytest.mark.parametrize("results", list(every_page()))
def test_every_chart_is_told_in_words(results: dict[str, Any]) -> None:
    """Catches a picture without a caption, its description, or a table of its numbers."""
    root = parsed(results)
    found = charts(root)
    assert found
    for figure in root.iter("figure"):
        assert figure[0].tag == "figcaption"
        assert text(figure[0]).strip()
    for part in root.iter("section"):
        if charts(part):
            assert part.find(".//table") is not None
    for chart in found:
        assert chart.get("role") == "img"
        assert len(chart.attrib["aria-label"]) > 20
        width, height = map(float, chart.attrib["viewBox"].split()[2:])
        assert width == WIDTH
        for t in chart.iter("text"):
            assert -1 <= float(t.attrib["x"]) <= width
            assert 0 <= float(t.attrib["y"]) <= height


@pytest.mark.parametrize("name", OPTIONAL)
def test_older_results_lack_fields(name: str) -> None:
    """Catches a page that cannot do without a field that older results do not have."""
    results = made_results()
    for without in ({k: v for k, v in results.items() if k != name}, {**results, name: None}):
        root = parsed(without)
        assert len(cells(section(root, "runs"))) == len(results["runs"])
        sections = {part.get("id") for part in root.iter("section")}
        assert ("costs" in sections) == (name != "cost_curve")
        assert ("samples" in sections) == (name != "samples")


@pytest.mark.parametrize("name", OPTIONAL_OF_RUNS)
def test_runs_lack_fields(name: str) -> None:
    """Catches the same of a run's fields: absent and null have to be alike."""
    absent, null = made_results(), made_results()
    for run in absent["runs"]:
        run.pop(name, None)
    for run in null["runs"]:
        run[name] = None
    assert page(absent) == page(null)
    assert len(cells(section(parsed(null), "runs"))) == len(null["runs"])


def test_nothing_known_of_a_run() -> None:
    """Catches a chart or title that is made of no numbers at all."""
    empty = dict.fromkeys(made_run("auto"))
    empty |= {"suite": "text", "method": "auto", "temperature": 0.7, "lookahead_tokens": 0}
    root = parsed(made_results(empty, cost_curve=None, samples=[]))
    assert {part.get("id") for part in root.iter("section")} == {"runs", "source"}
    assert cells(section(root, "runs")) == [["auto", "text", "0.7"]]


def test_no_runs() -> None:
    """Catches a page that needs a run."""
    for results in ({}, {"runs": []}, made_results() | {"runs": []}):
        assert "Nothing was measured." in text(parsed(results).find(".//header"))


def test_only_plain_decoding() -> None:
    """Catches plain decoding praised for being as fast as itself."""
    root = parsed(made_results(plain_run()))
    assert "Only plain decoding was measured." in text(root.find(".//header"))
    assert root.find(".//section[@id='speed-up']") is None
    assert len(cells(section(root, "runs"))) == 1


@pytest.mark.parametrize("value", [0.0, 1e-300, 1e-9, 1e9, 1e30, 1e300, math.nan, math.inf])
def test_odd_numbers(value: float) -> None:
    """Catches a scale that breaks on numbers that are far off, or on what is no number."""
    odd = {"tokens_per_second": value, "speedup_vs_ar": value, "seconds": value}
    odd |= {"speedup_interval": [value, value], "accepted_by_position": [value, value]}
    odd |= {"prefill_seconds": value, "decode_seconds": value, "rows_per_token": value}
    runs = [plain_run(), *(made_run("two-pass", n, **odd) for n in (1, 2)), made_run("hf", **odd)]
    root = parsed(made_results(*runs))
    for chart in charts(root):
        drawn = " ".join(" ".join(element.attrib.values()) for element in chart.iter("path"))
        drawn += " ".join(rect.attrib["width"] for rect in chart.iter("rect"))
        assert not re.search(r"nan|inf", drawn)
    speeds = column(section(root, "runs"), "speed-up")
    assert speeds[1:] == [value if math.isfinite(value) else NONE] * 3


def test_headline_is_the_best_of_each_suite() -> None:
    """Catches a headline that picks a slower method, or one without its interval."""
    runs = [plain_run(), made_run("two-pass", 4), made_run("auto", speedup_vs_ar=1.8)]
    runs += [made_run("auto", suite="code", speedup_vs_ar=2.5, speedup_interval=[2.25, 2.75])]
    told = text(parsed(made_results(*runs)).find(".//p[@class='headline']"))
    assert "auto 2.50 on code, greedy (2.25 to 2.75); auto 1.80 on text" in told
    assert "two-pass" not in told


def test_picking_the_best_is_owned_up_to() -> None:
    """Catches the best of several methods shown as if it had been the only one, or the reverse."""
    alone = text(parsed(made_results(plain_run(), made_run("auto"))).find(".//header"))
    assert "upwards" not in alone
    assert "upwards" in text(parsed(made_results()).find(".//header"))


@pytest.mark.parametrize(
    ("speed", "interval", "told"),
    [
        (0.9, [0.8, 0.95], "Nothing is faster than plain decoding. Nearest: auto 0.90"),
        (0.98, [0.9, 1.1], "Nothing is faster than plain decoding. Nearest: auto 0.98"),
        (1.2, [0.9, 1.5], "so the difference is not significant"),
        (1.2, None, "no interval"),
        (1.2, [1.1, 1.3], "auto 1.20 on text, greedy (1.10 to 1.30)"),
    ],
)
def test_headline_is_honest(speed: float, interval: list[float] | None, told: str) -> None:
    """Catches a gain claimed that the interval does not bear out, or a loss passed over."""
    run = made_run("auto", speedup_vs_ar=speed, speedup_interval=interval)
    root = parsed(made_results(plain_run(), run))
    assert told in text(root.find(".//p[@class='headline']"))
    assert ("not significant" in text(root.find(".//header"))) == bool(
        interval and interval[0] <= 1 <= interval[1]
    )


def test_warnings_come_first() -> None:
    """Catches results that are not whole, or of another model, shown as if they were."""
    results = made_results(complete=False)
    results["settings"]["quantize"] = "int8"
    told = [text(p) for p in parsed(results).findall(".//header/p[@class='warning']")]
    assert len(told) == 4
    for part in (
        "Not complete",
        "networkx is not installed",
        "because too long: 1",
        "rounded to int8",
    ):
        assert any(part in line for line in told), part
    whole = made_results(missing_suites={}, skipped=[])
    assert parsed(whole).find(".//p[@class='warning']") is None


def test_cost_chart_has_the_curve_and_the_plans() -> None:
    """Catches plans that are drawn at other rows or costs than their passes have."""
    curve = CostCurve(
        *(tuple(CURVE[name]) for name in ("rows", "seconds", "groups", "group_seconds")),  # type: ignore[arg-type]
        row_seconds=0.0002,
    )
    rows = [tuple(row) for row in cells(section(parsed(made_results()), "costs"))]
    for count, seconds in zip(CURVE["rows"], CURVE["seconds"], strict=True):  # type: ignore[call-overload]
        assert ("real rows", count, 1e3 * seconds) in rows
    assert ("plan of ar", 1, 1e3 * curve.of(1)) in rows
    assert ("plan of two-pass, L 2", 3, 1e3 * curve.of(1, 2, 2)) in rows
    assert ("plan of two-pass, L 2", 3, 1e3 * curve.of(3)) in rows
    assert ("plan of one-pass, L 2", 9, 1e3 * curve.of(3, 6, 2)) in rows
    assert ("mean pass of auto, text, greedy", 7.0, 40.0) in rows
    assert not [row for row in rows if row[0] == "plan of auto"]
    assert len(rows) == 5 + 3 + 1 + 2 * 2 + 2 * 1 + 6


def test_cost_chart_without_files() -> None:
    """Catches a curve without groups, as of a model without files, asked for their cost."""
    bare = {"rows": [1, 2], "seconds": [0.1, 0.11], "groups": [], "group_seconds": []}
    part = section(parsed(made_results(cost_curve=bare)), "costs")
    assert {row[0] for row in cells(part)} >= {"real rows", "plan of ar"}
    assert "look-ahead" not in text(part.find(".//ul"))


def test_time_is_divided() -> None:
    """Catches prefill counted twice, or the parts of decoding swapped."""
    rows = {row[0]: row[3:7] for row in cells(section(parsed(made_results()), "time"))}
    assert rows["auto"] == [5.0, 17.5, 2.5, NONE]
    assert rows["hf"] == [NONE, NONE, NONE, 25.0]
    counted = made_run("auto", seconds_outside_forward_share=None)
    unknown = made_run("auto", seconds_outside_forward_share=None, forward_seconds=None)
    for run, expected in ((counted, [5.0, 17.5, 2.5, NONE]), (unknown, [5.0, NONE, NONE, 20.0])):
        assert cells(section(parsed(made_results(run)), "time"))[0][3:7] == expected


def test_predictability_is_a_row_a_run() -> None:
    """Catches figures of refused candidates shown as those of accepted ones."""
    part = section(parsed(made_results()), "predictability")
    assert "likelier than rejected ones in 6 of 6 runs" in text(part.find("h2"))
    expected = [-0.25, -2.75, -1.125, 0.5, 1.5, 1.0, 41.0, 42.0, 43.0]
    assert [row[3:] for row in cells(part)] == [expected] * 6


def test_samples_are_coloured_by_position() -> None:
    """Catches text that is changed on its way, and a draft coloured as what was drawn."""
    part = section(parsed(made_results()), "samples")
    shown = part.find(".//div[@class='text']")
    assert text(shown) == "Say it.\n\n a <b>\n  c d e"
    assert shown is not None
    kinds = [(piece.tag, piece.get("class")) for piece in shown]
    deepest = [("span", "prompt"), ("span", None), ("mark", "p1"), ("mark", "p2")]
    assert kinds == [*deepest, ("span", None), ("mark", "p6")]
    assert shown[-1].get("title") == "accepted, position 11"
    assert "3 of 5 tokens" in text(part.find(".//figcaption"))
    assert "60 %" in text(part.find("h2"))


def test_newer_columns() -> None:
    """Catches a new figure that never arrives in the table, or a column of nothing but dashes."""
    table = section(parsed(made_results()), "runs")
    assert column(table, "rows/token")[1] == 3.5
    assert column(table, "first token, s (median)")[1] == 0.123
    assert column(table, "spread over prompts")[1] == 0.11
    assert column(table, "pass@1")[1] == [0.3, 0.2, 0.4]
    assert column(table, "pass@10")[1] == 0.6
    assert column(table, "programs run")[1] == 30
    assert column(table, "logit gap there: median, max")[1] == [0.0625, 0.0625]
    assert column(table, "accepted length")[:2] == [NONE, 1.25]
    heads = [text(head) for head in table.findall(".//thead/tr/th")]
    assert "spread over repeats" not in heads
    assert heads.index("pass@10") == heads.index("pass@1") + 1


def test_margins_of_sampled_text_are_no_ties() -> None:
    """Catches logits shown for texts that part because noise was drawn."""
    part = section(parsed(made_results(plain_run(), made_run("auto", temperature=0.8))), "runs")
    assert column(part, "logit gap there: median, max") == [[0.0625, 0.0625], NONE]


def test_source_says_everything() -> None:
    """Catches a page that no one could repeat: a setting, version or argument left out."""
    told = text(section(parsed(made_results()), "source"))
    assert "passlm bench --model 'a b'" in told
    for part in ("machine: processor", "a CPU", "lookahead: name", "shipped", "9000 tokens"):
        assert part in told, part
    rows = dict(cells(section(parsed(made_results()), "source")))
    assert rows["peak memory, MiB"] == "3"
    assert rows["seconds to start"] == 1.5


def test_long_names_are_cut_in_charts_alone() -> None:
    """Catches a name that runs out of its picture, and one that can be read nowhere."""
    for name in ("a-method-with-a-name-that-does-not-end", "方法" * 20):
        root = parsed(made_results(plain_run(), made_run(name)))
        (chart,) = charts(section(root, "speed-up"))
        label = next(t for t in chart.iter("text") if (t.text or "").endswith("…"))
        assert label.text is not None
        assert len(label.text) < 24
        assert text(label.find("title")) == name
        assert name in [row[0] for row in cells(section(root, "runs"))]


def test_styles_are_there() -> None:
    """Catches a class that is drawn with but has no style, and so no colour in either theme."""
    results = made_results(*(made_run(f"m{n}") for n in range(8)))
    used = {
        name
        for element in parsed(results).iter()
        for name in element.get("class", "").split()
        if element.tag != "section"
    }
    given = style(results)
    assert {name for name in used if f".{name}" not in given} == set()
    assert given.count("{") == given.count("}")
    assert "@media print" in given
    assert "prefers-color-scheme: dark" in given


def test_colours_stand_out() -> None:
    """Catches a colour too near its paper, in the light or the dark theme (WCAG 1.4.3, 1.4.11)."""
    light, dark = (_variables(block) for block in re.findall(r":root \{(.*?)\}", style(), re.S))
    for theme in (light, light | dark):
        paper = theme["paper"]
        for name in (*(f"c{n}" for n in range(8)), "t0", "t1", "t2"):
            assert _contrast(theme[name], paper) >= 3, name
        for name in ("ink", "muted", "warn"):
            assert _contrast(theme[name], paper) >= 4.5, name
        for depth in range(1, 7):
            assert _contrast(theme[f"p{depth}"], theme["on"]) >= 4.5, depth


def _variables(block: str) -> dict[str, str]:
    return dict(re.findall(r"--(\w+): (#\w{6})", block))


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("top", [0.0, 1e-9, 0.07, 0.3, 1.0, 2.5, 7.0, 81.0, 108.0, 1e9, 1e308])
@pytest.mark.parametrize("whole", [False, True])
def test_ticks(top: float, whole: bool) -> None:
    """Catches an axis that ends before its data, or has more marks than fit."""
    for most in (5, 12):
        marks = ticks(top, most, whole)
        assert marks[0] == 0
        assert marks[-1] >= min(top, 1e300) * (1 - 1e-6)
        assert 2 <= len(marks) <= most + 1
        steps = {round(b / marks[1] - a / marks[1], 6) for a, b in pairwise(marks)}
        assert steps == {1.0}
        assert not whole or all(mark == int(mark) for mark in marks)


def test_results_are_left_alone() -> None:
    """Catches a page that changes the results which are still to be written."""
    results = made_results()
    before = deepcopy(results)
    page(results)
    assert results == before
