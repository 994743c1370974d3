"""Parallel Speculative Sampling (PaSS) for language models.

One frozen model both drafts tokens, with trained look-ahead embeddings, and verifies them. Call
`load`, then `Generator.stream` or `Generator.generate`; `custom_generate` plugs into the `generate`
method of transformers. This module holds the public names only and imports nothing until a name is
used, because torch and transformers take seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from passlm.generate import Generator, load
    from passlm.integrations.custom_generate import custom_generate
    from passlm.layers.int8 import quantized
    from passlm.lookahead.trained import LookAhead, push_to_hub
    from passlm.outputs import Chunk, Output, Stats
    from passlm.params import SamplingParams, StopParams

__version__ = "0.1.0"

_MODULES = {
    "Chunk": "passlm.outputs",
    "Generator": "passlm.generate",
    "LookAhead": "passlm.lookahead.trained",
    "Output": "passlm.outputs",
    "SamplingParams": "passlm.params",
    "Stats": "passlm.outputs",
    "StopParams": "passlm.params",
    "custom_generate": "passlm.integrations.custom_generate",
    "load": "passlm.generate",
    "push_to_hub": "passlm.lookahead.trained",
    "quantized": "passlm.layers.int8",
}

__all__ = [
    "Chunk",
    "Generator",
    "LookAhead",
    "Output",
    "SamplingParams",
    "Stats",
    "StopParams",
    "custom_generate",
    "load",
    "push_to_hub",
    "quantized",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'passlm' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
