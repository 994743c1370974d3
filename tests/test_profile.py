"""`passlm profile` on a small model: what it measures, prints, keeps and refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from byte_model import byte_llama, save_folders

from passlm.cli import DONE, USAGE, main
from passlm.cli.profile import cost_table, predicted, rate_table
from passlm.model.target import Target
from passlm.planning import kept_costs
from passlm.planning.cost_curve import CostCurve
from passlm.planning.measure import read_bandwidth, weight_bytes

CURVE = CostCurve((1, 9), (1.0, 2.0), (1, 4), (0.5, 0.5), 0.1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    save_folders(folder)
    return folder


def profile(place: Path, *more: str) -> list[str]:
    rows = ("--lookahead", str(place / "rows"))
    return ["profile", "--model", str(place / "model"), "--dtype", "float32", *rows, *more]


def test_costs_are_measured_kept_and_told(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches figures that are not those kept for `auto`, and a plot or table left out."""
    monkeypatch.setattr(kept_costs, "cache_folder", lambda: tmp_path / "cache")
    assert main(profile(place, "--out", str(tmp_path / "out"), "--json")) == DONE
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("ceiling: ")
    content = json.loads(said[-1])
    assert content["curve"]["rows"][0] == 1
    assert content["passes_per_second_at_most"] == pytest.approx(
        content["bytes_per_second"] / content["weight_bytes"]
    )
    rows = len(content["prior"])
    assert rows >= 1
    assert len(content["tokens_per_second"]) == 1 + 2 * rows
    assert (tmp_path / "out" / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert main(profile(place, "--kept", "--json")) == DONE
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["curve"] == content["curve"]
    assert main(profile(place, "--json")) == DONE
    anew = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert anew["curve"] != content["curve"]


def test_the_sizes_told_are_those_measured(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a curve of a near size that is told as that of the size asked for."""
    measured: list[tuple[int, int]] = []

    def measure(target: Target, rows: object, batch: int, context: int) -> CostCurve:
        measured.append((batch, context))
        return CURVE

    monkeypatch.setattr(kept_costs, "measure", measure)
    assert main(profile(place, "--batch", "5", "--context", "3000", "--json")) == DONE
    said = capsys.readouterr().out
    content = json.loads(said.splitlines()[-1])
    assert measured == [(content["batch"], 2048)]  # which itself takes no more than there is
    assert content["batch"] in (4, 6)
    assert content["context"] < byte_llama().config.max_position_embeddings
    assert f"batch {content['batch']}, context {content['context']}" in said
    assert "nearest measured to batch 5, context 3000" in said


def test_predictions_follow_the_formulas() -> None:
    """Catches the best method read off another column, and speeds of a batch taken for a text's."""
    rates: list[dict[str, Any]] = predicted(CURVE, (0.9, 0.8))
    by_name = {(r["method"], r["lookahead_tokens"]): r["tokens_per_second"] for r in rates}
    assert by_name["ar", 0] == 1.0
    assert by_name["two-pass", 1] == pytest.approx((2 + 0.9) / (1.125 + 0.5 + 1.125))
    assert by_name["one-pass", 1] == pytest.approx((1 + 0.9) / (1.375 + 0.5 + 0.1))
    best = max(rates, key=lambda r: r["tokens_per_second"])
    said = rate_table(rates, 1)
    assert f"{best['method']} with {best['lookahead_tokens']} look-ahead tokens" in said
    curve = replace(CURVE, head_seconds=(0.1, 0.3))
    by_head = {r["lookahead_tokens"]: r for r in predicted(curve, (), (0.5, 0.4))[1:]}
    assert by_head[2]["method"] == "draft-head"
    assert by_head[2]["tokens_per_second"] == pytest.approx((1 + 0.5 + 0.2) / (0.3 + 1.25))
    assert "draft head, 2 tokens" in cost_table(curve)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--batch", "0"), "--batch is 0"),
        (("--batch", "65"), "up to 64"),
        (("--context", "-1"), "--context"),
    ],
)
def test_bad_input(
    place: Path, flags: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, and a batch of none."""
    assert main(profile(place, *flags)) == USAGE
    assert said in capsys.readouterr().err


def test_an_output_that_is_a_file(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback at the end of the measuring."""
    (tmp_path / "file").write_text("")
    assert main(profile(place, "--out", str(tmp_path / "file"))) == USAGE
    assert "cannot write" in capsys.readouterr().err


def test_the_ceiling_counts_what_a_pass_reads() -> None:
    """Catches tied embeddings that are left out, or untied ones that are counted though a pass
    reads a row of them; and a bandwidth in other units."""
    target = Target(byte_llama())
    every = sum(p.nbytes for p in target.model.parameters())
    untied = target.model.get_input_embeddings().weight.nbytes
    tied = target.model.config.tie_word_embeddings
    assert weight_bytes(target) == (every if tied else every - untied)
    assert 1e8 < read_bandwidth(target.device, 2**24, 2) < 1e13
