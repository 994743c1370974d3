"""Parameters: what is refused, and how."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from passlm.decoding.distribution import TokenDistribution
from passlm.decoding.processors import processors
from passlm.params import ParameterError, SamplingParams, StopParams

NAN, INFINITE = float("nan"), float("inf")

BAD_SAMPLING: list[tuple[str, Any]] = [
    *(("temperature", value) for value in (-0.1, NAN, INFINITE, 1e-30, "0.8", None)),
    *(("top_k", value) for value in (-1, 2.5, "5", None)),
    *(("top_p", value) for value in (0, -0.5, 1.01, NAN, "0.9")),
    *(("min_p", value) for value in (-0.01, 1.5, NAN, "0.1")),
    *(("repetition_penalty", value) for value in (0, -1.0, NAN, INFINITE, "1.1")),
    *(("presence_penalty", value) for value in (-2.1, 2.1, NAN, "1")),
    *(("frequency_penalty", value) for value in (-3, INFINITE, None)),
    *(("logit_bias", value) for value in ({-1: 1.0}, {3: NAN}, {3: INFINITE}, {"3": 1.0})),
    *(("bad_words", value) for value in (((),), ((1,), ()), ((1, -2),))),
    *(("min_new_tokens", value) for value in (-1, 1.5)),
    *(("seed", value) for value in (-1, 2**64, 0.5, "1")),
    *(("judge", value) for value in ("", "Coupled", None)),
    *(("draft", value) for value in ("beam", None)),
]
BAD_STOP: list[tuple[str, Any]] = [
    *(("max_new_tokens", value) for value in (0, -1, 2.5, "9", None)),
    *(("stop", value) for value in (("",), ("a", ""), "END", "")),
]


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        *((SamplingParams, *bad) for bad in BAD_SAMPLING),
        *((StopParams, *bad) for bad in BAD_STOP),
    ],
)
def test_a_bad_value_is_refused_by_name(kind: Any, name: str, value: Any) -> None:
    """Catches values that would decode to nonsense: NaN passes a check written as `not x < 0`, a
    stop string taken apart into its letters, a seed rounded to a whole number."""
    with pytest.raises(ParameterError) as caught:
        kind(**{name: value})
    message = str(caught.value)
    assert name in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 1e-6, "top_k": 1},
        {"temperature": 100, "top_p": 1e-6, "min_p": 1.0},
        {"temperature": 2, "repetition_penalty": 2, "top_k": 10**9},
        {"temperature": np.float32(0.7), "top_k": np.int64(5), "seed": np.uint64(2**64 - 1)},
        {"seed": 2**64 - 1, "logit_bias": {0: -100}, "min_new_tokens": 3},
        {"judge": "rejection", "draft": "sampled"},
    ],
)
def test_values_at_the_edge_decode(given: dict[str, Any]) -> None:
    """Catches a range drawn too narrow, and whole numbers that transformers takes for wrong."""
    params = SamplingParams(**given)
    distribution = TokenDistribution(processors(params, 1, (0,)), params.temperature == 0)
    probabilities = distribution(torch.tensor([[30.0, -30.0, 29.0, 0.0]]), [1], [])
    assert float(probabilities.sum()) == pytest.approx(1)


def test_the_defaults_are_greedy_and_change_nothing() -> None:
    """Catches a default that alters the model's own output."""
    params = SamplingParams()
    assert params.temperature == 0
    assert not processors(params, 3, (0,))


@pytest.mark.parametrize("kind", [SamplingParams, StopParams])
def test_every_field_has_a_line_of_help_and_cannot_be_changed(kind: Any) -> None:
    """Catches a flag without help on the command line, and a value changed after its check."""
    for field in dataclasses.fields(kind):
        assert field.metadata["help"]
        assert "\n" not in field.metadata["help"]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(kind(), field.name, None)
