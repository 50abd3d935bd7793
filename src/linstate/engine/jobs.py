"""One request under way in the scheduler: what was asked, how far it is, what there is to tell."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from linstate.engine.generation import Live, Sampling
from linstate.engine.language_model import LanguageModel
from linstate.engine.layers import each_layer
from linstate.engine.slots import ROWS
from linstate.state.state import State
from linstate.types import LayerState

LEAST_LOGPROB = -9999.0
"""Of a token that a constraint rules out, as OpenAI's interface writes it: JSON has no infinity."""


class Constraint(Protocol):
    """What restricts the next token (structured output)."""

    def allow(self, logits: Tensor) -> Tensor:
        """Logits ``[vocab]`` in which what is not allowed is -inf."""

    def accept(self, token: int) -> bool:
        """Take the chosen token; True when nothing more may follow."""


@dataclass(frozen=True)
class Request:
    """What is asked of the scheduler: read ``ids`` from ``state`` on, then generate.

    Attributes:
        max_tokens: most tokens to generate; 0 reads only.
        stop: texts at which to end; they are cut off the text, their tokens stay in the state.
        logprobs: how many likeliest tokens to report with each token; None reports none.
        constraint: structured output. tenant: whose it is, for fairness.
        settle: give the state with its tail run (``Live.settled``): a turn that rests on it runs its new tokens only.
        told: give an event for each token; else for the first only, and the end has the rest.
        on_layer: called on the model's thread with the number of each layer and its part of the state, while the last block
            of the reading runs: what is ready can be shipped while later layers compute.
        on_block: called on the model's thread with the state at each grid position of the reading (checkpoints).
    """

    state: State
    ids: tuple[int, ...] = ()
    max_tokens: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    constraint: Constraint | None = None
    tenant: str = "default"
    settle: bool = False
    told: bool = True
    on_block: Callable[[State], None] | None = None
    on_layer: Callable[[int, LayerState], None] | None = None


@dataclass(frozen=True)
class Reading:
    """``done`` of ``total`` tokens have been read."""

    done: int
    total: int


