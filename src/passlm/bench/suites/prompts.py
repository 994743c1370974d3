"""Encode tasks as the token ids that methods decode, and leave out those that do not fit.

`tasks.py` reads the tasks; `session.py` runs them.
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
    """The prompts to decode, and a record of what was left out.

    Attributes:
        suites: the prompts of each suite that has any. If prompts are cut to several lengths, all
            lengths of a prompt are next to each other.
        missing: the reason why each omitted suite was left out, by suite name.
        skipped: the suite, name and token count of prompts too long for the context.
        too_short: the number of prompts of a suite that are shorter than a length to cut to.
        first_turn_only: suites of which only the first turn of each chat is run.
        digests: a SHA-256 digest of the prompts of each suite.
    """

    suites: list[list[Prompt]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    too_short: list[dict[str, Any]] = field(default_factory=list)
    first_turn_only: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Collector:
    """Collects the prompts for one model.

    Attributes:
        lm: the model with its tokenizer.
        new_tokens: maximum number of new tokens per prompt.
        cuts: lengths in tokens to which prompts are cut, keeping their end; empty to leave them
            whole.
        whole_chats: whether all turns of a chat are run, or only the first.
        stripped: whether trailing white space is removed from text to continue.
    """

    lm: Generator
    new_tokens: int
    cuts: tuple[int, ...] = ()
    whole_chats: bool = True
    stripped: bool = False

    def collect(self, suites: Iterable[str], given: Sequence[Task], limit: int | None) -> Found:
        """Return the prompts of the named suites and of the given tasks.

        A suite whose package is missing, or which the model cannot take, is left out with a
        warning.

        Args:
            suites: names of the suites.
            given: tasks that were read from a file.
            limit: maximum number of prompts per suite; None for all. Does not apply to `given`.
        """
        found = Found()
        for name in suites:
            try:
                self._add(found, self._tasks(name, limit))
                continue
            except TaskError as error:
                why = str(error)
            except PromptError as error:
                why = f"suite {name!r} cannot be used with this model: {error}"
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
            tasks = [_without_trailing_space(task) for task in tasks]
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
            content = [[asdict(task), *ids] for task, ids in zip(tasks, encoded, strict=True)]
            found.digests[suite] = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _fits(self, found: Found, task: Task, ids: tuple[int, ...], cut: int | None) -> bool:
        context, tokens = self.lm.target.context, len(ids) if cut is None else cut
        if context is None or tokens + self.new_tokens <= context:
            return True
        found.skipped.append({"suite": task.suite, "prompt": task.name, "tokens": tokens})
        _log.warning(
            "skipped %s of %s: %d prompt tokens plus %d new tokens exceed the context of %d",
            *(task.name, task.suite, tokens, self.new_tokens, context),
        )
        return False

    def _prompt(self, task: Task, ids: tuple[int, ...], cut: int | None) -> Prompt:
        further = self._further(task) if self.whole_chats and task.turns else None
        kept = ids if cut is None else ids[-cut:]
        return Prompt(task.suite, task.name, kept, further, task.category, cut)

    def _further(self, task: Task) -> Further:
        """Return a function that encodes the next turn of a chat, given the answers so far.

        It returns None once the chat has no more turns or no longer fits the context.
        """
        lm, new_tokens = self.lm, self.new_tokens
        tokenizer: Any = lm.tokenizer

        def ids(answers: Sequence[Sequence[int]]) -> tuple[int, ...] | None:
            if len(answers) > len(task.turns):
                return None
            messages = list(task.messages or ())
            for answer, turn in zip(answers, task.turns, strict=False):
                content = tokenizer.decode(answer, skip_special_tokens=True)
                messages.append({"role": "assistant", "content": content})
                messages.append({"role": "user", "content": turn})
            encoded, context = tuple(lm.encode(messages)), lm.target.context
            return encoded if context is None or len(encoded) + new_tokens <= context else None

        return ids


def _without_trailing_space(task: Task) -> Task:
    """Return the task without trailing white space, or unchanged if nothing else would remain."""
    stripped = (task.prompt or "").rstrip()
    return replace(task, prompt=stripped) if stripped else task
