"""``linstate bench model`` and ``linstate bench weights``: whole models, and what narrow weights cost them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from linstate.cli import common
from linstate.errors import InputError

if TYPE_CHECKING:
    from linstate.bench.models import Case, Plan


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def model(
    models: Annotated[
        str, typer.Option(help="Models, with commas between: mamba2-370m, qwen3.5-0.8b, rwkv7-0.4b.")
    ] = "mamba2-370m,qwen3.5-0.8b,rwkv7-0.4b",
    weights: Annotated[
        str,
        typer.Option(help="Formats of the weights, with commas between; the first is prefilled at length."),
    ] = "bf16,int8,int4",
    threads: Annotated[
        int | None, typer.Option(help="Threads for everything; without it as many as torch takes.", min=1)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="2,048 tokens only, single turns.")] = False,
    peers: Annotated[
        bool, typer.Option("--peers/--no-peers", help="Measure transformers, too (extra 'hf').")
    ] = True,
    cpu_time: Annotated[
        bool,
        typer.Option(
            "--cpu-time", help="Count processor time: for one thread on a machine that others use too."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Only the JSON line.")] = False,
) -> None:
    """Time whole models of random weights in real shapes: prefill, decode, a resumed conversation; transformers beside.

    Prefill is given as a share of the rate of torch's bf16 matmuls of the same shapes, decode as a share of the bytes that a
    token reads (weights and state) over the bandwidth of memory, both measured in the same run. Prints a table for people
    and one JSON line. Takes a quarter of an hour and four gigabytes. Ctrl-C ends it with what was measured.
    """
    import time

    import torch

    from linstate.bench.machine import machine
    from linstate.bench.models import CASES, Plan
    from linstate.ops.native_linear import FORMATS

    if unknown := [name for name in words(models) if name not in CASES]:
        raise InputError(f"--models takes {', '.join(CASES)}; got {', '.join(unknown)}")
    formats = tuple(one for one in FORMATS if one in words(weights))
    if not formats or not set(words(weights)) <= set(FORMATS):
        raise InputError(f"--weights takes bf16, int8 and int4, with commas between; got {weights!r}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        if cpu_time and torch.get_num_threads() != 1:
            raise InputError("--cpu-time adds up the time of all threads: give --threads 1 with it")
        plan = Plan(formats=formats, clock=time.process_time if cpu_time else time.perf_counter)
        plan = plan.quick() if quick else plan
        rows, ended = _measure_models([CASES[name] for name in words(models)], plan, peers)
        found = {"machine": machine(), "clock": plan.clock.__name__, "models": rows}
    finally:
        torch.set_num_threads(before)
    if not as_json:
        _show_models(found)
    common.print_line(found)
    if ended:
        raise typer.Exit(130)


def _measure_models(cases: Sequence[Case], plan: Plan, peers: bool) -> tuple[list[dict[str, Any]], bool]:
    import torch
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from linstate.bench.model_peers import in_child
    from linstate.bench.models import measure
    from linstate.errors import BackendError

    rows: list[dict[str, Any]] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    try:
        with Progress(*columns, console=common.messages(), transient=True) as bar:
            task = bar.add_task("", total=None)
            for case in cases:
                bar.update(task, description=f"{case.name}: weights")
                for done, figures in measure(case, plan):
                    if figures not in rows:
                        rows.append(figures)
                    bar.update(task, description=f"{case.name}: behind {done}")
                bar.update(task, description=f"{case.name}: transformers")
                try:
                    if peers:
                        rows[-1]["transformers"] = in_child(
                            "transformers", case.name, 2048, 8, torch.get_num_threads(), 600.0, plan.clock
                        )
                except BackendError as error:
                    rows[-1]["transformers"] = {"left_out": str(error)}
    except KeyboardInterrupt:
        common.messages().print("stopped; what was measured until then:")
        return rows, True
    return rows, False


def _show_models(found: dict[str, Any]) -> None:
    about, console = found["machine"], common.results()

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    clock = ", processor time" if found["clock"] == "process_time" else ""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    say(
        f"{about['processor']}, {about['threads']} of {about['cores']} cores, native: {about['isa']}; {versions}{clock}"
    )
    for row in found["models"]:
        say(
            f"\n{row['model']}, {row['parameters'] / 1e6:.0f} M weights; bf16 matmuls of its shapes "
            f"{row['gemm_flops'] / 1e9:.0f} GFLOP/s, memory {row['bandwidth'] / 1e9:.1f} GB/s"
        )
        table = Table(box=None, padding=(0, 2))
        table.add_column("", no_wrap=True)
        for name in ("tokens/s", "of matmul rate", "of bandwidth", "x transformers"):
            table.add_column(name, justify="right")
        peer = row.get("transformers", {})

        def times(value: float, what: str, length: int | None = None, peer: dict[str, Any] = peer) -> str:
            fits = what in peer and length in (None, 2048)
            return f"{value / peer[what]:.1f}" if fits else "-"

        for format, lengths in row["prefill"].items():
            for tokens, one in lengths.items():
                rate = one["tokens_per_second"]
                more = times(rate, "prefill", tokens)
                table.add_row(
                    f"prefill {tokens:,}, {format}", f"{rate:.0f}", f"{one['of_gemm']:.0%}", "", more
                )
        for format, one in row["decode"].items():
            rate = one["tokens_per_second"]
            more = times(rate, "decode")
            table.add_row(f"decode, {format}", f"{rate:.1f}", "", f"{one['of_bandwidth']:.0%}", more)
        if "prefill" in peer:
            table.add_row("transformers, prefill 2,048", f"{peer['prefill']:.0f}", "", "", "")
            table.add_row("transformers, decode", f"{peer['decode']:.1f}", "", "", "")
        console.print(table)
        if "left_out" in peer:
            say(f"  transformers is left out: {peer['left_out']}")
        if "resumed" in row:
            one = row["resumed"]
            say(
                f"  first token of a conversation of 8,192 tokens from its file: {one['seconds'] * 1e3:.0f} ms, "
                f"{one['share']:.2%} of reading it again ({one['again_seconds']:.1f} s)"
            )


def weights(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A text that the model has not been trained on.")
    ],
    model: common.Model = common.POCKET,
    as_json: common.Json = False,
) -> None:
    """Print what packed weights cost a model: perplexity and bits per byte of a text, with weights as stored and in each format.

    The text is read on the grid, as reading does; all formats see the same tokens, so the differences are the weights' alone.
    """
    from linstate.engine import LanguageModel
    from linstate.engine.tokens import encode
    from linstate.ops.native_linear import FORMATS

    try:
        text = file.read_text("utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from error
    if not text:
        raise InputError(f"{file} is empty: there is nothing to measure")
    rows: dict[str, dict[str, float]] = {}
    for format in (None, *FORMATS):
        loaded = LanguageModel.from_pretrained(model, weights=format)
        bits = loaded.bits(text)
        tokens = len(encode(loaded.tokenizer, text))
        rows[format or "as stored"] = {
            "perplexity": 2 ** (bits / tokens),
            "bits_per_byte": bits / len(text.encode()),
        }
    if as_json:
        common.print_json({"model": model, "file": str(file), "weights": rows})
        return
    table = Table(box=None, padding=(0, 2))
    for name in ("weights", "perplexity", "bits per byte", "more"):
        table.add_column(name, justify="left" if name == "weights" else "right")
    stored = rows["as stored"]["perplexity"]
    for name, row in rows.items():
        more = "" if name == "as stored" else f"{row['perplexity'] / stored - 1:+.2%}"
        table.add_row(name, f"{row['perplexity']:.3f}", f"{row['bits_per_byte']:.4f}", more)
    common.results().print(table)
