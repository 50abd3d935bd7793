"""What the commands share: options, output files, streams of text, tables, numbers for people."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from linstate.errors import InputError

if TYPE_CHECKING:
    from linstate.engine import Generation, LanguageModel
    from linstate.state.store import StateStore

POCKET = "pocket"

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="Model folder, or name on the Hugging Face Hub; 'pocket' is the model that comes with Linstate.",
    ),
]
Weights = Annotated[
    Literal["bf16", "int8", "int4"] | None,
    typer.Option(
        "--weights",
        help="Pack the weights for this processor, in 16, 8.5 or 4.5 bits: faster, and smaller. A state is gone on from with the "
        "weights that it was read with. 'linstate bench weights' prints what narrow ones cost.",
        show_default=False,
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option(
        "--dtype",
        help="Precision of what is computed. Default: float32; with --weights bfloat16.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for programs on standard output.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Overwrite an output file that exists.")]
StateFile = Annotated[
    Path, typer.Argument(metavar="STATE", help="State file, as written by 'linstate read'.")
]

Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="FOLDER|URL",
        envvar="LINSTATE_STORE",
        help="The library of states. Default: .linstate/store in your home folder.",
        show_default=False,
    ),
]
Catalogue = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="The library's catalogue. Default: in its folder; object storage needs it named."
    ),
]
Tenant = Annotated[str, typer.Option(metavar="NAME", help="Whose states.")]
Key = Annotated[
    Path | None,
    typer.Option("--key", metavar="FILE", help="Sign, or ask for the signature, with the key in this file."),
]

_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def load_model(name: str, weights: str | None = None, dtype: str | None = None) -> LanguageModel:
    """The model in a folder or on the Hub, or the pocket model. Raises CheckpointError, ConfigError, BackendError.

    Args:
        weights, dtype: of :data:`Weights` and :data:`Dtype`.
    """
    import torch

    from linstate.engine import LanguageModel

    chosen = dtype or ("bfloat16" if weights else None)
    return LanguageModel.from_pretrained(
        name,
        dtype=None if chosen is None else getattr(torch, chosen),
        weights=weights,  # type: ignore[arg-type]
    )


@contextmanager
def open_store(where: str | None, catalogue: Path | None) -> Iterator[StateStore]:
    """The library of states at a place, closed behind. Raises InputError, StateFileError."""
    from linstate.state.store import StateStore

    opened = StateStore(where or Path.home() / ".linstate" / "store", catalogue=catalogue)
    try:
        yield opened
    finally:
        opened.close()


def read_key(path: Path | None) -> bytes | None:
    """The key in a file, without the line break at its end. Raises InputError."""
    if path is None:
        return None
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise InputError(f"cannot read the key {path}: {error.strerror or error}") from error
    if len(key) < 16:
        raise InputError(
            f"the key in {path} has {len(key)} bytes; expected at least 16 that nobody can guess"
        )
    return key


def text_of(source: str) -> str:
    """A text file (``-``: standard input); bytes that are no UTF-8 become U+FFFD. Raises InputError."""
    try:
        if source == "-":
            return sys.stdin.read()
        return Path(source).read_text("utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror or error}") from error


def model_option(name: str, weights: str | None = None, dtype: str | None = None) -> list[str]:
    """What to add to a command line so that it uses the same model in the same way."""
    given = {"--model": None if name == POCKET else name, "--weights": weights, "--dtype": dtype}
    return [word for option, value in given.items() if value is not None for word in (option, value)]


def check_output(path: Path, *, force: bool, same_as: Path | None = None, or_else: str = "") -> None:
    """Refuse now what could not be written later. Raises InputError.

    Args:
        force: an existing file may be overwritten. same_as: a file that may be overwritten in any case.
        or_else: what else there is to do, for the message.
    """
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; name a file")
    folder = path.parent
    if not folder.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK):
        raise InputError(f"cannot write {path}: no permission to write into {folder.resolve()}")
    if (
        path.exists()
        and not force
        and (same_as is None or not same_as.exists() or not path.samefile(same_as))
    ):
        raise InputError(f"{path} exists; {or_else}choose another name, or overwrite it with --force")


def print_json(content: Any) -> None:
    """One JSON object on standard output."""
    print(json.dumps(content, ensure_ascii=False, indent=2 if sys.stdout.isatty() else None), flush=True)


def print_line(content: Any) -> None:
    """One JSON object on one line of standard output, behind what is there for people."""
    print(json.dumps(content, ensure_ascii=False), flush=True)


def messages() -> Console:
    """The console for everything that is not the result: standard error."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def results() -> Console:
    """The console for tables: standard output."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def facts(rows: Iterable[tuple[str, str]]) -> None:
    """Print names and values in two columns on standard output; values are not cut where a program reads them."""
    shown = [(name, printable(value)) for name, value in rows]
    if not sys.stdout.isatty():
        wide = max(len(name) for name, _ in shown)
        for name, value in shown:
            print(f"{name:{wide}}  {value}".rstrip())
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in shown:
        table.add_row(name, Text(value))
    results().print(table)


def size(count: float) -> str:
    """Bytes for people, in powers of 1000: '217 kB'.

    >>> size(217), size(2_170), size(217_400_000)
    ('217 B', '2.2 kB', '217 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            return f"{count:.0f} {unit}" if count >= 9.95 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def printable(text: str) -> str:
    """Text without control characters, which could move a terminal's cursor or change its title."""
    return text.translate(_CONTROLS)


def write_text(text: str, stream: TextIO | None = None) -> None:
    """Write generated text at once; to a terminal without control characters, else as it is."""
    stream = stream or sys.stdout
    stream.write(printable(text) if stream.isatty() else text)
    stream.flush()


def stream_text(
    steps: Iterable[Generation], stop: Sequence[str] = (), *, show: bool = True
) -> Generation | None:
    """Write a generation to standard output while it is made; returns its last step, None if it had none.

    What may yet become part of a ``stop`` text or of a character of several bytes is held back until it is certain.
    """
    shown, last = 0, None
    for last in steps:
        sure = len(last.text) - _unsure(last.text, stop)
        if show and sure > shown:
            write_text(last.text[shown:sure])
            shown = sure
    if show and last is not None:
        write_text(last.text[shown:])
    return last


def _unsure(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end may still change or be cut off."""
    half = len(text) - len(text.rstrip("\ufffd"))
    for mark in stop:
        for length in range(min(len(mark), len(text)), half, -1):
            if text.endswith(mark[:length]):
                half = length
                break
    return half


def questions_in(path: str) -> list[str]:
    """The lines of a file (``-``: standard input), without the empty ones. Raises InputError."""
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text("utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"cannot read the questions in {path}: {error.strerror or error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]
