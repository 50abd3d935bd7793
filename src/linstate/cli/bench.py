"""``linstate bench``: measure this machine, peers in the same run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linstate.cli import bench_model, bench_states, common
from linstate.errors import InputError

if TYPE_CHECKING:
    from linstate.bench.ops import Cell, Plan, Rates, Row
    from linstate.bench.steps import Step

app = typer.Typer(help="Measure this machine, peers in turn in the same run.", no_args_is_help=True)
EXAMPLES = [
    "linstate bench ops",
    "linstate bench ops --only delta_rule --tokens 1024,4096 --dtype bfloat16 --threads 2",
    "linstate bench ops --sweep --memory --plot ops.png",
    "linstate bench ops --step --tokens none",
    "linstate bench patch --only mamba,qwen3_5 --threads 2",
    "linstate bench ops --device cuda --only delta_rule",
    "linstate bench model --quick",
    "linstate bench weights book.txt",
]
_TOKENS, _DTYPES = "256,1024,4096", "float32,bfloat16"


@app.callback()
def bench() -> None:
    """Measure this machine, peers in turn in the same run."""


app.command()(bench_states.store)
app.command()(bench_states.compose)
app.command()(bench_states.find)


@app.command()
def ops(
    tokens: Annotated[
        str, typer.Option(help="Lengths T, with commas between; 'none' for --step alone.")
    ] = _TOKENS,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Lengths from 64 to 65,536, each four times the last.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Precisions of the inputs, with commas between.")] = _DTYPES,
    heads: Annotated[int, typer.Option(help="Heads H.", min=1)] = 16,
    size: Annotated[
        int, typer.Option(help="Size of keys and values, K = V; RWKV-7 has at most 64.", min=1)
    ] = 128,
    isa: Annotated[
        str,
        typer.Option(
            help="Instruction sets of the native kernels, with commas between; without it the one in use."
        ),
    ] = "",
    threads: Annotated[
        int | None, typer.Option(help="Threads for everything; without it as many as torch takes.", min=1)
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds that count; in each everything has a turn.", min=1)] = 5,
    limit: Annotated[
        float,
        typer.Option(help="Seconds that one call may take, and all turns of one at a length.", min=0.01),
    ] = 10.0,
    only: Annotated[str, typer.Option(help="Only cases with this in their name.")] = "",
    memory: Annotated[
        bool, typer.Option("--memory", help="Also the peak of extra memory, each in a process of its own.")
    ] = False,
    step: Annotated[
        bool,
        typer.Option("--step", help="Also single tokens at batch 1, 8 and 64, beside copying the state."),
    ] = False,
    cpu_time: Annotated[
        bool,
        typer.Option(
            "--cpu-time", help="Count processor time: for one thread on a machine that others use too."
        ),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw time against length (extra 'plot').")
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="cpu, or cuda: the Triton programs beside FLA's, in --dtype bfloat16 unless said otherwise, with --tokens, "
            "--size, --rounds and --only as here."
        ),
    ] = "cpu",
    modes: Annotated[
        str,
        typer.Option(
            metavar="NAMES", help="With --device cuda: only these of forward, training, step and cold."
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Only the JSON line.")] = False,
) -> None:
    """Time each recurrence: native, our torch form, Hugging Face's and FLA's functions for it, softmax attention.

    Everything of a case is measured in turn within the same rounds, in alternating order; figures are medians. Ratios
    hold, microseconds drift with the machine. GFLOP/s count the operations of the chunked form, for everybody alike;
    their share is that of torch.mm in the same rounds. Prints a table for people and one JSON line. Ctrl-C ends it with what
    was measured. Peers that are not installed are left out (pip install 'linstate[bench]').
    """
    import time

    import torch

    from linstate.bench.ops import SWEEP, Plan
    from linstate.bench.ops import as_json as whole

    if device == "cuda":
        from linstate.cli.bench_cuda import ops_on_cuda

        lengths = None if tokens == _TOKENS else _lengths(tokens)
        dtypes = ["bfloat16"] if dtype == _DTYPES else _words(dtype)
        ops_on_cuda(lengths, dtypes, size, rounds, only, _words(modes) if modes else [], as_json)
        return
    if device != "cpu":
        raise InputError(f"--device takes cpu or cuda, got {device!r}")
    if plot is not None:
        _can_draw(plot)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        if cpu_time and torch.get_num_threads() != 1:
            raise InputError("--cpu-time adds up the time of all threads: give --threads 1 with it")
        plan = Plan(
            tokens=SWEEP if sweep else _lengths(tokens),
            dtypes=tuple(_dtypes(dtype)),
            heads=heads,
            size=size,
            rounds=rounds,
            limit=limit,
            only=only,
            memory=memory,
            clock=time.process_time if cpu_time else time.perf_counter,
            **({"isas": tuple(_words(isa))} if isa else {}),
        )
        if not plan.tokens and not step:
            raise InputError("there is nothing to measure: give --tokens, or --step")
        cells, steps, rates, ended = _measure(plan, step)
        found = whole(plan, rates, cells, steps)
        if not as_json:
            _show(found, plan, cells, steps)
        common.print_line(found)
        if plot is not None and cells:
            from linstate.bench.plot import draw

            draw(cells, _title(found, plan), plot)
            common.messages().print(f"drawn in {plot}", markup=False)
    finally:
        torch.set_num_threads(before)
    if ended:
        raise typer.Exit(130)


@app.command()
def patch(
    only: Annotated[str, typer.Option(help="Families, with commas between; without it all.")] = "",
    tokens: Annotated[int, typer.Option(help="Tokens of the prefill.", min=2)] = 512,
    dtype: Annotated[str, typer.Option(help="Precision of the weights.")] = "float32",
    threads: Annotated[
        int | None, typer.Option(help="Threads for everything; without it as many as torch takes.", min=1)
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds that count; in each both have a turn.", min=1)] = 3,
    cpu_time: Annotated[
        bool,
        typer.Option(
            "--cpu-time", help="Count processor time: for one thread on a machine that others use too."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Only the JSON line.")] = False,
) -> None:
    """Models of transformers before and after patch_transformers(): prefill, one token, and what reading in pieces is off by.

    Random models of real widths and few layers. Off: the largest difference between the logits of a text read in two
    pieces and read at once, relative to the largest logit.
    """
    import time
    from dataclasses import asdict

    import torch

    from linstate.bench.machine import machine
    from linstate.bench.patched import MODELS, measure

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    table = _plain("ms", "weights")
    for name in ("prefill", "ours", "", "token", "ours", "", "pieces off", "ours"):
        table.add_column(name, justify="right")
    found = []
    try:
        if cpu_time and torch.get_num_threads() != 1:
            raise InputError("--cpu-time adds up the time of all threads: give --threads 1 with it")
        clock = time.process_time if cpu_time else time.perf_counter
        precisions = list(_dtypes(dtype))
        if len(precisions) != 1:
            raise InputError(f"--dtype takes one precision here, got {dtype!r}")
        for family in _words(only) if only else MODELS:
            with common.messages().status(family):
                row = measure(family, tokens=tokens, dtype=precisions[0], rounds=rounds, clock=clock)
            found.append(asdict(row))
            times = [
                f"{value:.1f}" if place < 2 else f"{row_of[0] / row_of[1]:.1f}x"
                for row_of in (row.prefill, row.step)
                for place, value in enumerate((*row_of, 0.0))
            ]
            table.add_row(family, f"{row.weights / 1e6:.0f} M", *times, *(f"{off:.0e}" for off in row.pieces))
        about = {"machine": machine(), "tokens": tokens, "dtype": dtype, "rounds": rounds}
    finally:
        torch.set_num_threads(before)
    if not as_json:
        common.results().print(table)
    common.print_line({**about, "families": found})


app.command("model")(bench_model.model)
app.command("weights")(bench_model.weights)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _lengths(text: str) -> tuple[int, ...]:
    if text.strip() == "none":
        return ()
    words = _words(text)
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise InputError(
            f"--tokens takes lengths with commas between, such as 256,1024, or 'none'; got {text!r}"
        )
    return tuple(map(int, words))


def _dtypes(text: str) -> Iterator[Any]:
    from linstate.bench.ops import DTYPES

    names = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    words = _words(text)
    if not words or not set(words) <= set(names):
        raise InputError(f"--dtype takes {' and '.join(names)}, with a comma between; got {text!r}")
    return (names[word] for word in dict.fromkeys(words))


def _can_draw(plot: Path) -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install 'linstate[plot]'")
    common.check_output(plot, force=True)


def _measure(plan: Plan, with_steps: bool) -> tuple[list[Cell], list[Step], Rates | None, bool]:
    """Everything, with progress on standard error; after Ctrl-C what there is, and True."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from linstate.bench.ops import Rates, effort_of, sweep
    from linstate.bench.steps import BATCHES, names, steps

    cells: list[Cell] = []
    rows: list[Step] = []
    rates = None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    each = effort_of(0)  # a batch of steps
    total = plan.effort() + with_steps * len(names(plan.only)) * len(BATCHES) * each
    try:
        with Progress(*columns, console=common.messages(), transient=True) as bar:
            task = bar.add_task("matmul", total=total)
            rates = Rates(plan.clock)
            if plan.tokens:
                for cell in sweep(plan, rates):
                    cells.append(cell)
                    text = f"{cell.case}, {cell.dtype}, T={cell.tokens:,}"
                    bar.update(task, advance=effort_of(cell.tokens), description=text)
            if with_steps:
                shape = {"heads": plan.heads, "size": plan.size, "rounds": plan.rounds}
                for found in steps(only=plan.only, isas=plan.isas, clock=plan.clock, **shape):
                    rows += found
                    text = f"{found[0].case}, step, batch {found[0].batch}"
                    bar.update(task, advance=each, description=text)
    except KeyboardInterrupt:
        common.messages().print("stopped; what was measured until then:")
        return cells, rows, rates, True
    return cells, rows, rates, False


