"""The thread that owns the model; other threads submit and cancel sequences.

All public methods may be called from any thread. Scheduling is left to `scheduler.py`, HTTP to
`app.py`.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from passlm.decoding.decoder import PromptError
from passlm.generate import Generator
from passlm.serve.memory import release_free_memory
from passlm.serve.protocol import (
    ClosedError,
    EventCallback,
    Job,
    QueueFullError,
    SequenceRequest,
    WorkerSettings,
    WorkerState,
)
from passlm.serve.scheduler import Scheduler

_RELEASE_SECONDS = 2.0  # interval of returning freed memory to the system under load

_log = logging.getLogger(__name__)


def model_thread() -> ThreadPoolExecutor:
    """Create an executor with one thread, in which a model is loaded and run."""
    return ThreadPoolExecutor(1, "passlm-worker")


class Worker:
    """Decodes sequences in a batch that others join and leave (continuous batching).

    Args:
        lm: model, tokenizer and look-ahead rows; from now on only the worker may use them.
        settings: limits.
        thread: executor with one thread, the one in which the model was loaded; it belongs to the
            worker from `start` on. None creates one. A second computing thread would make passes
            take twice as long: OpenMP keeps a team of threads for each thread that ever computed,
            and with two teams on all cores GNU's implementation lets both sleep at every step of a
            pass.
    """

    def __init__(
        self, lm: Generator, settings: WorkerSettings, thread: ThreadPoolExecutor | None = None
    ) -> None:
        self.lm = lm
        self.settings = settings
        self._scheduler = Scheduler(lm, settings)
        self._condition = threading.Condition()
        self._inbox: list[Job] = []
        self._cancelled: list[Job] = []
        self._ready = False
        self._deadline: float | None = None  # of running sequences, once `stop` was called
        self._finished = True
        self._thread = model_thread() if thread is None else thread
        self._running: Future[None] | None = None
        self._memory_released = time.monotonic()

    @property
    def max_context(self) -> int:
        """Maximum length of a sequence, prompt and answer, in tokens."""
        return self._scheduler.max_context

    def start(self) -> None:
        """Start the thread.

        It warms up first, see `WorkerState.ready`; sequences are accepted meanwhile.
        """
        self._running = self._thread.submit(self._run)

    def submit(self, sequences: Sequence[SequenceRequest], deliver: EventCallback) -> list[Job]:
        """Accept the sequences of one request, all or none.

        Args:
            sequences: the sequences.
            deliver: receives their events, see `EventCallback`.

        Raises:
            PromptError: a prompt is empty, contains unknown ids, or leaves no room for an answer.
            QueueFullError: too many sequences wait already.
            ClosedError: the worker is stopping or has stopped.
        """
        jobs = [Job(sequence, index, deliver) for index, sequence in enumerate(sequences)]
        for sequence in sequences:
            self._check(sequence)
        with self._condition:
            if self._deadline is not None or not self._alive:
                raise ClosedError("the server is shutting down: send the request again later")
            self._check_queue(len(jobs))
            self._inbox += jobs
            self._condition.notify()
        return jobs

    def cancel(self, jobs: Iterable[Job]) -> None:
        """End sequences before their next step; ended ones are ignored."""
        with self._condition:
            self._cancelled += jobs
            self._condition.notify()

    def state(self) -> WorkerState:
        """Return the current load."""
        scheduler = self._scheduler
        with self._condition:
            waiting = len(self._inbox) + scheduler.waiting
        return WorkerState(
            ready=self._ready and self._deadline is None and self._alive,
            running=scheduler.running,
            waiting=waiting,
            cached_tokens=scheduler.cached_tokens,
            max_cache=scheduler.max_cache,
            passes=scheduler.passes,
            pass_seconds=scheduler.pass_seconds,
            faults=scheduler.faults,
        )

    def stop(self, grace: float) -> bool:
        """Accept no further sequences, finish the accepted ones, and end the thread.

        Args:
            grace: seconds after which unfinished sequences are cut off.

        Returns:
            True if all sequences finished.
        """
        with self._condition:
            if self._deadline is None:
                self._deadline = time.monotonic() + grace
            self._condition.notify()
        if self._running is not None:
            self._running.result()
        self._thread.shutdown()
        return self._finished

    @property
    def _alive(self) -> bool:
        return self._running is not None and not self._running.done()

    def _check(self, sequence: SequenceRequest) -> None:
        """Raise `PromptError` if a prompt cannot be answered."""
        limit, count = min(self.max_context, self._scheduler.max_cache), len(sequence.prompt)
        if not count:
            raise PromptError("the prompt is empty: give at least one token")
        if count >= limit:
            raise PromptError(
                f"the prompt has {count} tokens, but prompt and answer may have {limit} together: "
                "shorten the prompt"
            )
        vocabulary = self.lm.target.vocabulary
        unknown = next((t for t in sequence.prompt if not 0 <= t < vocabulary), None)
        if unknown is not None:
            raise PromptError(
                f"the prompt contains token id {unknown}: the model has ids 0 to {vocabulary - 1}"
            )

    def _check_queue(self, count: int) -> None:
        """Raise `QueueFullError` if `count` more sequences fit neither queue nor batch."""
        places = max(0, self.settings.max_batch - self._scheduler.running)
        waiting = len(self._inbox) + self._scheduler.waiting
        if waiting + count > self.settings.max_waiting + places:
            rounds = waiting / self.settings.max_batch
            raise QueueFullError(max(1, math.ceil(rounds * self._scheduler.mean_sequence_seconds)))

    def _run(self) -> None:
        self._run_safely(self._scheduler.warm)
        self._ready = True
        while self._wait_for_work():
            inbox, cancelled = self._take_inbox()
            for job in inbox:
                self._scheduler.add(job)
            self._run_safely(partial(self._tick, cancelled))
        self._ready = False

    def _tick(self, cancelled: Iterable[Job]) -> None:
        """Cancel sequences, and run a step of the others."""
        for job in cancelled:
            self._scheduler.cancel(job)
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._finished = self._finished and not self._scheduler.busy
            self._scheduler.cancel_all()
        self._scheduler.tick()
        self._release_memory()

    def _release_memory(self) -> None:
        """Return freed memory to the system, at intervals and when idle."""
        now = time.monotonic()
        if now - self._memory_released > _RELEASE_SECONDS or not self._scheduler.busy:
            self._memory_released = now
            release_free_memory()

    def _wait_for_work(self) -> bool:
        """Wait for work; return False if the worker is stopping and has none."""
        with self._condition:
            while not (self._inbox or self._cancelled or self._scheduler.busy):
                if self._deadline is not None:
                    return False
                self._condition.wait()
        return True

    def _take_inbox(self) -> tuple[list[Job], list[Job]]:
        with self._condition:
            taken = self._inbox, self._cancelled
            self._inbox, self._cancelled = [], []
        return taken

    def _run_safely(self, work: Callable[[], None]) -> None:
        """Call a function; an exception ends all sequences, but not the server."""
        try:
            work()
        except Exception:
            _log.exception("internal error in the worker: it ends all sequences and starts afresh")
            self._scheduler.fail_all()
