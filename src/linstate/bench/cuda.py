"""Speed of the recurrences on a GPU: our Triton programs, FLA's, mamba_ssm's, softmax attention, and a copy of what is read and written.

Everything of a cell is measured in the same rounds, in alternating order, with CUDA events around each call. The copy of inputs and outputs is the
floor: what the memory must carry at least. Rates of the memory and of matmuls are measured in the same run, and shares are of those.
"""

from __future__ import annotations

import importlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linstate.bench.cases import CASES, Case, Inputs, Shape
from linstate.bench.machine import machine
from linstate.errors import ArgumentError, BackendError
from linstate.ops.triton import runtime

TOKENS = (512, 2048, 8192, 32_768, 131_072)
SIZES = ((1, 16), (8, 32))
"""Batch and heads: a chip that is mostly idle, and one that is full."""
MODES = ("forward", "training", "step")
Run = Callable[[], Any]


def require() -> None:
    """Raises BackendError, saying what is missing, where nothing can be measured."""
    if not torch.cuda.is_available():
        raise BackendError(
            "bench ops --device cuda measures on an NVIDIA GPU, and torch sees none here; without --device the CPU is measured"
        )
    if why := runtime.missing():
        raise BackendError(f"bench ops --device cuda: {why}")


@dataclass(frozen=True)
class Plan:
    """What to measure. ``cold``: also first calls, each in a process of its own with empty caches."""

    tokens: tuple[int, ...] = TOKENS
    sizes: tuple[tuple[int, int], ...] = SIZES
    size: int = 128
    dtype: torch.dtype = torch.bfloat16
    rounds: int = 20
    only: str = ""
    cold: bool = True
    modes: tuple[str, ...] = field(default=MODES)

    def __post_init__(self) -> None:
        if not self.cases:
            raise ArgumentError(f"no case has {self.only!r} in its name; there are: {'; '.join(CASES)}")

    @property
    def cases(self) -> list[Case]:
        return [case for name, case in CASES.items() if self.only in name]


@dataclass(frozen=True)
class Row:
    """One implementation of a case in one mode. ``of_bandwidth``: the least bytes over the time, of the rate of a large copy.

    ``of_gemm``: operations of the chunked form over the time, of the rate of a large matmul; of the forward pass only.
    ``launches``: of ours. ``reason``: why there is no time.
    """

    case: str
    model: str
    who: str
    mode: str
    batch: int
    heads: int
    tokens: int
    dtype: str
    ms: float | None = None
    times_ours: float | None = None
    of_bandwidth: float | None = None
    of_gemm: float | None = None
    launches: int | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Rates:
    """Of this GPU in this run: bytes a second of a large copy (read and write counted), operations a second of a large matmul."""

    bytes: float
    flops: float


# --------------------------------------------------------------------------------------------------- timing


