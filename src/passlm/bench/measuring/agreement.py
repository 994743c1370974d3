"""Compare a method's tokens with those of plain decoding, and find where they differ first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from passlm.bench.engines.decoding import Record
from passlm.model.pass_records import PassRow
from passlm.model.target import Target
from passlm.plan import Plan

if TYPE_CHECKING:  # `measure` imports this module
    from passlm.bench.measuring.measure import Prompt


def agreement(
    compared: Iterable[tuple[Prompt, Record, Record]] | None, target: Target
) -> dict[str, Any]:
    """Return the share of prompts with the same tokens as plain decoding, and the differences.

    Args:
        compared: prompt, record of the method and record of plain decoding; None if the method is
            allowed to differ. Then both results are None.
        target: the target model.
    """
    if compared is None:
        return {"identical_to_ar": None, "differences": None}
    pairs = list(compared)
    differences = [
        _difference(prompt, record, plain, target)
        for prompt, record, plain in pairs
        if record.answers != plain.answers
    ]
    return {"identical_to_ar": 1 - len(differences) / len(pairs), "differences": differences}


def _difference(prompt: Prompt, record: Record, plain: Record, target: Target) -> dict[str, Any]:
    """Return the first difference, which is in the first turn that differs.

    Up to there, the conversation is the same for both methods.
    """
    asked = [prompt.ids, *(ids for ids, _ in plain.turns)]
    answers = zip(asked, record.answers, plain.answers, strict=False)
    turn, (ids, tokens, expected) = next(
        (number, parts) for number, parts in enumerate(answers) if parts[1] != parts[2]
    )
    shorter = min(len(tokens), len(expected))
    index = next((i for i in range(shorter) if tokens[i] != expected[i]), shorter)
    return {
        "prompt": prompt.name,
        "turn": turn,
        "index": index,
        "token": tokens[index] if index < len(tokens) else None,
        "ar_token": expected[index] if index < len(expected) else None,
        "margin": margin(target, [*ids, *expected[:index]]),
    }


@torch.inference_mode()
def margin(target: Target, text: Sequence[int]) -> float:
    """Return the difference between the two largest logits of the next token.

    Measured with a pass of a single row in the target's data type, before any processor. If two
    methods differ at a margin near 0, rounding has decided a tie; at a large margin, one of them is
    wrong.

    Args:
        target: the target model.
        text: token ids before the next token.
    """
    cache = target.prefill(text[:-1])
    logits = target.run(cache, [PassRow([text[-1]], Plan(0, (0,)))], None).logits
    best, second = logits[0, 0].float().topk(2).values.tolist()
    return float(best - second)
