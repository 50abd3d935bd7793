"""Speed of the recurrences on a GPU: our Triton programs, FLA's, mamba_ssm's, softmax attention, and a copy of what is read and written.

Everything of a cell is measured in the same rounds, in alternating order, with CUDA events around each call. The copy of inputs and outputs is the
floor: what the memory must carry at least. Rates of the memory and of matmuls are measured in the same run, and shares are of those.

A step is so short that the host is slower than the device: it is captured in a graph of many, each on a state of its own, all of them
more than the second-level cache holds, as in serving.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linstate.bench.cases import CASES, CONV_WIDTH, SCAN_STATE, Case, Inputs, Shape
from linstate.bench.gpu import Gpu, Rates, Run, in_turn
from linstate.bench.machine import machine
from linstate.errors import ArgumentError
from linstate.ops.triton import runtime

TOKENS = (512, 2048, 8192, 32_768, 131_072)
SIZES = ((1, 16), (8, 32))
"""Batch and heads: a chip that is mostly idle, and one that is full."""
MODES = ("forward", "training", "step")


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
        if unknown := [mode for mode in self.modes if mode not in MODES]:
            raise ArgumentError(f"no mode {unknown[0]!r}; there are {', '.join(MODES)}, and cold")
        if not self.cases:
            raise ArgumentError(f"no case has {self.only!r} in its name; there are: {'; '.join(CASES)}")

    @property
    def cases(self) -> list[Case]:
        return [case for name, case in CASES.items() if self.only in name]


@dataclass(frozen=True)
class Row:
    """One implementation of a case in one mode. ``ms``: of a call, with the host's share; ``graph_ms``: of the same captured in a graph, the device's alone (forward;
    a step's ``ms`` is that). Shares are of the device's time, where it is known. ``of_bandwidth``: the least bytes over the time, of the rate of a large copy.

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
    graph_ms: float | None = None
    times_ours_in_graph: float | None = None
    of_bandwidth: float | None = None
    of_gemm: float | None = None
    launches: int | None = None
    reason: str | None = None


# -------------------------------------------------------------------------------------------- who is measured


@dataclass(frozen=True)
class OfFLA:
    """A function of FLA: its module below ``fla.ops``, its name, ``theirs=ours`` for each tensor, and what else it is told."""

    path: str
    name: str
    tensors: str
    told: tuple[tuple[str, Any], ...] = ()

    def bind(self, inputs: Inputs, state: Tensor | None) -> Run:
        function = getattr(importlib.import_module(f"fla.ops.{self.path}"), self.name)
        pairs = (pair.split("=") for pair in self.tensors.split())
        tensors = {pair[0]: inputs[pair[-1]] for pair in pairs}
        more = {**dict(self.told), "output_final_state": True, "initial_state": state}
        return lambda: function(**tensors, **more)


_ONE = (("scale", 1.0),)
FLA: dict[str, tuple[OfFLA, OfFLA]] = {
    "DeltaNet": (
        OfFLA("delta_rule", "chunk_delta_rule", "q k v beta"),
        OfFLA("delta_rule", "fused_recurrent_delta_rule", "q k v beta"),
    ),
    "Gated DeltaNet": (
        OfFLA("gated_delta_rule", "chunk_gated_delta_rule", "q k v g beta"),
        OfFLA("gated_delta_rule", "fused_recurrent_gated_delta_rule", "q k v g beta"),
    ),
    "KDA": (
        OfFLA("kda", "chunk_kda", "q k v g beta"),
        OfFLA("kda", "fused_recurrent_kda", "q k v g beta"),
    ),
    "Linear Transformer": (
        OfFLA("linear_attn", "chunk_linear_attn", "q k v", (("normalize", False),)),
        OfFLA("linear_attn", "fused_recurrent_linear_attn", "q k v", (("normalize", False),)),
    ),
    "Mamba-2": (
        OfFLA("simple_gla", "chunk_simple_gla", "q k v=written g=decay", _ONE),
        OfFLA("simple_gla", "fused_recurrent_simple_gla", "q k v=written g=decay", _ONE),
    ),
    "GLA": (
        OfFLA("gla", "chunk_gla", "q k v g"),
        OfFLA("gla", "fused_recurrent_gla", "q k v gk=g"),
    ),
    "RWKV-6": (
        OfFLA("rwkv6", "chunk_rwkv6", "r=q k v w=g u=bonus"),
        OfFLA("rwkv6", "fused_recurrent_rwkv6", "r=q k v w=g u=bonus"),
    ),
    "RWKV-7": (  # theirs reads by a and writes by b
        OfFLA("rwkv7", "chunk_rwkv7", "r=q w=g k v a=b b=a", _ONE),
        OfFLA("rwkv7", "fused_recurrent_rwkv7", "r=q w=g k v a=b b=a", _ONE),
    ),
}
"""For many tokens, and for one."""


def _fla(model: str, inputs: Inputs, state: Tensor | None, *, one: bool) -> Run:
    """Mamba-2's op takes what is written and the log decay: products that our call makes, too."""
    function = FLA[model][one]
    if model != "Mamba-2":
        return function.bind(inputs, state)

    def run() -> Any:
        v, dt = inputs["v"], inputs["dt"]
        made = {"written": v * dt.to(v.dtype)[..., None], "decay": inputs["A"] * dt}
        return function.bind({**inputs, **made}, state)()

    return run


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


def implementations(
    case: Case, inputs: Inputs, mode: str, state: Tensor | None = None
) -> Iterator[tuple[str, Callable[[], Run]]]:
    """(who, what makes its call); whether it can be made is seen when it is tried. Ours is first. ``state``: of a step, ``[B, H, K, V]``."""
    one = mode == "step"
    form = "step" if one else "chunked"
    given: dict[str, Any] = {"form": form} if state is None else {"form": form, "initial_state": state}
    yield "triton", lambda: lambda: case.call(inputs, backend="triton", **given)
    yield "torch", lambda: lambda: case.call(inputs, backend="torch", **given)
    if case.model in FLA:
        yield "fla", lambda: _fla(case.model, inputs, state, one=one)
    if case.model == "Mamba" and not one:
        yield "mamba_ssm", lambda: _mamba_ssm(inputs)
    if case.model == "Mamba-2" and not one:
        yield "mamba_ssm", lambda: _mamba2_ssm(inputs)
    if case.beside_softmax and not one:
        yield "softmax", lambda: _softmax(inputs["v"])


def begin_state(case: Case, shape: Shape) -> Tensor | None:
    """A state to step from, float32; None where a case's op has none that a step reads."""
    if case.recurrence == "causal_conv1d":
        return torch.randn(shape.batch, CONV_WIDTH - 1, shape.heads * shape.size)
    rows = {"Mamba": SCAN_STATE, "RG-LRU": 1}.get(case.model, shape.size)
    return torch.randn(shape.batch, shape.heads, rows, shape.size)


def _softmax(v: Tensor) -> Run:
    q, k, values = (
        torch.randn_like(v).transpose(1, 2).contiguous().requires_grad_(v.requires_grad) for _ in range(3)
    )

    def run() -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, values, is_causal=True)

    return run


