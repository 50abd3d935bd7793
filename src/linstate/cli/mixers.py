"""``linstate mixers``: the table of architectures."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated, Any

import typer

from linstate.cli import common

EXAMPLES = ("linstate mixers", "linstate mixers --long --d-model 1024")

_SHORT, _LONG = 1_000, 1_000_000

ENCODER = "none (encoder)"
"""What stands for the recurrence of a layer that reads a whole text at once."""


def mixers(
    long: Annotated[
        bool,
        typer.Option(
            "--long",
            help="Show weights, FLOPs, options with their defaults, how states compose, and what was measured, too.",
        ),
    ] = False,
    d_model: Annotated[
        int, typer.Option(min=1, help="Width of the layer whose state is measured, in channels.")
    ] = 512,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in Markdown.")] = False,
    json: common.Json = False,
) -> None:
    """List the architectures that a model can be built from.

    Each is one file in the package's folder mixers. The state is that of one layer of width --d-model with default
    options, for one text; where it grows, it is given after 1,000 tokens. Encoders read a whole text at once, every
    token seeing all others, and have no state. What --long says a mixer is good or bad at was measured by linstate
    compare, in the run that docs/compare.md shows.
    """
    found = table_of_all(d_model)
    if json:
        common.print_json(found)
    elif markdown:
        print(as_markdown(found))
    elif long:
        for row in found:
            common.facts([("mixer", row["name"]), *((k, str(v)) for k, v in _long(row).items()), ("", "")])
    else:
        _table(found, d_model)


def _names() -> tuple[str, ...]:
    from linstate import mixers

    return mixers.names()


def _mixer(name: str, d_model: int) -> dict[str, Any]:
    import torch

    from linstate import mixers
    from linstate.errors import ConfigError

    kind = mixers.find(name)
    found: dict[str, Any] = {
        "name": name,
        "recurrence": kind.recurrence,
        "equation": kind.equation,
        "d_model": d_model,
        "state_bytes": None,
        "grows": None,
        "weights": None,
        "flops_per_token": None,
        "composition": kind.composition,
        "source": kind.source,
        "options": kind.options(),
    }
    try:
        # Weights are not needed, but where they are small making them is quicker than torch's first use of "meta".
        with torch.device("meta") if d_model > 1024 else nullcontext():
            layer = kind.build(name, d_model, {})
        found["state_bytes"] = layer.state_bytes(_SHORT)
        found["grows"] = layer.state_bytes(_LONG) > layer.state_bytes(_SHORT)
        found["weights"] = sum(p.numel() for p in layer.parameters())
        found["flops_per_token"] = round(layer.flops(_SHORT) / _SHORT)
    except ConfigError as error:  # a width that its heads do not divide
        found["refused"] = str(error)
    return found


def _encoder(name: str, d_model: int) -> dict[str, Any]:
    from linstate.mixers import encoders

    kind = encoders.find(name)
    return {
        "name": name,
        "recurrence": ENCODER,
        "equation": kind.equation,
        "d_model": d_model,
        "state_bytes": None,
        "grows": None,
        "composition": None,
        "source": kind.source,
        "options": kind.options(),
    }


def _state(row: dict[str, Any]) -> str:
    return "-" if row["state_bytes"] is None else common.size(row["state_bytes"])


def _grows(row: dict[str, Any]) -> str:
    return {None: "-", True: "yes", False: "no"}[row["grows"]]


def _long(row: dict[str, Any]) -> dict[str, str]:
    options = ", ".join(f"{name}={value}" for name, value in row["options"].items())
    if row["recurrence"] == ENCODER:
        return {
            "encoder": row["equation"],
            "state": "none: it reads a whole text at once",
            "source": row["source"],
            "options": options or "none",
        }
    return {
        "recurrence": f"{row['recurrence']}: {row['equation']}",
        "state": f"{_state(row)} at width {row['d_model']}; grows with the text: {_grows(row)}",
        **_work(row),
        "composition": row["composition"],
        "source": row["source"],
        "options": options or "none",
        **_evidence(row["name"]),
    }


def _work(row: dict[str, Any]) -> dict[str, str]:
    if row["weights"] is None:
        return {"weights": f"none at this width: {row['refused']}"}
    flops = f"{row['flops_per_token']:,} a token, over {_SHORT:,} tokens"
    return {"weights": f"{row['weights']:,}", "FLOPs": flops}


def _evidence(name: str) -> dict[str, str]:
    """What was measured of a mixer, by what it is good at, bad at, and neither."""
    from linstate.bench.compare import evidence

    run = evidence.measured()
    found = evidence.findings(run, name) if run else []
    said = {
        label: "; ".join(finding.text for finding in found if finding.good is good)
        for label, good in (("good at", True), ("bad at", False), ("measured", None))
    }
    return {label: text or "nothing measured says so" for label, text in said.items()}


def as_markdown(found: list[dict[str, Any]]) -> str:
    """The table as docs/models.md shows it."""
    lines = ["| mixer | recurrence | equation | state | grows | source |", "|---|---|---|---|---|---|"]
    for row in found:
        cells = (
            f"`{row['name']}`",
            row["recurrence"],
            f"`{row['equation']}`",
            _state(row),
            _grows(row),
            row["source"],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_all(d_model: int = 512) -> list[dict[str, Any]]:
    """What there is to say about every mixer and then every encoder at a width, JSON-able."""
    from linstate.mixers import encoders

    mixed = [_mixer(name, d_model) for name in _names()]
    return mixed + [_encoder(name, d_model) for name in encoders.names()]


def _table(found: list[dict[str, Any]], d_model: int) -> None:
    from rich.table import Table

    table = Table(title=f"one layer of width {d_model}", title_justify="left", padding=(0, 1))
    for name in ("mixer", "recurrence", "equation"):
        table.add_column(name, overflow="fold")
    table.add_column("state", justify="right", no_wrap=True)
    table.add_column("grows", no_wrap=True)
    table.add_column("source", overflow="fold")
    for row in found:
        cells = (row["name"], row["recurrence"], row["equation"], _state(row), _grows(row), row["source"])
        table.add_row(*(cell.replace("[", r"\[") for cell in cells))
    common.results().print(table)
