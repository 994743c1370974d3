"""The frozen model: what its rows see, what it refuses, and that it is left as it was."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from tiny import ARCHITECTURES, GREEDY, Architecture, Rig, requests_for
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from passlm.decoding.decoder import Decoder, PromptError
from passlm.decoding.request import Request
from passlm.decoding.strategies import OnePass
from passlm.masks import visibility, within_window
from passlm.model.cache import BLOCK
from passlm.model.pass_records import LookAheadRows, PassRow
from passlm.model.supported import UnsupportedModelError, check_supported
from passlm.model.target import Target
from passlm.model.training import look_ahead_pass
from passlm.params import SamplingParams
from passlm.plan import Plan

CPU = torch.device("cpu")
SOME = ("llama", "llama-eager", "mistral", "gemma2", "gemma3", "gpt2")


@pytest.fixture(params=SOME)
def target(request: pytest.FixtureRequest, tiny_target: Callable[[str], Target]) -> Target:
    return tiny_target(request.param)


def picture(mask: Tensor) -> list[str]:
    """A mask `[Q, S]` as lines of `x` and `.`."""
    return ["".join(".x"[int(seen)] for seen in row) for row in mask]


def close(left: Tensor, right: Tensor) -> bool:
    """Equal up to the rounding of float32 sums in another order."""
    return bool(torch.allclose(left, right, rtol=1e-4, atol=1e-4))


# Masks


def test_visibility_of_a_ragged_batch() -> None:
    """Catches a row that sees slots between its own length and the longest one, and an empty row
    of the softmax, which is NaN."""
    layouts = [Plan(1, (0, 1)).layout(), Plan(0, (0,)).layout()]
    seen = visibility([1, 3], [layout.visible for layout in layouts], CPU)
    assert picture(seen[0]) == ["xx....", "xxx...", "xxxx.."]
    assert picture(seen[1]) == ["xxxx..", "....x.", ".....x"]


def test_window_counts_positions_not_slots() -> None:
    """Catches a sliding window over slots: look-ahead rows stand elsewhere than their slot."""
    plan = Plan(1, (1, 3))
    length, window = 4, 3
    positions = (length + plan.layout().offset)[None]
    inside = within_window([length], positions, length + plan.rows, window)
    full = visibility([length], [plan.layout().visible], CPU)
    assert picture((full & inside)[0]) == [
        "..xxx.....",  # root, position 4: itself, 3 and 2
        "...xxx....",  # candidate, position 5
        "...xx.x...",  # LA_1 on the root, position 5
        "....xx.x..",  # LA_1 on the candidate, position 6
        ".....x.xx.",  # LA_2, position 7: no longer the root
        ".......xxx",  # LA_3, position 8
    ]


def test_window_shorter_than_a_group() -> None:
    """Catches the same where a group reaches beyond the window: slot and position differ there."""
    plan = Plan(1, (3, 3))
    positions = plan.layout().offset[None]
    inside = within_window([0], positions, plan.rows, 2) & plan.layout().visible
    assert picture(inside[0]) == [
        "x.......",
        "xx......",
        "x.x.....",  # LA_1 on the root
        "..xx....",  # LA_2: no longer the root
        "...xx...",  # LA_3: no longer LA_1
        ".x...x..",
        ".....xx.",
        "......xx",
    ]


def test_window_of_a_ragged_batch() -> None:
    """Catches a window laid over another row's positions."""
    positions = torch.tensor([[2, 3], [5, 6]])
    inside = within_window([2, 5], positions, 7, 2)
    seen = visibility([2, 5], [Plan(1, (0, 0)).layout().visible] * 2, CPU) & inside
    assert picture(seen[0]) == [".xx....", "..xx..."]
    assert picture(seen[1]) == ["....xx.", ".....xx"]


# Passes


