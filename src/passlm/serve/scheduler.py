"""Which texts run when: the batch, who joins it next, what is remembered, and faults kept apart.

Single-threaded: `worker.py` puts a thread around it. Between two steps of the batch one chunk of
one prompt is read, so that a long prompt stops nobody for long.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from functools import lru_cache

from torch import Tensor

from passlm.decoding.decoder import Decoder, Reading
from passlm.decoding.text import Row
from passlm.generate import Generator
from passlm.model.cache import RowCache
from passlm.outputs import Step
from passlm.planning.auto import AutoPlan
from passlm.serve.prefix_cache import MIN_PREFIX_TOKENS, PrefixCache, shared_prefix_length
from passlm.serve.protocol import INTERNAL_ERROR, EndReason, Failed, Job, WorkerSettings
from passlm.serve.sequence import ServedSequence

COST_CONTEXT = 128  # tokens behind which the costs of plans are measured
_INITIAL_SEQUENCE_SECONDS = 5.0  # believed before any text is over
_DECAY = 0.9  # what the mean keeps of its weight when one more text is over

_log = logging.getLogger(__name__)


class PrefixCachingDecoder(Decoder):
    """Keeps the keys and values of texts that leave."""

    prefix_cache: PrefixCache | None = None

    def leave(self, rows: Iterable[Row]) -> None:
        """See `Decoder`."""
        leaving = list(rows)
        for row in leaving:
            known = row.tokens[:-1]
            if self.prefix_cache is not None and len(known) >= MIN_PREFIX_TOKENS:
                self._keep_prefix(self.prefix_cache, row, known)
        super().leave(leaving)

    def _keep_prefix(self, prefix_cache: PrefixCache, row: Row, known: Sequence[int]) -> None:
        try:
            prefix_cache.add(known, self.copied(row, len(known)))
        except Exception:  # memory may be short, and it is a convenience
            _log.exception("a text that is over cannot be remembered")


class Scheduler:
    """The texts under way and those that wait, first come, first served.

    Args:
        lm: model, tokenizer and look-ahead rows.
        settings: limits; `max_cache` of 0 takes room for a full batch.

    Attributes:
        max_context: tokens that a text may have.
        max_cache: tokens that may be held of all texts.
        passes: run so far.
        pass_seconds: spent in them.
        faults: met so far.
        seconds_a_text: a text takes in the batch, the mean of the last ones.
    """

    def __init__(self, lm: Generator, settings: WorkerSettings) -> None:
        self.lm = lm
        self.settings = settings
        context = lm.target.context
        longest = min(settings.max_context, context or settings.max_context)
        self.max_cache = settings.max_cache or settings.max_batch * longest
        self.max_context = min(longest, self.max_cache)  # else it would wait for room for ever
        self.passes = 0
        self.pass_seconds = 0.0
        self.faults = 0
        self.mean_sequence_seconds = _INITIAL_SEQUENCE_SECONDS
        self._waiting: deque[ServedSequence] = deque()
        self._reading: tuple[ServedSequence, Reading] | None = None
        self._running: dict[Row, ServedSequence] = {}
        self._prefix_cache = PrefixCache()
        self._decoder = self._new_decoder()
        self._plans = lru_cache(maxsize=None)(self._new_plans)

    @property
    def running(self) -> int:
        """Texts in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Texts not begun, or whose prompt is being read."""
        return len(self._waiting) + (self._reading is not None)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._running or self.waiting)

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values are held."""
        running = sum(len(row.tokens) for row in list(self._running))
        return running + self._prefix_cache.tokens

    def warm(self) -> None:
        """Do once what the first requests would wait for: compile, measure what passes cost."""
        method = "ar" if self.lm.rows is None else "two-pass"
        self.lm.generate([[0]], method=method, max_new_tokens=4, ignore_eos=True)
        for batch in range(1, 1 + self.settings.max_batch):
            self.lm.costs.curve(batch, self._context)

    def add(self, job: Job) -> None:
        """Let a text wait for its turn."""
        seconds = self.settings.max_seconds
        try:
            sequence = ServedSequence(job, self.lm, self._plans, self.max_context, seconds)
        except Exception:
            self.faults += 1
            _log.exception("a request cannot be taken on")
            job.notify(Failed(INTERNAL_ERROR))
            return
        self._waiting.append(sequence)

    def cancel(self, job: Job) -> None:
        """End a text wherever it is; one that is over already stays as it is."""
        self._end([sequence for sequence in self._sequences() if sequence.job is job], "cancelled")

    def cancel_all(self) -> None:
        """End all texts."""
        self._end(self._sequences(), "cancelled")

    def tick(self) -> None:
        """Let the next text begin, read a bit of its prompt, and run a step for all others."""
        idle = [sequence for sequence in self._sequences() if sequence.row is None]
        self._end([sequence for sequence in idle if sequence.expired], "waited")
        self._admit_next()
        self._prefill()
        self._step()

    def fail_all(self) -> None:
        """After a fault that nobody can be blamed for: end all texts and begin anew."""
        sequences = self._sequences()
        self._waiting.clear()
        self._reading = None
        self._running.clear()
        self._prefix_cache = PrefixCache()
        self._decoder = self._new_decoder()
        for sequence in sequences:
            sequence.fail()

    def _sequences(self) -> list[ServedSequence]:
        reading = [] if self._reading is None else [self._reading[0]]
        return [*self._running.values(), *reading, *self._waiting]

    def _end(self, sequences: Sequence[ServedSequence], reason: EndReason) -> None:
        for sequence in sequences:
            if sequence.row is not None:
                self._leave(sequence.row)
            elif self._reading is not None and self._reading[0] is sequence:
                self._reading = None
            else:
                self._waiting.remove(sequence)
            sequence.end(reason)

    def _admit_next(self) -> None:
        """The first of the queue, where there is a place and room for it; nobody overtakes it."""
        if self._reading is not None or not self._waiting:
            return
        sequence = self._waiting[0]
        if self.running >= self.settings.max_batch:
            return
        if self._reserved + sequence.reserved > self.max_cache:
            return
        self._waiting.popleft()
        self._make_room(sequence.reserved)
        try:
            prefix = self._reusable_prefix(sequence)
            sequence.job.reused = 0 if prefix is None else prefix.lengths[0]
            self._reading = sequence, self._decoder.begin(sequence.request, prefix)
        except Exception:
            self._fail(sequence)

    @property
    def _reserved(self) -> int:
        """Tokens that the texts of the batch may come to."""
        return sum(sequence.reserved for sequence in self._running.values())

    def _make_room(self, more: int = 0) -> None:
        """Forget remembered texts whose room the batch has, or may need with `more` tokens."""
        taken = max(self._decoder.slots, self._reserved + more)
        self._prefix_cache.evict_to(self.max_cache - taken)

    def _reusable_prefix(self, sequence: ServedSequence) -> RowCache | None:
        """Keys and values of the prompt's first tokens, from the batch or from what is over."""
        prompt = sequence.prompt[:-1]
        count, remembered = self._prefix_cache.find(prompt)
        counts = {
            row: min(shared_prefix_length(row.tokens, prompt), len(row.tokens) - 1)
            for row in self._running
        }
        row = max(counts, key=counts.__getitem__, default=None)
        if row is not None and counts[row] > max(count, MIN_PREFIX_TOKENS - 1):
            return self._decoder.copied(row, counts[row])
        if remembered is None or count < MIN_PREFIX_TOKENS:
            return None
        return remembered.copied(0, count)

    def _prefill(self) -> None:
        if self._reading is None:
            return
        sequence, reading = self._reading
        started = time.perf_counter()
        try:
            self._decoder.read(reading, self.settings.prefill_chunk)
            sequence.job.stats.prefill_seconds += time.perf_counter() - started
            if reading.left:
                return
            self._reading = None
            sequence.row = self._decoder.admit(reading)
            self._running[sequence.row] = sequence
            sequence.started = time.monotonic()
        except Exception:
            self._reading = None
            self._fail(sequence)

    def _step(self) -> None:
        if not self._running:
            return
        started = time.perf_counter()
        try:
            settled = self._decoder.step()
        except Exception:
            self.faults += 1
            _log.exception("a step failed: the texts of the batch are taken apart")
            settled = self._retry_separately()
        seconds = time.perf_counter() - started
        self.passes += 1
        self.pass_seconds += seconds
        for row, step in settled:
            self._deliver(row, step, seconds)
        self._make_room()

    def _deliver(self, row: Row, step: Step, seconds: float) -> None:
        sequence = self._running[row]
        try:
            output = sequence.push(step, seconds)
        except Exception:
            self._leave(row)
            self._fail(sequence)
            return
        if output.finish_reason is not None:
            self._leave(row)
        sequence.job.notify(output)

    def _leave(self, row: Row) -> None:
        """Take a text out of the batch; it may have left the decoder on its own."""
        seconds = time.monotonic() - self._running.pop(row).started
        self.mean_sequence_seconds = _DECAY * self.mean_sequence_seconds + (1 - _DECAY) * seconds
        self._decoder.leave([row] if row in self._decoder.rows else [])

    def _fail(self, sequence: ServedSequence) -> None:
        self.faults += 1
        _log.exception("a text failed; the others go on")
        sequence.fail()

    def _retry_separately(self) -> list[tuple[Row, Step]]:
        """Where a step failed: what it settled all the same, or what each text settles alone.

        A text that fails alone as well is ended, and the others go on without it.
        """
        broken = self._decoder
        self._decoder = self._new_decoder()
        ahead = dict(broken.settled)
        settled = []
        for row in list(ahead) or broken.rows:
            try:
                step, cache = self._step_alone(broken, row, ahead.get(row))
                if cache is not None:
                    self._decoder.admit(Reading(row, cache))
                settled.append((row, step))
            except Exception:
                self._fail(self._running.pop(row))
        return settled

    def _step_alone(
        self, broken: Decoder, row: Row, step: Step | None
    ) -> tuple[Step, RowCache | None]:
        """What a text of a failed step settled, or settles alone, and its cache if it goes on."""
        if step is not None and step.finish_reason:
            return step, None
        cache = broken.copied(row, len(row.tokens) - 1)
        if step is not None:
            return step, cache
        alone = Decoder(self.lm.target, self.lm.rows, self._observe)
        alone.admit(Reading(row, cache))
        ((_, step),) = alone.step()
        return step, None if step.finish_reason else alone.copied(row, len(row.tokens) - 1)

    def _observe(self, row: Row, logits: Tensor, settled: Sequence[int]) -> None:
        self._running[row].observe(logits, settled)

    def _new_decoder(self) -> PrefixCachingDecoder:
        decoder = PrefixCachingDecoder(self.lm.target, self.lm.rows, self._observe)
        decoder.prefix_cache = self._prefix_cache
        return decoder

    def _new_plans(self, longest: int) -> AutoPlan:
        return self.lm.costs.auto(1, self._context, longest)

    @property
    def _context(self) -> int:
        return min(COST_CONTEXT, self.max_context)
