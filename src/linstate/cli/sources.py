"""What ``read`` reads: files, folders and standard input as a stream of pieces of text, each with the bytes it came from.

Every source is cut into pieces for itself, and the cuts depend on its text alone: a reading that begins at the byte
where a piece begins meets the same pieces, and so the same tokens, as one that began at the start.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from linstate.errors import InputError

if TYPE_CHECKING:
    from hashlib import _Hash

Waiting = Callable[[], AbstractContextManager[None]]

STDIN = "-"
SEPARATOR = "\n\n"
_CHUNK = 1 << 16
_HEAD = 1 << 13
_MARK = codecs.BOM_UTF8
_UNDECODED = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True)
class Source:
    """A file, or standard input (``name`` "-"). ``length`` in bytes and ``modified`` are None where they are not known."""

    name: str
    length: int | None = None
    modified: float | None = None

    @property
    def label(self) -> str:
        """The name that survives a move to another folder or machine."""
        return self.name if self.name == STDIN else Path(self.name).name

    def open(self) -> BinaryIO:
        """The bytes, from the start."""
        return sys.stdin.buffer if self.name == STDIN else open(self.name, "rb", buffering=0)


@dataclass(frozen=True)
class Piece:
    """A piece of text, the bytes that it was, and how many of these were no UTF-8."""

    text: str
    data: bytes
    replaced: int


def find(arguments: Sequence[str], note: Callable[[str], None]) -> list[Source]:
    """The sources that the arguments of ``read`` name, in order; folders with all their text files, sorted by path.

    Hidden files and folders inside a folder are left out. ``note`` is told about every binary file that is skipped.

    Raises:
        InputError: a file or folder does not exist or cannot be read.
    """
    found: list[Source] = []
    for argument in arguments:
        if argument == STDIN:
            if any(source.name == STDIN for source in found):
                raise InputError("standard input ('-') can be read only once")
            found.append(Source(STDIN))
            continue
        path = Path(argument)
        try:
            kind = path.stat().st_mode
        except OSError as error:
            raise InputError(f"cannot read {argument}: {error.strerror or error}") from error
        if stat.S_ISDIR(kind):
            found += _in_folder(path, note)
        elif source := _source(path, note, required=True):
            found.append(source)
    return found


def _in_folder(folder: Path, note: Callable[[str], None]) -> Iterator[Source]:
    paths = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(place, name) for name in files if not name.startswith(".")]
    for path in sorted(paths, key=lambda p: p.relative_to(folder).parts):
        if source := _source(path, note, required=False):
            yield source


def _source(path: Path, note: Callable[[str], None], *, required: bool) -> Source | None:
    try:
        found = path.stat()
        if not stat.S_ISREG(
            found.st_mode
        ):  # a pipe: it can be read only once, so nothing is looked at before
            return Source(str(path)) if required else None
        with path.open("rb") as file:
            binary = b"\0" in file.read(_HEAD)
    except OSError as error:
        if required:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error
        note(f"skipped {path}: {error.strerror or error}")
        return None
    if binary:
        note(f"skipped {path}: it is no UTF-8 text (it holds zero bytes)")
        return None
    return Source(str(path), found.st_size, found.st_mtime)


def stream(
    file: BinaryIO, at: int, digest: _Hash, *, separate: bool, waiting: Waiting = nullcontext
) -> Iterator[Piece]:
    """The pieces of a source from byte ``at`` on. Bytes that are no UTF-8 are read as U+FFFD, one for each.

    Args:
        at: where to begin: 0, or where a piece begins; the bytes before it are read past and put into ``digest``.
        separate: begin with a blank line, since there is text before this source.
        waiting: the context in which bytes are waited for.
    """
    from linstate.engine.tokens import pieces

    with waiting():
        if not _pass_over(file, at, digest):
            return
    mark = 0

    def parts() -> Iterator[str]:
        nonlocal mark
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        begun = at > 0
        for chunk in chunks(file, waiting):
            if not begun:
                begun = True
                mark = len(_MARK) if chunk.startswith(_MARK) else 0
                if separate:
                    yield SEPARATOR
                chunk = chunk[mark:]
            yield decoder.decode(chunk)
        yield decoder.decode(b"", final=True)

    first = True
    for piece in pieces(parts()):
        own = piece[len(SEPARATOR) :] if first and separate and at == 0 else piece
        data = (_MARK if first and mark else b"") + own.encode("utf-8", "surrogateescape")
        first = False
        text, replaced = _UNDECODED.subn("\ufffd", piece)
        yield Piece(text, data, replaced)


def chunks(file: BinaryIO, waiting: Waiting = nullcontext) -> Iterator[bytes]:
    """What a file holds, as it comes; a pipe is not waited for until a chunk is full."""
    read = getattr(file, "read1", file.read)
    while True:
        with waiting():
            chunk = read(_CHUNK)
        if not chunk:
            return
        yield chunk


def _pass_over(file: BinaryIO, count: int, digest: _Hash) -> bool:
    """Read ``count`` bytes into ``digest``; False if there are fewer."""
    while count and (chunk := file.read(min(count, _CHUNK))):
        digest.update(chunk)
        count -= len(chunk)
    return count == 0


def new_digest() -> _Hash:
    """An empty SHA-256."""
    return hashlib.sha256()