@dataclass(frozen=True)
class Token:
    """A generated token: its id, the text that is now certain (may be empty), log probabilities if asked for."""

    id: int
    text: str
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end: ``reason`` is "stop", "length", "read" or "cancelled"; ``text`` is the whole text, ``rest`` what of it had
    not been told yet. ``computed`` tokens of the prompt were run; of those, ``tail`` were behind the grid of the state
    that it began from, and had been run before."""

    reason: str
    text: str
    rest: str
    ids: tuple[int, ...]
    state: State
    computed: int
    tail: int


@dataclass(frozen=True)
class Failed:
    """The job ended with an error."""

    error: Exception


Event = Reading | Token | Finished | Failed


class Job:
    """See the module. Everything but :meth:`cancel` and :meth:`wait` is the scheduler's."""

    def __init__(self, request: Request, model: LanguageModel, nbytes: int) -> None:
        self.request, self.model, self.nbytes = request, model, nbytes
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.cancelled = self.ended = self.admitted = False
        self.ready = False  # to choose a token
        self.finished: Finished | None = None
        self._ending: str | None = None  # why, once nothing is left but to run the last token
        self._text, self._shown = "", 0
        self._ids: list[int] = []
        self._words = Words(model)
        self._logits: Tensor | None = None
        self._computed = 0
        self._tail = 0
        model.reader(request.state)  # refuses a state of another model now

    def cancel(self) -> None:
        """End it before the next step; its slot is free at once."""
        self.cancelled = True

    def wait(self, timeout: float | None = None) -> Iterator[Event]:
        """The events up to the last; of a scheduler with the default delivery."""
        while True:
            event = self.events.get(timeout=timeout)
            yield event
            if isinstance(event, Finished | Failed):
                return

    def result(self, timeout: float | None = None) -> Finished:
        """The last event. Raises what the job failed with."""
        *_, last = self.wait(timeout)
        if isinstance(last, Failed):
            raise last.error
        assert isinstance(last, Finished)
        return last

    @property
    def full(self) -> bool:
        """Whether a block is to be read before the next token."""
        return self.live.reader.full

    @property
    def next_tokens(self) -> int:
        """Tokens of the next call of what is to be read, at most."""
        return min(len(self.live.reader.tail), self.live.reader.grid)

    def begin(self, counts: dict[str, int]) -> None:
        request = self.request
        self.live = Live(self.model.decoder, request.state, ROWS)
        if request.ids:
            self.live.append(request.ids)
        self._tail = len(request.state.tail)
        self._total = len(self.live.reader.tail)
        seed = (request.sampling.seed * 1_000_003 + self.live.reader.position) % 2**63
        self._generator = torch.Generator().manual_seed(seed)
        counts["prompt"] += len(request.ids)
        if request.max_tokens > 0:
            counts["tail"] += self._tail

    def read(self, counts: dict[str, int]) -> Iterator[Event]:
        """One call of what is to be read; sets ``ready`` behind the last."""
        live, request = self.live, self.request
        if live.reader.full:
            last = len(live.reader.tail) <= 2 * live.reader.grid
            if request.on_layer is not None and last and not self._ids:
                with each_layer(self.model.decoder, request.on_layer):
                    live.run_block()
            else:
                live.run_block()
            counts["blocks"] += 1
            if not self._ids:
                self._computed += live.reader.grid
                if request.on_block is not None:
                    request.on_block(live.reader.state())
                yield Reading(self._computed, self._total)
            if self._ids:  # a generation that filled a block: its newest token runs with the others
                self.ready = not live.reader.full
                return
        if live.reader.full:
            return
        if request.max_tokens == 0:
            self.ready = True
            self.finished = self.stopped("read")
            return
        if live.to_replay:
            live.replay()
            return
        self._logits = live.logits()
        self._computed = self._total
        self.ready = True
        yield from self.choose(counts)

    def take(self, logits: Tensor) -> None:
        """Logits ``[vocab]`` of the next token."""
        self._logits = logits

    def choose(self, counts: dict[str, int]) -> Iterator[Event]:
        """Choose the next token from the logits; sets ``finished`` behind the last."""
        request, live, logits = self.request, self.live, self._logits
        assert logits is not None
        self._logits = None
        if self._ending is not None:
            self.finished = self.stopped(self._ending)
            return
        if request.constraint is not None:
            logits = request.constraint.allow(logits)
        token = request.sampling.choose(logits, self._generator)
        if token in self.model.ends:
            self._text += self._words.end()
            self.finished = self.stopped("stop")
            return
        live.reader.append([token])
        self._ids.append(token)
        counts["generated"] += 1
        piece = self._words.add(token)
        self._text += piece
        cut = self._cut(len(piece))
        logprob, top = 0.0, tuple[tuple[int, float], ...]()
        if request.logprobs is not None:
            scores = logits.float().log_softmax(-1).clamp(min=LEAST_LOGPROB)
            logprob = float(scores[token])
            best = scores.topk(request.logprobs) if request.logprobs else None
            top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        if request.told or len(self._ids) == 1:
            sure = len(self._text) - (0 if cut else held_back(self._text, request.stop))
            text, self._shown = self._text[self._shown : sure], max(sure, self._shown)
            yield Token(token, text, logprob, top)
        complete = request.constraint is not None and request.constraint.accept(token)
        if cut or complete:
            self._end("stop")
        elif len(self._ids) >= request.max_tokens:
            self._text += self._words.end()
            self._end("length")

    def _end(self, reason: str) -> None:
        """The end behind a token; if the state is to be settled the token runs with those of the others first."""
        live = self.live
        left = len(live.reader.tail) - sum(live.calls)
        if self.request.settle and left == 1 and live.rows == ROWS and not live.reader.full:
            self._ending = reason
        else:
            self.finished = self.stopped(reason)

    def _cut(self, new: int) -> bool:
        """Cut the text before the first stop text in it."""
        marks = [m for m in self.request.stop if m]
        start = max(0, len(self._text) - new - max(map(len, marks), default=0))
        places = [at for m in marks if (at := self._text.find(m, start)) >= 0]
        if places:
            self._text = self._text[: min(places)]
        return bool(places)

    def stopped(self, reason: str) -> Finished:
        """The end for ``reason``, with the state as it is."""
        if not hasattr(self, "live"):
            return Finished(reason, "", "", (), self.request.state, 0, 0)
        return Finished(
            reason,
            self._text,
            self._text[self._shown :],
            tuple(self._ids),
            self.live.settled() if self.request.settle and reason != "cancelled" else self.live.state(),
            self._computed,
            min(self._tail, self._computed),
        )


class Words:
    """Tokens to text, one at a time: what was given out never changes, and all of it is the decoding of the whole.

    Only the newest tokens are decoded: those since text was last given out, and those of that time before them.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._tokenizer = model.tokenizer
        self._ids: list[int] = []
        self._given = 0  # of those, how many have been given out

    def _new(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._given], skip_special_tokens=False)
        return self._tokenizer.decode(self._ids, skip_special_tokens=False)[len(before) :]

    def add(self, token: int) -> str:
        """The text that is certain with this token; a character of several bytes comes with its last."""
        self._ids.append(token)
        text = self._new()
        if text.endswith("\ufffd"):
            return ""
        self._ids, self._given = self._ids[self._given :], len(self._ids) - self._given
        return text

    def end(self) -> str:
        """What was still held back."""
        return self._new()


def held_back(text: str, stop: tuple[str, ...]) -> int:
    """How many characters at the end of ``text`` may yet turn out to begin a stop text."""
    most = 0
    for mark in stop:
        for length in range(min(len(mark) - 1, len(text)), most, -1):
            if text.endswith(mark[:length]):
                most = length
                break
    return most
