"""``linstate bench store`` and ``linstate bench compose``: what is measured of stored states."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from linstate.cli import common
from linstate.errors import InputError

AsJson = Annotated[bool, typer.Option("--json", help="Only the JSON line.")]


def store(
    states: Annotated[int, typer.Option(help="States in the catalogue.", min=20)] = 100_000,
    calls: Annotated[int, typer.Option(help="Look-ups of each kind.", min=10)] = 500,
    find: Annotated[bool, typer.Option(help="Also search (extra 'memory').")] = True,
    model: common.Model = common.POCKET,
    folder: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where to put the store; default: a temporary one.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time look-ups in a store of many states: the longest stored beginning of a text, and what was read about something.

    The catalogue is filled first, which takes a while. Prints a table for people and one JSON line.
    """
    from linstate.bench.machine import machine
    from linstate.bench.store import measure

    made = common.load_model(model)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        rows = measure(Path(place), made, states=states, calls=calls, find=find)
    if not as_json:
        table = _table("milliseconds", "calls", "p50", "p99", "longest", "p99, processor")
        for row in rows:
            figures = (f"{value:.2f}" for value in (row.p50, row.p99, row.longest))
            worked = f"{row.p99_processor:.2f}" if row.p99_processor else "-"
            table.add_row(row.what, str(row.calls), *figures, worked)
        common.results().print(table)
    common.print_line({"states": states, "rows": [vars(row) for row in rows], "machine": machine()})


def compose(
    texts: Annotated[str, typer.Option(help="How many texts, with commas between.")] = "2,4",
    facts: Annotated[int, typer.Option(help="Facts in each text.", min=2)] = 6,
    rounds: Annotated[int, typer.Option(help="Rounds, each with texts of its own.", min=1)] = 8,
    model: common.Model = common.POCKET,
    as_json: AsJson = False,
) -> None:
    """Ask states that were put together of several texts: right answers by each method, and by reading them all.

    Prints a table for people and one JSON line.
    """
    from linstate.bench.composing import as_json as plain
    from linstate.bench.composing import measure
    from linstate.bench.machine import machine

    counts = [int(part) for part in texts.split(",") if part.strip().isdecimal()]
    if not counts or min(counts) < 2 or max(counts) > 8:
        raise InputError(f"--texts takes numbers from 2 to 8 with commas between, got {texts!r}")
    rows = measure(common.load_model(model), texts=counts, facts=facts, rounds=rounds)
    if not as_json:
        table = _table("one state of", "by", "right", "of", "composition", "ms to compose")
        for row in rows:
            spent = f"{row.milliseconds:.1f}" if row.way != "the right text alone" else "-"
            table.add_row(f"{row.texts} texts", row.way, str(row.right), str(row.asked), row.label, spent)
        common.results().print(table)
    common.print_line({"rows": plain(rows), "machine": machine()})


def find(
    count: Annotated[int, typer.Option(help="Modules of the standard library.", min=5)] = 60,
    size: Annotated[int, typer.Option(help="Characters of each.", min=500)] = 4000,
    model: common.Model = common.POCKET,
    as_json: AsJson = False,
) -> None:
    """Count how often the right text is found: Python's modules, without their docstrings, by their own summaries.

    Prints a table for people and one JSON line. Needs the extra 'memory'.
    """
    from linstate.bench.finding import measure
    from linstate.bench.machine import machine

    with tempfile.TemporaryDirectory() as place:
        rows = measure(Path(place), common.load_model(model), count=count, size=size)
    if not as_json:
        table = _table("by", "first", "among five", "of")
        for row in rows:
            table.add_row(row.how, str(row.first), str(row.among_five), str(row.asked))
        common.results().print(table)
    common.print_line({"rows": [vars(row) for row in rows], "machine": machine()})


def _table(*names: str) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2))
    for name in names:
        table.add_column(name)
    return table
