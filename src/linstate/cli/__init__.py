"""The command line: one file per command, listed in :data:`COMMANDS`.

The file of a command defines a function of the same name, which typer turns into the command (or ``app``, a
sub-application with commands of its own), and ``EXAMPLES``, command lines that its help shows. What takes long to
import (torch, a model) is imported inside the functions, so that ``linstate --help`` is there at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Annotated

import typer

from linstate.errors import LinstateError

__all__ = ["COMMANDS", "app", "main"]

COMMANDS = {
    "demo": "Start here",
    "read": "Read and ask",
    "ask": "Read and ask",
    "chat": "Read and ask",
    "generate": "Read and ask",
    "serve": "Serve",
    "keys": "Serve",
    "info": "States",
    "fork": "States",
    "compose": "States",
    "store": "The library",
    "find": "The library",
    "train": "Models",
    "eval": "Models",
    "models": "Models",
    "mixers": "Models",
    "simulate": "This machine",
    "bench": "This machine",
    "compare": "This machine",
    "doctor": "This machine",
}
"""Every command, in the order of the help, with the heading that it stands under."""


def _version(asked: bool) -> None:
    if asked:
        from linstate import __version__

        typer.echo(f"linstate {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Read a text once, keep what was read in a small state, and ask it again and again.

    Every command explains itself: linstate COMMAND --help
    """


def _help(function: Callable[..., object]) -> str:
    """A docstring with each paragraph on one line, so that the terminal decides where lines end."""
    return "\n\n".join(" ".join(part.split()) for part in (function.__doc__ or "").split("\n\n"))


def _build() -> typer.Typer:
    made = typer.Typer(
        name="linstate",
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    made.callback()(_root)
    for name, panel in COMMANDS.items():
        module = import_module(f"{__name__}.{name}")
        examples = getattr(module, "EXAMPLES", ())
        epilog = "\n\n".join(["Examples:", *examples]) if examples else None
        if hasattr(module, "app"):
            made.add_typer(module.app, name=name, epilog=epilog, rich_help_panel=panel)
        else:
            function = getattr(module, name)
            made.command(name, help=_help(function), epilog=epilog, rich_help_panel=panel)(function)
    return made


app = _build()
"""The typer application."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line (default: that of the process) and exit: 0 done, 1 error, 2 wrong usage, 130 Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(
            stream, "reconfigure", None
        ):  # a terminal that cannot show a character is no error
            reconfigure(errors="replace")
    try:
        app(args=None if arguments is None else list(arguments), prog_name="linstate")
    except LinstateError as error:
        _end(str(error))
    except BrokenPipeError:  # whoever read our output has had enough
        _silence()
        sys.exit(1)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        _end(f"{error.strerror or error}{where}")
    except KeyboardInterrupt:
        sys.exit(130)


def _end(message: str) -> None:
    """One line on standard error, and exit code 1."""
    with contextlib.suppress(BrokenPipeError):
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)


def _silence() -> None:
    """Let what is still to be flushed at exit go nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
