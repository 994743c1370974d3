"""What differs between releases of transformers, and what is refused when one is too new."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, MORE_ARCHITECTURES, prompt
from transformers import Cache, DynamicCache, LlamaForCausalLM

from passlm.model import compat
from passlm.model.compat import cache_name, given_cache, newer_than_tested
from passlm.model.supported import UnsupportedModelError, check_supported
from passlm.model.target import Target

EVERY = {**ARCHITECTURES, **MORE_ARCHITECTURES}


def old_name(self: Any, past_key_values: Cache | None = None) -> None: ...


def new_name(self: Any, cache: Cache | None = None, use_cache: bool = True) -> None: ...


def other_name(self: Any, kv: DynamicCache | None = None, other: int | None = None) -> None: ...


def none(self: Any, input_ids: torch.Tensor | None = None, **kwargs: Any) -> None: ...


def two(self: Any, one: Cache | None = None, other: Cache | None = None) -> None: ...


@pytest.mark.parametrize(
    ("forward", "name"),
    [
        (old_name, "past_key_values"),
        (new_name, "cache"),
        (other_name, "kv"),
        (none, None),
        (two, None),
    ],
)
def test_the_cache_is_found_by_name_and_else_by_type(forward: Any, name: str | None) -> None:
    """Catches a check by one name, which the next release makes refuse every model, and a guess
    where two parameters could be meant."""
    assert cache_name(forward) == name


@pytest.mark.parametrize("name", EVERY)
def test_every_architecture_of_the_tests_takes_a_cache(name: str) -> None:
    """Catches a release that renames the cache so that it is not found."""
    with torch.device("meta"):
        model = EVERY[name].build()
    assert cache_name(model.forward) in compat.CACHE_NAMES


def test_a_given_cache_is_found_under_either_name() -> None:
    """Catches a user's cache that is overlooked under the name of the other release."""
    cache = DynamicCache()
    for name in compat.CACHE_NAMES:
        assert given_cache({name: cache}) == (name, cache)
        assert given_cache({name: None}) == ("cache", None)


class RenamedLlama(LlamaForCausalLM):
    """As a later release might have it."""

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        kv_state: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        name = str(cache_name(LlamaForCausalLM.forward))
        return super().forward(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds=inputs_embeds,
            **{name: kv_state},
            **kwargs,
        )


class ForgetfulLlama(LlamaForCausalLM):
    """Takes a cache and passes it over, as a release does that no longer knows the keyword."""

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        return super().forward(
            input_ids, None, position_ids, inputs_embeds=inputs_embeds, use_cache=False
        )


class NoCacheLlama(LlamaForCausalLM):
    """Takes no cache at all."""

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> Any:
        raise AssertionError("refused before it is called")


def built(kind: type[LlamaForCausalLM]) -> Any:
    model = kind(ARCHITECTURES["llama"].config()).eval()
    model.load_state_dict(ARCHITECTURES["llama"].build().state_dict())
    return model


def test_a_renamed_cache_is_used() -> None:
    """Catches a model refused for a name, and one whose renamed cache stays empty."""
    tokens = prompt(11)
    caches = [Target(model).prefill(tokens) for model in (built(RenamedLlama), built_plain())]
    for mine, theirs in zip(*(cache.row_layers for cache in caches), strict=True):
        assert mine.keys is not None
        assert theirs.keys is not None
        assert torch.equal(mine.keys, theirs.keys)


def built_plain() -> LlamaForCausalLM:
    model: LlamaForCausalLM = built(LlamaForCausalLM)
    return model


def test_a_cache_that_is_passed_over_is_an_error() -> None:
    """Catches wrong text without a word where a model's forward takes any keyword and drops it."""
    with pytest.raises(UnsupportedModelError, match=r"ForgetfulLlama.* given as cache") as caught:
        Target(built(ForgetfulLlama)).prefill(prompt(5))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("version", "told"),
    [("5.23.0", False), ("5.24.7", False), ("5.25.0.dev0", True), ("6.0", True)],
)
def test_a_refusal_names_the_known_releases_when_the_library_is_newer(
    monkeypatch: pytest.MonkeyPatch, version: str, told: bool
) -> None:
    """Catches a refusal of every model that does not say that the library is the reason."""
    monkeypatch.setattr(compat, "installed", version)
    assert bool(newer_than_tested()) == told
    with pytest.raises(UnsupportedModelError, match="takes no key-value cache") as caught:
        check_supported(built(NoCacheLlama))
    assert ("5.23.0 to 5.24.0" in str(caught.value)) == told
    assert (version in str(caught.value)) == told
    assert "\n" not in str(caught.value)
