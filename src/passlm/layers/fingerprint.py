"""Fingerprint of a model: its shape and a sample of its weights.

A look-ahead folder identifies the model it was trained for by its fingerprint. Stored cost curves
do the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

_SAMPLES = 32  # weights taken from each of two matrices
# bfloat16 rounds a weight by up to 0.4 %, 0.14 % on average; other models differ by far more.
_SAME_WEIGHTS = 0.004


@dataclass(frozen=True)
class Fingerprint:
    """Shape of a target model and a sample of its weights.

    Attributes:
        model_type: name of the architecture in transformers.
        d_model: width of an input embedding.
        vocabulary: number of token ids.
        layers: number of decoder layers.
        sample: weights at fixed positions of the input embeddings and of a middle layer.
    """

    model_type: str
    d_model: int
    vocabulary: int
    layers: int
    sample: tuple[float, ...]

    @property
    def shape(self) -> str:
        """Description of the part that must be equal."""
        return (
            f"{self.model_type} with d_model {self.d_model}, {self.layers} layers, "
            f"vocabulary {self.vocabulary}"
        )

    def same_weights(self, other: Fingerprint) -> bool:
        """Return whether the samples agree up to the rounding of a 16-bit type."""
        mine, theirs = torch.tensor(self.sample), torch.tensor(other.sample)
        if mine.shape != theirs.shape:
            return False
        return bool((mine - theirs).abs().mean() <= _SAME_WEIGHTS * mine.abs().mean())


@runtime_checkable
class RoundedLayer(Protocol):
    """A layer with rounded weights that keeps a sample of the original ones.

    Attributes:
        sample: the result of `sample_weights` for the original weights.
        weight: the original weights, if the layer keeps them; else None.
    """

    sample: Tensor
    weight: Tensor | None


def sample_weights(weight: Tensor) -> Tensor:
    """Return the weights at fixed positions of a matrix, `[32]`, float32 on the CPU."""
    whole = weight.full_tensor() if isinstance(weight, DTensor) else weight  # sharded
    flat = whole.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, _SAMPLES, dtype=torch.float64).long()
    return flat[places.to(flat.device)].float().cpu()


def fingerprint_of(model: PreTrainedModel, embedding: nn.Embedding) -> Fingerprint:
    """Return the fingerprint of a model.

    Args:
        model: the model.
        embedding: the model's input embeddings.
    """
    config: Any = model.config.get_text_config()
    matrices = _matrices(model)
    sampled = [_sample(matrices[0]), _sample(matrices[len(matrices) // 2])]
    vocabulary, d_model = embedding.weight.shape
    return Fingerprint(
        model_type=str(config.model_type),
        d_model=d_model,
        vocabulary=vocabulary,
        layers=int(config.num_hidden_layers),
        sample=tuple(float(f"{value:.6g}") for value in torch.cat(sampled).tolist()),
    )


def _sample(weight: Tensor | RoundedLayer) -> Tensor:
    return weight.sample if isinstance(weight, RoundedLayer) else sample_weights(weight)


def _matrices(model: nn.Module) -> list[Tensor | RoundedLayer]:
    """Return the weight matrices of a model in the order of its parameters, each once."""
    found: dict[int, Tensor | RoundedLayer] = {}
    for module in model.modules():
        if isinstance(module, RoundedLayer):
            # Where two layers share weights, the first one counts.
            key = id(module) if module.weight is None else id(module.weight)
            found.setdefault(key, module)
        else:
            own = module.parameters(recurse=False)
            found |= {id(p): p for p in own if p.ndim == 2 and id(p) not in found}
    return list(found.values())
