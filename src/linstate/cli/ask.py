"""``linstate ask``: answers from a state alone."""

from __future__ import annotations

from typing import Annotated

import typer

from linstate.cli import common

EXAMPLES = (
    "linstate ask notes.state 'colour of the door'",
    "linstate ask notes.state --file questions.txt --json",
)


def ask(
    state: common.StateFile,
    questions: Annotated[
        list[str] | None, typer.Argument(metavar="QUESTION", help="Each is answered for itself.")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option("--file", metavar="FILE", help="Questions, one a line; '-' is standard input."),
    ] = None,
    model: common.Model = common.POCKET,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 48,
    json: common.Json = False,
) -> None:
    """Answer questions about what a state has read.

    Nothing is read again and the state file stays as it is; the questions do not see each other. One question prints
    its answer; several print a line each, question and answer with a tab between.
    """
    asked = [*(questions or []), *(common.questions_in(file) if file else [])]
    if not asked:
        raise typer.BadParameter("give a question, or --file with one question a line", param_hint="QUESTION")
    made = common.load_model(model)
    loaded = made.load_state(state)
    answers = []
    for question in asked:
        answer = made.ask(question, loaded, max_tokens=max_tokens)
        answers.append({"question": question, "answer": answer})
        if not json:
            common.write_text(f"{answer}\n" if len(asked) == 1 else f"{question}\t{answer}\n")
    if json:
        common.print_json({"state": str(state), "id": loaded.id, "answers": answers})
