"""Many requests on one model: reading in grid blocks between decode steps, decoding in slots.

One thread owns the model. Each turn of its loop

1. takes what was asked and drops what was cancelled,
2. admits waiting jobs, one tenant after the other, while there are free slots and memory for their states,
3. runs one block of one job that reads, or the rests of several that are no more work, each in its turn, so that a long text
   holds nobody up and many short ones are not kept waiting for each other,
4. runs one token of every job that generates, in one call (:mod:`linstate.engine.slots`).

Calls are those of :class:`linstate.engine.generation.Live`, in the same shapes, so the tokens of a job are the tokens
that it gets alone, to the bit.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from linstate.engine.jobs import Event, Failed, Job, Request
from linstate.engine.language_model import LanguageModel
from linstate.engine.slots import ROWS, Slots
from linstate.errors import BusyError, InputError

T = TypeVar("T")
COPIES = 3
"""Of a state under way: on the grid, live, and one being made."""
SHORT = 32
"""Tokens that a call of fewer is counted as: it costs no less."""
Deliver = Callable[[list[tuple[Job, Event]]], None]


def to_queue(events: list[tuple[Job, Event]]) -> None:
    """The default delivery: each event into its job's queue."""
    for job, event in events:
        job.events.put(event)


class Scheduler:
    """See the module. Use as a context manager, or call :meth:`close`.

    Args:
        slots: jobs that may be under way at once, reading and generating together. waiting: jobs that may wait for a slot.
        memory: bytes that the states of jobs under way may take; each is counted :data:`COPIES` times. Batches
            are no larger than fits, either.
        deliver: gets the events of each turn of the loop, on the model's thread; default: into ``Job.events``.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        slots: int = 32,
        waiting: int = 128,
        memory: int = 4 * 2**30,
        deliver: Deliver = to_queue,
    ) -> None:
        self.model, self.deliver = model, deliver
        self.most_slots, self.most_waiting, self.memory = slots, waiting, memory
        fit = memory // (COPIES * max(1, model.decoder.state_bytes(1)))
        self.slots = Slots(model.decoder, min(slots, fit))
        self.reading: deque[Job] = deque()
        self.decoding: list[Job] = []
        self.counts = {
            "prompt": 0,
            "tail": 0,
            "generated": 0,
            "steps": 0,
            "blocks": 0,
            "finished": 0,
            "cancelled": 0,
        }
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self._inbox: queue.SimpleQueue[Job | tuple[Callable[[], Any], Future[Any]] | None] = (
            queue.SimpleQueue()
        )
        self._lock = threading.Lock()
        self._pending = 0  # submitted and not yet under way
        self._used = 0  # bytes of jobs under way
        self._rate = 0.0  # jobs finished per second, smoothed
        self._last_finish = time.monotonic()
        self._events: list[tuple[Job, Event]] = []
        self._closing = self._closed = False
        self._thread = threading.Thread(target=self._loop, name="linstate-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ----------------------------------------------------------------------------------------- from any thread

    def submit(self, request: Request) -> Job:
        """Queue a request.

        Raises:
            InputError: its state alone would not fit into the memory there is.
            BusyError: too many are waiting, or the scheduler is closing.
            StateMismatchError: its state belongs to another model.
        """
        job = Job(request, self.model, self._bytes(request))
        if job.nbytes > self.memory:
            raise InputError(
                f"this request's state would take {job.nbytes:,} bytes, more than the {self.memory:,} that there are; "
                "ask for fewer tokens"
            )
        with self._lock:
            if self._closing or self._pending >= self.most_waiting:
                raise BusyError(
                    "the server is stopping"
                    if self._closing
                    else f"{self._pending} requests are waiting already",
                    self.retry_after(),
                )
            self._pending += 1
            self._inbox.put(job)
        return job

    def run(self, function: Callable[[], T]) -> Future[T]:
        """Run ``function`` on the model's thread, between two turns of the loop. Raises BusyError when closing."""
        future: Future[T] = Future()
        with self._lock:
            if self._closing:
                raise BusyError("the server is stopping", self.retry_after())
            self._inbox.put((function, future))
        return future

    def retry_after(self) -> int:
        """Seconds after which a slot should be free, from how fast jobs have finished lately; 1 to 60."""
        return max(1, min(60, round(self._pending / self._rate))) if self._rate > 0 else 1

    @property
    def load(self) -> dict[str, int]:
        """What there is to do now, for metrics."""
        return {
            "waiting": self._pending,
            "reading": len(self.reading),
            "decoding": len(self.decoding),
            "state_bytes": self._used,
        }

    def close(self, *, drain: float = 0.0) -> None:
        """Take nothing more, give what is under way ``drain`` seconds to finish, cancel the rest, end the thread."""
        with self._lock:
            already, self._closing = self._closing, True
        if already:
            self._thread.join()
            return
        end = time.monotonic() + drain
        while time.monotonic() < end and (self._pending or self._used):
            time.sleep(0.02)
        self._closed = True
        self._inbox.put(None)
        self._thread.join()

    # ------------------------------------------------------------------------------------- on the model's thread

    def _bytes(self, request: Request) -> int:
        tokens = request.state.position + len(request.ids) + request.max_tokens
        return COPIES * self.model.decoder.state_bytes(tokens)

    def _loop(self) -> None:
        while not self._closed:
            busy = bool(self.reading or self.decoding)
            self._take(block=not busy and not self._admittable())
            self._drop_cancelled()
            self._admit()
            self._read()
            self._decode()
            self._flush()
        for job in [*self.decoding, *self.reading, *(j for q in self._waiting.values() for j in q)]:
            self._end(job, Failed(BusyError("the server was stopped", 1)))
        while not self._inbox.empty():
            item = self._inbox.get()
            if isinstance(item, Job):
                self._end(item, Failed(BusyError("the server was stopped", 1)))
            elif item is not None:
                item[1].set_exception(BusyError("the server was stopped", 1))
        self._flush()

    def _take(self, *, block: bool) -> None:
        while True:
            try:
                item = self._inbox.get(block=block)
            except queue.Empty:
                return
            block = False
            if item is None:
                continue
            if isinstance(item, Job):
                self._waiting.setdefault(item.request.tenant, deque()).append(item)
                continue
            function, future = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

    def _drop_cancelled(self) -> None:
        gone = [j for j in (*self.decoding, *self.reading) if j.cancelled]
        gone += [j for q in self._waiting.values() for j in q if j.cancelled]
        for job in gone:
            self.counts["cancelled"] += 1
            self._end(job, job.stopped("cancelled"))

    def _admittable(self) -> bool:
        return any(self._waiting.values())

    def _admit(self) -> None:
        """One job of each tenant in turn, oldest first; one whose state does not fit now keeps its tenant waiting."""
        refused = 0
        while self._waiting and refused < len(self._waiting):
            if len(self.reading) + len(self.decoding) >= self.most_slots:
                return
            tenant, jobs = next(iter(self._waiting.items()))
            self._waiting.move_to_end(tenant)
            if not jobs:
                del self._waiting[tenant]
                continue
            if self._used + jobs[0].nbytes > self.memory:
                refused += 1
                continue
            job = jobs.popleft()
            self._used += job.nbytes
            self._forget()
            job.admitted = True
            self._try(job, lambda job=job: job.begin(self.counts))  # type: ignore[misc]
            if not job.ended:
                self.reading.append(job)

    def _read(self) -> None:
        """A call of each job whose turn it is to read, as far as they are no more work than one block."""
        left = self.model.grid
        for turn in range(len(self.reading)):
            work = max(SHORT, self.reading[0].next_tokens)
            if turn > 0 and work > left:
                return
            left -= work
            self._read_one(self.reading.popleft())

    def _read_one(self, job: Job) -> None:
        self._try(job, lambda: self._events.extend((job, e) for e in job.read(self.counts)))
        if job.ended:
            return
        if not job.ready:
            self.reading.append(job)
        elif job.finished is not None:
            self._end(job, job.finished)
        else:
            self.decoding.append(job)

    def _decode(self) -> None:
        """The newest token of every job that generates; those whose block is full go back to reading."""
        for job in [j for j in self.decoding if j.full]:
            self.decoding.remove(job)
            self.reading.append(job)
        if not self.decoding:
            return
        together = [j for j in self.decoding if j.live.rows == ROWS]
        for job in [j for j in self.decoding if j.live.rows != ROWS]:
            self._try(job, lambda job=job: job.take(job.live.logits()))  # type: ignore[misc]
        if together:
            try:
                for job, logits in zip(together, self.slots.step([j.live for j in together]), strict=True):
                    job.take(logits)
            except Exception as error:
                for job in together:
                    self._end(job, Failed(error))
        self.counts["steps"] += 1
        for job in list(self.decoding):
            self._try(job, lambda job=job: self._events.extend((job, e) for e in job.choose(self.counts)))  # type: ignore[misc]
            if not job.ended and job.finished is not None:
                self._end(job, job.finished)

    def _try(self, job: Job, work: Callable[[], object]) -> None:
        """An error of one job ends that job alone."""
        try:
            work()
        except Exception as error:
            self._end(job, Failed(error))

    def _end(self, job: Job, event: Event) -> None:
        if job.ended:
            return
        job.ended = True
        if job in self.decoding:
            self.decoding.remove(job)
        if job in self.reading:
            self.reading.remove(job)
        if job.admitted:
            self._used -= job.nbytes
        else:
            self._forget()
            if job in (waiting := self._waiting.get(job.request.tenant, deque())):
                waiting.remove(job)
        now = time.monotonic()
        self._rate = 0.8 * self._rate + 0.2 / max(now - self._last_finish, 1e-3)
        self._last_finish = now
        self.counts["finished"] += 1
        self._events.append((job, event))

    def _forget(self) -> None:
        with self._lock:
            self._pending -= 1

    def _flush(self) -> None:
        if self._events:
            events, self._events = self._events, []
            self.deliver(events)
