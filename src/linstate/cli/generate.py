"""``linstate generate``: text from a prompt or a state on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linstate.cli import common

if TYPE_CHECKING:
    from linstate.engine import Generation

EXAMPLES = (
    "linstate generate 'def main():' --max-tokens 100",
    "linstate generate --state notes.state --temperature 0.8 --seed 1 -o further.state",
    "head -c 2000 story.txt | linstate generate -",
)


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", help="Text to go on from; '-' is standard input. It is not printed."
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option("--state", "-s", metavar="FILE", help="State to go on from, before the prompt."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Save the state behind the last token here."),
    ] = None,
    model: common.Model = common.POCKET,
    weights: common.Weights = None,
    dtype: common.Dtype = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 200,
    temperature: Annotated[
        float, typer.Option(min=0, help="0: always the likeliest token; 1: as the model says.")
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option(min=0, help="Choose among this many likeliest tokens; 0: among all.")
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Choose among the likeliest tokens that together have this probability."
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed chooses the same tokens again.")] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End before this text; may be given several times."),
    ] = None,
    force: common.Force = False,
    json: common.Json = False,
) -> None:
    """Generate text from a prompt, from a state, or from both.

    The text goes to standard output while it is made. With --out the state behind it is saved: generating from there
    goes on as if it had never stopped.
    """
    if prompt is None and state is None:
        raise typer.BadParameter("give a prompt, '-' for standard input, or --state", param_hint="PROMPT")
    if out is not None:
        common.check_output(out, force=force, same_as=state)
    from linstate.engine import Generation, Sampling

    made = common.load_model(model, weights, dtype)
    sampling = Sampling(temperature, top_k, top_p, seed)
    text = sys.stdin.read() if prompt == "-" else prompt or ""
    loaded = made.load_state(state) if state else made.empty_state()
    last = Generation("", (), made.read(text, loaded) if text else loaded)
    marks, interrupted = tuple(stop or ()), False

    def steps() -> Iterator[Generation]:
        nonlocal last, interrupted
        try:
            for step in made.stream(last.state, max_tokens=max_tokens, sampling=sampling, stop=marks):
                last = step
                yield step
        except KeyboardInterrupt:
            interrupted = True

    common.stream_text(steps(), marks, show=not json)
    if out is not None:
        last.state.save(out)
    if json:
        common.print_json(
            {
                "text": last.text,
                "ids": list(last.ids),
                "position": last.state.position,
                "id": last.state.id,
                "state": None if out is None else str(out),
            }
        )
    elif sys.stdout.isatty():
        print()
    if interrupted:
        raise typer.Exit(130)