def in_turn(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Median milliseconds of each; three calls of each before the first round do not count."""
    for run in runs.values():
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {who: [] for who in runs}
    order = list(runs)
    for number in range(rounds):
        for who in reversed(order) if number % 2 else order:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            runs[who]()
            end.record()
            end.synchronize()
            times[who].append(begin.elapsed_time(end))
    return {who: statistics.median(found) for who, found in times.items()}


def rates(dtype: torch.dtype) -> Rates:
    """Measured: a copy of 1 GiB, a matmul of 8,192."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a = torch.randn(8192, 8192, device="cuda").to(dtype)
    timed = in_turn({"copy": lambda: target.copy_(source), "gemm": lambda: a @ a}, 10)
    return Rates(2 * (1 << 30) / timed["copy"] * 1e3, 2 * 8192**3 / timed["gemm"] * 1e3)


# -------------------------------------------------------------------------------------------- who is measured


def _of_fla(path: str, function: str, call: Callable[[Any, Inputs], Any]) -> Callable[[Inputs], Run]:
    def bind(inputs: Inputs) -> Run:
        found = getattr(importlib.import_module(f"fla.ops.{path}"), function)
        return lambda: call(found, inputs)

    return bind


def _gla(f: Any, x: Inputs) -> Any:
    return f(x["q"], x["k"], x["v"], x["g"], output_final_state=True)


def _mamba2(f: Any, x: Inputs) -> Any:
    written = x["v"] * x["dt"].to(x["v"].dtype)[..., None]
    return f(x["q"], x["k"], written, x["A"] * x["dt"], scale=1.0, output_final_state=True)


def _rwkv7(f: Any, x: Inputs) -> Any:
    """Theirs reads by a and writes by b."""
    return f(x["q"], x["g"], x["k"], x["v"], x["b"], x["a"], output_final_state=True)


def _mamba_ssm(inputs: Inputs) -> Run:
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    v, dt = (inputs[name].flatten(2).transpose(1, 2).contiguous() for name in ("v", "dt"))  # [B, D, T]
    B, C = (inputs[name][:, :, 0].transpose(1, 2).contiguous() for name in ("k", "q"))  # [B, N, T]
    A = inputs["A"].transpose(1, 2).flatten(0, 1).float().contiguous()  # [D, N]
    return lambda: scan(v, dt.to(v.dtype), A, B, C, return_last_state=True)


def _mamba2_ssm(inputs: Inputs) -> Run:
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    x = inputs
    return lambda: scan(x["v"], x["dt"], x["A"], x["k"], x["q"], chunk_size=256, return_final_states=True)


_FLA: dict[str, dict[str, Callable[[Inputs], Run]]] = {
    "DeltaNet": {
        "chunk": _of_fla(
            "delta_rule",
            "chunk_delta_rule",
            lambda f, x: f(x["q"], x["k"], x["v"], x["beta"], output_final_state=True),
        ),
        "step": _of_fla(
            "delta_rule",
            "fused_recurrent_delta_rule",
            lambda f, x: f(x["q"], x["k"], x["v"], x["beta"], output_final_state=True),
        ),
    },
    "Gated DeltaNet": {
        "chunk": _of_fla(
            "gated_delta_rule",
            "chunk_gated_delta_rule",
            lambda f, x: f(x["q"], x["k"], x["v"], x["g"], x["beta"], output_final_state=True),
        ),
        "step": _of_fla(
            "gated_delta_rule",
            "fused_recurrent_gated_delta_rule",
            lambda f, x: f(x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"], output_final_state=True),
        ),
    },
    "KDA": {
        "chunk": _of_fla(
            "kda",
            "chunk_kda",
            lambda f, x: f(x["q"], x["k"], x["v"], x["g"], x["beta"], output_final_state=True),
        ),
        "step": _of_fla(
            "kda",
            "fused_recurrent_kda",
            lambda f, x: f(x["q"], x["k"], x["v"], x["g"], x["beta"], output_final_state=True),
        ),
    },
    "Linear Transformer": {
        "chunk": _of_fla(
            "linear_attn",
            "chunk_linear_attn",
            lambda f, x: f(x["q"], x["k"], x["v"], output_final_state=True, normalize=False),
        ),
    },
    "Mamba-2": {
        "chunk": _of_fla("simple_gla", "chunk_simple_gla", _mamba2),
        "step": _of_fla("simple_gla", "fused_recurrent_simple_gla", _mamba2),
    },
    "GLA": {
        "chunk": _of_fla("gla", "chunk_gla", _gla),
        "step": _of_fla(
            "gla",
            "fused_recurrent_gla",
            lambda f, x: f(x["q"], x["k"], x["v"], gk=x["g"], output_final_state=True),
        ),
    },
    "RWKV-6": {
        "chunk": _of_fla(
            "rwkv6",
            "chunk_rwkv6",
            lambda f, x: f(x["q"], x["k"], x["v"], x["g"], x["bonus"], output_final_state=True),
        ),
    },
    "RWKV-7": {"chunk": _of_fla("rwkv7", "chunk_rwkv7", _rwkv7)},
}


def implementations(case: Case, inputs: Inputs, mode: str) -> Iterator[tuple[str, Callable[[], Run]]]:
    """(who, what makes its call); whether it can be made is seen when it is tried. Ours is first."""
    form = "step" if mode == "step" else "chunked"
    yield "triton", lambda: lambda: case.call(inputs, form=form, backend="triton")
    yield "torch", lambda: lambda: case.call(inputs, form=form, backend="torch")
    of_fla = _FLA.get(case.model, {}).get("step" if mode == "step" else "chunk")
    if of_fla is not None:
        yield "fla", lambda: of_fla(inputs)
    if case.model == "Mamba":
        yield "mamba_ssm", lambda: _mamba_ssm(inputs)
    if case.model == "Mamba-2" and mode != "step":
        yield "mamba_ssm", lambda: _mamba2_ssm(inputs)
    if case.beside_softmax and mode != "step":
        yield "softmax", lambda: _softmax(inputs["v"])


def _softmax(v: Tensor) -> Run:
    q, k, values = (
        torch.randn_like(v).transpose(1, 2).contiguous().requires_grad_(v.requires_grad) for _ in range(3)
    )

    def run() -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, values, is_causal=True)

    return run


def least_bytes(inputs: Inputs, output: Tensor, mode: str) -> int:
    """Inputs read once and outputs written once; in training everything once more as a gradient, and inputs read again."""
    read = sum(t.numel() * t.element_size() for t in inputs.values())
    written = output.numel() * output.element_size()
    return read + written if mode != "training" else 3 * read + 2 * written


# ------------------------------------------------------------------------------------------------- measuring


def sweep(plan: Plan, measured: Rates) -> Iterator[list[Row]]:
    """Every cell of a plan: a case in one mode, at one size and length."""
    for case in plan.cases:
        for batch, heads in plan.sizes:
            shape = case.at(Shape(1, heads, plan.size, plan.dtype, batch))
            for mode in plan.modes:
                for tokens in (1,) if mode == "step" else plan.tokens:
                    yield cell(case, replace(shape, tokens=tokens), mode, plan, measured)


def cell(case: Case, shape: Shape, mode: str, plan: Plan, measured: Rates) -> list[Row]:
    """All implementations of a case at one length, ours first. What fails, or does not fit into memory, is a row with its reason."""

    def row(who: str, **found: Any) -> Row:
        sizes = (shape.batch, shape.heads, shape.tokens, shape.precision)
        return Row(case.name, case.model, who, mode, *sizes, **found)

    runs: dict[str, Run] = {}
    rows: list[Row] = []
    launched = None
    try:
        inputs = {name: t.cuda() for name, t in case.inputs(shape).items()}
        if mode == "training":
            inputs = {name: t.requires_grad_() for name, t in inputs.items()}
        copy_from = torch.empty(1, device="cuda", dtype=torch.uint8)
    except torch.OutOfMemoryError as error:
        return [row("triton", reason=f"inputs do not fit: {error}")]
    for who, make in implementations(case, inputs, mode):
        try:
            run = _trained(make(), inputs) if mode == "training" else _plain(make())
            runtime.launches.clear()
            output = run()
            torch.cuda.synchronize()
            if who == "triton":
                launched = sum(runtime.launches.values())
                least = least_bytes(inputs, output, mode)
                copy_from = torch.empty(least // 2, device="cuda", dtype=torch.uint8)
            runs[who] = run
            del output
        except (
            Exception
        ) as error:  # an absent package, another version of a peer, no memory: the others are measured
            rows.append(
                row(who, reason=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            )
            torch.cuda.empty_cache()
    if "triton" in runs:
        copy_to = torch.empty_like(copy_from)
        runs["copy"] = lambda: copy_to.copy_(copy_from)
    timed = in_turn(runs, plan.rounds)
    ours = timed.get("triton")
    operations = case.flops(shape) * shape.tokens * shape.heads * shape.batch
    for who, ms in timed.items():
        chunked = mode == "forward" and who not in ("copy", "softmax")
        rows.append(
            row(
                who,
                ms=ms,
                times_ours=None if ours is None else ms / ours,
                of_bandwidth=None
                if who == "softmax" or ours is None
                else 2 * copy_from.numel() / ms * 1e3 / measured.bytes,
                of_gemm=operations / ms * 1e3 / measured.flops if chunked else None,
                launches=launched if who == "triton" else None,
            )
        )
    return rows


def _plain(run: Run) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            result = run()
        return result[0] if isinstance(result, tuple) else result

    return call


def _trained(run: Run, inputs: Inputs) -> Callable[[], Tensor]:
    weights: list[Tensor] = []

    def call() -> Tensor:
        result = run()
        output: Tensor = result[0] if isinstance(result, tuple) else result
        if not weights:
            weights.append(torch.randn_like(output))
        for t in inputs.values():
            t.grad = None
        output.backward(weights[0])
        return output.detach()

    return call


# ---------------------------------------------------------------------------------------------- cold starts

_FIRST = """
import sys, time
from linstate.bench import cuda
from linstate.bench.cases import CASES, Shape
import torch
name, who, tokens, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
case = CASES[name]
inputs = {n: t.cuda() for n, t in case.inputs(Shape(tokens, 16, size, torch.bfloat16)).items()}
torch.cuda.synchronize()
begin = time.perf_counter()
make = dict(cuda.implementations(case, inputs, "forward"))[who]
make()()
torch.cuda.synchronize()
print(time.perf_counter() - begin)
"""


def cold(case: Case, who: str, *, tokens: int = 8192, size: int = 128) -> tuple[float | None, str | None]:
    """Seconds of the first call in a new process whose caches of compiled programs are empty, imports of Triton and FLA included."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TRITON_CACHE_DIR": folder}
        command = [sys.executable, "-c", _FIRST, case.name, who, str(tokens), str(size)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.split()
    if done.returncode or not lines:
        return None, (done.stderr.strip().splitlines() or ["no output"])[-1]
    return float(lines[-1]), None


def cold_rows(plan: Plan) -> Iterator[Row]:
    """First calls of ours and of FLA's, in milliseconds."""
    for case in plan.cases:
        ours = None
        for who in ("triton", "fla") if case.model in _FLA else ("triton",):
            seconds, reason = cold(case, who, size=plan.size)
            ours = seconds if who == "triton" else ours
            ratio = seconds / ours if seconds is not None and ours else None
            ms = None if seconds is None else seconds * 1e3
            yield Row(case.name, case.model, who, "cold", 1, 16, 8192, "bfloat16", ms, ratio, reason=reason)


def as_json(plan: Plan, measured: Rates, rows: Sequence[Row]) -> dict[str, Any]:
    """Everything of a run as one JSON-able object."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "machine": machine(),
        "rates": asdict(measured),
        "rounds": plan.rounds,
        "size": plan.size,
        "rows": [asdict(row) for row in rows],
    }
