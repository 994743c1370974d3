"""Tiny random models of every architecture the tests decode, and helpers to decode with them.

Weights are scaled so that greedy text wanders instead of repeating one token, and no model has an
end-of-sequence token. Nothing here asserts; that is left to the tests.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from passlm.decoding.decoder import Decoder, Observer
from passlm.decoding.request import Request
from passlm.decoding.strategies import Strategy, autoregressive
from passlm.decoding.text import Row
from passlm.drafts.draft_head import DraftHead
from passlm.drafts.sampler_head import SamplerHead
from passlm.lookahead.trained import Card, LookAhead
from passlm.model.pass_records import LookAheadRows
from passlm.model.target import Target
from passlm.outputs import Step
from passlm.params import SamplingParams
from passlm.plan import Chain

VOCABULARY = 64
CONTEXT = 256
WINDOW = 8  # shorter than every text the tests decode
NEW_TOKENS = 64
SHORTLIST = 8  # of sampler heads: fewer than the vocabulary has
PROMPT_LENGTHS = (1, 5, 11, 30)
GREEDY = SamplingParams()

_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": CONTEXT,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Architecture:
    """How to build one tiny model.

    Attributes:
        name: what a test is called after.
        model_type: the architecture's name in transformers.
        options: of its configuration; llama-like ones come on top of common sizes.
        attention: the attention implementation it is loaded with.
        llama_like: whether the common sizes go by llama's names.
        scale: standard deviation of the weight matrices.
        seed: of the weights; chosen with `scale` so that no text repeats itself early.
    """

    name: str
    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    llama_like: bool = True
    scale: float = 0.4
    seed: int = 0

    def config(self, **changes: Any) -> PretrainedConfig:
        """Its configuration, with some options changed."""
        common = _LLAMA_LIKE if self.llama_like else {}
        return CONFIG_MAPPING[self.model_type](**{**common, **self.options, **changes})

    def build(self, **changes: Any) -> PreTrainedModel:
        """A model with random weights, in evaluation mode, float32."""
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            self.config(**changes), attn_implementation=self.attention, dtype=torch.float32
        )
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for weight in model.parameters():
                noise = torch.randn(weight.shape, generator=generator)
                if weight.ndim >= 2:
                    weight.copy_(self.scale * noise)
                else:
                    weight.add_(0.1 * noise)
        return model.eval()


_MIXED_LAYERS = {
    "num_hidden_layers": 3,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_GEMMA = {**_MIXED_LAYERS, "head_dim": 8, "query_pre_attn_scalar": 8}


def _by_name(*architectures: Architecture) -> dict[str, Architecture]:
    return {architecture.name: architecture for architecture in architectures}


ARCHITECTURES = _by_name(
    Architecture("llama", "llama"),
    Architecture("mistral", "mistral", {"sliding_window": WINDOW}),
    Architecture("qwen2", "qwen2"),
    Architecture("qwen3", "qwen3", {"head_dim": 8}, scale=0.3, seed=1),
    Architecture("gemma2", "gemma2", _GEMMA, attention="eager", seed=1),
    Architecture("gemma3", "gemma3_text", _GEMMA),
    Architecture("gpt2", "gpt2", _GPT2, llama_like=False, scale=0.6, seed=1),
    Architecture("gpt_neox", "gpt_neox", scale=0.6, seed=1),
    Architecture("phi3", "phi3", {"sliding_window": WINDOW}),
    Architecture("olmo2", "olmo2", scale=0.6),
    Architecture("falcon", "falcon", {"alibi": False, "ffn_hidden_size": 48}, scale=0.6, seed=1),
    Architecture("starcoder2", "starcoder2", {"sliding_window": WINDOW}, scale=0.6),
    Architecture("opt", "opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
)
# These go through the same code as those above; they are decoded, with fewer plans.
MORE_ARCHITECTURES = _by_name(
    Architecture("llama-eager", "llama", attention="eager"),
    Architecture("qwen2-mixed", "qwen2", {**_MIXED_LAYERS, "use_sliding_window": True}),
    Architecture("phi", "phi"),
    Architecture("stablelm", "stablelm", seed=1),
    Architecture("cohere", "cohere", {"logit_scale": 1.0}, seed=1),
    Architecture("granite", "granite"),
)


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    return random.Random(f"{seed} {length}").choices(range(VOCABULARY), k=length)


def look_ahead_inputs(target: Target, count: int, seed: int = 5) -> Tensor:
    """Random look-ahead embeddings, `[count, d_model]`, of the size of the input embeddings."""
    noise = torch.randn(count, target.d_model, generator=torch.Generator().manual_seed(seed))
    every = target.embed(torch.arange(target.vocabulary)).detach()
    return (noise * every.std()).to(target.dtype)


def look_ahead_rows(target: Target, count: int, seed: int = 5) -> LookAheadRows:
    """The same as rows of a pass."""
    return LookAheadRows(look_ahead_inputs(target, count, seed))


def random_look_ahead(
    target: Target,
    count: int,
    rank: int = 0,
    sampler_width: int = 0,
    seed: int = 5,
    head_width: int = 0,
) -> LookAhead:
    """The same embeddings with a LoRA, a sampler head and a draft head that change much, at random.

    The draft head guesses up to `count` tokens, among three in four of them.
    """
    card = Card("tiny", target.fingerprint, count)
    start = LookAhead(look_ahead_inputs(target, count, seed), card)
    lora = start.extended(target, rank, (), 0).lora
    generator = torch.Generator().manual_seed(seed)
    if lora is not None:
        for up in lora.up:
            up.data.copy_(0.5 * torch.randn(up.shape, generator=generator))
    sampler = None
    if sampler_width:
        sampler = SamplerHead.start(target.d_model, sampler_width, SHORTLIST, tokens=2)
        sampler.out.data.copy_(torch.randn(sampler.out.shape, generator=generator))
    head = None
    if head_width:
        listed = torch.randperm(target.vocabulary, generator=generator)[
            : target.vocabulary * 3 // 4
        ]
        head = DraftHead.start(target.d_model, head_width, 2, count, listed)
        head.out.data.copy_(torch.randn(head.out.shape, generator=generator))
    return LookAhead(start.embeddings, card, lora, sampler, head)


def generate(model: PreTrainedModel, tokens: Sequence[int], new: int) -> tuple[list[int], float]:
    """What transformers' own greedy `generate` adds, and its smallest margin between two logits."""
    ids = torch.tensor([list(tokens)])
    output: Any = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(output.logits).topk(2).values
    return output.sequences[0, len(tokens) :].tolist(), float((best[:, 0] - best[:, 1]).min())


