"""Continuous batching: admission, chunked prefill, prefix caching, isolation of errors.

Single-threaded; `worker.py` runs it in a thread. Between two steps of the batch one chunk of one
prompt is prefilled, so that a long prompt does not delay the other sequences for long.
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

COST_CONTEXT = 128  # context length at which the costs of passes are measured
_INITIAL_SEQUENCE_SECONDS = 5.0  # estimate before the first sequence has ended
_DECAY = 0.9  # weight of the old mean when a sequence ends

_log = logging.getLogger(__name__)


class PrefixCachingDecoder(Decoder):
    """A decoder that caches the keys and values of sequences that leave the batch."""

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
        except Exception:  # memory may be short, and caching is optional
            _log.exception("a finished sequence cannot be cached")


class Scheduler:
    """Runs sequences in one batch, first come, first served.

    Args:
        lm: model, tokenizer and look-ahead rows.
        settings: limits; a `max_cache` of 0 means enough for a full batch.

    Attributes:
        max_context: maximum length of a sequence, in tokens.
        max_cache: maximum number of tokens in the KV cache, of all sequences.
        passes: number of passes so far.
        pass_seconds: time spent in them.
        faults: number of internal errors so far.
        mean_sequence_seconds: moving average of the time that a sequence spends in the batch.
    """

    def __init__(self, lm: Generator, settings: WorkerSettings) -> None:
        self.lm = lm
        self.settings = settings
        context = lm.target.context
        longest = min(settings.max_context, context or settings.max_context)
        self.max_cache = settings.max_cache or settings.max_batch * longest
        # A sequence longer than the cache would wait for room for ever.
        self.max_context = min(longest, self.max_cache)
        self.passes = 0
        self.pass_seconds = 0.0
        self.faults = 0
        self.mean_sequence_seconds = _INITIAL_SEQUENCE_SECONDS
        self._waiting: deque[ServedSequence] = deque()
        self._prefilling: tuple[ServedSequence, Reading] | None = None
        self._running: dict[Row, ServedSequence] = {}
        self._prefix_cache = PrefixCache()
        self._decoder = self._new_decoder()
        self._plans = lru_cache(maxsize=None)(self._new_plans)

    @property
    def running(self) -> int:
        """Number of sequences in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Number of sequences that wait or whose prompt is being prefilled."""
        return len(self._waiting) + (self._prefilling is not None)

    @property
    def busy(self) -> bool:
        """True if any sequence runs or waits."""
        return bool(self._running or self.waiting)

    @property
    def cached_tokens(self) -> int:
        """Number of tokens in the KV cache, those of finished sequences included."""
        running = sum(len(row.tokens) for row in list(self._running))
        return running + self._prefix_cache.tokens

    def warm(self) -> None:
        """Compile the model and measure cost curves, so that the first requests need not wait."""
        method = "ar" if self.lm.rows is None else "two-pass"
        self.lm.generate([[0]], method=method, max_new_tokens=4, ignore_eos=True)
        for batch in range(1, 1 + self.settings.max_batch):
            self.lm.costs.curve(batch, self._context)

    def add(self, job: Job) -> None:
        """Append a sequence to the queue."""
        seconds = self.settings.max_seconds
        try:
            sequence = ServedSequence(job, self.lm, self._plans, self.max_context, seconds)
        except Exception:
            self.faults += 1
            _log.exception("a sequence cannot be accepted")
            job.notify(Failed(INTERNAL_ERROR))
            return
        self._waiting.append(sequence)

    def cancel(self, job: Job) -> None:
        """End a sequence, whether it runs or waits; an ended one is ignored."""
        self._end([sequence for sequence in self._sequences() if sequence.job is job], "cancelled")

    def cancel_all(self) -> None:
        """End all sequences."""
        self._end(self._sequences(), "cancelled")

    def tick(self) -> None:
        """Admit the next sequence, prefill one chunk of its prompt, and run a step of the batch."""
        idle = [sequence for sequence in self._sequences() if sequence.row is None]
        self._end([sequence for sequence in idle if sequence.expired], "waited")
        self._admit_next()
        self._prefill()
        self._step()

    def fail_all(self) -> None:
        """End all sequences and start with a new decoder, after an error of unknown cause."""
        sequences = self._sequences()
        self._waiting.clear()
        self._prefilling = None
        self._running.clear()
        self._prefix_cache = PrefixCache()
        self._decoder = self._new_decoder()
        for sequence in sequences:
            sequence.fail()

    def _sequences(self) -> list[ServedSequence]:
        reading = [] if self._prefilling is None else [self._prefilling[0]]
        return [*self._running.values(), *reading, *self._waiting]

    def _end(self, sequences: Sequence[ServedSequence], reason: EndReason) -> None:
        for sequence in sequences:
            if sequence.row is not None:
                self._leave(sequence.row)
            elif self._prefilling is not None and self._prefilling[0] is sequence:
                self._prefilling = None
            else:
                self._waiting.remove(sequence)
            sequence.end(reason)

    def _admit_next(self) -> None:
        """Begin the first sequence of the queue if the batch and the cache have room for it.

        No other sequence overtakes it.
        """
        if self._prefilling is not None or not self._waiting:
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
            self._prefilling = sequence, self._decoder.begin(sequence.request, prefix)
        except Exception:
            self._fail(sequence)

    @property
    def _reserved(self) -> int:
        """Maximum total length that the sequences of the batch can reach, in tokens."""
        return sum(sequence.reserved for sequence in self._running.values())

    def _make_room(self, more: int = 0) -> None:
        """Evict finished sequences whose room the batch uses, or may need with `more` tokens."""
        used = max(self._decoder.slots, self._reserved + more)
        self._prefix_cache.evict_to(self.max_cache - used)

    def _reusable_prefix(self, sequence: ServedSequence) -> RowCache | None:
        """Return keys and values of the prompt's first tokens, if any sequence starts like it.

        Running and finished sequences are searched. The last token of the prompt is left out: it
        is the first root.
        """
        prompt = sequence.prompt[:-1]
        count, cached = self._prefix_cache.find(prompt)
        counts = {
            row: min(shared_prefix_length(row.tokens, prompt), len(row.tokens) - 1)
            for row in self._running
        }
        row = max(counts, key=counts.__getitem__, default=None)
        if row is not None and counts[row] > max(count, MIN_PREFIX_TOKENS - 1):
            return self._decoder.copied(row, counts[row])
        if cached is None or count < MIN_PREFIX_TOKENS:
            return None
        return cached.copied(0, count)

    def _prefill(self) -> None:
        if self._prefilling is None:
            return
        sequence, reading = self._prefilling
        started = time.perf_counter()
        try:
            self._decoder.read(reading, self.settings.prefill_chunk)
            sequence.job.stats.prefill_seconds += time.perf_counter() - started
            if reading.left:
                return
            self._prefilling = None
            sequence.row = self._decoder.admit(reading)
            self._running[sequence.row] = sequence
            sequence.started = time.monotonic()
        except Exception:
            self._prefilling = None
            self._fail(sequence)

    def _step(self) -> None:
        if not self._running:
            return
        started = time.perf_counter()
        try:
            settled = self._decoder.step()
        except Exception:
            self.faults += 1
            _log.exception("a step failed: each sequence of the batch runs it alone")
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
        """Remove a sequence from the batch; it may have left the decoder already."""
        seconds = time.monotonic() - self._running.pop(row).started
        self.mean_sequence_seconds = _DECAY * self.mean_sequence_seconds + (1 - _DECAY) * seconds
        self._decoder.leave([row] if row in self._decoder.rows else [])

    def _fail(self, sequence: ServedSequence) -> None:
        self.faults += 1
        _log.exception("a sequence failed; the others continue")
        sequence.fail()

    def _retry_separately(self) -> list[tuple[Row, Step]]:
        """Return what a failed step settled, or else what each sequence settles alone.

        A sequence that fails alone as well is ended, and the others continue without it.
        """
        broken = self._decoder
        self._decoder = self._new_decoder()
        already_settled = dict(broken.settled)
        settled = []
        for row in list(already_settled) or broken.rows:
            try:
                step, cache = self._step_alone(broken, row, already_settled.get(row))
                if cache is not None:
                    self._decoder.admit(Reading(row, cache))
                settled.append((row, step))
            except Exception:
                self._fail(self._running.pop(row))
        return settled

    def _step_alone(
        self, broken: Decoder, row: Row, step: Step | None
    ) -> tuple[Step, RowCache | None]:
        """Return what a sequence of a failed step settled, or settles alone.

        Returns:
            The step, and the sequence's keys and values; None in their place if it has ended.
        """
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