def test_real_rows_ignore_the_rest_of_the_pass(target: Target) -> None:
    """Catches real rows that see look-ahead rows or later candidates: their logits must be those
    of plain decoding, whatever hangs on them and whoever shares the batch."""
    text, shorter = tiny.prompt(20), tiny.prompt(7)
    look_ahead = tiny.look_ahead_rows(target, 4)
    cache = target.prefill(text[:14])
    rows = [PassRow(text[14:18], Plan(3, (4, 0, 2, 4)))]
    logits = target.run(cache, rows, look_ahead).logits[0]
    for real in range(4):
        before = target.prefill(text[: 14 + real])
        plain = target.run(before, [PassRow([text[14 + real]], Plan(0, (0,)))], None).logits
        assert close(logits[real], plain[0, 0])
    cache.append(target.prefill(shorter[:6]))
    rows.append(PassRow(shorter[6:], Plan(0, (1,))))
    batch = target.run(cache, rows, look_ahead).logits
    assert close(batch[0], logits)
    alone = target.run(target.prefill(shorter[:6]), rows[1:], look_ahead).logits
    assert close(batch[1, :2], alone[0])
    assert bool(batch.isfinite().all())


def test_look_ahead_rows_continue_their_own_row(target: Target) -> None:
    """Catches a group at the wrong positions or on the wrong real row: with the embeddings of
    true tokens in their place, look-ahead rows must give those tokens' own logits."""
    text = tiny.prompt(18)
    cache = target.prefill(text[:10])
    plan = Plan(2, (3, 3, 3))
    for real in range(3):
        continued = LookAheadRows(target.embed(torch.tensor(text[11 + real : 14 + real])))
        logits = target.run(cache, [PassRow(text[10:13], plan)], continued).logits[0]
        expected = target.model(torch.tensor([text[: 14 + real]])).logits[0]
        assert close(logits[plan.group(real)], expected[11 + real :])


def test_hung_rows_are_those_of_decoding(target: Target) -> None:
    """Catches training rows that stand or see elsewhere than in decoding: what was trained would
    then not be what is run. Gradients reach the look-ahead embeddings and nothing else."""
    texts = [tiny.prompt(16, seed) for seed in (1, 2)]
    look_ahead = tiny.look_ahead_inputs(target, 3).requires_grad_()
    decoding, training = LookAheadRows(look_ahead.detach()), LookAheadRows(look_ahead)
    anchors = [{2: 3, 9: 2, 14: 3}, {1: 3, 12: 3, 15: 2}]
    plans = [Plan(15, tuple(chosen.get(row, 0) for row in range(16))) for chosen in anchors]
    hung = look_ahead_pass(target, torch.tensor(texts), [plan.layout() for plan in plans], training)
    logits, text_logits = target.logits(hung.hidden), target.logits(hung.text_hidden)
    for index, (text, chosen) in enumerate(zip(texts, anchors, strict=True)):
        start = 0
        for anchor, length in chosen.items():
            rows = slice(start, start + length)
            start += length
            assert hung.depth[index, rows].tolist() == list(range(1, length + 1))
            ahead = [anchor + depth for depth in range(1, length + 1)]
            assert hung.position[index, rows].tolist() == ahead
            cache = target.prefill(text[:anchor])
            drafting = PassRow([text[anchor]], Plan(0, (length,)))
            decoded = target.run(cache, [drafting], decoding).logits[0]
            assert close(logits[index, rows], decoded[1:])
            assert close(text_logits[index, anchor], decoded[0])
    assert not hung.text_hidden.requires_grad
    logits.logsumexp(-1).sum().backward()
    assert look_ahead.grad is not None
    assert bool(look_ahead.grad.abs().sum(1).gt(0).all())
    for weight in target.model.parameters():
        weight.grad = None