class Rig:
    """Replaces drafted ids by the true continuation, right up to a random place and wrong there.

    Nothing else of the pass is replaced. The place depends on the seed, the prompt and the
    position alone, so a text meets the same candidates alone and in a batch.

    Args:
        truths: the true continuation of each prompt.
        seed: of the places.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], truths: Sequence[Sequence[int]], seed: int = 0
    ) -> None:
        self.truths = {tuple(p): list(t) for p, t in zip(prompts, truths, strict=True)}
        self.seed = seed

    def __call__(self, row: Row, chain: Chain) -> Chain:
        """The same proposal with other candidates."""
        count, start = len(chain.tokens), len(row.request.prompt)
        at = len(row.tokens) - start
        rng = random.Random(f"{self.seed} {start} {at}")
        truth = [*self.truths[tuple(row.request.prompt)], *([0] * count)][at : at + count]
        right = rng.randint(0, count)
        tokens = truth[:right] + [
            (token + rng.randrange(1, VOCABULARY)) % VOCABULARY for token in truth[right:]
        ]
        q = chain.q
        if q is not None:
            q = one_hot(torch.tensor(tokens), q.shape[1]).to(q)
        return replace(chain, tokens=tuple(tokens), q=q)


class RiggedDecoder(Decoder):
    """A decoder whose drafted candidates are rigged; copied ones are not."""

    def __init__(
        self,
        target: Target,
        look_ahead: LookAheadRows | None,
        rig: Rig | None,
        observer: Observer | None = None,
    ) -> None:
        super().__init__(target, look_ahead, observer)
        self.rig = rig

    def _propose(self, rows: Sequence[Row]) -> None:
        super()._propose(rows)
        for row in rows if self.rig else ():
            row.proposed = [
                chain if chain.source == "lookup" else self.rig(row, chain)
                for chain in row.proposed
            ]


def drafter(decoder: Decoder, source: str) -> Any:
    """A decoder's drafter of this name."""
    (found,) = [own for own in decoder.drafters if own.source == source]
    return found


def drafted(decoder: Decoder, row: Row) -> list[int]:
    """What was drafted from the look-ahead group on a row's last accepted one."""
    (chain,) = drafter(decoder, "look-ahead").propose([row])
    return [] if chain is None else list(chain.tokens)


@dataclass(frozen=True)
class Run:
    """What a batch gave: the tokens and the steps of each text, in the order of the requests."""

    texts: list[list[int]]
    steps: list[list[Step]]

    def accepted(self, judged: int) -> set[int]:
        """The accepted lengths that occurred in passes of so many candidates."""
        return {step.accepted for row in self.steps for step in row if step.judged == judged}


def run(
    target: Target,
    requests: Sequence[Request],
    look_ahead: LookAheadRows | None = None,
    rig: Rig | None = None,
) -> Run:
    """Decode some requests in one batch, to their ends."""
    decoder = RiggedDecoder(target, look_ahead, rig)
    rows = [decoder.join(request) for request in requests]
    steps: dict[int, list[Step]] = {id(row): [] for row in rows}
    while decoder.rows:
        for row, step in decoder.step():
            steps[id(row)].append(step)
    kept = [steps[id(row)] for row in rows]
    return Run([[token for step in row for token in step.tokens] for row in kept], kept)


def requests_for(
    prompts: Sequence[Sequence[int]],
    strategy: Strategy = autoregressive,
    sampling: SamplingParams = GREEDY,
    new: int = NEW_TOKENS,
) -> list[Request]:
    """One request for each prompt."""
    return [Request.of(tokens, sampling, new, strategy) for tokens in prompts]
