"""Gated LoRA: which layers it updates, on look-ahead rows only, and a clean model afterwards.

Real rows are compared bit by bit, because a single rounding error could change a token.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import tiny
import torch
from tiny import ARCHITECTURES, MORE_ARCHITECTURES
from torch import Tensor, nn

from passlm.layers.lora import PROBE_ROWS, GatedLora, LoraError, RowSplit, groups_of
from passlm.layers.packed import can_pack
from passlm.model.pass_records import LookAheadRows, PassRow
from passlm.model.target import Target
from passlm.model.training import look_ahead_pass
from passlm.plan import Plan

EVERY = ARCHITECTURES | MORE_ARCHITECTURES
ROWS = 4
TYPES = ("float32", "bfloat16", "packed")
every_architecture = pytest.mark.parametrize("name", EVERY)


@cache
def target_of(name: str, kind: str = "float32") -> Target:
    """Return a tiny target in one of `TYPES`; tests do not change it."""
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    target = Target(EVERY[name].build().to(dtype).requires_grad_(False), pack=kind == "packed")
    if kind == "packed" and not can_pack(target.model):
        pytest.skip("this CPU's oneDNN does not compute in bfloat16")
    return target


def rows_of(target: Target) -> LookAheadRows:
    """Return look-ahead rows with a LoRA and a sampler head whose effect is large."""
    return tiny.random_look_ahead(target, ROWS, rank=3, sampler_width=8).rows(target)


def without_lora(rows: LookAheadRows) -> LookAheadRows:
    """Return the same look-ahead rows without LoRA and sampler head."""
    return LookAheadRows(rows.inputs)


def forwards(model: nn.Module) -> dict[str, Any]:
    """Return the forwards in the layers' own `__dict__`; an unaltered model has none."""
    return {
        name: vars(module)["forward"]
        for name, module in model.named_modules()
        if "forward" in vars(module)
    }


# Real rows are the target's own, to the bit

PASSES = [
    ([3, 1, 4, 1], Plan(3, (4, 0, 2, 4)), 20),
    ([5], Plan(0, (1,)), 7),
    ([9, 2], Plan(1, (0, 0)), 12),
    ([6, 5, 3], Plan(2, (0, 3, 1)), 1),
]  # tokens, plan, and the number of cached tokens before them


def given(target: Target, which: list[int], rows: LookAheadRows | None) -> list[Tensor]:
    """Return the logits of some of the passes in one batch, each cut to its own rows."""
    texts = target.new_cache(batch=0)
    for index in which:
        texts.append(target.prefill(tiny.prompt(PASSES[index][2])))
    passes = [PassRow(PASSES[index][0], PASSES[index][1]) for index in which]
    logits = target.run(texts, passes, rows).logits
    return [logits[b, : PASSES[index][1].rows] for b, index in enumerate(which)]


@pytest.mark.parametrize("kind", TYPES)
@every_architecture
def test_real_rows_are_the_targets_own_to_the_bit(name: str, kind: str) -> None:
    """Catches an update that reaches a real row, a row of another sequence or a padding row, and
    a hidden state modified in place. Alone and in a ragged batch, in every architecture;
    look-ahead rows must be affected."""
    target = target_of(name, kind)
    rows = rows_of(target)
    for which in ([0], [3], [0, 1, 2, 3], [2, 1]):
        updated = given(target, which, rows)
        plain = given(target, which, without_lora(rows))
        for index, mine, theirs in zip(which, updated, plain, strict=True):
            real = 1 + PASSES[index][1].candidates
            assert torch.equal(mine[:real], theirs[:real])
            assert bool(mine.isfinite().all())
            assert all(
                bool((a != b).any()) for a, b in zip(mine[real:], theirs[real:], strict=True)
            )
    assert not forwards(target.model)


@pytest.mark.parametrize("kind", TYPES)
@every_architecture
def test_a_pass_of_real_rows_alone_is_the_targets_own_to_the_bit(name: str, kind: str) -> None:
    """Catches a verifying pass without look-ahead rows that still pays for the LoRA or is
    changed by it."""
    target = target_of(name, kind)
    for tokens in ([7], [7, 1, 2]):
        plan = Plan(len(tokens) - 1, (0,) * len(tokens))
        cache_ = target.prefill(tiny.prompt(9))
        outputs = [
            target.run(cache_, [PassRow(tokens, plan)], rows) for rows in (None, rows_of(target))
        ]
        assert torch.equal(outputs[0].logits, outputs[1].logits)
        assert outputs[1].hidden is None  # no forward was swapped


