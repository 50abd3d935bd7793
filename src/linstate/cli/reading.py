"""A reading of many sources that can be stopped at any block and taken up again, to the bit.

What was read is written into the state's notes under ``sources``, as JSON::

    {"count": 2, "bytes": 5120, "files": [{"name", "bytes", "sha256", "size", "modified"}, ...],   # the newest 100
     "partial": {"done", "list", "name", "size", "modified", "at", "skip", "sha256", "piece"}}     # only if stopped

``partial`` says where an interrupted reading stands: ``done`` sources are through (``list`` is a digest of their names
and sizes); of the next one, the bytes before ``at`` (``sha256``) are read, and ``skip`` tokens of the piece of text
behind them (``piece``: digest of the file up to its end).
"""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

from linstate.cli.sources import STDIN, Source, new_digest, stream
from linstate.errors import InputError, StateFileError

if TYPE_CHECKING:
    from linstate.engine import LanguageModel
    from linstate.state import State

NOTE = "sources"
_KEPT = 100


class Interrupted(Exception):
    """Stop was asked for while the reading waited for input."""


class Stop:
    """Turns the first Ctrl-C (or SIGTERM) into a wish that the reading grants at its next block; the second one ends it."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._waiting = False

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.signal = number
        if self._waiting:
            raise Interrupted

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, a wish to stop raises :class:`Interrupted` at once, as there may never be a next block."""
        self._waiting = True
        try:
            if self.requested:  # since the last block
                raise Interrupted
            yield
        finally:
            self._waiting = False

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Inside, the signals come here."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass
class Ledger:
    """What a state has read, as it stands in its notes."""

    count: int = 0
    bytes: int = 0
    files: list[dict[str, Any]] = field(default_factory=list)
    partial: dict[str, Any] | None = None

    @classmethod
    def of(cls, notes: Mapping[str, str]) -> Ledger:
        """Raises StateFileError."""
        try:
            raw = json.loads(notes.get(NOTE, "{}"))
            made = cls(
                int(raw.get("count", 0)),
                int(raw.get("bytes", 0)),
                list(raw.get("files", [])),
                raw.get("partial"),
            )
            if made.partial is not None:
                for name, kind in {
                    "done": int,
                    "list": str,
                    "name": str,
                    "at": int,
                    "skip": int,
                    "sha256": str,
                }.items():
                    if not isinstance(made.partial[name], kind):
                        raise ValueError(name)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StateFileError(
                f"the state's note {NOTE!r} cannot be read ({error}); it was not written by 'linstate read'"
            ) from error
        return made

    def then(self, later: Ledger) -> Ledger:
        """What both have read, in this order."""
        return Ledger(self.count + later.count, self.bytes + later.bytes, [*self.files, *later.files])

    def text(self) -> str:
        """The note."""
        plain: dict[str, Any] = {"count": self.count, "bytes": self.bytes, "files": self.files[-_KEPT:]}
        return json.dumps(
            plain if self.partial is None else {**plain, "partial": self.partial}, ensure_ascii=False
        )


@dataclass(frozen=True)
class Tally:
    """How far a reading has come in this run: bytes taken (those read in earlier runs too) and tokens, and where it is."""

    bytes: int
    tokens: int
    source: Source


@dataclass(frozen=True)
class Outcome:
    """The state after a reading; ``ledger.partial`` is set where it stopped early, because of ``error`` or a wish."""

    state: State
    ledger: Ledger
    tokens: int
    bytes: int
    replaced: int
    error: str | None = None


def _list(sources: Sequence[Source]) -> str:
    """A digest of names and sizes."""
    return hashlib.sha256(json.dumps([[s.label, s.length] for s in sources]).encode()).hexdigest()


def take_up(ledger: Ledger, sources: Sequence[Source]) -> None:
    """Check that these are the sources of the interrupted reading. Raises InputError that says what differs."""
    part = ledger.partial
    assert part is not None
    where = (
        f"the state stopped in the middle of {part['name']} (source {part['done'] + 1}, byte {part['at']:,})"
    )
    hint = (
        "give the sources of that reading to go on, or --abandon to leave it there and read these behind it"
    )
    if len(sources) <= part["done"]:
        raise InputError(f"{where}, but there are only {len(sources)} sources; {hint}")
    if _list(sources[: part["done"]]) != part["list"]:
        raise InputError(
            f"{where}, but the {part['done']} sources before that are not those that it has read; {hint}"
        )
    here = sources[part["done"]]
    if here.label != Source(part["name"]).label:
        raise InputError(f"{where}, but source {part['done'] + 1} is now {here.name}; {hint}")


