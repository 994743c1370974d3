"""Differences between the transformers releases that passlm supports.

All code that depends on the release of transformers goes here, so that the next change of name is a
change of this file alone:

- Transformers 5.24 renamed the key-value cache of a model's `forward` from `past_key_values` to
  `cache`. It still takes the old keyword with a warning, until 5.40. Models of the user's own code
  may keep the old name.
- `generate` hands a `custom_generate` callable its cache as `cache` since 5.24 and as
  `past_key_values` before.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from transformers import __version__ as installed
from transformers.cache_utils import Cache

OLDEST = "5.23.0"  # the releases that the test suite runs on; pyproject.toml admits no others
NEWEST = "5.24.0"

CACHE_NAMES = ("cache", "past_key_values")


def cache_name(forward: Callable[..., Any]) -> str | None:
    """Return the name under which a model's `forward` takes the key-value cache.

    The parameter is found by its known names and otherwise by its type, so that a release that
    renames it once more still works.

    Args:
        forward: the `forward` of a model or of its body.

    Returns:
        The name of the parameter, or None where there is none.
    """
    parameters = inspect.signature(forward).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    typed = [name for name, one in parameters.items() if _is_cache(one.annotation)]
    return typed[0] if len(typed) == 1 else None


def _is_cache(annotation: Any) -> bool:
    """Return whether an annotation is `Cache`, a class of caches, or a union with one."""
    if isinstance(annotation, str):
        return "Cache" in annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return any(_is_cache(one) for one in typing.get_args(annotation))
    return isinstance(annotation, type) and issubclass(annotation, Cache)


def given_cache(model_kwargs: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the cache among the keyword arguments of a generation call, and its name there.

    Returns:
        The name and the cache; `("cache", None)` where none was given.
    """
    for name in CACHE_NAMES:
        if model_kwargs.get(name) is not None:
            return name, model_kwargs[name]
    return CACHE_NAMES[0], None


def newer_than_tested() -> str:
    """Return a clause for error messages if transformers is newer than any tested release.

    Returns:
        A clause that names the installed and the tested releases; empty if the installed one is
        not newer than the tested ones.
    """
    if _release(installed) <= _release(NEWEST):
        return ""
    return (
        f" (transformers {installed} is newer than passlm knows: it is tested with {OLDEST} to "
        f"{NEWEST}, and 'pip install transformers=={NEWEST}' installs one of these)"
    )


def _release(version: str) -> tuple[int, ...]:
    """Return the numbers of a minor release: `(5, 24)` for `5.24.1`."""
    return tuple(int(part) for part in version.split(".")[:2])