# The update itself


@contextmanager
def merged(model: nn.Module, lora: GatedLora, real: int) -> Iterator[None]:
    """Multiply rows from `real` on by `W + BA`, layer by layer and matrix by matrix."""
    tensors, hooks = lora.tensors(), []
    for group in lora.groups:
        for at, name in enumerate(group):
            down = tensors[f"lora.A.{group[0]}"][at * lora.rank : (at + 1) * lora.rank]
            update = tensors[f"lora.B.{name}"] @ down
            hooks.append(model.get_submodule(name).register_forward_hook(_merged(update, real)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _merged(update: Tensor, real: int) -> Callable[..., Tensor]:
    def hook(layer: Any, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        weight = layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight
        rows = arguments[0].reshape(-1, arguments[0].shape[-1])
        whole = nn.functional.linear(rows, weight + update, layer.bias)
        kept = output.reshape(-1, output.shape[-1])
        return torch.cat([kept[:real], whole[real:]]).view(output.shape)

    return hook


@every_architecture
def test_updates_are_those_of_each_layers_own_matrices(name: str) -> None:
    """Catches A or B of another layer of the group, a misplaced block, a transposed matrix, an
    update of the wrong rows, and one added before the layer instead of after it."""
    target = target_of(name)
    look_ahead = tiny.random_look_ahead(target, ROWS, rank=3)
    rows, lora = look_ahead.rows(target), look_ahead.lora
    assert lora is not None
    text, passes = target.prefill(tiny.prompt(20)), [PassRow(*PASSES[0][:2])]
    updated = target.run(text, passes, rows).logits
    with torch.no_grad(), merged(target.model, lora, real=4):
        naive = target.run(text, passes, without_lora(rows)).logits
    torch.testing.assert_close(updated, naive, rtol=1e-3, atol=1e-3 * float(naive.abs().max()))


@every_architecture
def test_hung_rows_with_a_lora_are_those_of_decoding(name: str) -> None:
    """Catches a LoRA that training applies to other rows or in another way than decoding, and a
    parameter without gradient."""
    target = target_of(name)
    look_ahead = tiny.random_look_ahead(target, 3, rank=2)
    text = tiny.prompt(16)
    plan = Plan(15, tuple({2: 3, 9: 2}.get(row, 0) for row in range(16)))
    training = look_ahead.trained_rows(target)
    hung = look_ahead_pass(target, torch.tensor([text]), [plan.layout()], training)
    logits = target.logits(hung.hidden)
    for anchor, rows in ((2, slice(0, 3)), (9, slice(3, 5))):
        drafting = PassRow([text[anchor]], Plan(0, (rows.stop - rows.start,)))
        decoded = target.run(target.prefill(text[:anchor]), [drafting], look_ahead.rows(target))
        torch.testing.assert_close(logits[0, rows], decoded.logits[0, 1:], rtol=1e-3, atol=1e-3)
    logits.logsumexp(-1).sum().backward()
    for parameter in look_ahead.parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.any())
    assert not forwards(target.model)


@pytest.mark.parametrize("kind", TYPES)
def test_a_fresh_lora_changes_nothing(kind: str) -> None:
    """Catches new updates that undo what the look-ahead embeddings have learned."""
    target = target_of("llama", kind)
    plain = tiny.random_look_ahead(target, ROWS)
    fresh = plain.extended(target, 5, (), 8)
    assert fresh.lora is not None
    assert bool(fresh.lora.down[0].any())
    mine, theirs = (given(target, [0, 1, 3], one.rows(target)) for one in (fresh, plain))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_rows_for_decoding_are_copies_and_those_for_training_are_not() -> None:
    """Catches a decoder whose drafts change while training goes on, and a training step that the
    following evaluation does not see."""
    target = target_of("llama")
    look_ahead = tiny.random_look_ahead(target, ROWS, rank=2, sampler_width=4)
    decoding, training = look_ahead.rows(target), look_ahead.trained_rows(target)
    layout = Plan(5, (0, 0, 3, 0, 0, 0)).layout()
    text = torch.tensor([tiny.prompt(6)])
    before = (
        given(target, [0], decoding)[0],
        look_ahead_pass(target, text, [layout], training).hidden,
    )
    with torch.no_grad():
        for parameter in look_ahead.parameters():
            parameter.mul_(1.5)
    assert torch.equal(given(target, [0], decoding)[0], before[0])
    assert not torch.equal(look_ahead_pass(target, text, [layout], training).hidden, before[1])
    assert decoding.sampler is not None
    assert look_ahead.sampler is not None
    torch.testing.assert_close(look_ahead.sampler.out, 1.5 * decoding.sampler.out)
    assert training.sampler is look_ahead.sampler


# Rows


@pytest.mark.parametrize(
    ("split", "places"),
    [
        (RowSplit(), range(6)),
        (RowSplit(4), [4, 5]),
        (RowSplit(6), []),
        (RowSplit(index=torch.tensor([1, 3, 4])), [1, 3, 4]),
    ],
)
@pytest.mark.parametrize("shape", [(1, 6, 5), (2, 3, 5), (6, 5)])
def test_a_split_takes_and_adds_to_its_rows_alone(
    split: RowSplit, places: list[int], shape: tuple[int, ...]
) -> None:
    """Catches row indices counted per sequence instead of over the whole batch, also where a
    model flattens the rows; and a layer output overwritten in place that autograd needs."""
    rows = torch.randn(shape, requires_grad=True)
    update = torch.randn(len(places), 5, requires_grad=True)
    expected = rows.detach().clone().reshape(6, 5)
    for row, place in enumerate(places):
        assert torch.equal(split.take(rows)[row], expected[place])
        expected[place] += update.detach()[row]
    assert split.take(rows).shape == (len(places), 5)
    before = rows.detach().clone()
    added = split.add(rows, update)
    assert torch.equal(added.detach(), expected.view(shape))
    assert torch.equal(rows, before)
    added.sum().backward()
    assert rows.grad is not None
    assert bool((rows.grad == 1).all())
    if len(places):
        assert update.grad is not None
        assert bool((update.grad == 1).all())
    with torch.inference_mode():
        assert torch.equal(split.add(rows.detach() + 0.0, update), expected.view(shape))


# The layers

QKV, GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
LLAMA_LIKE = [QKV, ("o_proj",), GATED, ("down_proj",)]
GROUPS = {
    "gpt2": [("c_attn",), ("c_proj",), ("c_fc",), ("c_proj",)],
    "gpt_neox": [("query_key_value",), ("dense",), ("dense_h_to_4h",), ("dense_4h_to_h",)],
    "phi3": [("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",)],
    "falcon": [("query_key_value", "dense_h_to_4h"), ("dense",), ("dense_4h_to_h",)],
    "starcoder2": [QKV, ("o_proj",), ("c_fc",), ("c_proj",)],
    "opt": [QKV, ("out_proj",), ("fc1",), ("fc2",)],
    "phi": [(*QKV, "fc1"), ("dense",), ("fc2",)],
    "cohere": [(*QKV, *GATED), ("o_proj",), ("down_proj",)],
}


@every_architecture
def test_layers_are_grouped_by_the_input_they_share(name: str) -> None:
    """Catches layers grouped that take different inputs, layers with a shared input left apart,
    transposed or fused layers that are not found, and an update of the output layer, which real
    rows need unchanged."""
    target = target_of(name)
    groups = groups_of(target.model, target.probe)
    layers = int(target.config.num_hidden_layers)
    found = [tuple(layer.rpartition(".")[2] for layer in group) for group in groups]
    assert found == GROUPS.get(name, LLAMA_LIKE) * layers
    linear = [
        layer
        for layer, module in target.model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D", "FalconLinear")
    ]
    head = target.model.get_output_embeddings()
    assert [layer for layer in linear if not any(layer in group for group in groups)] == [
        layer for layer, module in target.model.named_modules() if module is head
    ]
    assert not forwards(target.model)
    assert not any(module._forward_pre_hooks for module in target.model.modules())


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["q_proj"], ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        (["layers.1.mlp.*"], ["1.mlp.gate_proj", "1.mlp.up_proj", "1.mlp.down_proj"]),
        (["[gu]*_proj", "o_proj"], None),
        (["model.layers.0.self_attn.v_proj"], ["0.self_attn.v_proj"]),
        (["*"], "all"),
        ([], "all"),
    ],
)
def test_patterns_choose_layers(llama: Target, patterns: list[str], expected: Any) -> None:
    """Catches a pattern that must match the whole name, one that matches inside a part of it,
    and an order other than that of the calls."""
    groups = groups_of(llama.model, llama.probe, patterns)
    names = [name.removeprefix("model.layers.") for group in groups for name in group]
    if expected == "all":
        assert groups == groups_of(llama.model, llama.probe)
        assert len(names) == 14
    elif expected is None:
        each = ["self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"]
        assert names == [f"{layer}.{name}" for layer in range(2) for name in each]
        assert [len(group) for group in groups] == [1, 2, 1, 2]
    else:
        assert names == expected


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("q_porj", "q_proj"), ("proj", "q_proj"), ("qkv", "v_proj"), ("lm_head", "gate_proj")],
)
def test_a_pattern_that_matches_nothing_names_the_nearest(
    llama: Target, pattern: str, near: str
) -> None:
    """Catches a typing error that silently trains fewer layers than intended."""
    with pytest.raises(LoraError) as caught:
        groups_of(llama.model, llama.probe, ["o_proj", pattern])
    message = str(caught.value)
    assert repr(pattern) in message
    assert near in message
    assert "\n" not in message


