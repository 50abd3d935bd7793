"""``linstate simulate``: what a service would do, by models of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linstate.cli import common
from linstate.errors import InputError

app = typer.Typer(help="What a service would do, by models of it.", no_args_is_help=True)
EXAMPLES = [
    "linstate simulate prefill",
    "linstate simulate prefill --profiles recurrent,dense --gbps 0.1,1,10 --sites 1,100 --plot prefill.png",
]


@app.callback()
def simulate() -> None:
    """What a service would do, by models of it."""


@app.command()
def prefill(
    profiles: Annotated[
        str, typer.Option(help="Models, with commas between: hybrid, recurrent, recurrent int8, dense.")
    ] = "recurrent,recurrent int8,hybrid,dense",
    gbps: Annotated[
        str, typer.Option(help="Uplinks of the hub that reads, in Gbit/s, with commas between.")
    ] = "0.1,1,10,100",
    sites: Annotated[
        str, typer.Option(help="Sites that share the uplink, with commas between.")
    ] = "1,10,100",
    decode: Annotated[float, typer.Option(help="Requests/s that an instance decodes.", min=0.01)] = 0.75,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw it (extra 'plot').")
    ] = None,
    json: common.Json = False,
) -> None:
    """Requests a second when long prompts are read elsewhere and shipped as states (arXiv 2604.15039).

    First the paper's own table beside what the model makes of its inputs; then what it would take for other models, links and
    numbers of sites.
    """
    from linstate.bench import prefill as model

    names = [name.strip() for name in profiles.split(",")]
    fleet = model.paper_fleet(decode)
    table = model.reproduce(decode)
    points = model.sweep(names, _numbers(gbps, "--gbps"), [int(n) for n in _numbers(sites, "--sites")], fleet)
    if plot is not None:
        try:
            model.draw(fleet, plot)
        except ImportError:
            raise InputError("pictures need matplotlib: pip install 'linstate[plot]'") from None
    if json:
        common.print_json({"paper": model.PAPER, "model": table, "points": model.as_json(points)})
        return
    _print(model.PAPER, table, points)


def _numbers(text: str, option: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) <= 0:
        raise InputError(f"{option}: expected numbers above 0 with commas between, got {text!r}")
    return found


def _print(paper: dict[str, float], table: dict[str, float], points: list) -> None:
    from rich.table import Table

    console = common.results()
    first = Table(box=None, padding=(0, 2))
    for name in ("arXiv 2604.15039", "paper", "model", "off by"):
        first.add_column(name, justify="left" if name.startswith("arXiv") else "right")
    said = {
        "homogeneous": "96 H20, requests/s (calibrated to it)",
        "naive": "32 H200 read all, 64 H20 decode, requests/s",
        "offloading": "32 H200 read what is long, requests/s",
        "threshold": "long: more tokens than",
        "gbps": "the link carries, Gbit/s",
    }
    for key, label in said.items():
        shown = (
            f"{value:,.0f}" if key == "threshold" else f"{value:.2f}" for value in (paper[key], table[key])
        )
        first.add_row(label, *shown, f"{table[key] / paper[key] - 1:+.1%}")
    console.print(first)
    second = Table(box=None, padding=(0, 2))
    for name in (
        "model",
        "sites",
        "uplink Gbit/s",
        "requests/s a site",
        "x home alone",
        "offloaded",
        "above",
        "carries Gbit/s",
        "limit",
    ):
        second.add_column(name, justify="left" if name in ("model", "limit") else "right")
    for point in points:
        plan = point.plan
        second.add_row(
            point.profile,
            str(point.sites),
            f"{point.uplink_gbps:g}",
            f"{plan.rate:.2f}",
            f"{point.gain:.2f}",
            f"{plan.offloaded:.0%}",
            f"{plan.threshold:,.0f}",
            f"{plan.gbps * point.sites:.2f}",
            plan.limit,
        )
    console.print()
    console.print(second)