def test_prefill_in_chunks(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a chunk that misses the chunks before it, or the last one left unsettled."""
    text = tiny.prompt(33)
    whole = target.prefill(text)
    monkeypatch.setattr("passlm.model.target.PREFILL_CHUNK", 8)
    chunked = target.prefill(text)
    assert chunked.lengths == whole.lengths == [33]
    for one, other in zip(whole.row_layers, chunked.row_layers, strict=True):
        assert one.keys is not None
        assert other.keys is not None
        assert close(one.keys[:, :, :33], other.keys[:, :, :33])


def test_prefill_of_nothing(llama: Target) -> None:
    """Catches an empty pass for a prompt of one token."""
    cache = llama.prefill([])
    assert cache.lengths == [0]
    assert cache.capacity == 0


def test_memory_of_a_short_text(llama: Target) -> None:
    """Catches a cache as long as the model's context."""
    cache = llama.prefill(tiny.prompt(20))
    llama.run(cache, [PassRow([1], Plan(0, (6,)))], tiny.look_ahead_rows(llama, 6))
    assert cache.capacity == BLOCK < tiny.CONTEXT


def test_a_pass_row_must_fit_its_plan() -> None:
    """Catches tokens that run into the look-ahead rows without an error."""
    with pytest.raises(ValueError, match="2 tokens"):
        PassRow([1, 2], Plan(0, (3,)))
    with pytest.raises(ValueError, match="1 tokens"):
        PassRow([1], Plan(1, (0, 0)))


def test_context_ends_where_longrope_switches() -> None:
    """Catches look-ahead rows that switch the rotation of a whole pass a few tokens early: up to
    the switch the text is the model's own, and a longer prompt is refused."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 24,
    }
    model = Architecture("phi3", "phi3").build(
        rope_parameters=rope, original_max_position_embeddings=24
    )
    target = Target(model)
    assert target.context == 24
    prompts = [tiny.prompt(9)]
    truth = [tiny.generate(model, prompts[0], 15)[0]]
    asked = requests_for(prompts, OnePass(3))
    for rig in (None, Rig(prompts, truth)):
        given = tiny.run(target, asked, tiny.look_ahead_rows(target, 3), rig)
        assert given.texts == truth
        assert given.steps[0][-1].finish_reason == "context"
    with pytest.raises(PromptError, match="24"):
        Decoder(target).join(Request.of(tiny.prompt(24), GREEDY, 8))


# Refusals

_STATEFUL = "cannot be rolled back"


def small(model_type: str, **options: Any) -> PreTrainedModel:
    """A model without weights: refusing looks at none."""
    config = CONFIG_MAPPING[model_type](**options)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}
MAMBA = {"mamba_n_heads": 8, "mamba_expand": 2, "mamba_d_head": 8}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
REFUSED = [
    ("mamba", {}, "MambaForCausalLM", _STATEFUL),
    ("falcon_mamba", {}, "FalconMambaForCausalLM", _STATEFUL),
    ("rwkv", {"attention_hidden_size": 32}, "RwkvForCausalLM", _STATEFUL),
    ("recurrent_gemma", {}, "RecurrentGemmaForCausalLM", _STATEFUL),
    ("jamba", EXPERTS, "JambaForCausalLM", _STATEFUL),
    ("bamba", MAMBA, "BambaForCausalLM", _STATEFUL),
    ("falcon_h1", {}, "FalconH1ForCausalLM", _STATEFUL),
    ("qwen3_next", EXPERTS, "Qwen3NextForCausalLM", _STATEFUL),
    ("lfm2", {"layer_types": ["conv", "full_attention"]}, "Lfm2ForCausalLM", "conv layers"),
    ("minimax", EXPERTS, "MiniMaxForCausalLM", "linear_attention layers"),
    ("llama4_text", EXPERTS, "Llama4ForCausalLM", "chunked_attention layers"),
    ("bloom", {}, "BloomForCausalLM", "position_ids"),
    ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}, "MptForCausalLM", "position_ids"),
    ("openai-gpt", {}, "OpenAIGPTLMHeadModel", "cache"),
    ("falcon", {"alibi": True}, "FalconForCausalLM", "ALiBi"),
    ("gpt_neo", {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
     "GPTNeoForCausalLM", "local attention"),
    ("bert", {}, "BertLMHeadModel", "encoder"),
    ("roberta", {}, "RobertaForCausalLM", "encoder"),
    ("gemma3n_text", {"num_kv_shared_layers": 0}, "Gemma3nForCausalLM", "token ids"),
    ("moshi", {}, "MoshiForCausalLM", "window"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "options", "name", "reason"), REFUSED, ids=[case[0] for case in REFUSED]
)
def test_unsupported_models_are_refused_by_name(
    model_type: str, options: dict[str, Any], name: str, reason: str
) -> None:
    """Catches a model that would be decoded to wrong text without a word: recurrent state, biases
    for positions that cannot be told, rows that see what lies behind them, lookups by token id."""
    model = small(model_type, **_known(model_type, SIZES) | options)
    with pytest.raises(UnsupportedModelError, match=reason) as refused:
        check_supported(model)
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)


def _known(model_type: str, options: dict[str, Any]) -> dict[str, Any]:
    """Those options that the configuration of an architecture has under llama's names."""
    default = CONFIG_MAPPING[model_type]()
    fixed = ("head_dim", "layer_types")
    return {k: v for k, v in options.items() if hasattr(default, k) and k not in fixed}


def test_encoder_decoders_are_refused() -> None:
    """Catches a translation model that is taken for a decoder."""
    config = CONFIG_MAPPING["t5"](vocab_size=64, d_model=32, d_ff=48, num_layers=2, num_heads=4)
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match=r"T5ForConditionalGeneration.*encoder-decoder"):
        Target(model)


