"""``linstate models``: the checkpoint families that can be loaded."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from linstate.cli import common

EXAMPLES = ("linstate models", "linstate models --json")

HELD = (
    "Each language model is held to the library that writes it, on small random checkpoints: logits in float32 and bfloat16, greedy text,"
    " padded batches, reading in pieces; saved, restored, forked and rolled back to the bit; weights there and back; every"
    " setting that its configuration can have counts or is refused by name."
)
"""What the tests of every family say (tests/families/test_families.py)."""


def models(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in Markdown.")] = False,
    json: common.Json = False,
) -> None:
    """List the checkpoint families that can be loaded.

    Any command's --model takes a folder with such a checkpoint (config.json, tokenizer.json, safetensors), or its name
    on the Hugging Face Hub. Each family is one file in the package's folder models/families, and is tested against the
    library that writes it; the last column says with which of its options.
    """
    found = table_of_all()
    if json:
        common.print_json({"held_to": HELD, "families": found})
    elif markdown:
        print(as_markdown(found))
    else:
        _table(found)


def table_of_all() -> list[dict[str, Any]]:
    """What there is to say about every family but our own, JSON-able."""
    from linstate.models.families import all_families, encoder_families

    families = sorted(
        all_families(), key=lambda family: (family.library != "transformers", family.model_types)
    )
    return [
        {
            "model_types": list(family.model_types),
            "kind": kind,
            "library": family.library,
            "mixers": list(family.mixers),
            "checked": family.checked,
        }
        for kind, some in (("language model", families), ("encoder", encoder_families()))
        for family in some
        if family.library != "linstate"
    ]


def _library(row: dict[str, Any]) -> str:
    return f"{row['library']}, an encoder" if row["kind"] == "encoder" else str(row["library"])


def as_markdown(found: list[dict[str, Any]]) -> str:
    """The table as docs/models.md shows it."""
    lines = ["| model_type | written by | mixers | checked with |", "|---|---|---|---|"]
    for row in found:
        types, mixers = (", ".join(f"`{name}`" for name in row[key]) for key in ("model_types", "mixers"))
        lines.append(f"| {types} | {_library(row)} | {mixers} | {row['checked']} |")
    return "\n".join(lines)


def _table(found: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(caption=HELD, caption_justify="left", padding=(0, 1))
    for name in ("model_type", "written by", "mixers", "checked with"):
        table.add_column(name, overflow="fold")
    for row in found:
        table.add_row(", ".join(row["model_types"]), _library(row), ", ".join(row["mixers"]), row["checked"])
    common.results().print(table)
