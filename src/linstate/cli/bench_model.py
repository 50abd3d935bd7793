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
    from linstate.bench.model_cases import Case
    from linstate.bench.models import Plan

PEERS = {
    "transformers": {"bf16": "bf16"},
    "llama.cpp": {"bf16": "bf16", "int8": "q8_0", "int4": "q4_0"},
}
"""Their formats with as many bits as ours."""


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def model(
    models: Annotated[
        str, typer.Option(help="Models, with commas between: mamba2-370m, qwen3.5-0.8b, rwkv7-0.4b.")
    ] = "mamba2-370m,qwen3.5-0.8b,rwkv7-0.4b",
    weights: Annotated[
        str,
        typer.Option(
            help="Formats of the weights, with commas between; the first is prefilled at all lengths."
        ),
    ] = "bf16,int8,int4",
    lengths: Annotated[
        str,
        typer.Option(
            help="Tokens to prefill, with commas between; the first in all formats. Those above 8,192 only for recurrent models."
        ),
    ] = "2048,8192,32768",
    rounds: Annotated[
        int, typer.Option(help="Turns of which the median counts, for up to 2,048 tokens.", min=1)
    ] = 3,
    tokens: Annotated[int, typer.Option(help="Tokens to decode.", min=1)] = 32,
    threads: Annotated[
        int | None, typer.Option(help="Threads for everything; without it as many as torch takes.", min=1)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="--lengths 2048 --rounds 1 --tokens 16.")] = False,
    peers: Annotated[
        str,
        typer.Option(help="Programs to measure beside, with commas between; 'none' for none."),
    ] = "transformers,llama.cpp",
    llama_cpp: Annotated[
        Path | None,
        typer.Option(
            "--llama-cpp",
            metavar="FOLDER",
            envvar="LINSTATE_LLAMA_CPP",
            help="Source of llama.cpp or of llama-cpp-python, for its converter.",
        ),
    ] = None,
    cpu_time: Annotated[
        bool,
        typer.Option(
            "--cpu-time", help="Count processor time: for one thread on a machine that others use too."
        ),
    ] = False,
    device: Annotated[
        str,
        typer.Option(
            help="cpu, or cuda: prefill, decode, a training step and the first call on a GPU, beside transformers with FLA's kernels."
        ),
    ] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Only the JSON line.")] = False,
) -> None:
    """Time whole models of random weights in real shapes: prefill, decode, a resumed conversation; other programs beside.

    Prefill is given as a share of the rate of torch's bf16 matmuls of the same shapes, decode as a share of the bytes that a
    token reads (weights and state) over the bandwidth of memory, both measured in the same run. The same weights are then
    written as a checkpoint for transformers (extra 'hf') and for llama.cpp (extra 'bench-model', and its converter, see
    --llama-cpp), each in a process of its own with as many threads; what is not installed is left out, and the table says
    so. Prints a table for people and one JSON line. Takes half an hour and four gigabytes of memory and of disk. Ctrl-C ends it
    with what was measured.
    """
    import time

    import torch

    from linstate.bench.llama_cpp import converter_in
    from linstate.bench.machine import machine
    from linstate.bench.model_cases import CASES
    from linstate.bench.models import Plan
    from linstate.ops.native.linear import FORMATS

    if unknown := [name for name in words(models) if name not in CASES]:
        raise InputError(f"--models takes {', '.join(CASES)}; got {', '.join(unknown)}")
    if device == "cuda":
        from linstate.cli.bench_model_cuda import models_on_cuda

        models_on_cuda(words(models), quick, peers != "none", as_json)
        return
    if device != "cpu":
        raise InputError(f"--device takes cpu or cuda, got {device!r}")
    formats = tuple(one for one in FORMATS if one in words(weights))
    if not formats or not set(words(weights)) <= set(FORMATS):
        raise InputError(f"--weights takes bf16, int8 and int4, with commas between; got {weights!r}")
    if not all(word.isdecimal() and int(word) > 0 for word in words(lengths)) or not words(lengths):
        raise InputError(
            f"--lengths takes numbers of tokens with commas between, such as 2048,8192; got {lengths!r}"
        )
    beside = [] if peers == "none" else words(peers)
    if not set(beside) <= set(PEERS):
        raise InputError(f"--peers takes {' and '.join(PEERS)} with a comma between, or none; got {peers!r}")
    source = "" if llama_cpp is None else str(converter_in(llama_cpp))
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        if cpu_time and torch.get_num_threads() != 1:
            raise InputError("--cpu-time adds up the time of all threads: give --threads 1 with it")
        plan = Plan(
            prefill=(2048,) if quick else tuple(sorted({int(word) for word in words(lengths)})),
            formats=formats,
            tokens=16 if quick else tokens,
            rounds=1 if quick else rounds,
            clock=time.process_time if cpu_time else time.perf_counter,
        )
        rows, ended = _measure_models([CASES[name] for name in words(models)], plan, beside, source)
        found = {"machine": machine(), "clock": plan.clock.__name__, "models": rows}
    finally:
        torch.set_num_threads(before)
    if not as_json:
        for row in _begin(found):
            _show(row)
    common.print_line(found)
    if ended:
        raise typer.Exit(130)


