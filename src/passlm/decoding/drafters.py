"""The drafters that a decoder asks for candidates, in order.

To add a source of drafts, add its drafter here.
"""

from __future__ import annotations

from passlm.drafts.draft_head import DraftHeadDrafter
from passlm.drafts.look_ahead import LookAheadDrafter
from passlm.drafts.prompt_lookup import LookupDrafter
from passlm.drafts.protocol import Drafter
from passlm.model.pass_records import LookAheadRows
from passlm.model.target import Target


def drafters_for(target: Target, look_ahead: LookAheadRows | None) -> list[Drafter]:
    """Return the drafters for a model and its look-ahead files.

    The draft head comes last: whether it pays depends on the candidates that are there already.

    Raises:
        UnsupportedModelError: the files have a sampler head and the output layer's weights cannot
            be read.
    """
    drafters: list[Drafter] = [LookupDrafter()]
    if look_ahead is not None:
        tables = None if look_ahead.sampler is None else target.embeddings
        drafters.append(LookAheadDrafter(look_ahead.sampler, tables))
        if look_ahead.head is not None:
            drafters.append(DraftHeadDrafter(look_ahead.head))
    return drafters
