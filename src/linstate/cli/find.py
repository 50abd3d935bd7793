"""``linstate find``: which stored states have read about something."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from linstate.cli import common

EXAMPLES = (
    "linstate find 'broken lamp in the hall'",
    "linstate find 'ticket 4711' --by words",
)


def find(
    question: Annotated[
        str | None, typer.Argument(metavar="QUESTION", help="What they should have read about.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many states.")] = 5,
    by: Annotated[
        Literal["hybrid", "words", "vectors"] | None,
        typer.Option(
            help="By words, by meaning (vectors), or both joined by reciprocal rank. Default: by words, and by meaning if "
            "no word was read.",
            show_default=False,
        ),
    ] = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="First make the index anew from what the store holds.")
    ] = False,
    model: common.Model = common.POCKET,
    weights: common.Weights = None,
    dtype: common.Dtype = None,
    where: common.Store = None,
    catalogue: common.Catalogue = None,
    tenant: common.Tenant = "default",
    json: common.Json = False,
) -> None:
    """Find stored states by what they have read; each is shown with the passage that matched.

    Only states whose token ids were kept can be found: those of 'linstate store add'. Needs the extra 'memory'.
    """
    from linstate.memory import Library

    if question is None and not rebuild:
        raise typer.BadParameter("say what to look for", param_hint="QUESTION")
    made = common.load_model(model, weights, dtype)
    with common.open_store(where, catalogue) as opened:
        library = Library(opened, made, tenant=tenant)
        rebuilt = library.rebuild() if rebuild else None
        found = [] if question is None else library.find(question, limit=limit, how=by)
    if json:
        states = [{"state": f.handle.info(), "passage": vars(f.passage), "score": f.score} for f in found]
        common.print_json({"found": states} if rebuilt is None else {"found": states, "indexed": rebuilt})
        return
    if rebuilt is not None:
        common.messages().print(f"{rebuilt:,} states indexed")
    if question is not None and not found:
        common.messages().print("nothing in the library has read about that")
    for one in found:
        passage = " ".join(one.passage.text.split())
        named = one.handle.name or one.handle.id[:12]
        print(common.printable(f"{named}\t{one.passage.begin}-{one.passage.end}\t{passage}"))
