"""``linstate eval``: measured tables."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linstate.cli import common

if TYPE_CHECKING:
    from linstate.evals.pocket import PocketTable, Row

EXAMPLES = ("linstate eval pocket", "linstate eval pocket --quick --model runs/mine/model")

app = typer.Typer(no_args_is_help=True, help="Measure a model: repeat the tables of the documentation.")


@app.callback()
def _group() -> None:
    """Measure a model: repeat the tables of the documentation."""


@app.command()
def pocket(
    model: common.Model = common.POCKET,
    quick: Annotated[
        bool, typer.Option("--quick", help="A small sample of every part, in about a minute.")
    ] = False,
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write rows and wrong answers to this file, as JSON."),
    ] = None,
) -> None:
    """Repeat the table of docs/pocket.md.

    Lookup in unseen and in real files (each document is read once, every question is asked from that state), and bits
    per byte of Python sources that no training has seen, beside xz -9. Goals are marked as reached or missed.
    """
    from linstate.evals.pocket import evaluate

    if json is not None:
        common.check_output(json, force=True)
    made = common.load_model(model)
    console = common.messages()
    began = time.monotonic()

    def answer(document: str, questions: list[str]) -> list[str]:
        state = made.read(document)
        return [made.ask(question, state) for question in questions]

    def bits(data: bytes) -> float:
        return made.bits(data.decode(errors="replace"))  # its end may fall into a character

    with console.status("collecting the test documents") as status:

        def on_row(row: Row) -> None:
            status.update(f"{time.monotonic() - began:.0f} s, after {row.group}: {row.name.strip()}")

        if quick:
            table = evaluate(answer, bits, on_row=on_row, documents=4, grid_documents=0, python_bytes=50_000)
        else:
            table = evaluate(answer, bits, on_row=on_row)
    _show(table)
    if json is not None:
        json.write_text(table.to_json() + "\n", encoding="utf-8")
    common.messages().print(f"measured in {time.monotonic() - began:.0f} s" + (" (quick)" if quick else ""))


def _show(table: PocketTable) -> None:
    from rich.table import Table

    shown = Table(padding=(0, 1))
    for name, justify in (
        ("", "left"),
        ("", "left"),
        ("score", "right"),
        ("asked", "right"),
        ("goal", "right"),
        ("", "left"),
    ):
        shown.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    group = ""
    for row, cells in zip(table.rows, table.cells(), strict=True):
        if row.group != group and group:
            shown.add_section()
        mark = {None: "", True: "reached", False: "missed"}[row.reached]
        shown.add_row("" if row.group == group else row.group, *cells[1:], mark)
        group = row.group
    common.results().print(shown)
