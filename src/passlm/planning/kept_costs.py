"""Cost curves of this machine: measured once with the model itself, kept in the user's cache.

A kept curve is used as long as model, type, device, threads, versions and look-ahead files are the
same. Plans made from it do not depend on the clock. Measuring is left to `measure.py`, choosing
plans to `auto.py`.
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

CONTEXTS = (128, 512, 2048, 8192)  # context lengths that curves are measured for

_log = logging.getLogger(__name__)


@dataclass
class Costs:
    """Cost curves of one model with its look-ahead files, each measured when first needed.

    Attributes:
        target: the model.
        look_ahead: its files; None without.
        rows: the files in the form that decoding uses.
    """

    target: Target
    look_ahead: LookAhead | None = None
    rows: LookAheadRows | None = None

    def __post_init__(self) -> None:
        self._known: dict[tuple[int, int], CostCurve] = {}
        self._unknown: set[tuple[int, int]] = set()  # no kept curve was found
        self._plans: dict[tuple[AutoPlan, int], AutoPlan] = {}  # by plan and context

    def curve(self, batch: int, context: int, anew: bool = False) -> CostCurve:
        """Return the cost curve for a batch size and context length.

        Args:
            batch: batch size; the nearest measured size is used.
            context: tokens of the longest sequence; the nearest measured length is used.
            anew: measure even where a curve is kept.
        """
        batch, context = _nearest(batch, context)
        if anew or (batch, context) not in self._known:
            self._known[batch, context] = self._kept_or_measured(batch, context, anew)
        return self._known[batch, context]

    def size(self, batch: int, context: int) -> tuple[int, int]:
        """Return the batch size and context length that are measured instead of these."""
        batch, context = _nearest(batch, context)
        return batch, fitting(self.target, context)

    def auto(
        self, batch: int, context: int, longest: int | None = None, lookup: bool = True
    ) -> AutoPlan:
        """Return adaptive plans for this batch size, and for others whose curves are kept.

        When the batch size changes, a sequence goes on with the curve of the new size if one is
        known. Nothing is measured during generation.

        Args:
            batch: initial batch size.
            context: tokens of the longest sequence.
            longest: rows of the longest look-ahead group; None allows all, 0 none, and no draft
                head either.
            lookup: whether candidates copied from the sequence are used.
        """
        card = None if self.look_ahead is None else self.look_ahead.card
        prior = () if card is None else card.prior[:longest]
        head = () if card is None or longest == 0 else card.head_prior

        def of(texts: int) -> CostCurve | None:
            return self.known(texts, context)

        made = AutoPlan(self.curve(batch, context), prior, lookup, of, head)
        # An equal plan made before keeps its first weighing, which takes long.
        return self._plans.setdefault((made, _near(context, CONTEXTS)), made)

    def known(self, batch: int, context: int) -> CostCurve | None:
        """Return a curve that was measured before; None where there is none."""
        size = _nearest(batch, context)
        if size not in self._known and size not in self._unknown:
            key = {**self._identity(), "batch": size[0], "context": size[1]}
            kept = _read(_place(key), key)
            if kept is None:
                self._unknown.add(size)
            else:
                self._known[size] = kept
        return self._known.get(size)

    def _kept_or_measured(self, batch: int, context: int, anew: bool) -> CostCurve:
        key = {**self._identity(), "batch": batch, "context": context}
        kept = None if anew else _read(_place(key), key)
        if kept is not None:
            return kept
        _log.info("measuring the cost of passes on this machine; this takes some seconds, once")
        curve = measure(self.target, self.rows, batch, context)
        key["engine"] = self.target.engine  # passes may have turned out not to compile here
        path = _place(key)
        content = {"key": key, "curve": asdict(curve), "provenance": provenance([])}
        try:
            write_atomically(path, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            _log.warning("cannot keep the measured costs in %s: %s", path.parent, error.strerror)
        return curve

    def _identity(self) -> dict[str, Any]:
        """Return everything that a curve depends on except batch size and context length."""
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


def _place(key: dict[str, Any]) -> Path:
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / "costs" / f"{name}.json"


def _read(path: Path, key: dict[str, Any]) -> CostCurve | None:
    """Return the curve kept for a key; None where none can be read."""
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


def _nearest(batch: int, context: int) -> tuple[int, int]:
    return _near(batch, BATCHES), _near(context, CONTEXTS)


def _near(wanted: int, known: Sequence[int]) -> int:
    """Return the known size that is nearest by ratio."""
    return min(known, key=lambda size: max(size / max(1, wanted), max(1, wanted) / size))
