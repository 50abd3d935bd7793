"""``linstate compose``: two states into one, without reading again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from linstate.cli import common
from linstate.cli.reading import NOTE, Ledger

EXAMPLES = ("linstate compose chapter1.state chapter2.state -o book.state",)


def compose(
    first: Annotated[Path, typer.Argument(metavar="A", help="State of the text that comes first.")],
    later: Annotated[
        Path, typer.Argument(metavar="B", help="State of the text behind it, read from nothing.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="State file to write.")],
    model: common.Model = common.POCKET,
    weights: common.Weights = None,
    dtype: common.Dtype = None,
    force: common.Force = False,
    json: common.Json = False,
) -> None:
    """Join the states of two texts into one, without reading again.

    The result is exact for models of one layer without decay, else approximate, and the command says which; models
    with attention layers refuse. For an exact state in any case, read the second text from the first state.
    """
    common.check_output(out, force=force)
    made = common.load_model(model, weights, dtype)
    one, two = made.load_state(first), made.load_state(later)
    read = Ledger.of(one.notes).then(Ledger.of(two.notes))
    joined = made.settle(one).compose(two)
    joined = replace(joined, notes={**two.notes, **one.notes, NOTE: read.text()})
    written = joined.save(out)
    if json:
        common.print_json(
            {
                "state": str(out),
                "id": joined.id,
                "composition": joined.composition,
                "position": joined.position,
                "file_bytes": written,
            }
        )
    else:
        common.messages().print(
            f"{out}: {first} followed by {later}, {joined.composition}, position {joined.position:,}",
            markup=False,
        )
