"""``linstate bench model --device cuda``: whole models on a GPU, beside the same weights in transformers with FLA's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from linstate.cli import common

if TYPE_CHECKING:
    from linstate.bench.gpu import Rates
    from linstate.bench.models_cuda import Row


def models_on_cuda(names: list[str], quick: bool, peers: bool, as_json: bool) -> None:
    """Measure everything, print a table for people and one JSON line."""
    import torch

    from linstate.bench import gpu, models_cuda

    gpu.require("bench model")
    plan = models_cuda.Plan(peers=peers)
    plan = plan.quick() if quick else plan
    device = gpu.Gpu()
    rates = gpu.rates(device, torch.bfloat16)
    rows: list[Row] = []
    say = common.messages()
    try:
        for row in models_cuda.sweep(names, plan, rates, device):
            rows.append(row)
            say.print(f"{row.model}, {row.mode}, B={row.batch}, T={row.tokens:,}: {row.who}", markup=False)
    except KeyboardInterrupt:
        say.print("stopped; what was measured until then:")
    if not as_json:
        show(torch.cuda.get_device_name(), rates, rows)
    common.print_line({"device": torch.cuda.get_device_name(), **models_cuda.as_json(plan, rates, rows)})


def show(device: str, rates: Rates, rows: Sequence[Row]) -> None:
    """The table for people."""
    console = common.results()
    console.print(
        f"{device}: a copy {rates.bytes / 1e9:,.0f} GB/s, torch.mm {rates.flops / 1e12:,.0f} TFLOP/s; medians, measured in turn",
        markup=False,
        soft_wrap=True,
    )
    for model in dict.fromkeys(row.model for row in rows):
        console.print(f"\n{model}", markup=False)
        console.print(_table([row for row in rows if row.model == model]))


def _table(rows: Sequence[Row]) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2))
    for name in ("", "B", "T", "who", "ms", "tokens/s", "x ours", "of GEMM", "of bandwidth", "launches"):
        table.add_column(name, justify="left" if name in ("", "who") else "right", no_wrap=True)
    table.add_column("")
    for row in rows:
        table.add_row(
            *(row.mode, f"{row.batch}", f"{row.tokens:,}", row.who),
            "-" if row.ms is None else f"{row.ms:.4g}",
            "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
            "-" if row.times_ours is None else f"{row.times_ours:.2f}",
            "" if row.of_gemm is None else f"{row.of_gemm:.1%}",
            "" if row.of_bandwidth is None else f"{row.of_bandwidth:.1%}",
            "" if row.launches is None else f"{row.launches}",
            row.reason or "",
        )
    return table
