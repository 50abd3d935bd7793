"""``linstate read``: texts into a state."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from linstate.cli import common
from linstate.cli.reading import NOTE, Ledger, Outcome, Reading, Stop, Tally, take_up
from linstate.cli.sources import STDIN, Source, find
from linstate.errors import InputError

if TYPE_CHECKING:
    from linstate.state.state import State

EXAMPLES = (
    "linstate read notes.txt",
    "linstate read src/ README.md -o project.state --title 'my project'",
    "zcat log.gz | linstate read - --state project.state",
)


def read(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE", help="Files and folders to read, in this order; '-' is standard input."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="State file to write. Default: the --state that is continued, else NAME.state in this folder, "
            "NAME being the first source's.",
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option("--state", "-s", metavar="FILE", help="Go on from this state instead of an empty one."),
    ] = None,
    model: common.Model = common.POCKET,
    weights: common.Weights = None,
    dtype: common.Dtype = None,
    title: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A title, kept in the state's notes.")
    ] = None,
    keep_tokens: Annotated[
        bool,
        typer.Option("--keep-tokens", help="Keep the ids of all tokens in the state too (4 bytes a token)."),
    ] = False,
    precision: Annotated[
        Literal["exact", "bf16", "int8"],
        typer.Option(help="Precision of the stored numbers: exact, or a half or a quarter of the bytes."),
    ] = "exact",
    force: common.Force = False,
    abandon: Annotated[
        bool,
        typer.Option(
            "--abandon",
            help="--state was interrupted: leave the rest of that reading, read these sources now.",
        ),
    ] = False,
    json: common.Json = False,
) -> None:
    """Read files, folders and standard input into a state file.

    Memory stays constant however long the text is, and so does the state (unless the model has attention layers).
    Folders are read recursively, sorted by path, without hidden and binary files; each source is set off from the
    text before it by a blank line; bytes that are no UTF-8 are read as U+FFFD. Ctrl-C finishes the block, saves what
    was read and says how to go on: the same command with --state gives the same state as an uninterrupted reading.
    """
    skipped: list[str] = []
    console = common.messages()

    def note(line: str) -> None:
        skipped.append(line)
        if len(skipped) <= 10:
            console.print(f"note: {line}", markup=False)

    found = find(sources, note)
    if len(skipped) > 10:
        console.print(f"note: and {len(skipped) - 10} more")
    if not found:
        raise InputError("there is nothing to read: no text file among the sources")
    target = out or state or Path(f"{_stem(sources[0])}.state")
    common.check_output(target, force=force, same_as=state, or_else=f"go on from it with --state {target}, ")

    made = common.load_model(model, weights, dtype)
    start, ledger = _start(
        made.load_state(state) if state else made.empty_state(keep_tokens=keep_tokens), keep_tokens
    )
    resumed = ledger.partial is not None and not abandon
    if resumed:
        take_up(ledger, found)
    else:
        ledger.partial = None
        if start.position:
            start = replace(start, lineage=(*start.lineage, start.id))

    from linstate.bench.reading import resident_bytes

    seconds = time.monotonic()
    reading = Reading(made, start, ledger, found)
    with Stop().listening() as stop, _bar(found, hidden=json) as show:
        outcome = reading.run(stop, show)
    seconds = time.monotonic() - seconds

    after = _with_notes(outcome, title)
    if outcome.ledger.partial is not None:
        again = ["linstate", "read", *sources, *(["--precision", precision] if precision != "exact" else [])]
        again += [*common.model_option(model, weights, dtype), "--state", str(target)]
        _interrupted(outcome, after, target, shlex.join(again), stop.signal)
    written = after.save(target, precision=precision)
    report: dict[str, Any] = {
        "state": str(target),
        "id": after.id,
        "position": after.position,
        "tokens": outcome.tokens,
        "bytes": outcome.bytes,
        "sources": len(found),
        "skipped": skipped,
        "undecodable_bytes": outcome.replaced,
        "resumed": resumed,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(outcome.tokens / max(seconds, 1e-9), 1),
        "state_bytes": after.nbytes,
        "file_bytes": written,
        "precision": precision,
        "resident_bytes": resident_bytes(),
    }
    if outcome.replaced:
        console.print(f"note: {outcome.replaced:,} bytes were no UTF-8 and were read as U+FFFD")
    if json:
        common.print_json(report)
        return
    console.print(
        f"{target}: {common.size(written)}, position {after.position:,}; read {outcome.tokens:,} tokens "
        f"({common.size(outcome.bytes)}) in {seconds:.1f} s, {report['tokens_per_second']:,.0f} tokens/s, "
        f"memory {common.size(report['resident_bytes'])}",
        markup=False,
    )


def _stem(source: str) -> str:
    return "stdin" if source == STDIN else Path(source).resolve().stem


def _start(state: State, keep_tokens: bool) -> tuple[State, Ledger]:
    """The state to read from, and its ledger."""
    if keep_tokens and state.tokens is None:
        if state.position:
            raise InputError(
                "the state to continue was read without --keep-tokens, so its first tokens are not known"
            )
        state = replace(state, tokens=())
    return state, Ledger.of(state.notes)


def _with_notes(outcome: Outcome, title: str | None) -> State:
    notes = {**outcome.state.notes, NOTE: outcome.ledger.text()}
    return replace(outcome.state, notes=notes if title is None else {**notes, "title": title})


def _interrupted(outcome: Outcome, state: State, target: Path, again: str, by: int | None) -> None:
    """Save exactly what there is, say how to go on, and exit."""
    console, part = common.messages(), outcome.ledger.partial
    assert part is not None
    if state.position:  # always exact: what goes on from rounded numbers would not be what never stopped
        state.save(target)
        of = "" if part["size"] is None else f" of {part['size']:,}"
        console.print(
            f"stopped in {part['name']}, byte {part['at']:,}{of}; {state.position:,} tokens are in {target}\n"
            f"to go on:  {again}",
            markup=False,
        )
    else:
        console.print("stopped before the first token; nothing was written")
    if outcome.error is not None:
        raise InputError(outcome.error)
    raise typer.Exit(128 + (by or signal.SIGINT))


@contextmanager
def _bar(sources: list[Source], *, hidden: bool) -> Iterator[Callable[[Tally], None]]:
    """A progress bar on standard error, where that is a terminal."""
    from linstate.bench.reading import resident_bytes

    lengths = [source.length for source in sources]
    total = None if None in lengths else sum(length or 0 for length in lengths)
    console = common.messages()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.fields[name]}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[done]}  {task.fields[rate]}  {task.fields[memory]}"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console, transient=True, disable=hidden or not console.is_terminal)
    task = bar.add_task("read", total=total, name="", done="", rate="", memory="")
    begun = shown = time.monotonic()

    def show(tally: Tally) -> None:
        nonlocal shown
        if (now := time.monotonic()) - shown < 0.1:
            return
        shown = now
        bar.update(
            task,
            completed=tally.bytes,
            name=common.printable(Path(tally.source.name).name[-24:]),
            done=common.size(tally.bytes) + ("" if total is None else f" of {common.size(total)}"),
            rate=f"{tally.tokens / (now - begun):,.0f} tokens/s",
            memory=f"memory {common.size(resident_bytes())}",
        )

    with bar:
        yield show
