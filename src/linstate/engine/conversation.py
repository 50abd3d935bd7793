"""Conversations with a model that has a chat template, each point of them a state to go on from.

A template writes down a whole conversation, and may write earlier turns in another way than they were (it leaves out what
the model thought). So each turn is written down anew, and read from the last point whose tokens it begins with: what was
read and said already is not read again, and what the template changed is rolled back to where it changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from linstate.engine.chat_template import Message
from linstate.state.state import State

_POINTS = 16
"""So many points are kept, newest first, and the begin."""


class Speaker(Protocol):
    """A language model, as conversations see it (:class:`linstate.engine.language_model.LanguageModel`)."""

    @property
    def first_tokens(self) -> tuple[int, ...]:
        """Tokens that every text begins with."""
        ...

    def chat_tokens(self, messages: Sequence[Message]) -> list[int]:
        """A conversation as the text that the model was taught to read."""
        ...

    def append(self, ids: Sequence[int], state: State | None = None) -> State:
        """The state after more tokens."""
        ...


@dataclass(frozen=True)
class Point:
    """The tokens of a conversation so far, and the state behind them."""

    tokens: tuple[int, ...]
    state: State


@dataclass(frozen=True)
class Conversation:
    """A conversation that begins behind what ``begin`` has read. It is never changed: each turn makes another.

    Attributes:
        messages: what was said. points: where it can go on from, newest first.
    """

    begin: State
    messages: tuple[Message, ...] = ()
    points: tuple[Point, ...] = field(default=(), repr=False)

    @property
    def state(self) -> State:
        """The state at its end."""
        return self.points[0].state if self.points else self.begin

    def ask(self, model: Speaker, content: str, *, role: str = "user") -> Conversation:
        """With this message, and read to where the answer begins. Raises InputError: no template, or it refuses."""
        messages = (*self.messages, {"role": role, "content": content})
        tokens = tuple(model.chat_tokens(messages))
        first = model.first_tokens
        if self.begin.position and first and tokens[: len(first)] == first:
            tokens = tokens[len(first) :]  # a text begins once
        known = next((p for p in self._all() if tokens[: len(p.tokens)] == p.tokens), Point((), self.begin))
        state = model.append(tokens[len(known.tokens) :], known.state)
        return replace(self, messages=messages, points=(Point(tokens, state), *self.points)[:_POINTS])

    def answered(self, text: str, ids: Sequence[int], state: State) -> Conversation:
        """With the model's answer: its text, its tokens, the state behind it."""
        said = (*self.messages, {"role": "assistant", "content": text})
        point = Point((*self.points[0].tokens, *ids), state)
        return replace(self, messages=said, points=(point, *self.points)[:_POINTS])

    def _all(self) -> tuple[Point, ...]:
        return (*self.points, Point((), self.begin))