class Mixture(nn.Module):
    """Two experts that get half of the rows each, between layers that get all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.unused, self.head = nn.Linear(4, 4), nn.Linear(4, 9)

    def forward(self, rows: Tensor) -> Tensor:
        rows = self.first(rows)
        half = PROBE_ROWS // 2
        return self.head(torch.cat([self.left(rows[:half]), self.right(rows[half:])]))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_experts_that_see_some_rows_are_left_out() -> None:
    """Catches a layer whose rows are not the rows of the pass: its updates would reach real
    rows."""
    model = Mixture()
    assert groups_of(model, lambda: model(torch.zeros(PROBE_ROWS, 4))) == [("first",)]
    with pytest.raises(RuntimeError, match="probe"):
        groups_of(model, _broken)
    assert not any(module._forward_pre_hooks for module in model.modules())


def _broken() -> None:
    raise RuntimeError("broken probe")


@pytest.mark.parametrize("rank", [0, -1, 33])
def test_a_rank_that_a_layer_cannot_have_is_refused(llama: Target, rank: int) -> None:
    """Catches updates of rank 0, which learn nothing, and matrices larger than the layer's own.
    The narrowest layer sets the limit: 32 inputs, 16 outputs."""
    groups = groups_of(llama.model, llama.probe, ["q_proj", "o_proj"])
    assert GatedLora.start(llama.model, groups, 32).rank == 32
    with pytest.raises(LoraError, match=f"lora-rank is {rank}: layer .*q_proj.* 1 to 32"):
        GatedLora.start(llama.model, groups, rank)
    with pytest.raises(LoraError, match="1 to 16"):
        GatedLora.start(llama.model, groups_of(llama.model, llama.probe, ["k_proj"]), 17)


def _tensors() -> tuple[list[tuple[str, ...]], list[Tensor], dict[str, Tensor]]:
    """Return groups, A and B of rank 2."""
    up = {"a": torch.ones(5, 2), "b": torch.ones(3, 2), "c": torch.ones(4, 2)}
    return [("a", "b"), ("c",)], [torch.ones(4, 4), torch.ones(2, 5)], up


@pytest.mark.parametrize("damage", ["none", "twice", "empty", "rank", "short", "flat", "no-groups"])
def test_tensors_that_do_not_fit_each_other_are_refused(damage: str) -> None:
    """Catches files whose parts come from different trainings."""
    groups, down, up = _tensors()
    match damage:
        case "none":
            lora = GatedLora(groups, down, up)
            assert (lora.rank, lora.names) == (2, ("a", "b", "c"))
            assert lora.description() == {"rank": 2, "groups": [["a", "b"], ["c"]]}
            return
        case "twice":
            groups = [("a", "b"), ("a",)]
        case "empty":
            groups.append(())
            down.append(torch.ones(0, 5))
        case "rank":
            up["b"] = torch.ones(3, 3)
        case "short":
            down[0] = torch.ones(2, 4)
        case "flat":
            down[1] = torch.ones(2)
        case "no-groups":
            groups, down, up = [], [], {}
    with pytest.raises(LoraError):
        GatedLora(groups, down, up)


def test_another_model_is_refused_by_its_layers(llama: Target) -> None:
    """Catches updates bound to layers that do not exist or have another size."""
    lora = tiny.random_look_ahead(llama, 2, rank=2).lora
    assert lora is not None
    lora.check(llama.model)
    wider = ARCHITECTURES["llama"].build(intermediate_size=64)
    with pytest.raises(LoraError, match=r"mlp\.gate_proj' of \(32, 48\).* has \(32, 64\)"):
        lora.check(wider)
    with pytest.raises(LoraError, match=r"o_proj.* no linear layer"):
        lora.check(EVERY["phi"].build())


# The model is left as it was


def test_the_model_has_its_own_layers_after_a_pass_that_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches updates that stay after a pass that raises, and its row split reused in the next
    pass."""
    target = Target(ARCHITECTURES["llama"].build())
    rows = rows_of(target)
    before = given(target, [0], rows)[0]
    monkeypatch.setattr(target.model.model.layers[1].mlp.act_fn, "forward", _raise, raising=False)
    with pytest.raises(RuntimeError, match="half-way"):
        given(target, [0, 1], rows)
    monkeypatch.undo()
    assert not forwards(target.model)
    assert torch.equal(given(target, [0], rows)[0], before)
    assert torch.equal(given(target, [0], without_lora(rows))[0][:4], before[:4])


