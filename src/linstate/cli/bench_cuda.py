"""``linstate bench ops --device cuda``: the Triton programs beside FLA's, and what memory and matmuls do at best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from linstate.cli import common
from linstate.errors import InputError

if TYPE_CHECKING:
    from linstate.bench.cuda import Row
    from linstate.bench.gpu import Rates


def ops_on_cuda(
    tokens: tuple[int, ...] | None,
    dtypes: Sequence[str],
    size: int,
    rounds: int,
    only: str,
    modes: Sequence[str],
    as_json: bool,
) -> None:
    """Measure everything, or only some modes, print a table for people and one JSON line. ``tokens``: None for the lengths of a GPU."""
    import torch

    from linstate.bench import cuda, gpu

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if len(dtypes) != 1 or dtypes[0] not in names:
        raise InputError(
            f"--dtype with --device cuda takes one of {', '.join(names)}; got {','.join(dtypes)!r}"
        )
    gpu.require("bench ops")
    plan = cuda.Plan(
        tokens=cuda.TOKENS if tokens is None else tokens,
        size=size,
        dtype=names[dtypes[0]],
        rounds=max(rounds, 5),
        only=only,
        cold=not modes or "cold" in modes,
        modes=tuple(m for m in modes if m != "cold") if modes else ("step",) if tokens == () else cuda.MODES,
    )
    rows: list[Row] = []
    device = gpu.Gpu()
    rates = gpu.rates(device, plan.dtype)
    say = common.messages()
    try:
        for found in cuda.sweep(plan, rates, device):
            rows += found
            row = found[0]
            say.print(
                f"{row.model}, {row.mode}, B={row.batch}, H={row.heads}, T={row.tokens:,}", markup=False
            )
        if plan.cold:
            for one in cuda.cold_rows(plan):
                rows.append(one)
                say.print(f"{one.model}, first call of {one.who}", markup=False)
    except KeyboardInterrupt:
        say.print("stopped; what was measured until then:")
    if not as_json:
        _show(torch.cuda.get_device_name(), rates, rows)
    common.print_line(cuda.as_json(plan, rates, rows))


def _show(device: str, rates: Rates, rows: Sequence[Row]) -> None:
    console = common.results()
    console.print(
        f"{device}: a copy {rates.bytes / 1e9:,.0f} GB/s, torch.mm {rates.flops / 1e12:,.0f} TFLOP/s; medians, measured in turn",
        markup=False,
        soft_wrap=True,
    )
    for model, mode in dict.fromkeys((row.model, row.mode) for row in rows):
        console.print(f"\n{model}, {mode}", markup=False)
        console.print(_table([row for row in rows if (row.model, row.mode) == (model, mode)]))


def _table(rows: Sequence[Row]) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2))
    for name in (
        "B",
        "H",
        "T",
        "who",
        "ms",
        "x ours",
        "in a graph",
        "x ours",
        "of bandwidth",
        "of GEMM",
        "launches",
    ):
        table.add_column(name, justify="left" if name == "who" else "right", no_wrap=True)
    table.add_column("")
    for row in rows:
        table.add_row(
            *(f"{row.batch}", f"{row.heads}", f"{row.tokens:,}", row.who),
            "-" if row.ms is None else f"{row.ms:.4g}",
            "-" if row.times_ours is None else f"{row.times_ours:.2f}",
            "-" if row.graph_ms is None else f"{row.graph_ms:.4g}",
            "-" if row.times_ours_in_graph is None else f"{row.times_ours_in_graph:.2f}",
            "-" if row.of_bandwidth is None else f"{row.of_bandwidth:.1%}",
            "-" if row.of_gemm is None else f"{row.of_gemm:.1%}",
            "" if row.launches is None else f"{row.launches}",
            row.reason or "",
        )
    return table
