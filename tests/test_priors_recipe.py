"""The recipe that measures what is believed of candidates before a text has shown anything."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from byte_model import byte_generator, save_folders

from passlm.decoding.decoder import Decoder
from passlm.decoding.text import Row
from passlm.lookahead.card import read_card
from passlm.lookahead.trained import CARD_FILE
from passlm.plan import Chain

SCRIPT = Path(__file__).parents[1] / "recipes" / "priors.py"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("priors_recipe", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_what_was_put_in_is_found_again(recipe: Any) -> None:
    """Catches chances of the mean confidence instead of 1, and a power that is always 1. Of 6,000
    draws a level the standard error of a chance is below 0.01, that of the power about 0.05."""
    draw = random.Random(0)
    for power in (1.0, 2.0):
        guesses = recipe.Guesses()
        for level, odds in enumerate((0.5, 4.0)):
            for _ in range(6000):
                confidence = draw.uniform(0.1, 1.0)
                scaled = odds * confidence**power
                right = draw.random() < scaled / (1 + scaled)
                guesses.met["lookup", level].append((confidence, right))
        found = recipe.fitted(guesses, "lookup")
        assert found["guesses"] == [6000, 6000]
        assert found["power"] == pytest.approx(power, abs=0.25)
        if power == 1.0:
            assert found["chances"] == pytest.approx([1 / 3, 0.8], abs=0.04)


def test_guesses_are_compared_with_what_came(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches guesses compared with the text one place off: those of somebody who knows the text
    are all right."""
    save_folders(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"kind": "text", "prompt": "ab" * 20}, {"kind": "chat", "prompt": "x"}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "priors.json"
    flags = ["--model", str(tmp_path / "model"), "--dtype", "float32", "--temperatures", "0"]
    common = [str(prompts), "--each", "1", "--max-new-tokens", "12", "--out", str(out), *flags]
    assert recipe.main([*common, "--lookahead", "none"]) == 2
    common += ["--lookahead", str(tmp_path / "rows")]
    lm = byte_generator()
    texts = [[*lm.encode(line["prompt"])] for line in lines]
    for text in texts:
        text += lm.generate([text], max_new_tokens=12, method="ar")[0].tokens
    drafted = recipe.drafted

    def knowing(decoder: Decoder, row: Row) -> list[Chain]:
        place = len(row.tokens)
        (whole,) = (text for text in texts if text[:place] == row.tokens)
        assert list(drafted(decoder, row)) or len(whole) - place < 3
        return [Chain(tuple(whole[place : place + 2]))]

    monkeypatch.setattr(recipe, "drafted", knowing)
    assert recipe.main([*common, "--card", str(tmp_path / "rows")]) == 0
    report = json.loads(out.read_text())
    assert report["texts"] == 2
    assert report["look-ahead"]["guesses"] == [22, 20]  # behind all tokens but first and last
    assert min(report["look-ahead"]["chances"]) > 0.99
    assert report["lookup"]["guesses"]
    assert report["look-ahead"]["power"] is None  # greedy text tells nothing of it
    assert report["provenance"]["arguments"][:-2] == common
    card = read_card(tmp_path / "rows" / CARD_FILE)
    assert card.chances is not None
    assert card.chances["look_ahead"] == report["look-ahead"]["chances"]
    assert card.head_prior == ()
    others = tmp_path / "others.jsonl"
    others.write_text(json.dumps(lines[0]) + "\n")
    assert recipe.chosen(prompts, others, 9, 0) == ["x"]
    prompts.write_text("[1]\n")
    assert recipe.main(common) == 2
