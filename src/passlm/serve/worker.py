"""The one thread that owns the model; others hand it texts and take them back.

Everything public here may be called from any thread. What the thread does with the texts is left
to `scheduler.py`, requests and answers of the network to `app.py`.
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

_RELEASE_SECONDS = 2.0  # between two times that freed memory is given back under load

_log = logging.getLogger(__name__)


def model_thread() -> ThreadPoolExecutor:
    """A thread for a model to be loaded and decoded in."""
    return ThreadPoolExecutor(1, "passlm-worker")


class Worker:
    """Decodes texts that join and leave while others run.

    Args:
        lm: model, tokenizer and look-ahead rows; nothing else may use them any more.
        settings: how much it takes on.
        thread: an executor of one thread, which is the worker's from `start` on: that in which the
            model was loaded. OpenMP keeps a team of threads for each thread that ever computed, and
            with two teams on all cores GNU's lets both sleep at every step of a pass, which then
            takes twice as long. None makes one.
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
        self._deadline: float | None = None  # of the texts under way, once nothing more is taken
        self._finished = True
        self._thread = model_thread() if thread is None else thread
        self._running: Future[None] | None = None
        self._memory_released = time.monotonic()

    @property
    def max_context(self) -> int:
        """Tokens that a text may have, prompt and answer."""
        return self._scheduler.max_context

    def start(self) -> None:
        """Begin: the thread gets ready first, see `State.ready`, and takes texts meanwhile."""
        self._running = self._thread.submit(self._run)

    def submit(self, sequences: Sequence[SequenceRequest], deliver: EventCallback) -> list[Job]:
        """Take on the texts of one request, all or none.

        Args:
            sequences: the texts.
            deliver: takes their events, see `Deliver`.

        Raises:
            PromptError: a prompt is empty, holds unknown ids, or is too long to be answered.
            QueueFullError: too many wait already.
            ClosedError: the worker is going down, or down.
        """
        jobs = [Job(sequence, index, deliver) for index, sequence in enumerate(sequences)]
        for sequence in sequences:
            self._check(sequence)
        with self._condition:
            if self._deadline is not None or not self._alive:
                raise ClosedError("the server is shutting down: try another one")
            self._check_queue(len(jobs))
            self._inbox += jobs
            self._condition.notify()
        return jobs

    def cancel(self, jobs: Iterable[Job]) -> None:
        """End texts before their next step; those that are over stay as they are."""
        with self._condition:
            self._cancelled += jobs
            self._condition.notify()

    def state(self) -> WorkerState:
        """How busy it is."""
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
        """Take nothing more, finish what is under way, and end.

        Args:
            grace: seconds after which texts are ended where they are.

        Returns:
            Whether all were finished.
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
        """Whether a prompt can be answered at all."""
        limit, count = min(self.max_context, self._scheduler.max_cache), len(sequence.prompt)
        if not count:
            raise PromptError("the prompt is empty: give at least one token")
        if count >= limit:
            raise PromptError(
                f"the prompt has {count} tokens and a text may have {limit} with its answer: "
                "shorten the prompt"
            )
        vocabulary = self.lm.target.vocabulary
        unknown = next((t for t in sequence.prompt if not 0 <= t < vocabulary), None)
        if unknown is not None:
            raise PromptError(
                f"the prompt holds token id {unknown}, but the model knows 0 to {vocabulary - 1}"
            )

    def _check_queue(self, count: int) -> None:
        """Whether so many more may wait; those that find a place at once do not wait."""
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
        """Let those go that are not wanted any more, and take a step with the others."""
        for job in cancelled:
            self._scheduler.cancel(job)
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._finished = self._finished and not self._scheduler.busy
            self._scheduler.cancel_all()
        self._scheduler.tick()
        self._release_memory()

    def _release_memory(self) -> None:
        """Give freed memory back: now and then, and when there is nothing left to do."""
        now = time.monotonic()
        if now - self._memory_released > _RELEASE_SECONDS or not self._scheduler.busy:
            self._memory_released = now
            release_free_memory()

    def _wait_for_work(self) -> bool:
        """Wait for something to do; False once there is nothing and will be nothing."""
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
        """Do something; a fault that nobody can be blamed for ends all texts, not the server."""
        try:
            work()
        except Exception:
            _log.exception("the worker met a fault: it ends all texts and begins anew")
            self._scheduler.fail_all()
