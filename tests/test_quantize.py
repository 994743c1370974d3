"""Int8 weights: rows are independent of each other, no plan changes the output, errors are
clear."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_llama import randomised, small_llama
from tiny import GREEDY, PROMPT_LENGTHS, VOCABULARY, generate, prompt, random_look_ahead
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from passlm.decoding.decoder import Decoder
from passlm.decoding.request import Request
from passlm.decoding.strategies import OnePass, Strategy, TwoPass, autoregressive
from passlm.kernels import native
from passlm.layers import int8
from passlm.layers.int8 import Int8Linear, QuantizeError, is_quantized, quantized
from passlm.lookahead.trained import LookAhead, load_for
from passlm.model.target import Target
from passlm.planning.kept_costs import Costs
from passlm.planning.measure import weight_bytes

needs_operators = pytest.mark.skipif(
    not native.available(), reason="this machine has no AVX2, or no C++ compiler"
)
PLANS = (autoregressive, TwoPass(3), OnePass(2))


def written(target: Target, look_ahead: LookAhead, plan: Strategy, new: int) -> list[list[int]]:
    """Return the continuations of a batch of prompts."""
    decoder = Decoder(target, look_ahead.rows(target))
    rows = [
        decoder.join(Request.of(prompt(length), GREEDY, new, plan)) for length in PROMPT_LENGTHS
    ]
    while decoder.rows:
        decoder.step()
    return [row.tokens[length:] for row, length in zip(rows, PROMPT_LENGTHS, strict=True)]


@needs_operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gives_the_same_whatever_is_beside_it(dtype: torch.dtype) -> None:
    """Catches rows that are rounded as well, sums that depend on other rows, and a lost bias."""
    torch.manual_seed(0)
    plain = nn.Linear(96, 80).to(dtype)
    layer = Int8Linear(plain)
    rows = (torch.randn(33, 96) * torch.logspace(-3, 3, 33)[:, None]).to(dtype)
    rows[7] = 0
    with torch.inference_mode():
        together = layer(rows.view(3, 11, 96)).view(33, 80)
        apart = torch.cat([layer(row[None]) for row in rows])
        expected = plain(rows)
    assert together.dtype == dtype
    assert torch.equal(together, apart)
    error = (together - expected).float().norm(dim=1) / expected.float().norm(dim=1)
    assert error.max() < 0.02
    assert torch.allclose(together[7], plain.bias)


@needs_operators
def test_transposed_layers() -> None:
    """Catches gpt2's layers scaled by input instead of output, or left out."""
    torch.manual_seed(0)
    plain = Conv1D(24, 40)
    rows = torch.randn(5, 40)
    with torch.no_grad():
        expected = plain(rows)
        assert (Int8Linear(plain)(rows) - expected).norm() < 0.02 * expected.norm()


@needs_operators
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt_neox"])
def test_every_plan_writes_what_transformers_writes(
    name: str, tiny_target: Callable[[str], Target]
) -> None:
    """Catches rounded rows that affect each other, LoRA lost on quantized layers, and a
    quantized model that transformers itself cannot run."""
    target = Target(quantized(tiny_target(name).model))
    look_ahead = random_look_ahead(target, 3, rank=4, sampler_width=4)
    expected = [generate(target.model, prompt(length), 24)[0] for length in PROMPT_LENGTHS]
    for plan in PLANS:
        assert written(target, look_ahead, plan, 24) == expected
    assert expected != [
        generate(tiny_target(name).model, prompt(length), 24)[0] for length in PROMPT_LENGTHS
    ]


@needs_operators
def test_the_given_model_stays_and_shares_what_is_not_rounded() -> None:
    """Catches changes to the caller's own model, and a second copy of the embeddings."""
    model = small_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = quantized(model)
    assert is_quantized(made)
    assert not is_quantized(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert made.get_input_embeddings().weight is model.get_input_embeddings().weight
    rounded = [module for module in made.modules() if isinstance(module, Int8Linear)]
    assert len(rounded) == 2 * 7 + 1
    assert [layer.weight is None for layer in rounded] == [True] * 14 + [False]


@needs_operators
@pytest.mark.parametrize("tied", [False, True])
def test_look_ahead_files_know_the_rounded_model(tied: bool, tmp_path: Path) -> None:
    """Catches look-ahead files refused for the quantized copy of their model, and accepted for
    any other model."""
    model = small_llama()
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    files = randomised(LookAhead.mean(Target(model), 3, "small"), 0.2)
    files.save(tmp_path / "files")
    assert Target(quantized(model)).fingerprint == Target(model).fingerprint
    assert load_for(Target(quantized(model)), tmp_path / "files") is not None
    other = quantized(small_llama(seed=1))
    assert not Target(other).fingerprint.same_weights(Target(model).fingerprint)


@needs_operators
def test_costs_are_told_apart() -> None:
    """Catches plans of the quantized model chosen by the costs of the original one, and a memory
    ceiling that counts bytes which are not read."""
    model = small_llama()
    plain, rounded = Target(model), Target(quantized(model))
    assert rounded.engine == "eager, int8"
    assert Costs(plain, None, None)._identity() != Costs(rounded, None, None)._identity()
    layers = [module for module in rounded.model.modules() if isinstance(module, Int8Linear)]
    norms = sum(p.nbytes for p in model.parameters() if p.ndim == 1)
    assert weight_bytes(rounded) == norms + sum(layer.nbytes for layer in layers)
    assert 3 < weight_bytes(plain) / weight_bytes(rounded) < 4


@needs_operators
def test_packing_leaves_rounded_layers_alone() -> None:
    """Catches a report of packed weights where no layer is left to pack."""
    target = Target(quantized(small_llama().to(torch.bfloat16)), pack=True)
    assert target.engine == "eager, int8"


@pytest.mark.slow
@needs_operators
def test_compiled_passes_of_a_rounded_model(tmp_path: Path) -> None:
    """Catches integer products that the compiler replaces by others, and the original model's
    package used for the quantized one."""
    model: PreTrainedModel = small_llama(VOCABULARY)
    target = Target(quantized(model))
    look_ahead = random_look_ahead(target, 3, rank=4)
    expected = [written(target, look_ahead, plan, 24) for plan in PLANS]
    fast = Target(quantized(model), compiled=tmp_path)
    assert [written(fast, look_ahead, plan, 24) for plan in PLANS] == expected
    assert fast.engine == "compiled, int8"


def test_what_cannot_be_rounded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback from torch, and a model silently left as it is."""
    with pytest.raises(QuantizeError, match="quantize is 'int3': it must be one of int8"):
        quantized(small_llama(), "int3")
    with pytest.raises(QuantizeError, match="on CPUs only: the model is on meta"):
        quantized(small_llama().to("meta"))
    monkeypatch.setattr(native, "available", lambda: False)
    with pytest.raises(QuantizeError, match="AVX2 or AVX-512, and a C\\+\\+ compiler"):
        quantized(small_llama())
    monkeypatch.setattr(native, "available", lambda: True)
    monkeypatch.setattr(int8, "_is_linear", lambda _: False)
    with pytest.raises(QuantizeError, match="no linear layers"):
        quantized(small_llama())
