"""``linstate compare``: all architectures side by side."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linstate.cli import common
from linstate.errors import InputError

if TYPE_CHECKING:
    from linstate.bench.compare.jobs import Run

EXAMPLES = (
    "linstate compare --json compare.json --plots pictures",
    "linstate compare --only capacity,tasks --mixers deltanet,mamba2",
    "linstate compare --full --json full.json --resume --report full.md",
)


def compare(
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Train a handful of mixers, in minutes: so it is without --full, too."),
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Train all of them, with learning rates swept, in an hour.")
    ] = False,
    only: Annotated[
        str,
        typer.Option(
            metavar="NAMES", help="Only these of cost, speed, capacity and tasks, with commas between."
        ),
    ] = "",
    mixers: Annotated[
        str,
        typer.Option(
            metavar="NAMES", help="Only these mixers, in every part; softmax attention is always there."
        ),
    ] = "",
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Keep what is measured here, after every step."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with what the file of --json holds, with the settings it has."),
    ] = False,
    plots: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Draw pictures into this folder.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write all of it as Markdown, its pictures in a folder of the same name."
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that train, a core each; 0: one for each core, at most 8.")
    ] = 0,
    force: common.Force = False,
) -> None:
    """Compare all architectures, at equal numbers of weights, softmax attention among them.

    Cost: state and FLOPs against length. Speed: tokens per second on this machine, reading and decoding. Capacity: how many
    pairs a bare recurrence recalls, against theory. Tasks: what tiny models learn of associative recall, selective
    copying and parity. Seeds are fixed. An interrupted run goes on with --resume. docs/compare.md is such a report.
    """
    from linstate.bench.compare.jobs import Run, Settings

    if quick and full:
        raise InputError("choose one of --quick and --full")
    settings = Settings.of(full=full, only=_names(only), mixers_=_names(mixers))
    if resume and json is None:
        raise InputError("--resume needs --json: the file to go on with")
    if resume and json is not None and json.exists():
        run = Run.load(json)
        if run.settings != settings and (only or mixers or full or quick):
            raise InputError(f"{json} was measured by another command: {run.settings.command()}")
    else:
        run = Run(settings, json)
    for path in (json, report):
        if path is not None:
            common.check_output(path, force=force or resume)
    _check_pictures(plots or report)
    with _watching(run) as on_done:
        run.go_on(workers or min(8, _cores()), on_done)
    _show(run)
    _write(run, plots, report)
    common.messages().print(f"measured in {run.seconds:.0f} s: {run.settings.command()}", markup=False)


def _names(given: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in given.split(",") if name.strip())


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_pictures(wanted: Path | None) -> None:
    from importlib.util import find_spec

    if wanted is not None and find_spec("matplotlib") is None:
        raise InputError("pictures need matplotlib: pip install 'linstate[plot]'")


@contextmanager
def _watching(run: Run) -> Iterator[Any]:
    """A bar on a terminal, else a line for each measurement."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = common.messages()
    todo = len(run.missing())
    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[said]}"),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    task = bar.add_task("", total=todo, said="")
    done = 0

    def on_done(key: str, value: Any) -> None:
        nonlocal done
        done += 1
        right = value.get("accuracy") if isinstance(value, dict) else None
        said = f"{key}: {', '.join(f'{name} {share:.0%}' for name, share in right.items())}" if right else key
        bar.update(task, completed=done, said=said)
        if bar.disable and (right or not key.startswith("cost/")):
            console.print(f"{done} of {todo}, {run.seconds:.0f} s: {said}", markup=False)

    with bar:
        yield on_done


def _show(run: Run) -> None:
    from rich.table import Table

    from linstate.bench.compare import tables
    from linstate.bench.compare.tasks import TASKS

    console = common.results()
    for table in tables.tables(run):
        shown = Table(
            title=table.title,
            title_justify="left",
            padding=(0, 1),
            caption=table.note,
            caption_justify="left",
        )
        for i, column in enumerate(table.columns):
            shown.add_column(column.replace("[", r"\["), justify="right" if i else "left", overflow="fold")
        for row in table.rows:
            shown.add_row(*(cell.replace("`", "").replace("[", r"\[") for cell in row))
        console.print(shown)
    left = {task: tables.untrained(run, task) for task in TASKS if tables.best(run, task)}
    for task, names in left.items():
        if names:
            console.print(f"{task}: not trained: {', '.join(names)} (--full trains all)", markup=False)


def _write(run: Run, plots: Path | None, report: Path | None) -> None:
    if plots is None and report is None:
        return
    from linstate.bench.compare import pictures
    from linstate.bench.compare.report import markdown
    from linstate.files import write_atomically

    console = common.messages()
    if plots is not None:
        console.print(f"{len(pictures.draw(run, plots))} pictures in {plots}", markup=False)
    if report is not None:
        pictures.draw(run, report.with_suffix(""))
        write_atomically(report, markdown(run, report.stem).encode())
        console.print(f"report in {report}", markup=False)
