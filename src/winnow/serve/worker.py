"""The thread that drives the engines: admission, steps, preemption, and who hears of it.

The engine is synchronous and belongs to this thread alone. Other threads hand in jobs and
cancellations under one lock; the thread looks at them between two steps.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from winnow.engine.engine import Engine, Event
from winnow.engine.request import Stats
from winnow.serve.errors import ApiError
from winnow.serve.fairness import FairQueue
from winnow.serve.job import Ended, Failed, Job, Piece
from winnow.serve.memory import Memory
from winnow.serve.scratch import Scratch
from winnow.store.swap import Swap

__all__ = ["Counters", "Worker"]

_log = logging.getLogger("winnow.serve")

# A waiting client may take a slot from one that holds more than its share, but not at every turn.
_SLOT_PATIENCE = 1.0
_PUBLISH_EVERY = 0.2  # seconds
_RECENT = 50  # ended requests that the live page shows


class Counters:
    """What happened since the start; read by the metrics from other threads (single assignments)."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.computed_tokens = 0
        self.reused_tokens = 0
        self.approximate_tokens = 0
        self.generated_tokens = 0
        self.preemptions = 0
        self.steps = 0
        self.ended: dict[str, int] = {}


class Worker:
    """Runs jobs on one engine per recipe.

    Parameters
    ----------
    engines : mapping of str to Engine
        By name of the recipe; they share one model.
    kv_memory : int
        Bytes that sequences and pools may take together.
    max_num_seqs, max_queue : int
        Jobs that run, and that wait, at a time.
    swap_space : int
        Bytes of host memory, beside ``kv_memory``, where preempted sequences go first.
    swap_dir : Path or None
        Where they go when that is full.
    on_end : callable or None
        Called from the worker's thread with every job that has ended.
    on_stop : callable or None
        Called after the thread has ended.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        *,
        kv_memory: int,
        max_num_seqs: int,
        max_queue: int,
        swap_space: int = 0,
        swap_dir: Path | None = None,
        on_end: Callable[[Job], None] | None = None,
        on_stop: Callable[[], None] | None = None,
    ) -> None:
        self.engines = dict(engines)
        self._scratch = Scratch(swap_dir)
        self.swap = Swap(self._scratch.path, swap_space)
        self.memory = Memory(kv_memory, list(self.engines.values()), self.swap)
        self.counters = Counters()
        self.recent: deque[Job] = deque(maxlen=_RECENT)
        self._max_num_seqs = max_num_seqs
        self._max_queue = max_queue
        self._on_end = on_end
        self._on_stop = on_stop
        self._queue: FairQueue[Job] = FairQueue()
        self._running: list[Job] = []  # in order of admission
        self._by_result: dict[int, Job] = {}
        self._wake = threading.Condition()
        self._stopping = False
        self._errands: deque[Callable[[], None]] = deque()
        self._slot_taken = 0.0
        self._speed = 0.0  # tokens per second, computed and drawn, as of late
        self._thread = threading.Thread(target=self._main, name="winnow-worker", daemon=True)
        self.failure: BaseException | None = None
        self.snapshot: dict[str, Any] = {"kv_bytes": {}, "kv_elsewhere": {}, "swapped": 0, "steps": 0}
        self._published = 0.0

    # ------------------------------------------------------------------ from any thread

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs and takes jobs."""
        return self._thread.is_alive() and not self._stopping

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises
        ------
        ApiError
            400 where it can never fit, 429 where the queue is full, 503 while shutting down.
        """
        engine = self.engines[job.recipe]
        answers = job.params.n * engine.bytes_of(job.params.max_new_tokens)
        # Chunks are in use until the prompt is read, answers grow from then on.
        most = engine.bytes_of(len(job.tokens)) + max(answers, engine.bytes_of_division(job.division))
        if most > self.memory.limit:
            raise ApiError(
                400,
                f"this request may need {most} bytes of KV memory and the server has {self.memory.limit}; "
                "shorten the prompt, ask for fewer tokens or fewer samples",
                code="context_length_exceeded",
            )
        turned_away = None
        with self._wake:
            if not self.alive:
                raise _stopped()
            if len(self._queue) >= self._max_queue:
                turned_away = self._queue.crowd(job.client)
                if turned_away is None or turned_away.state == "suspended":
                    raise self._full()
                self._queue.remove(turned_away)
            self._queue.push(job)
            self._wake.notify()
        if turned_away is not None:
            self._fail(turned_away, self._full())

    def cancel(self, job: Job) -> None:
        """End a job and free what it holds; nothing where it has ended already."""
        with self._wake:
            job.cancelled = True
            self._wake.notify()

    def errand(self, act: Callable[[], None]) -> None:
        """Have something done by the worker's thread, between two steps.

        Raises
        ------
        ApiError
            Nobody is there to do it.
        """
        with self._wake:
            if not self.alive:
                raise _stopped()
            self._errands.append(act)
            self._wake.notify()

    def stop(self, timeout: float = 30.0) -> None:
        """End every job and the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)
        if self._on_stop is not None:
            self._on_stop()
        self._scratch.close()

    def waiting(self) -> list[Job]:
        """Jobs that wait, preempted ones included."""
        with self._wake:
            return list(self._queue)

    def running(self) -> list[Job]:
        """Jobs that run."""
        return list(self._running)

    def recent_jobs(self) -> list[Job]:
        """Jobs that ended last, the latest first."""
        with self._wake:
            return list(self.recent)

    def forget(self) -> None:
        """Drop every reusable entry that nobody is using; call it as an errand."""
        self.memory.clear()
        self._publish()

    def retry_after(self) -> int:
        """Seconds until the queue has probably moved on."""
        with self._wake:
            tokens = sum(job.cost for job in self._queue)
        return max(1, min(60, round(tokens / self._speed))) if self._speed else 1

    # ------------------------------------------------------------------ the thread

    def _main(self) -> None:
        try:
            while True:
                with self._wake:
                    while not (self._stopping or self._running or self._errands or len(self._queue)):
                        self._publish()
                        self._wake.wait()
                    stopping, errands = self._stopping, list(self._errands)
                    self._errands.clear()
                for act in errands:
                    act()
                if stopping:
                    break
                self._reap()
                self._admit()
                self._step()
        except BaseException as error:
            self.failure = error
            _log.exception("the worker died")
        finally:
            self._stopping = True
            self._end_all()

    def _end_all(self) -> None:
        error = _stopped()
        for engine in self.engines.values():
            engine.abort()
        with self._wake:
            left = [*self._running, *self._queue]
            for job in left:
                self._queue.remove(job)
            self._running.clear()
            errands = list(self._errands)
            self._errands.clear()
        for job in left:
            self._fail(job, error)
        for act in errands:
            act()

    def _reap(self) -> None:
        """End jobs that were cancelled or took too long."""
        now = time.monotonic()
        with self._wake:
            over = [j for j in [*self._running, *self._queue] if j.cancelled or now > j.deadline]
            for job in over:
                self._queue.remove(job)
        for job in over:
            if job.result is not None:
                self.engines[job.recipe].cancel(job.result)
            if job.cancelled:
                self._fail(job, ApiError(499, "cancelled by the client"))
            else:
                self._fail(job, ApiError(408, "it took longer than the server allows; ask for less"))

    def _fail(self, job: Job, error: ApiError) -> None:
        self._leave(job, {408: "timeout", 429: "refused", 499: "cancelled"}.get(error.status, "error"))
        job.listen(Failed(error=error))

    def _leave(self, job: Job, outcome: str) -> None:
        if job in self._running:
            self._running.remove(job)
        if job.result is not None:
            self._by_result.pop(job.result.number, None)
            with self._wake:
                spent = job.result.stats.tokens_computed + job.generated
                job.state = "ended"
                self._queue.refund(job.client, job.cost - spent)
        job.state, job.outcome, job.ended_at = "ended", outcome, time.monotonic()
        self.counters.ended[outcome] = self.counters.ended.get(outcome, 0) + 1
        with self._wake:
            self.recent.appendleft(job)
        if self._on_end is not None:
            self._on_end(job)

    # ------------------------------------------------------------------ admission

    def _admit(self) -> None:
        while (job := self._next()) is not None:
            self._start(job)

    def _next(self) -> Job | None:
        """Take the job that may start now out of the queue."""
        with self._wake:
            candidates = list(self._queue.order())
        if candidates and len(self._running) >= self._max_num_seqs:
            self._make_way(candidates[0])
        for job in candidates:
            if len(self._running) >= self._max_num_seqs:
                return None
            if self._is_held_back(job):
                continue
            if not self._memory_for(job):
                # Nobody passes a job that waits for memory, or a long one would wait for ever.
                return None
            with self._wake:
                if self._queue.take(job):
                    return job
        return None

    def _memory_for(self, job: Job) -> bool:
        engine = self.engines[job.recipe]
        if job.state == "suspended":
            assert job.result is not None
            return self.memory.admits(engine.bytes_suspended(job.result) + engine.bytes_of(1))
        need = engine.bytes_of(len(job.tokens) - engine.reusable(job.tokens, job.salt) + 1)
        return self.memory.admits(need, engine.bytes_of_chunks(job.tokens, job.division, job.salt))

    def _is_held_back(self, job: Job) -> bool:
        """Whether most of a prompt is being computed just now by another job, whose entries it can take."""
        engine = self.engines[job.recipe]
        if engine.pool is None or job.state == "suspended":
            return False
        shared = max(
            (
                job.common(other)
                for other in self._running
                if other.prompting and (other.recipe, other.salt) == (job.recipe, job.salt)
            ),
            default=0,
        )
        if 2 * shared <= len(job.tokens):
            return False
        have = engine.reusable(job.tokens, job.salt)
        return 2 * (shared - have) > len(job.tokens) - have

    def _start(self, job: Job) -> None:
        engine = self.engines[job.recipe]
        job.started = job.started or time.monotonic()
        try:
            if job.result is None:
                job.result = job.submit(engine)
                self._by_result[job.result.number] = job
            else:
                engine.resume(job.result)
        except ValueError as error:
            _log.exception("a job could not start")
            if job.result is not None:
                engine.cancel(job.result)
            self._fail(job, ApiError(500 if job.result else 400, str(error)))
            return
        job.state = "running"
        self._running.append(job)

    # ------------------------------------------------------------------ preemption

    def _make_way(self, first: Job) -> None:
        """Take a slot from a client that holds more than its share, for one that holds none."""
        now = time.monotonic()
        held: dict[str, list[Job]] = {}
        for job in self._running:
            held.setdefault(job.client, []).append(job)
        if first.client in held or now - self._slot_taken < _SLOT_PATIENCE:
            return
        most = max(held.values(), key=len)
        victims = [job for job in most if not job.prompting]
        if len(most) > -(-self._max_num_seqs // (len(held) + 1)) and victims:
            self._slot_taken = now
            self._suspend(victims[-1])

    def _suspend(self, job: Job) -> None:
        assert job.result is not None
        try:
            self.engines[job.recipe].suspend(job.result, self.swap)
        except ValueError:
            # The swap is full and the disk too. Memory is needed all the same, so this one has to end.
            _log.exception("a preempted request could not be saved")
            self.engines[job.recipe].cancel(job.result)
            self._fail(job, ApiError(503, "out of KV memory and of disk; try again later", retry_after=5))
            return
        self._running.remove(job)
        job.state = "suspended"
        job.preemptions += 1
        self.counters.preemptions += 1
        _log.info("preempted", extra={"request": job.name, "client": job.client})
        with self._wake:
            self._queue.push(job)

    def _room_for_step(self) -> None:
        """Send the youngest jobs to the swap until the next step fits."""
        while not self.memory.step_fits():
            if len(self._running) <= 1:
                for job in list(self._running):
                    assert job.result is not None
                    self.engines[job.recipe].cancel(job.result)
                    self._fail(job, ApiError(503, "out of KV memory; ask for fewer tokens", retry_after=5))
                return
            self._suspend(self._running[-1])

    # ------------------------------------------------------------------ a step

    def _step(self) -> None:
        if not self._running:
            return
        self._room_for_step()
        begin, tokens = time.monotonic(), 0
        for engine in self.engines.values():
            if not engine.busy:
                continue
            try:
                tokens += engine.planned()
                events = engine.step()
            except Exception:
                _log.exception("a step failed")
                engine.abort()
                for job in [j for j in self._running if self.engines[j.recipe] is engine]:
                    self._fail(job, ApiError(500, "the engine failed on this batch; try again"))
                continue
            for event in events:
                self._deliver(event)
            self._end_read(engine)
        self.counters.steps += 1
        self.memory.held()
        if time.monotonic() - self._published > _PUBLISH_EVERY:
            self._publish()
        speed = tokens / max(time.monotonic() - begin, 1e-9)
        self._speed = speed if not self._speed else 0.9 * self._speed + 0.1 * speed

    def _publish(self) -> None:
        """Put what other threads may read where they read it."""
        self._published = time.monotonic()
        self.snapshot = {
            "kv_bytes": self.memory.by_kind(),
            "kv_elsewhere": self.memory.elsewhere(),
            "swapped": sum(engine.swapped() for engine in self.engines.values()),
            "steps": self.counters.steps,
        }

    def _deliver(self, event: Event) -> None:
        job = self._by_result.get(event.result.number)
        if job is None:
            return
        now = time.monotonic()
        if not job.first_token:
            job.first_token = now
            # Only now: a prompt in chunks finds what it reuses in its first step.
            self._count_prompt(job, event.result.stats)
        job.last_token = now
        self.counters.generated_tokens += 1
        sample = event.sample
        job.listen(
            Piece(
                index=sample.index,
                token=event.token,
                text=event.text,
                logprob=sample.logprobs[-1] if sample.logprobs else None,
                finish_reason=sample.finish_reason,
            )
        )
        if sample.finish_reason:
            job.open_samples -= 1
            if job.open_samples == 0:
                self._finish(job, event.result.stats)

    def _end_read(self, engine: Engine) -> None:
        """End the jobs of texts that were only read: they end without a token."""
        for job in [j for j in self._running if self.engines[j.recipe] is engine]:
            if job.result is not None and job.result.finished:
                self._count_prompt(job, job.result.stats)
                self._finish(job, job.result.stats)

    def _count_prompt(self, job: Job, stats: Stats) -> None:
        self.counters.prompt_tokens += len(job.tokens)
        self.counters.computed_tokens += stats.tokens_computed
        self.counters.reused_tokens += stats.tokens_reused
        self.counters.approximate_tokens += stats.tokens_approximate

    def _finish(self, job: Job, stats: Stats) -> None:
        told = stats.to_dict()
        self._leave(job, "finished")
        job.listen(Ended(stats=told))

    def _full(self) -> ApiError:
        return ApiError(
            429,
            f"the queue of {self._max_queue} requests is full; try again later",
            code="rate_limit_exceeded",
            retry_after=self.retry_after(),
        )


def _stopped() -> ApiError:
    return ApiError(503, "the server is shutting down; try another one", retry_after=5)
