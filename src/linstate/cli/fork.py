"""``linstate fork``: a second state that goes on from the same point."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linstate.cli import common

EXAMPLES = ("linstate fork notes.state -o draft.state --title 'before the change'",)


def fork(
    state: common.StateFile,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="State file to write.")],
    title: Annotated[str | None, typer.Option(metavar="TEXT", help="A title for the fork.")] = None,
    force: common.Force = False,
    json: common.Json = False,
) -> None:
    """Write a second state that goes on from the same point.

    Its lineage names the state that it came from; from then on the two know nothing of each other.
    """
    from linstate.state import State

    common.check_output(out, force=force)
    forked = State.load(state).fork(**({} if title is None else {"title": title}))
    written = forked.save(out)
    if json:
        common.print_json(
            {"state": str(out), "id": forked.id, "lineage": list(forked.lineage), "file_bytes": written}
        )
    else:
        common.messages().print(f"{out}: a fork of {state} at position {forked.position:,}", markup=False)
