"""The server's scheduler and worker: texts that come and go, each as if it were alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pytest
import torch
from byte_model import CONTEXT, byte_generator

from passlm.decoding.decoder import PromptError
from passlm.generate import Generator, Options
from passlm.outputs import Output
from passlm.serve.prefix_cache import MIN_PREFIX_TOKENS, PrefixCache
from passlm.serve.protocol import (
    ClosedError,
    Event,
    Failed,
    Job,
    QueueFullError,
    SequenceOutput,
    SequenceRequest,
    WorkerSettings,
)
from passlm.serve.scheduler import Scheduler
from passlm.serve.settings import SettingsError
from passlm.serve.worker import Worker

SETTINGS = WorkerSettings(max_batch=3, prefill_chunk=8)
LONG = "a prompt that takes several chunks to be read, " * 2


@pytest.fixture(scope="module")
def lm() -> Generator:
    return byte_generator()


@dataclass
class Told:
    """Collects the events of one request's texts."""

    events: list[tuple[int, Event]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    texts: int = 1

    def __call__(self, index: int, event: Event) -> None:
        self.events.append((index, event))
        ended = [e for _, e in self.events if isinstance(e, Failed) or e.finish_reason]
        if len(ended) == self.texts:
            self.over.set()

    def pieces(self, index: int = 0) -> list[SequenceOutput]:
        return [e for i, e in self.events if i == index and isinstance(e, SequenceOutput)]

    def ids(self, index: int = 0) -> tuple[int, ...]:
        return tuple(t.id for piece in self.pieces(index) for t in piece.tokens)

    def text(self, index: int = 0) -> str:
        return "".join(t.text for piece in self.pieces(index) for t in piece.tokens)

    def reason(self, index: int = 0) -> str | None:
        last = [e for i, e in self.events if i == index][-1]
        return "failed" if isinstance(last, Failed) else last.finish_reason


def ask(lm: Generator, prompt: str, logprobs: int | None = None, **options: Any) -> SequenceRequest:
    given = {"max_new_tokens": 20, **options}
    return SequenceRequest(tuple(lm.encode(prompt)), Options.of(lm.look_ahead, given), logprobs)


def add(scheduler: Scheduler, asked: SequenceRequest) -> tuple[Job, Told]:
    told = Told()
    job = Job(asked, 0, told)
    scheduler.add(job)
    return job, told


def drain(scheduler: Scheduler) -> None:
    for _ in range(1000):
        if not scheduler.busy:
            return
        scheduler.tick()
    raise AssertionError("the texts do not end")


REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("def f(x):", {}),
    (LONG, {"method": "two-pass", "max_new_tokens": 30}),
    ("once", {"temperature": 0.9, "seed": 5, "ignore_eos": True}),
    ("ab ab ab ab", {"method": "one-pass", "temperature": 1.1, "seed": 2, "stop": ("a", "é")}),
    ("x", {"temperature": 0.8, "seed": 9, "judge": "rejection", "ignore_eos": True}),
    ("import os", {"method": "ar", "presence_penalty": 1.0, "frequency_penalty": 0.5}),
]


def test_each_text_is_what_it_is_alone(lm: Generator) -> None:
    """Catches texts that depend on when they joined, on their neighbours or on what was read for
    others: greedy and sampled, under either judge, by every method, joining while others run."""
    alone = [lm.generate(prompt, **{"max_new_tokens": 20, **o})[0] for prompt, o in REQUESTS]
    scheduler = Scheduler(lm, SETTINGS)
    told = []
    for prompt, options in REQUESTS * 2:
        told.append(add(scheduler, ask(lm, prompt, **options))[1])
        scheduler.tick()
        scheduler.tick()
    drain(scheduler)
    for one, expected in zip(told, alone * 2, strict=True):
        assert (one.ids(), one.text()) == (expected.tokens, expected.text)
        assert one.reason() == expected.finish_reason
    assert scheduler.running == scheduler.waiting == scheduler.faults == 0


