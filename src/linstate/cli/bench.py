"""``linstate bench``: measure this machine, peers in the same run."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer

app = typer.Typer(help="Measure this machine, peers in turn in the same run.", no_args_is_help=True)
EXAMPLES = ["linstate bench ops", "linstate bench ops --only delta_rule --tokens 1024 --dtype bfloat16"]


class Dtype(StrEnum):
    """Precision of the inputs."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@app.callback()
def bench() -> None:
    """Measure this machine, peers in turn in the same run."""


@app.command()
def ops(
    tokens: Annotated[int, typer.Option(help="Length T of the sequence.", min=1)] = 4096,
    heads: Annotated[int, typer.Option(help="Heads H.", min=1)] = 16,
    size: Annotated[int, typer.Option(help="Size of keys and values, K = V.", min=1)] = 128,
    dtype: Annotated[Dtype, typer.Option(help="Precision of the inputs.")] = Dtype.float32,
    rounds: Annotated[int, typer.Option(help="Rounds that count; each runs everything once.", min=1)] = 5,
    only: Annotated[str, typer.Option(help="Only cases with this in their name.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Only the JSON line.")] = False,
) -> None:
    """Time each recurrence, beside Hugging Face's function for it where there is one, and softmax attention.

    Prints a table for people and one JSON line. Ratios hold, milliseconds drift with the machine. Peers that are not
    installed are left out (pip install 'linstate[hf]').
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from linstate.bench.ops import Row, Shape, machine, measure
    from linstate.bench.ops import as_json as whole

    console = Console(stderr=as_json)
    about = machine()
    console.print(
        f"{about['processor']}, {about['threads']} threads, torch {about['torch']}; T={tokens} H={heads} K=V={size} {dtype.value}"
    )
    rows: list[Row] = []
    with console.status("measuring") as status:
        for case in measure(
            Shape(tokens, heads, size, getattr(torch, dtype.value)), rounds=rounds, only=only
        ):
            rows += case
            status.update(f"measured {case[0].case}")
    table = Table(box=None)
    for title in ("recurrence", "who", "ms", "µs / token, head", "ours takes"):
        table.add_column(title, justify="left" if title in ("recurrence", "who") else "right")
    for row in rows:
        share = "" if row.who == "linstate" else f"{row.ratio:.2f}x of it"
        table.add_row(row.case, row.who, f"{row.ms:.1f}", f"{row.us_per_token_head:.2f}", share)
    console.print(table)
    print(json.dumps(whole(rows)))