def test_a_model_without_a_head_is_refused() -> None:
    """Catches hidden states that are taken for logits."""
    with torch.device("meta"):
        model = AutoModel.from_config(ARCHITECTURES["llama"].config())
    with pytest.raises(UnsupportedModelError, match=r"LlamaModel.*not a causal language model"):
        Target(model)


@pytest.mark.parametrize("kernel", ["flex_attention", "flash_attention_2", "flash_attention_3"])
def test_attention_without_masks_is_refused(kernel: str) -> None:
    """Catches a kernel that drops the mask, so that real rows see look-ahead rows."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(ARCHITECTURES["llama"].config())
    model.config._attn_implementation_internal = kernel
    with pytest.raises(UnsupportedModelError, match=f"{kernel}.*'sdpa'"):
        Target(model)


# The model is left as it was


class Broken:
    """A logits processor that raises on its tenth call."""

    calls = 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Count, then raise."""
        self.calls += 1
        if self.calls == 10:
            raise RuntimeError("broken processor")
        return scores


def hooks(model: PreTrainedModel) -> int:
    """How many hooks hang on a model's modules."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@contextmanager
def left_as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Assert that a block leaves weights, configuration, hooks, mode and `generate` alone."""
    weights = copy.deepcopy(model.state_dict())
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    attributes, training, before = set(vars(model)), model.training, hooks(model)
    gradients = [weight.requires_grad for weight in model.parameters()]
    text = tiny.generate(model, tiny.prompt(6), 12)
    yield
    assert set(weights) == set(model.state_dict())
    assert all(torch.equal(weights[name], now) for name, now in model.state_dict().items())
    assert model.config.to_dict() == config
    assert model.generation_config.to_dict() == generation
    assert set(vars(model)) == attributes
    assert model.training == training
    assert hooks(model) == before
    assert [weight.requires_grad for weight in model.parameters()] == gradients
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert tiny.generate(model, tiny.prompt(6), 12) == text


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_the_model_is_left_as_it_was(name: str, training: bool) -> None:
    """Catches a patch, hook, mode or setting that outlives decoding, finished or abandoned."""
    changes = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if name == "gpt2" else {}
    model = ARCHITECTURES[name].build(**changes).train(training)
    with left_as_it_was(model):
        target = Target(model)
        look_ahead = tiny.look_ahead_rows(target, 3)
        sampling = SamplingParams(temperature=1.0, seed=1, judge="rejection", draft="sampled")
        prompts = [tiny.prompt(length) for length in (3, 9)]
        tiny.run(target, requests_for(prompts, OnePass(3), sampling, 16), look_ahead)
        abandoned = Decoder(target, look_ahead)
        abandoned.join(Request.of(prompts[0], GREEDY, 50, OnePass(3)))
        abandoned.step()
        abandoned.step()
        del abandoned