class Reading:
    """Reads ``sources`` from ``state`` on; goes on where ``ledger.partial`` stands, if it is set."""

    def __init__(self, model: LanguageModel, state: State, ledger: Ledger, sources: Sequence[Source]) -> None:
        self.model, self.sources, self.ledger = model, sources, ledger
        self.reader = model.text_reader(state)
        self.start, self.first = state.position, 0 if ledger.partial is None else int(ledger.partial["done"])
        self.tokens = self.bytes = self.replaced = 0
        self._where: dict[str, Any] = {}
        self._taken = sum(s.length or 0 for s in sources[: self.first])

    def run(self, stop: Stop, on_progress: Callable[[Tally], None]) -> Outcome:
        """Read to the end, or until ``stop`` is requested or a source fails. Raises InputError if a source has changed."""
        part, self.ledger.partial = self.ledger.partial, None
        error = None
        for index in range(self.first, len(self.sources)):
            source = self.sources[index]
            self._where = {"done": index, "list": _list(self.sources[:index]), "name": source.name}
            self._where |= {"size": source.length, "modified": source.modified}
            self._where |= {"at": 0, "skip": 0, "sha256": new_digest().hexdigest(), "piece": None}
            if part is not None and part["done"] == index:
                self._where |= {key: part[key] for key in ("at", "skip", "sha256", "piece")}
            whole = False
            try:
                whole = self._source(source, stop, on_progress)
            except Interrupted:
                pass
            except OSError as failure:
                error = f"cannot read on in {source.name}: {failure.strerror or failure}"
            if not whole:
                self.ledger.partial = self._where
                break
            self._taken += source.length or self._where["at"]
        return Outcome(self.reader.state(), self.ledger, self.tokens, self.bytes, self.replaced, error)

    def _source(self, source: Source, stop: Stop, on_progress: Callable[[Tally], None]) -> bool:
        """Read one source from where ``self._where`` stands; False if it was stopped."""
        at, skip, grid = self._where["at"], self._where["skip"], self.reader.grid
        if stop.requested:
            return False
        with stop.waiting():
            file = source.open()
        digest = new_digest()
        try:
            behind = at == 0 and self.reader.position - skip > len(self.model.first_tokens)
            found = stream(file, at, digest, separate=behind, waiting=stop.waiting)
            while True:
                piece = next(found, None)
                if digest.hexdigest() != self._where["sha256"]:
                    raise self._changed(source, at)
                if piece is None:
                    if skip:
                        raise self._changed(source, at)
                    break
                ids = self.model.encode(piece.text, self.reader)
                digest.update(piece.data)
                if skip and digest.hexdigest() != self._where["piece"]:
                    raise self._changed(source, at)
                for begin in range(skip, len(ids), grid):
                    if stop.requested:
                        self._where |= {"skip": begin, "piece": digest.hexdigest()}
                        return False
                    part = ids[begin : begin + grid]
                    self.reader.feed(part)
                    self.tokens += len(part)
                    share = len(piece.data) * min(begin + grid, len(ids)) // len(ids)
                    on_progress(Tally(self._taken + at + share, self.tokens, source))
                at, skip = at + len(piece.data), 0
                self.bytes += len(piece.data)
                self.replaced += piece.replaced
                self._where |= {"at": at, "skip": 0, "sha256": digest.hexdigest(), "piece": None}
        finally:
            if source.name != STDIN:
                file.close()
        self.ledger.count += 1
        self.ledger.bytes += at
        read = {"name": source.name, "bytes": at, "sha256": digest.hexdigest()}
        self.ledger.files.append({**read, "size": source.length, "modified": source.modified})
        del self.ledger.files[:-_KEPT]
        return True

    def _changed(self, source: Source, at: int) -> InputError:
        return InputError(
            f"{source.name} is not what it was when the reading stopped in it (byte {at:,}); read everything anew, or give "
            "--abandon to keep what the state has and read these sources behind it"
        )
