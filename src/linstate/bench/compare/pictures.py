"""The pictures of a run, one for each section, and one for each task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from linstate.bench.compare import capacity, cost, sizes, tables
from linstate.bench.compare.jobs import Run
from linstate.bench.compare.tasks import TASKS


def draw(run: Run, folder: Path) -> dict[str, Path]:
    """Draw what has been measured into ``folder``; the files by the name of their table. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for name, how in (("cost", _cost), ("speed", _speed), ("capacity", _capacity)):
        if tables.part(run, name):
            made[name] = _save(how(run), folder / f"{name}.png")
    for task in TASKS:
        if tables.best(run, task):
            made[task] = _save(_task(run, task), folder / f"{task}.png")
    return made


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    part = path.with_name(f".{path.stem}.part.png")
    figure.savefig(part, dpi=100, metadata={"Software": None})
    part.replace(path)
    plt.close(figure)
    return path


def _figure(columns: int, height: float = 4.5) -> tuple[Any, list[Any]]:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, columns, figsize=(5.5 * columns, height), layout="constrained", squeeze=False
    )
    for each in axes[0]:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.3)
    return figure, list(axes[0])


def _cost(run: Run) -> Any:
    figure, (left, right) = _figure(2, 6)
    for axes, what, label in ((left, "state_bytes", "bytes of state"), (right, "flops", "FLOPs a token")):
        for name, found in tables.part(run, "cost").items():
            values = list(found[what].values())
            known = name == sizes.BASE or values[-1] > 1.5 * values[0]
            axes.plot(
                cost.LENGTHS,
                values,
                color="tab:red" if name == sizes.BASE else None if known else "0.6",
                linewidth=2.5 if name == sizes.BASE else 1,
            )
            axes.annotate(f" {name}", (cost.LENGTHS[-1], values[-1]), fontsize=6, va="center")
        axes.set(xscale="log", yscale="log", xlabel="tokens read", ylabel=label)
    figure.suptitle(f"One block of width {cost.D_MODEL}")
    return figure


def _speed(run: Run) -> Any:
    found = tables.speeds(run)
    figure, panels = _figure(2, max(3.0, 0.22 * len(found)))
    for axes, what in zip(panels, ("prefill", "decode"), strict=True):
        lengths = list(next(iter(found.values()))[what])
        names = sorted(found, key=lambda name: found[name][what][lengths[-1]]["times_attention"])
        for length in lengths:
            axes.scatter(
                [found[name][what][length]["times_attention"] for name in names],
                names,
                s=18,
                label=f"{int(length):,} tokens",
            )
        axes.axvline(1, color="tab:red")
        axes.set(xscale="log", title=what, xlabel="times the speed of softmax attention")
        for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            axis(lambda value, _: f"{value:g}")
        axes.tick_params(axis="y", labelsize=7)
        axes.legend(frameon=False, fontsize=8)
    return figure


def _capacity(run: Run) -> Any:
    figure, panels = _figure(len(capacity.KINDS))
    found = tables.part(run, "capacity")
    for axes, kind in zip(panels, capacity.KINDS, strict=True):
        for name in capacity.CASES:
            if measured := found.get(f"{name}/{kind}"):
                axes.plot(capacity.PAIRS, list(measured["recalled"].values()), marker=".", label=name)
        axes.axvline(
            capacity.theory(kind), color="0.3", linestyle="--", label="theory, sum of outer products"
        )
        axes.set(
            xscale="log",
            xlabel="pairs written",
            ylabel="share recalled",
            title=f"{kind} keys, K = V = {capacity.SIZE}",
        )
    panels[-1].legend(frameon=False, fontsize=7)
    return figure


def _task(run: Run, task: str) -> Any:
    found = tables.best(run, task)
    names = sorted(found, key=lambda name: found[name]["accuracy"][TASKS[task].judged])
    tests = list(TASKS[task].test)
    figure, (axes,) = _figure(1, max(2.5, 0.5 + 0.3 * len(names)))
    for place, test in enumerate(tests):
        heights = [row + 0.25 * (place - (len(tests) - 1) / 2) for row in range(len(names))]
        axes.barh(heights, [found[name]["accuracy"][test] for name in names], height=0.22, label=test)
    axes.axvline(TASKS[task].chance, color="0.3", linestyle="--", label="guessing")
    axes.set(xlim=(0, 1), xlabel="right answers", title=task, yticks=range(len(names)), yticklabels=names)
    axes.legend(frameon=False, fontsize=7, loc="lower right")
    return figure
