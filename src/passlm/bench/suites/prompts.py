"""Tasks as the ids that methods decode: those that fit the model, whole or cut to a length.

Which tasks there are is left to `tasks.py`, running them to `session.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from passlm.bench.measuring.measure import Further, Prompt
from passlm.bench.suites.tasks import Task, TaskError, load_suite
from passlm.decoding.decoder import PromptError
from passlm.generate import Generator

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """What there is to decode, and what was left out of it.

    Attributes:
        suites: the prompts of each suite that has some. Where texts are cut, the lengths of one
            stand side by side.
        missing: why suites were left out, by name.
        skipped: prompts too long for the context, with their suite and tokens.
        too_short: how many prompts of a suite have less than a length to cut to.
        first_turn_only: suites whose chats were not asked their further turns.
        digests: what the prompts of each suite hash to.
    """

    suites: list[list[Prompt]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    too_short: list[dict[str, Any]] = field(default_factory=list)
    first_turn_only: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Collector:
    """Gathers the prompts for one model.

    Attributes:
        lm: the model with its tokenizer.
        new_tokens: that each text may have behind its prompt.
        cuts: lengths that the text of each prompt is cut to, from its end; none to leave it whole.
        whole_chats: whether chats are asked their further turns.
        stripped: whether white space at the end of text to continue is left out.
    """

    lm: Generator
    new_tokens: int
    cuts: tuple[int, ...] = ()
    whole_chats: bool = True
    stripped: bool = False

    def collect(self, suites: Iterable[str], given: Sequence[Task], limit: int | None) -> Found:
        """The prompts of suites and of a file.

        Suites whose package is missing, or which the model cannot take, are left out.

        Args:
            suites: their names.
            given: tasks that were read from a file.
            limit: at most so many prompts of each suite.
        """
        found = Found()
        for name in suites:
            try:
                self._add(found, self._tasks(name, limit))
                continue
            except TaskError as error:
                why = str(error)
            except PromptError as error:
                why = f"suite {name!r} cannot be given to this model: {error}"
            _log.warning("%s", why)
            found.missing[name] = why
        self._add(found, given)
        return found

    def _tasks(self, name: str, limit: int | None) -> list[Task]:
        tokenizer: Any = self.lm.tokenizer

        def encode(text: str) -> list[int]:
            ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return ids

        return load_suite(name, encode, tokenizer.decode, limit)

    def _add(self, found: Found, tasks: Sequence[Task]) -> None:
        """Add the prompts of one suite."""
        if self.stripped:
            tasks = [_without_end(task) for task in tasks]
        encoded = [
            tuple(self.lm.encode(task.prompt if task.prompt else list(task.messages or ())))
            for task in tasks
        ]
        prompts = []
        for task, ids in zip(tasks, encoded, strict=True):
            prompts += [
                self._prompt(task, ids, cut)
                for cut in self.cuts or (None,)
                if (cut is None or cut <= len(ids)) and self._fits(found, task, ids, cut)
            ]
        if not tasks:
            return
        suite = tasks[0].suite
        for cut in self.cuts:
            short = sum(len(ids) < cut for ids in encoded)
            if short:
                found.too_short.append({"suite": suite, "prompt_tokens": cut, "prompts": short})
        if not self.whole_chats and any(task.turns for task in tasks):
            found.first_turn_only.append(suite)
        if prompts:
            found.suites.append(prompts)
            told = [[asdict(task), *ids] for task, ids in zip(tasks, encoded, strict=True)]
            found.digests[suite] = hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def _fits(self, found: Found, task: Task, ids: tuple[int, ...], cut: int | None) -> bool:
        context, tokens = self.lm.target.context, len(ids) if cut is None else cut
        if context is None or tokens + self.new_tokens <= context:
            return True
        found.skipped.append({"suite": task.suite, "prompt": task.name, "tokens": tokens})
        _log.warning(
            "skipped %s of %s: its %d tokens and %d new ones exceed the context of %d",
            *(task.name, task.suite, tokens, self.new_tokens, context),
        )
        return False

    def _prompt(self, task: Task, ids: tuple[int, ...], cut: int | None) -> Prompt:
        further = self._further(task) if self.whole_chats and task.turns else None
        kept = ids if cut is None else ids[-cut:]
        return Prompt(task.suite, task.name, kept, further, task.category, cut)

    def _further(self, task: Task) -> Further:
        """The turns of a chat behind its first: each asked once those before it are answered."""
        lm, new_tokens = self.lm, self.new_tokens
        tokenizer: Any = lm.tokenizer

        def ids(answers: Sequence[Sequence[int]]) -> tuple[int, ...] | None:
            if len(answers) > len(task.turns):
                return None
            messages = list(task.messages or ())
            for answer, turn in zip(answers, task.turns, strict=False):
                said = tokenizer.decode(answer, skip_special_tokens=True)
                messages.append({"role": "assistant", "content": said})
                messages.append({"role": "user", "content": turn})
            asked, context = tuple(lm.encode(messages)), lm.target.context
            return asked if context is None or len(asked) + new_tokens <= context else None

        return ids


def _without_end(task: Task) -> Task:
    """A task whose text ends with something to see, if it has any."""
    seen = (task.prompt or "").rstrip()
    return replace(task, prompt=seen) if seen else task