def _title(found: dict[str, Any], plan: Plan) -> str:
    about = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    clock = ", processor time" if found["clock"] == "process_time" else ""
    return (
        f"{about['processor']}, {about['threads']} of {about['cores']} cores, native: {', '.join(plan.isas) or 'none'}; "
        f"{versions}\nB=1, H={plan.heads}, K=V={plan.size}, medians of {plan.rounds} rounds, measured in turn{clock}"
    )


def _show(found: dict[str, Any], plan: Plan, cells: Sequence[Cell], steps: Sequence[Step]) -> None:
    from linstate.bench.ops import crossovers

    console = common.results()

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    say(_title(found, plan))
    if found["gemm"]:
        rates, sizes = found["gemm"]["gflops"], found["gemm"]["size"]
        each = (f"{name} {rate:.3g} GFLOP/s (N = {sizes[name]})" for name, rate in rates.items())
        slow = "; bfloat16 is the slower one here, so shares of both precisions are of float32's rate"
        say(f"torch.mm: {', '.join(each)}{slow if found['gemm']['bfloat16_is_slower'] else ''}")
    if found["missing"]:
        say(f"not installed and left out: {', '.join(found['missing'])} (pip install 'linstate[bench]')")
    crossing: dict[tuple[str, str], list[str]] = {}
    for one in crossovers(cells):
        crossing.setdefault((one.dtype, one.case), []).append(f"{one.who} {one.text} tokens")
    for dtype, case in dict.fromkeys((cell.dtype, cell.case) for cell in cells):
        mine = [cell for cell in cells if (cell.dtype, cell.case) == (dtype, case)]
        say(f"\n{_heading(mine, found['flops_per_token_head'][case])}")
        console.print(_table(mine))
        for line in _left_out(mine):
            say(f"  {line}")
        if (dtype, case) in crossing:
            say(f"  crossover with softmax attention: {', '.join(crossing[dtype, case])}")
    if steps:
        of = f"{steps[0].dtype}, H={plan.heads}, K=V={plan.size}"
        say(
            f"\nOne token, {of}: µs, and times those of copying the state (states in turn, none of them in the cache)"
        )
        console.print(_step_table(steps))


