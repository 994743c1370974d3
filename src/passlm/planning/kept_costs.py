"""Cost curves of this machine: measured once with the model itself, kept in the cache folder.

A kept curve is used as long as model, type, device, threads, versions and look-ahead files are the
same. Plans chosen by a kept curve do not depend on the clock. Measuring is left to `measure.py`,
choosing plans to `auto.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from passlm.kernels import linear, native
from passlm.lookahead.trained import LookAhead
from passlm.model.pass_records import LookAheadRows
from passlm.model.target import Target
from passlm.planning.auto import AutoPlan
from passlm.planning.cost_curve import BATCHES, CostCurve
from passlm.planning.measure import METHOD, fitting, measure
from passlm.provenance import cache_folder, environment, provenance, write_atomically

CONTEXTS = (128, 512, 2048, 8192)  # context lengths, in tokens, that curves are measured for

_log = logging.getLogger(__name__)


@dataclass
class Costs:
    """Cost curves of one model with its look-ahead files, each measured when first needed.

    Attributes:
        target: the model.
        look_ahead: its look-ahead files; None without.
        rows: the same files in the form that decoding uses.
    """

    target: Target
    look_ahead: LookAhead | None = None
    rows: LookAheadRows | None = None

    def __post_init__(self) -> None:
        # The first two are by batch size and context length.
        self._known: dict[tuple[int, int], CostCurve] = {}
        self._unknown: set[tuple[int, int]] = set()  # no kept curve was found
        self._plans: dict[tuple[AutoPlan, int], AutoPlan] = {}  # by plan and context length

    def curve(self, batch: int, context: int, anew: bool = False) -> CostCurve:
        """Return the cost curve for a batch size and context length.

        Args:
            batch: batch size; the nearest measured size is used.
            context: tokens of the longest sequence; the nearest measured length is used.
            anew: measure even if a curve is kept.
        """
        batch, context = _measured_size(batch, context)
        if anew or (batch, context) not in self._known:
            self._known[batch, context] = self._load_or_measure(batch, context, anew)
        return self._known[batch, context]

    def size(self, batch: int, context: int) -> tuple[int, int]:
        """Return the measured batch size and context length that stand for these.

        The context length is reduced to fit the model.
        """
        batch, context = _measured_size(batch, context)
        return batch, fitting(self.target, context)

    def auto(
        self, batch: int, context: int, longest: int | None = None, lookup: bool = True
    ) -> AutoPlan:
        """Return settings of adaptive planning, with the curves of all batch sizes that are kept.

        When the batch size changes, sequences continue with the curve of the new size if one is
        kept. Nothing is measured during generation.

        Args:
            batch: initial batch size.
            context: tokens of the longest sequence.
            longest: rows of the longest look-ahead group; None for no limit; 0 for no look-ahead
                rows and no draft head.
            lookup: whether candidates copied from the sequence are used.
        """
        card = None if self.look_ahead is None else self.look_ahead.card
        prior = () if card is None else card.prior[:longest]
        head = () if card is None or longest == 0 else card.head_prior

        def curves(batch_size: int) -> CostCurve | None:
            return self.known(batch_size, context)

        plan = AutoPlan(self.curve(batch, context), prior, lookup, curves, head)
        # Reuse an equal plan: its first values take long to compute.
        return self._plans.setdefault((plan, _nearest(context, CONTEXTS)), plan)

    def known(self, batch: int, context: int) -> CostCurve | None:
        """Return the curve of a size if it was measured before, None otherwise."""
        size = _measured_size(batch, context)
        if size not in self._known and size not in self._unknown:
            key = {**self._identity(), "batch": size[0], "context": size[1]}
            kept = _read(_path(key), key)
            if kept is None:
                self._unknown.add(size)
            else:
                self._known[size] = kept
        return self._known.get(size)

    def _load_or_measure(self, batch: int, context: int, anew: bool) -> CostCurve:
        key = {**self._identity(), "batch": batch, "context": context}
        kept = None if anew else _read(_path(key), key)
        if kept is not None:
            return kept
        _log.info("measuring the cost of passes on this machine; this takes some seconds, once")
        curve = measure(self.target, self.rows, batch, context)
        key["engine"] = self.target.engine  # measuring may have found that passes do not compile
        path = _path(key)
        content = {"key": key, "curve": asdict(curve), "provenance": provenance([])}
        try:
            write_atomically(path, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            _log.warning("cannot keep the measured costs in %s: %s", path.parent, error.strerror)
        return curve

    def _identity(self) -> dict[str, Any]:
        """Return all that a curve depends on, except batch size and context length."""
        card = None if self.look_ahead is None else self.look_ahead.card
        head = None if self.look_ahead is None else self.look_ahead.head
        shape = head and head.description()
        return {
            "model": asdict(self.target.fingerprint),
            "engine": self.target.engine,
            "in_line": self.target.in_line,
            "products": linear.described(),
            "operators": native.version(),
            "dtype": str(self.target.dtype),
            "device": str(self.target.device),
            "environment": environment(),
            "method": list(METHOD),
            "look_ahead": card and [card.look_ahead_tokens, card.lora, card.sampler, shape],
        }


def _path(key: dict[str, Any]) -> Path:
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / "costs" / f"{name}.json"


def _read(path: Path, key: dict[str, Any]) -> CostCurve | None:
    """Return the curve kept for a key; None if there is none or it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] != json.loads(json.dumps(key)):
            return None
        fields = content["curve"]
        kept: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else float(value)
            for name, value in fields.items()
        }
        return CostCurve(**kept)
    except OSError:
        return None
    except (ValueError, KeyError, TypeError):
        _log.warning("%s is damaged: measuring again", path)
        return None


def _measured_size(batch: int, context: int) -> tuple[int, int]:
    return _nearest(batch, BATCHES), _nearest(context, CONTEXTS)


def _nearest(wanted: int, sizes: Sequence[int]) -> int:
    """Return the size that is nearest by ratio."""
    return min(sizes, key=lambda size: max(size / max(1, wanted), max(1, wanted) / size))