def _measure_models(
    cases: Sequence[Case], plan: Plan, peers: Sequence[str], source: str
) -> tuple[list[dict[str, Any]], bool]:
    import gc
    import tempfile

    import torch
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from linstate.bench.model_cases import random_decoder, write_checkpoint
    from linstate.bench.model_peers import in_child
    from linstate.bench.models import measure
    from linstate.bench.peer_task import Task
    from linstate.errors import BackendError

    rows: list[dict[str, Any]] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    first = plan.prefill[0]
    asked = {
        "transformers": (first,),
        "llama.cpp": tuple(sorted({min(512, first), *(plan.short or (first,))})),
    }
    try:
        with Progress(*columns, console=common.messages(), transient=True) as bar:
            task = bar.add_task("", total=None)
            for case in cases:
                bar.update(task, description=f"{case.name}: weights")
                with tempfile.TemporaryDirectory() as folder:
                    write_checkpoint(case, random_decoder(case.config), Path(folder))
                    for done, figures in measure(case, plan, Path(folder)):
                        if figures not in rows:
                            rows.append(figures)
                        bar.update(task, description=f"{case.name}: behind {done}")
                    gc.collect()
                    for peer in peers:
                        bar.update(task, description=f"{case.name}: {peer}")
                        one = Task(
                            peer,
                            folder,
                            asked[peer],
                            plan.tokens if peer == "llama.cpp" else min(8, plan.tokens),
                            plan.rounds if peer == "llama.cpp" else 1,
                            torch.get_num_threads(),
                            plan.clock.__name__,
                            source,
                        )
                        try:
                            rows[-1][peer] = in_child(one, 1800.0)
                        except BackendError as error:
                            rows[-1][peer] = {"left_out": str(error)}
    except KeyboardInterrupt:
        common.messages().print("stopped; what was measured until then:")
        return rows, True
    return rows, False


def _say(text: str) -> None:
    common.results().print(text, markup=False, soft_wrap=True)


def _begin(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Say what the machine is; the rows."""
    about = found["machine"]
    clock = ", processor time" if found["clock"] == "process_time" else ""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    _say(
        f"{about['processor']}, {about['threads']} of {about['cores']} cores, native: {about['isa']}; {versions}{clock}"
    )
    rows: list[dict[str, Any]] = found["models"]
    return rows


def _show(row: dict[str, Any]) -> None:
    """The table of a model."""
    _say(
        f"\n{row['model']}, {row['parameters'] / 1e6:.0f} M weights; bf16 matmuls of its shapes "
        f"{row['gemm_flops'] / 1e9:.0f} GFLOP/s, memory {row['bandwidth'] / 1e9:.1f} GB/s"
    )
    table = Table(box=None, padding=(0, 2))
    table.add_column("", no_wrap=True)
    there = [peer for peer in PEERS if "prefill" in row.get(peer, {})]
    for name in ("tokens/s", "of matmul rate", "of bandwidth", "resident", *(f"x {peer}" for peer in there)):
        table.add_column(name, justify="right")

    def prefill_of(peer: str, tokens: int | str) -> float | None:
        """The peer's best of all formats."""
        found = [lengths[str(tokens)] for lengths in row[peer]["prefill"].values() if str(tokens) in lengths]
        return max(found, default=None)

    def times(ours: float, theirs: float | None) -> str:
        return "-" if theirs is None else f"{ours / theirs:.1f}"

    for format, lengths in row["prefill"].items():
        for tokens, one in lengths.items():
            rate = one["tokens_per_second"]
            more = (times(rate, prefill_of(peer, tokens)) for peer in there)
            shares = f"{rate:.0f}", f"{one['of_gemm']:.0%}", "", common.size(one["resident"])
            table.add_row(f"prefill {tokens:,}, {format}", *shares, *more)
    for format, one in row["decode"].items():
        rate = one["tokens_per_second"]
        more = (times(rate, row[peer]["decode"].get(PEERS[peer].get(format, ""))) for peer in there)
        table.add_row(f"decode, {format}", f"{rate:.1f}", "", f"{one['of_bandwidth']:.0%}", "", *more)
    for peer in there:
        for format, lengths in row[peer]["prefill"].items():
            for length, rate in lengths.items():
                table.add_row(f"{peer}, prefill {int(length):,}, {format}", f"{rate:.0f}")
        for format, rate in row[peer]["decode"].items():
            table.add_row(f"{peer}, decode, {format}", f"{rate:.1f}")
    common.results().print(table)
    for peer in PEERS:
        if "left_out" in row.get(peer, {}):
            _say(f"  {peer} is left out: {row[peer]['left_out']}")
    if "resumed" in row:
        one = row["resumed"]
        settled, tail = (f"{one['seconds'][name] * 1e3:.0f} ms" for name in ("settled", "tail"))
        _say(
            f"  first token of a conversation of {one['tokens']:,} tokens from its file: {settled}, "
            f"{one['seconds']['settled'] / one['again_seconds']:.2%} of reading it again ({one['again_seconds']:.1f} s); "
            f"of a reading that ends with a whole block over the grid: {tail}"
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
    from linstate.ops.native.linear import FORMATS

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