def _heading(cells: Sequence[Cell], flops: int) -> str:
    from linstate.bench.cases import CASES

    case = CASES[cells[0].case]
    sizes = {f", K=V={row.size}" for cell in cells for row in cell.rows}
    return f"{case.model}: {case.name}, {cells[0].dtype}{''.join(sizes)}; {flops:,} operations for a token and head"


def _plain(*left: str) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2))
    for name in left:
        table.add_column(name, no_wrap=True)
    return table


def _table(cells: Sequence[Cell]) -> Any:
    """µs per token and head at each length; what else there is at the longest that an implementation was measured at."""
    rows = [row for cell in cells for row in cell.rows]
    memory = any(row.extra_bytes is not None for row in rows)
    table = _plain("µs per token and head, T =")
    for name in (f"{cell.tokens:,}" for cell in cells):
        table.add_column(name, justify="right")
    for name in ("x ours", "GFLOP/s", "of GEMM", *(["extra MB"] if memory else [])):
        table.add_column(name, justify="right")
    for who in dict.fromkeys(row.who for row in rows):
        mine = {row.tokens: row for row in rows if row.who == who}
        times = (f"{mine[c.tokens].us_per_token_head:.3f}" if c.tokens in mine else "-" for c in cells)
        table.add_row(_name(mine), *times, *_longest(mine[max(mine)], memory))
    return table


def _name(rows: dict[int, Row]) -> str:
    row = next(iter(rows.values()))
    return row.who if row.kind in ("native", "torch", "softmax") else f"{row.who}: {row.function}"


def _longest(row: Row, memory: bool) -> list[str]:
    cells = [
        "-" if row.times_ours is None else f"{row.times_ours:.2f}",
        "-" if row.gflops is None else f"{row.gflops:.1f}",
        "-" if row.share is None else f"{row.share:.1%}",
    ]
    if memory:
        cells.append("?" if row.extra_bytes is None else f"{row.extra_bytes / 1e6:.1f}")
    return cells


def _left_out(cells: Sequence[Cell]) -> Iterator[str]:
    """A line for each implementation that is absent somewhere, with the reason at the first length."""
    by_who: dict[str, list[Any]] = {}
    for cell in cells:
        for one in cell.skipped:
            by_who.setdefault(one.who, []).append(one)
    for who, skipped in by_who.items():
        everywhere = len(skipped) == len(cells)
        where = "" if everywhere else f" at T = {', '.join(f'{one.tokens:,}' for one in skipped)}"
        yield f"{who} is left out{where}: {skipped[0].reason}"


def _step_table(steps: Sequence[Step]) -> Any:
    batches = list(dict.fromkeys(step.batch for step in steps))
    table = _plain("", "")
    for batch in batches:
        table.add_column(f"batch {batch}", justify="right")
        table.add_column("x copy", justify="right")
    for case, who in dict.fromkeys((step.case, step.who) for step in steps):
        cells = []
        for batch in batches:
            at = [s for s in steps if (s.case, s.who, s.batch) == (case, who, batch)]
            cells += [f"{at[0].us:.1f}", f"{at[0].times_copy:.2f}"] if at else ["-", "-"]
        table.add_row(case, who, *cells)
    return table
