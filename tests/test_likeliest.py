"""Argmax and top-k by blocks equal torch's, with ties and odd vocabulary sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from passlm.kernels.topk import likeliest, shortlist

SIZES = [(1, 64), (3, 8_192), (2, 49_152), (4, 8_191), (2, 100)]


def rows(count: int, size: int, coarse: bool) -> Tensor:
    """Return random logits; coarse ones have many ties."""
    made = torch.randn(count, size, generator=torch.Generator().manual_seed(count + size))
    return (2 * made).round() if coarse else made


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "size"), SIZES)
def test_the_likeliest_token_is_torchs(
    count: int, size: int, dtype: torch.dtype, coarse: bool
) -> None:
    """Catches the last of tied tokens, where transformers' greedy decoding takes the first, and
    indices within a block taken for token ids."""
    logits = rows(count, size, coarse).to(dtype)
    assert likeliest(logits).tolist() == logits.float().argmax(-1).tolist()
    # A slice of a larger tensor: its rows are not contiguous.
    wide = torch.cat([logits, logits.flip(0)]).view(2, count, size)[:, 0]
    assert likeliest(wide).tolist() == wide.float().argmax(-1).tolist()


def test_forbidden_and_missing_numbers_are_taken_as_torch_does() -> None:
    """Catches tokens of minus infinity chosen, and NaN that goes unnoticed."""
    logits = torch.full((3, 128), -torch.inf)
    logits[0, 100] = -1e30
    logits[2, 70] = torch.nan
    assert likeliest(logits).tolist() == logits.argmax(-1).tolist() == [100, 0, 70]


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("wanted", [1, 6, 64])
@pytest.mark.parametrize(("count", "size"), SIZES)
def test_the_shortlist_has_the_best_tokens_in_order(
    count: int, size: int, wanted: int, coarse: bool
) -> None:
    """Catches a token missed because its block is not searched, and one listed twice."""
    logits = rows(count, size, coarse)
    best, tokens = shortlist(logits, wanted)
    assert best.tolist() == logits.topk(wanted).values.tolist()
    assert torch.equal(logits.gather(1, tokens), best)
    assert all(len(set(row)) == wanted for row in tokens.tolist())