def finish(decoder: Decoder) -> None:
    """Step until every text has ended."""
    while decoder.rows:
        decoder.step()


def test_a_processor_that_raises(llama: Target) -> None:
    """Catches a model, or the other texts of the batch, left half-way through a step: once the
    broken text is taken out, the others go on to plain decoding's text."""
    prompts = [tiny.prompt(length) for length in (4, 6, 8)]
    truth = [tiny.generate(llama.model, tokens, 30)[0] for tokens in prompts]
    asked = requests_for(prompts, OnePass(3), new=30)
    broken = Request.of(prompts[1], SamplingParams(processors=(Broken(),)), 30, OnePass(3))
    rig = Rig(prompts, truth)
    with left_as_it_was(llama.model):
        decoder = tiny.RiggedDecoder(llama, tiny.look_ahead_rows(llama, 3), rig)
        first, middle, last = (decoder.join(one) for one in (asked[0], broken, asked[2]))
        with pytest.raises(RuntimeError, match="broken processor"):
            finish(decoder)
        assert len(middle.tokens) > len(prompts[1])
        decoder.leave([middle])
        finish(decoder)
    for row, prompt, text in ((first, prompts[0], truth[0]), (last, prompts[2], truth[2])):
        assert row.tokens == [*prompt, *text]


def test_sizes_are_known_while_a_pass_has_the_body_replaced(llama: Target) -> None:
    """Catches a server's web side that asks for the vocabulary in the middle of a pass and fails:
    transformers finds the embeddings through the body, which `logits` replaces for a moment."""
    found: list[int] = []
    hook = llama.model.get_output_embeddings().register_forward_hook(
        lambda *_: found.append(llama.vocabulary + llama.d_model)
    )
    try:
        llama.logits(torch.zeros(1, llama.d_model))
    finally:
        hook.remove()
    assert found == [llama.vocabulary + llama.d_model]


def test_threads_that_share_a_model_take_turns() -> None:
    """Catches real rows of one thread that meet what another's pass has altered: updates of its
    look-ahead rows, and attention that the second target then takes for the model's own."""
    model = ARCHITECTURES["llama"].build()
    mine, theirs = Target(model), Target(model)
    rows = tiny.random_look_ahead(mine, 2, rank=2).rows(mine)
    drafting = [PassRow([1, 2], Plan(1, (0, 2)))]
    plain = [PassRow([3, 4, 5, 6], Plan(3, (0,) * 4))]
    expected = theirs.run(theirs.new_cache(), plain, None).logits
    entered, leave = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        if threading.current_thread().name.startswith("drafting"):
            entered.set()
            assert leave.wait(60)

    found: list[Tensor | None] = []

    def beside() -> None:
        other = Target(model)
        found.append(other.run(other.new_cache(), plain, None).logits)

    hook = model.model.layers[0].mlp.register_forward_pre_hook(hold)
    try:
        with ThreadPoolExecutor(1, "drafting") as one, ThreadPoolExecutor(1, "plain") as other:
            first = one.submit(mine.run, mine.new_cache(), drafting, rows)
            assert entered.wait(60)
            second = other.submit(beside)
            with pytest.raises(TimeoutError):
                second.result(0.2)
            leave.set()
            first.result(60)
            second.result(60)
    finally:
        leave.set()
        hook.remove()
    assert expected is not None
    assert found[0] is not None
    assert torch.equal(found[0], expected)
