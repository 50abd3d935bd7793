"""``linstate train``: a model from a recipe."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from linstate.cli import common
from linstate.cli.doctor import SUMS
from linstate.errors import InputError

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from linstate.cli.reading import Stop
    from linstate.train.recipe import Recipe

EXAMPLES = (
    "linstate train recipes/pocket.toml --out runs/pocket",
    "linstate train mine.toml --out runs/mine --export my-model --dtype bf16",
)


def train(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="TOML file: the model, its data and its schedule.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FOLDER", help="Work folder; a run that stands there goes on."),
    ],
    start: Annotated[
        Path | None,
        typer.Option(
            "--start", metavar="FOLDER", help="Begin with the weights of this model, not random ones."
        ),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            "--export", metavar="FOLDER", help="Write the finished model here too, with its checksums."
        ),
    ] = None,
    dtype: Annotated[
        Literal["fp32", "bf16"], typer.Option(help="Precision of the exported weights.")
    ] = "bf16",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: as torch chooses.")] = 0,
) -> None:
    """Train a model as a recipe says, with Hugging Face's Trainer.

    The tokenizer is trained first, the text is what any Python machine has. Ctrl-C saves a checkpoint at the next
    step; the same command goes on from the newest one. FOLDER/model is then a model folder for every other command,
    FOLDER/log.jsonl holds the losses. Needs the extra 'train'.
    """
    from linstate.train.recipe import Recipe

    loaded = Recipe.load(recipe)
    loaded.config()
    if missing := [name for name in ("transformers", "accelerate") if find_spec(name) is None]:
        raise InputError(f"training needs {' and '.join(missing)}: pip install 'linstate[train]'")
    import torch

    from linstate.cli.reading import Stop

    if threads:
        torch.set_num_threads(threads)
    console = common.messages()
    console.print(f"preparing tokenizer and text in {out} (once, about a minute)", markup=False)
    from transformers.utils import logging

    from linstate.train.loop import train

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    stop = Stop()
    with ExitStack() as signals, _watching(loaded, out / "log.jsonl", stop) as callback:
        callback.at_begin = lambda: signals.enter_context(stop.listening())  # before, Ctrl-C simply ends it
        made = train(loaded, out, start=start, callbacks=[callback])
    if callback.step < loaded.steps:
        console.print(
            f"stopped at step {callback.step:,} of {loaded.steps:,}; the same command goes on", markup=False
        )
        raise typer.Exit(128 + (stop.signal or 2))
    if export is not None:
        made.save_pretrained(export, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
        _write_sums(export)
        console.print(f"exported to {export}", markup=False)
    model = out / "model"
    console.print(f"the model is in {model}; use it:  linstate generate 'def ' --model {model}", markup=False)


def _write_sums(folder: Path) -> None:
    """The digests of a model's files, as ``sha256sum`` writes them."""
    names = ("config.json", "model.safetensors", "tokenizer.json")
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


@contextmanager
def _watching(recipe: Recipe, log: Path, stop: Stop) -> Iterator[Any]:
    """A callback for the Trainer: a bar on a terminal, else a line now and then; losses into ``log``; grants a stop."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = common.messages()
    bar = Progress(
        TextColumn("step"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task("train", total=recipe.steps, said="")
    with bar, log.open("a", encoding="utf-8") as file:
        yield _callback(recipe, stop, file, bar, task)


def _callback(recipe: Recipe, stop: Stop, file: Any, bar: Any, task: Any) -> TrainerCallback:
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        """Reports steps, losses and speed."""

        step = 0

        def __init__(self) -> None:
            self.first: tuple[int, float] | None = None
            self.at_begin: Callable[[], object] = lambda: None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.at_begin()
            self.step, self.first = state.global_step, (state.global_step, time.monotonic())
            bar.reset(task, total=recipe.steps, completed=self.step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.step = state.global_step
            bar.update(task, completed=self.step)
            if stop.requested:
                control.should_save = control.should_training_stop = True

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
        ) -> None:
            assert self.first is not None
            step, began = self.first
            seconds = time.monotonic() - began
            speed = recipe.tokens_per_step * (state.global_step - step) / max(seconds, 1e-9)
            row = {
                "step": state.global_step,
                **(logs or {}),
                "seconds": round(seconds, 1),
                "tokens_per_second": round(speed),
            }
            file.write(json.dumps(row) + "\n")
            file.flush()
            losses = ", ".join(
                f"{n.replace('_', ' ')} {v:.3f}" for n, v in (logs or {}).items() if n.endswith("loss")
            )
            said = f"{losses}, {speed:,.0f} tokens/s"
            bar.update(task, said=said)
            if bar.disable:
                with suppress(BrokenPipeError):
                    print(
                        f"step {state.global_step:,} of {recipe.steps:,}: {said}", file=sys.stderr, flush=True
                    )

    return Watch()