def _raise(_: Tensor) -> Tensor:
    raise RuntimeError("half-way")


def test_a_forward_somebody_replaced_is_used_and_left_in_place() -> None:
    """Catches another library's forward that the update bypasses or drops."""
    target = Target(ARCHITECTURES["llama"].build())
    rows = rows_of(target)
    layer = target.model.model.layers[0].self_attn.q_proj
    before = given(target, [0], rows)[0]
    own = layer.forward

    def replaced(hidden: Tensor) -> Tensor:
        return -own(hidden)

    layer.forward = replaced
    changed = given(target, [0], rows)[0]
    assert forwards(target.model) == {"model.layers.0.self_attn.q_proj": replaced}
    plain = given(target, [0], without_lora(rows))[0]
    assert torch.equal(changed[:4], plain[:4])
    assert not torch.equal(changed[:4], before[:4])
    assert not torch.equal(changed[4:], plain[4:])
    del layer.forward
    assert torch.equal(given(target, [0], rows)[0], before)


def test_updates_lie_around_packed_weights() -> None:
    """Catches packed products that drop the update, and updates that undo packing. Look-ahead
    rows get the output of the packed layers plus the update, and both are gone afterwards."""
    packed, plain = target_of("llama", "packed"), target_of("llama", "bfloat16")
    mine, theirs = (given(target, [0], rows_of(target))[0].float() for target in (packed, plain))
    without = given(packed, [0], without_lora(rows_of(packed)))[0].float()
    assert torch.equal(mine[:4], without[:4])
    assert float((mine - theirs).abs().mean()) < 0.2 * float((mine - without)[4:].abs().mean())
    assert not forwards(packed.model)


def test_no_input_is_kept_alive_behind_a_pass() -> None:
    """Catches hidden states of every layer kept in memory until the next pass."""
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"layer": layer})
    lora = GatedLora([("layer",)], [torch.ones(2, 4)], {"layer": torch.ones(4, 2)})
    applied = lora.on(model)
    rows = torch.ones(3, 4)
    with torch.no_grad(), applied.applied(RowSplit(1)):
        layer(rows)
    gone = weakref.ref(rows)
    del rows
    assert gone() is None


def test_a_layer_called_twice_in_a_pass_gets_an_update_for_each_input() -> None:
    """Catches the update of the first call added in the second; some models share layers."""
    layer = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(layer.weight)
    lora = GatedLora([("layer",)], [torch.ones(1, 2)], {"layer": torch.ones(2, 1)})
    with torch.no_grad(), lora.on(nn.ModuleDict({"layer": layer})).applied(RowSplit(1)):
        given_ = [layer(size * torch.ones(2, 2)).tolist() for size in (1, 3)]
    assert given_ == [[[0, 0], [2, 2]], [[0, 0], [6, 6]]]
