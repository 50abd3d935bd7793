"""``linstate ask``: answers from a state alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from linstate.cli import common

if TYPE_CHECKING:
    from linstate.engine import LanguageModel

EXAMPLES = (
    "linstate ask notes.state 'colour of the door'",
    "linstate ask notes.state --file questions.txt --json",
    "linstate ask --library 'colour of the door'",
)


def ask(
    state: Annotated[
        str,
        typer.Argument(
            metavar="STATE",
            help="State file, as written by 'linstate read'. With --library, the first QUESTION.",
        ),
    ],
    questions: Annotated[
        list[str] | None, typer.Argument(metavar="QUESTION", help="Each is answered for itself.")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option("--file", metavar="FILE", help="Questions, one a line; '-' is standard input."),
    ] = None,
    model: common.Model = common.POCKET,
    weights: common.Weights = None,
    dtype: common.Dtype = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 48,
    library: Annotated[
        bool,
        typer.Option("--library", help="Find the best states of the library, and answer from them."),
    ] = False,
    states: Annotated[
        int, typer.Option(min=1, max=8, help="With --library: from so many states, put together.")
    ] = 1,
    method: Annotated[
        Literal["sum", "average", "caso", "picaso"] | None,
        typer.Option(
            help="With --library and several states: how they are put together; by default picaso if the model allows it, else sum."
        ),
    ] = None,
    where: common.Store = None,
    catalogue: common.Catalogue = None,
    tenant: common.Tenant = "default",
    json: common.Json = False,
) -> None:
    """Answer questions about what a state has read.

    Nothing is read again and the state file stays as it is; the questions do not see each other. One question prints
    its answer; several print a line each, question and answer with a tab between. With --library the states are found
    among the stored ones, and each answer says from which it is.
    """
    asked = [*(questions or []), *(common.questions_in(file) if file else [])]
    if library:
        asked = [state, *asked]
    if not asked:
        raise typer.BadParameter("give a question, or --file with one question a line", param_hint="QUESTION")
    made = common.load_model(model, weights, dtype)
    if library:
        with common.open_store(where, catalogue) as opened:
            _from_library(opened, made, tenant, asked, states, method, max_tokens, json)
        return
    loaded = made.load_state(Path(state))
    answers = []
    for question in asked:
        answer = made.ask(question, loaded, max_tokens=max_tokens)
        answers.append({"question": question, "answer": answer})
        if not json:
            common.write_text(f"{answer}\n" if len(asked) == 1 else f"{question}\t{answer}\n")
    if json:
        common.print_json({"state": str(state), "id": loaded.id, "answers": answers})


def _from_library(
    store: Any,
    model: LanguageModel,
    tenant: str,
    asked: list[str],
    states: int,
    method: Literal["sum", "average", "caso", "picaso"] | None,
    max_tokens: int,
    json: bool,
) -> None:
    from linstate.memory import Library

    library, answers = Library(store, model, tenant=tenant), []
    for question in asked:
        answer = library.ask(question, states=states, method=method, max_tokens=max_tokens)
        sources = [
            {"id": f.handle.id, "name": f.handle.name, "passage": f.passage.text} for f in answer.sources
        ]
        answers.append(
            {
                "question": question,
                "answer": answer.text,
                "sources": sources,
                "composition": answer.composition,
            }
        )
        if not json:
            named = ", ".join(f.handle.name or f.handle.id[:12] for f in answer.sources)
            how = "" if answer.composition == "alone" else f" ({answer.method}, {answer.composition})"
            line = f"{answer.text}\t[{named}{how}]\n"
            common.write_text(line if len(asked) == 1 else f"{question}\t{line}")
    if json:
        common.print_json({"answers": answers})