def test_counts_are_those_of_a_text_alone(lm: Generator) -> None:
    """Catches passes counted for neighbours, and positions that disagree with the counts."""
    [alone] = lm.generate("def f(x):", method="one-pass", max_new_tokens=30)
    scheduler = Scheduler(lm, SETTINGS)
    job, told = add(scheduler, ask(lm, "def f(x):", method="one-pass", max_new_tokens=30))
    add(scheduler, ask(lm, "other"))
    drain(scheduler)
    for name in ("tokens", "passes", "accepted_by_position", "judged_by_position"):
        assert getattr(job.stats, name) == getattr(alone.stats, name)
    places = [t.position for piece in told.pieces() for t in piece.tokens]
    accepted = [places.count(1 + place) for place in range(len(job.stats.accepted_by_position))]
    assert accepted == job.stats.accepted_by_position
    assert 0 < job.stats.decode_seconds <= scheduler.pass_seconds


def test_a_long_prompt_stops_nobody(lm: Generator) -> None:
    """Catches a prompt read in one go: others must get tokens between its chunks."""
    scheduler = Scheduler(lm, SETTINGS)
    _, short = add(scheduler, ask(lm, "x", method="ar", ignore_eos=True, max_new_tokens=60))
    scheduler.tick()
    long_job, _ = add(scheduler, ask(lm, LONG))
    chunks = -(-(len(long_job.request.prompt) - 1) // SETTINGS.prefill_chunk)
    before = len(short.pieces())
    for _ in range(chunks - 1):
        scheduler.tick()
        assert scheduler.running == 1
    assert chunks > 5
    assert len(short.pieces()) == before + chunks - 1
    scheduler.tick()
    assert scheduler.running == 2


def test_texts_wait_for_a_place_and_for_room_in_order(lm: Generator) -> None:
    """Catches a batch or a cache over its bound, and a small text that overtakes a large one."""
    settings = replace(SETTINGS, max_batch=2, max_cache=100)
    scheduler = Scheduler(lm, settings)
    sequences = [ask(lm, "x" * size, ignore_eos=True) for size in (30, 60, 10, 10)]
    told = [add(scheduler, asked)[1] for asked in sequences]
    most = 0
    while scheduler.busy:
        scheduler.tick()
        most = max(most, scheduler.running)
        assert scheduler.cached_tokens <= 100
        begun = [bool(one.events) for one in told]
        assert begun == sorted(begun, reverse=True)
    assert most == 2
    assert [one.reason() for one in told] == ["length"] * 4


def test_remembered_texts_give_way_to_the_room_that_the_batch_has(lm: Generator) -> None:
    """Catches memory over its bound: each text of the batch has as many slots as the longest."""
    settings = replace(SETTINGS, max_batch=2, max_cache=560)
    scheduler = Scheduler(lm, settings)
    for first in "ab":
        add(scheduler, ask(lm, first * 150, ignore_eos=True, max_new_tokens=10))
        drain(scheduler)
    assert scheduler.cached_tokens > 300
    for first in "de":  # 2 x 128 slots, then 2 x 256
        add(scheduler, ask(lm, first * 60, ignore_eos=True, max_new_tokens=100))
    remembered = []
    while scheduler.busy:
        scheduler.tick()
        remembered.append(scheduler._prefix_cache.tokens)
        assert not remembered[-1] or scheduler._decoder.slots + remembered[-1] <= 560
    assert 0 in remembered
    assert max(remembered) > 100


@pytest.mark.parametrize("ticks", [0, 1, 3, 20])
def test_cancelled_texts_leave_at_once(lm: Generator, ticks: int) -> None:
    """Catches a text that goes on when nobody listens: waiting, being read, or running."""
    scheduler = Scheduler(lm, replace(SETTINGS, max_batch=1))
    add(scheduler, ask(lm, "x", ignore_eos=True, max_new_tokens=4))
    job, told = add(scheduler, ask(lm, LONG, ignore_eos=True, max_new_tokens=60, method="ar"))
    other, other_told = add(scheduler, ask(lm, "def f(x):"))
    for _ in range(ticks):
        scheduler.tick()
    scheduler.cancel(job)
    assert told.reason() == "cancelled"
    assert job not in [text.job for text in scheduler._sequences()]
    count = len(told.events)
    drain(scheduler)
    assert len(told.events) == count
    assert other_told.ids() == lm.generate("def f(x):")[0].tokens[:20]
    scheduler.cancel(other)  # over already: nothing happens
    assert other_told.reason() != "cancelled"


def test_a_chat_that_goes_on_reads_only_what_is_new(lm: Generator) -> None:
    """Catches a cache of another text, of one token too many, or none at all."""
    scheduler = Scheduler(lm, SETTINGS)
    first, told = add(scheduler, ask(lm, "a first question, long enough to remember"))
    drain(scheduler)
    further = "a first question, long enough to remember" + told.text() + " and more"
    job, again = add(scheduler, ask(lm, further))
    drain(scheduler)
    assert first.reused == 0
    assert job.reused >= len(first.request.prompt)
    assert again.ids() == byte_generator().generate(further, max_new_tokens=20)[0].tokens
    other, _ = add(scheduler, ask(lm, "something else that begins in another way"))
    drain(scheduler)
    assert other.reused == 0


def test_texts_of_one_prompt_read_it_once(lm: Generator) -> None:
    """Catches `n` choices that prefill the same prompt `n` times, or share more than that."""
    scheduler = Scheduler(lm, SETTINGS)
    sequences = [ask(lm, LONG, temperature=1.0, seed=seed, ignore_eos=True) for seed in range(3)]
    jobs, told = zip(*(add(scheduler, asked) for asked in sequences), strict=True)
    drain(scheduler)
    assert [job.reused for job in jobs] == [0] + [len(jobs[0].request.prompt) - 1] * 2
    alone = [lm.generate(LONG, temperature=1.0, seed=s, ignore_eos=True) for s in range(3)]
    assert [one.ids() for one in told] == [out[0].tokens[:20] for out in alone]


def test_remembered_texts_give_way() -> None:
    """Catches a memory that grows, forgets the wrong text, or keeps a text and its beginning."""
    lm = byte_generator()
    prefixes = PrefixCache()
    texts = [[first, *range(MIN_PREFIX_TOKENS)] for first in range(3)]
    for tokens in texts:
        prefixes.add(tokens, lm.target.prefill(tokens))
    assert prefixes.tokens == 3 * len(texts[0])
    longer = [*texts[0], 7, 8]
    prefixes.add(longer, lm.target.prefill(longer))
    assert prefixes.tokens == 3 * len(texts[0]) + 2
    assert prefixes.find(texts[1])[0] == len(texts[1])  # used: now the last to go
    prefixes.evict_to(2 * len(texts[0]) + 2)
    assert prefixes.find([*texts[2], 5])[0] == 0
    assert prefixes.find([*texts[1], 5])[0] == len(texts[1])
    assert prefixes.find([1, 99])[0] == 1
    prefixes.add([1, 2], lm.target.prefill([1, 2]))
    assert prefixes.find([1, 2])[0] == 1, "too short to be worth keeping"


class Broken:
    """A model's pass that raises where it is told to."""

    def __init__(self, lm: Generator, raises: Callable[[Sequence[Any]], bool]) -> None:
        self.run = lm.target.run
        self.raises = raises

    def __call__(self, cache: Any, rows: Sequence[Any], look_ahead: Any) -> Any:
        if self.raises(rows):
            raise RuntimeError("a pass that fails")
        return self.run(cache, rows, look_ahead)


def started(lm: Generator) -> tuple[Scheduler, list[Told], list[Output]]:
    """Three texts in the batch, and what each is alone."""
    prompts = ("def f(x):", "once", "ab ab ab")
    alone = [lm.generate(p, max_new_tokens=20, method="one-pass")[0] for p in prompts]
    scheduler = Scheduler(lm, SETTINGS)
    told = [add(scheduler, ask(lm, p, method="one-pass"))[1] for p in prompts]
    for _ in range(5):
        scheduler.tick()
    assert scheduler.running == 3
    return scheduler, told, alone


def test_a_step_that_fails_once_harms_nobody(
    lm: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a batch lost to a passing fault, and tokens lost or doubled on the way."""
    scheduler, told, alone = started(lm)
    left = [True]
    monkeypatch.setattr(lm.target, "run", Broken(lm, lambda rows: bool(left) and left.pop()))
    drain(scheduler)
    assert scheduler.faults == 1
    assert [one.ids() for one in told] == [out.tokens for out in alone]


def test_a_text_that_makes_steps_fail_ends_alone(
    lm: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches one text's fault ending its neighbours."""
    scheduler, told, alone = started(lm)
    culprit = list(scheduler._running)[1]

    def raises(rows: Sequence[Any]) -> bool:
        return any(row.tokens[0] == culprit.tokens[-1] for row in rows) and culprit.room > 0

    other_roots = [row.tokens[-1] for row in scheduler._running if row is not culprit]
    assert culprit.tokens[-1] not in other_roots
    monkeypatch.setattr(lm.target, "run", Broken(lm, raises))
    scheduler.tick()
    monkeypatch.undo()
    drain(scheduler)
    assert told[1].reason() == "failed"
    for index in (0, 2):
        assert told[index].ids() == alone[index].tokens


def test_what_settled_before_a_fault_is_told(
    lm: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches tokens lost when the step fails after they were settled, as drafters may make it."""
    scheduler, told, alone = started(lm)
    decoder = scheduler._decoder

    def fails(*_: object) -> None:
        raise RuntimeError("drafting that fails")

    monkeypatch.setattr(decoder, "_remember", fails)
    drain(scheduler)
    assert scheduler.faults == 1
    assert [one.ids() for one in told] == [out.tokens for out in alone]
    assert [one.reason() for one in told] == [out.finish_reason for out in alone]


def test_a_listener_that_raises_harms_nobody(lm: Generator) -> None:
    """Catches a web side's fault reaching the worker."""
    scheduler = Scheduler(lm, SETTINGS)

    def deliver(index: int, event: Event) -> None:
        raise RuntimeError("a loop that is closed")

    scheduler.add(Job(ask(lm, "x"), 0, deliver))
    _, told = add(scheduler, ask(lm, "def f(x):"))
    drain(scheduler)
    assert told.reason() in ("eos", "length")


def test_logprobs_are_the_models_own(lm: Generator) -> None:
    """Catches log-probabilities after temperature or penalties, of the wrong row or token."""
    scheduler = Scheduler(lm, SETTINGS)
    options = {"temperature": 0.7, "seed": 3, "method": "one-pass", "ignore_eos": True}
    asked = ask(lm, "def f(x):", 3, **options, frequency_penalty=1.0)
    _, told = add(scheduler, asked)
    _, without = add(scheduler, ask(lm, "def f(x):"))
    drain(scheduler)
    text = torch.tensor([[*asked.prompt, *told.ids()]])
    logits = lm.target.model(text).logits[0, len(asked.prompt) - 1 : -1]
    truth = logits.log_softmax(-1)
    tokens = [t for piece in told.pieces() for t in piece.tokens]
    for row, token in enumerate(tokens):
        assert token.logprob == pytest.approx(float(truth[row, token.id]), abs=1e-4)
        best = truth[row].topk(3)
        assert [i for i, _ in token.top] == best.indices.tolist()
        assert [v for _, v in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert all(t.logprob is None for piece in without.pieces() for t in piece.tokens)


def test_texts_end_when_their_time_is_over(lm: Generator) -> None:
    """Catches a text that holds its place for ever: waiting or running, it ends and says why."""
    scheduler = Scheduler(lm, replace(SETTINGS, max_batch=1, max_seconds=1e-9))
    _, first = add(scheduler, ask(lm, "x", ignore_eos=True))
    drain(scheduler)
    assert (first.ids(), first.reason()) == ((), "waited")
    scheduler = Scheduler(lm, replace(SETTINGS, max_seconds=1000.0))
    _, running = add(scheduler, ask(lm, "x", ignore_eos=True, max_new_tokens=50))
    scheduler.tick()
    scheduler.tick()
    for text in scheduler._running.values():
        text.deadline = time.monotonic() - 1
    drain(scheduler)
    assert running.reason() == "time"
    assert 0 < len(running.ids()) < 50


def test_an_answer_that_meets_the_context_says_so(lm: Generator) -> None:
    """Catches a text that outgrows its bound, and 'length' where the user asked for more."""
    scheduler = Scheduler(lm, replace(SETTINGS, max_context=40))
    job, told = add(scheduler, ask(lm, "x" * 30, ignore_eos=True, max_new_tokens=30))
    _, exact = add(scheduler, ask(lm, "x" * 30, ignore_eos=True, max_new_tokens=10))
    drain(scheduler)
    assert (len(told.ids()), told.reason()) == (10, "context")
    assert (len(exact.ids()), exact.reason()) == (10, "length")
    assert job.stats.prompt_tokens == 30


def test_an_answer_that_meets_the_cache_says_so(lm: Generator) -> None:
    """Catches a text that waits for more room than there is, and all others behind it."""
    scheduler = Scheduler(lm, replace(SETTINGS, max_cache=24))
    assert scheduler.max_context == 24
    _, told = add(scheduler, ask(lm, "x" * 10, ignore_eos=True, max_new_tokens=40))
    drain(scheduler)
    assert (len(told.ids()), told.reason()) == (14, "context")


@pytest.mark.parametrize("name", [field.name for field in fields(WorkerSettings)])
def test_limits_that_leave_no_room_are_refused(name: str) -> None:
    """Catches a server that starts and then answers nobody."""
    with pytest.raises(SettingsError, match=name.replace("_", "-")):
        replace(SETTINGS, **{name: -1})
    if name not in ("max_cache", "max_waiting"):
        with pytest.raises(SettingsError, match="more than 0"):
            replace(SETTINGS, **{name: 0})


def test_a_text_that_cannot_be_remembered_is_whole(
    lm: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a lack of memory, met when a text is over, that fails it or others."""

    def full(*given: Any) -> Any:
        raise MemoryError

    scheduler = Scheduler(lm, SETTINGS)
    monkeypatch.setattr(scheduler._decoder, "copied", full)
    told = [add(scheduler, ask(lm, prompt))[1] for prompt in (LONG, "def f(x):")]
    drain(scheduler)
    expected = [lm.generate(p, max_new_tokens=20)[0].tokens for p in (LONG, "def f(x):")]
    assert [one.ids() for one in told] == expected
    assert scheduler.faults == 0


@pytest.fixture
def worker(lm: Generator) -> Any:
    made = Worker(lm, replace(SETTINGS, max_waiting=2))
    made.start()
    yield made
    made.stop(0)


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(2000):
        if holds():
            return
        time.sleep(0.005)
    raise AssertionError("it does not come")


def test_the_worker_serves_and_ends(lm: Generator) -> None:
    """Catches a worker that loses texts of a request, mixes them, or does not end."""
    alone = [lm.generate("def f(x):", max_new_tokens=20, temperature=1.0, seed=s) for s in (1, 2)]
    worker = Worker(lm, SETTINGS)
    worker.start()
    told = Told(texts=2)
    sequences = [ask(lm, "def f(x):", temperature=1.0, seed=seed) for seed in (1, 2)]
    worker.submit(sequences, told)
    assert worker.stop(grace=60)
    assert [told.ids(index) for index in (0, 1)] == [out[0].tokens for out in alone]
    assert not worker.state().ready
    with pytest.raises(ClosedError, match="shutting down"):
        worker.submit(sequences, told)


def test_a_fault_while_a_text_is_cancelled_ends_no_worker(
    lm: Generator, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a thread that dies, so that everybody waits for ever."""
    cancel = Scheduler.cancel

    def broken(scheduler: Scheduler, job: Job) -> None:
        monkeypatch.setattr(Scheduler, "cancel", cancel)
        raise MemoryError

    monkeypatch.setattr(Scheduler, "cancel", broken)
    told, other = Told(), Told()
    jobs = worker.submit([ask(lm, "x", ignore_eos=True, max_new_tokens=60)], told)
    worker.cancel(jobs)
    assert told.over.wait(60)
    assert told.reason() == "failed"
    worker.submit([ask(lm, "x")], other)
    assert other.over.wait(60)
    assert other.ids() == lm.generate("x", max_new_tokens=20)[0].tokens


def test_a_worker_gives_memory_back_when_it_is_done(
    lm: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches memory that is given back at the next request only, or never."""
    worker = Worker(lm, SETTINGS)
    given: list[bool] = []
    monkeypatch.setattr(
        "passlm.serve.worker.release_free_memory", lambda: given.append(worker._scheduler.busy)
    )
    worker.start()
    worker.submit([ask(lm, "def f(x):")], Told())
    assert worker.stop(grace=60)
    assert given
    assert not given[-1]


def test_a_worker_without_grace_ends_texts_where_they_are(worker: Worker, lm: Generator) -> None:
    """Catches a shutdown that waits for texts longer than it may, or leaves listeners waiting."""
    told = Told()
    worker.submit([ask(lm, "x", ignore_eos=True, max_new_tokens=150)], told)
    wait_until(lambda: len(told.events) > 1)
    assert not worker.stop(grace=0)
    assert told.over.is_set()
    assert told.reason() == "cancelled"


def test_the_queue_has_an_end(worker: Worker, lm: Generator) -> None:
    """Catches a queue without a bound, a refusal that takes some texts all the same, and places
    that are not given back."""
    wait_until(lambda: worker.state().ready)
    long = [ask(lm, "x", ignore_eos=True, max_new_tokens=150, method="ar")]
    told = [Told() for _ in range(5)]
    jobs = [job for one in told for job in worker.submit(long, one)]
    with pytest.raises(QueueFullError) as refused:
        worker.submit(long, Told())
    assert refused.value.retry_after >= 1
    worker.cancel(jobs)
    wait_until(lambda: all(one.over.is_set() for one in told))
    many = Told(texts=6)
    with pytest.raises(QueueFullError):
        worker.submit(long * 6, many)
    assert many.events == []
    five = Told(texts=5)
    worker.cancel(worker.submit(long * 5, five))
    assert five.over.wait(10)
    assert worker.state().running == worker.state().waiting == 0


@pytest.mark.parametrize(
    ("prompt", "names"),
    [((), "empty"), ((9999,), "9999"), ((1,) * CONTEXT, "shorten"), ((-1,), "-1")],
)
def test_prompts_that_cannot_be_answered_are_refused(
    worker: Worker, lm: Generator, prompt: tuple[int, ...], names: str
) -> None:
    """Catches a prompt that would fail in the worker, where nobody is told what to mend."""
    asked = replace(ask(lm, "x"), prompt=prompt)
    with pytest.raises(PromptError, match=names):
        worker.submit([ask(lm, "x"), asked], Told())


def test_a_fault_of_the_scheduler_ends_texts_and_not_the_worker(
    worker: Worker, lm: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a dead thread that leaves every later request waiting."""
    scheduler = worker._scheduler
    tick = scheduler.tick

    def fails() -> None:
        monkeypatch.setattr(scheduler, "tick", tick)
        raise RuntimeError("a bug")

    monkeypatch.setattr(scheduler, "tick", fails)
    first, second = Told(), Told()
    worker.submit([ask(lm, "x")], first)
    assert first.over.wait(10)
    assert first.reason() == "failed"
    worker.submit([ask(lm, "x")], second)
    assert second.over.wait(10)
    assert second.reason() != "failed"