def least_bytes(inputs: Inputs, output: Tensor, mode: str, state: Tensor | None = None) -> int:
    """Inputs read once and outputs written once, a step's state both; in training everything once more as a gradient, and inputs read again."""
    read = sum(t.numel() * t.element_size() for t in inputs.values())
    written = output.numel() * output.element_size()
    held = 0 if state is None else 2 * state.numel() * state.element_size()
    return read + written + held if mode != "training" else 3 * read + 2 * written


# ------------------------------------------------------------------------------------------------- measuring


def sweep(plan: Plan, measured: Rates, gpu: Gpu) -> Iterator[list[Row]]:
    """Every cell of a plan: a case in one mode, at one size and length."""
    for case in plan.cases:
        for batch, heads in plan.sizes:
            shape = case.at(Shape(1, heads, plan.size, plan.dtype, batch))
            for mode in plan.modes:
                for tokens in (1,) if mode == "step" else plan.tokens:
                    yield cell(case, replace(shape, tokens=tokens), mode, plan, measured, gpu)


STATES = 256
"""Of a graph of steps, at most."""


def cell(case: Case, shape: Shape, mode: str, plan: Plan, measured: Rates, gpu: Gpu) -> list[Row]:
    """All implementations of a case at one length, ours first. What fails, or does not fit into memory, is a row with its reason."""

    def row(who: str, **found: Any) -> Row:
        sizes = (shape.batch, shape.heads, shape.tokens, shape.precision)
        return Row(case.name, case.model, who, mode, *sizes, **found)

    def failed(who: str, error: Exception) -> Row:
        first = str(error).splitlines()[0] if str(error) else ""
        return row(who, reason=f"{type(error).__name__}: {first}")

    runs: dict[str, Run] = {}
    rows: list[Row] = []
    launched, least = None, 0
    states: list[Tensor | None] = [None]
    try:
        inputs = case.inputs(shape, gpu.name)
        if mode == "training":
            inputs = {name: t.requires_grad_() for name, t in inputs.items()}
        if mode == "step" and (state := begin_state(case, shape)) is not None:
            count = max(1, min(STATES, -(-3 * gpu.cache_bytes() // (state.numel() * 4))))
            states = [state.to(gpu.name).clone() for _ in range(count)]
    except torch.OutOfMemoryError as error:
        return [row("triton", reason=f"inputs do not fit: {error}")]
    for who, first in implementations(case, inputs, mode, states[0]):
        try:
            run = _trained(first(), inputs) if mode == "training" else _plain(first())
            runtime.launches.clear()
            output = run()
            gpu.synchronize()
            if who == "triton":
                launched = sum(runtime.launches.values())
                least = least_bytes(inputs, output, mode, states[0])
            if mode == "step":
                makers = [dict(implementations(case, inputs, mode, state))[who] for state in states]
                run = _in_a_graph([_plain(make()) for make in makers], gpu)
            runs[who] = run
            del output
        except Exception as error:  # an absent package, another peer, no memory: the others are measured
            rows.append(failed(who, error))
            gpu.empty_cache()
    if "triton" in runs:
        try:
            runs["copy"] = _copy(least // 2, len(states), gpu)
        except Exception as error:
            rows.append(failed("copy", error))
    timed = {who: ms / len(states) for who, ms in in_turn(gpu, runs, plan.rounds).items()}
    in_graph: dict[str, float] = {}
    if mode == "forward":
        captured = {}
        for who, run in runs.items():
            try:
                captured[who] = gpu.graph(run)
            except Exception:  # what waits for the device within
                gpu.synchronize()
        in_graph = in_turn(gpu, captured, plan.rounds)
    ours, ours_in_graph = timed.get("triton"), in_graph.get("triton")
    operations = case.flops(shape) * shape.tokens * shape.heads * shape.batch
    for who, ms in timed.items():
        chunked = mode == "forward" and who not in ("copy", "softmax")
        beside = who != "softmax" and ours is not None
        device = in_graph.get(who)
        alone = ms if device is None else device
        rows.append(
            row(
                who,
                ms=ms,
                times_ours=None if ours is None else ms / ours,
                graph_ms=device,
                times_ours_in_graph=device / ours_in_graph if device and ours_in_graph else None,
                of_bandwidth=least / alone * 1e3 / measured.bytes if beside else None,
                of_gemm=operations / alone * 1e3 / measured.flops if chunked else None,
                launches=launched if who == "triton" else None,
            )
        )
    return rows


def _in_a_graph(runs: list[Run], gpu: Gpu) -> Run:
    """All calls in one graph; each has run before."""

    def all_of_them() -> list[Any]:
        return [run() for run in runs]

    all_of_them()
    gpu.synchronize()
    return gpu.graph(all_of_them)


def _copy(size: int, times: int, gpu: Gpu) -> Run:
    """A copy of so many bytes; of several, in a graph."""
    pairs = [
        tuple(torch.empty(size, device=gpu.name, dtype=torch.uint8) for _ in range(2)) for _ in range(times)
    ]
    copies = [lambda to=to, of=of: to.copy_(of) for to, of in pairs]
    return copies[0] if times == 1 else _in_a_graph(list(copies), gpu)


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
        for who in ("triton", "fla") if case.model in FLA else ("triton",):
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
