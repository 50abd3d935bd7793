"""The picture of a sweep: a small plot for each case, time per token and head against length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linstate.bench.ops import Cell, Crossover, Row, crossovers

COLOURS = {
    "native": "#0b5fa5",
    "torch": "#6baed6",
    "transformers": "#d95f0e",
    "FLA naive": "#756bb1",
    "softmax": "#636363",
}
_DASHES = ("-", "--", ":", "-.")
_COLUMNS = 4


def draw(cells: Sequence[Cell], title: str, file: Path) -> None:
    """Write a picture of the cells; matplotlib (extra ``plot``) must be there."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, str], list[Row]] = {}
    for cell in cells:
        panels.setdefault((cell.dtype, cell.case), []).extend(cell.rows)
    crossing = {(one.dtype, one.case): one for one in reversed(crossovers(cells))}  # ours: the first
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(
        lines,
        columns,
        figsize=(3.6 * columns, 2.9 * lines + 0.9),
        squeeze=False,
        layout="constrained",
    )
    legend: dict[str, Any] = {}
    for number, ((dtype, case), rows) in enumerate(panels.items()):
        axes = grid[number // columns][number % columns]
        legend |= _panel(axes, rows, crossing.get((dtype, case)))
        axes.set_title(f"{rows[0].model}\n{case}, {dtype}", fontsize=8.5)
        if number % columns == 0:
            axes.set_ylabel("µs per token and head", fontsize=8)
        if number + columns >= len(panels):
            axes.set_xlabel("tokens", fontsize=8)
    for number in range(len(panels), lines * columns):
        grid[number // columns][number % columns].set_axis_off()
    figure.suptitle(title, fontsize=9)
    kinds = list(COLOURS)
    legend = dict(
        sorted(legend.items(), key=lambda item: [item[0].startswith(k) for k in kinds], reverse=True)
    )
    figure.legend(
        legend.values(),
        legend.keys(),
        loc="outside lower center",
        ncols=len(legend),
        fontsize=8.5,
        frameon=False,
    )
    figure.savefig(file, dpi=160)
    pyplot.close(figure)


def _panel(axes: Any, rows: list[Row], crossing: Crossover | None) -> dict[str, Any]:
    from matplotlib.ticker import LogLocator

    made = {}
    kinds: dict[str, int] = {}
    for who in dict.fromkeys(row.who for row in rows):
        points = sorted((row.tokens, row.us_per_token_head) for row in rows if row.who == who)
        kind = next(row.kind for row in rows if row.who == who)
        style = _DASHES[kinds.get(kind, 0) % len(_DASHES)]
        kinds[kind] = kinds.get(kind, 0) + 1
        (made[who],) = axes.plot(
            [t for t, _ in points],
            [us for _, us in points],
            style,
            color=COLOURS[kind],
            marker="o",
            markersize=3,
            linewidth=2.2 if kind == "native" else 1.3,
        )
    ticks = sorted({row.tokens for row in rows})
    if crossing is not None and crossing.tokens is not None:
        axes.axvline(crossing.tokens, color="#bbbbbb", linewidth=0.8, zorder=0)
        on_the_left = crossing.tokens**2 > ticks[0] * ticks[-1]
        axes.annotate(
            f"{crossing.who} ahead of softmax\nfrom {crossing.tokens:,} tokens",
            (crossing.tokens, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(-3 if on_the_left else 3, 0),
            textcoords="offset points",
            ha="right" if on_the_left else "left",
            fontsize=6.5,
            color="#777777",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0.55 * min(row.us_per_token_head for row in rows))  # room for the words below
    axes.set_xticks(ticks, [f"{t // 1024}k" if t % 1024 == 0 else str(t) for t in ticks])
    axes.grid(True, which="major", linewidth=0.3)
    axes.tick_params(labelsize=7.5)
    axes.minorticks_off()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return made
