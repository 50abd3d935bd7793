"""Whole models on a GPU: prefill, one token of small and large batches, a training step, and the first call of a new process.

Beside ours the same weights in their own library (transformers; FLA's models for what only it has), with FLA's kernels where those are installed, in the
same rounds. Shares are of the rates of a large matmul and of a large copy that were measured in the same run.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linstate.bench.gpu import Gpu, Rates, Run, in_turn
from linstate.bench.model_cases import CASES, Case, random_decoder, write_checkpoint
from linstate.bench.models import linear_shapes
from linstate.errors import BackendError
from linstate.models import Decoder
from linstate.ops.triton import runtime
from linstate.types import LayerState, state_bytes


@dataclass(frozen=True)
class Plan:
    """What to measure. ``read``: tokens before those that are decoded. ``cold``: also first calls, in processes of their own."""

    prefill: tuple[int, ...] = (512, 2048, 8192, 32_768)
    batches: tuple[int, ...] = (1, 8, 64)
    training: tuple[int, ...] = (2048,)
    read: int = 2048
    rounds: int = 10
    peers: bool = True
    cold: bool = True

    def quick(self) -> Plan:
        return replace(self, prefill=(2048,), batches=(1,), rounds=3, cold=False)

    def lengths(self, case: Case) -> tuple[int, ...]:
        return self.prefill if case.recurrent else tuple(n for n in self.prefill if n <= 8192)


@dataclass(frozen=True)
class Row:
    """One program on a model in one mode: "prefill", "decode" or "training", of ``batch`` rows of ``tokens``; "cold": the first call.

    ``of_gemm``, ``of_bandwidth``: operations of the linear layers, and weights and state read once, over the time, of what was measured to be the most.
    """

    model: str
    mode: str
    who: str
    batch: int
    tokens: int
    ms: float | None = None
    tokens_per_second: float | None = None
    times_ours: float | None = None
    of_gemm: float | None = None
    of_bandwidth: float | None = None
    launches: int | None = None
    reason: str | None = None


Made = dict[str, Callable[[], Run]]
"""Who, and what makes its call."""


def measure(case: Case, plan: Plan, rates: Rates, gpu: Gpu) -> Iterator[Row]:
    """All rows of a model; what fails is a row with its reason."""
    decoder = random_decoder(case.config)
    other, why = _peer(case, decoder, gpu) if plan.peers else (None, None)
    decoder = decoder.to(gpu.name)
    if why is not None:
        yield Row(case.name, "peer", _library(case), 0, 0, reason=why)
    per_token = sum(2 * n * k * count for (n, k), count in linear_shapes(decoder).items())
    weights = sum(p.numel() * p.element_size() for p in decoder.parameters())

    def ids(batch: int, tokens: int) -> Tensor:
        drawn = torch.randint(
            1, case.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0)
        )
        return drawn.to(gpu.name)

    for tokens in plan.lengths(case):
        made = _prefill(decoder, _library(case), other, ids(1, tokens))
        for row in _rows(case, "prefill", made, 1, tokens, plan, gpu):
            yield _shared(row, of_gemm=per_token * tokens, rates=rates)
    for batch in plan.batches:
        made, held = _decode(decoder, _library(case), other, ids(batch, plan.read), gpu)
        for row in _rows(case, "decode", made, batch, 1, plan, gpu):
            yield _shared(row, of_bandwidth=weights + held, rates=rates)
    for tokens in plan.training:
        made = _training(decoder, _library(case), other, ids(1, tokens))
        for row in _rows(case, "training", made, 1, tokens, plan, gpu):
            yield _shared(row, of_gemm=3 * per_token * tokens, rates=rates)


def _library(case: Case) -> str:
    return "transformers" if case.transformers else "fla"


def _shared(row: Row, rates: Rates, *, of_gemm: float = 0.0, of_bandwidth: float = 0.0) -> Row:
    if row.ms is None:
        return row
    share = of_gemm / row.ms * 1e3 / rates.flops if of_gemm else None
    carried = of_bandwidth / row.ms * 1e3 / rates.bytes if of_bandwidth else None
    return replace(row, of_gemm=share, of_bandwidth=carried)


def _peer(case: Case, decoder: Decoder, gpu: Gpu) -> tuple[Any, str | None]:
    """The same weights in their own library, or why there is nothing.

    By the class, not by ``AutoModel``: FLA registers its models there in the place of those of the same name.
    """
    try:
        library = importlib.import_module("transformers" if case.transformers else "fla.models")
        kind = getattr(library, case.raw["architectures"][0])
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(case, decoder, Path(folder))
            made = kind.from_pretrained(folder, dtype=torch.bfloat16)
        return made.to(gpu.name).eval(), None
    except Exception as error:  # absent, of another version, or without this model
        return None, _said(error)


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _prefill(decoder: Decoder, library: str, other: Any, ids: Tensor) -> Made:
    def ours() -> Any:
        with torch.no_grad():
            return decoder(ids, logits="last")

    def theirs() -> Any:
        with torch.no_grad():
            return other(ids, use_cache=True, logits_to_keep=1)

    return {"linstate": lambda: ours, **({} if other is None else {library: lambda: theirs})}


def _decode(decoder: Decoder, library: str, other: Any, ids: Tensor, gpu: Gpu) -> tuple[Made, int]:
    """One token of every row: ours from one state, once as it is called and once as a graph; theirs from a cache that it changes. And bytes of state."""
    one = ids[:, :1].contiguous()
    state: LayerState = {}

    def ours() -> Any:
        with torch.no_grad():
            return decoder(one, state, logits="last")

    def graph() -> Run:
        ours()
        gpu.synchronize()
        return gpu.graph(ours)

    def theirs() -> Run:
        with torch.no_grad():
            out = other(ids, use_cache=True, logits_to_keep=1)
        cache = {name: out[name] for name in ("past_key_values", "cache_params") if out.get(name) is not None}

        def run() -> Any:
            with torch.no_grad():
                return other(one, use_cache=True, logits_to_keep=1, **cache)

        return run

    with torch.no_grad():
        _, state = decoder(ids, logits="none")
    made: Made = {"linstate": lambda: ours, "linstate, graph": graph}
    if other is not None:
        made[library] = theirs
    return made, state_bytes(state)


def _training(decoder: Decoder, library: str, other: Any, ids: Tensor) -> Made:
    def trained(model: torch.nn.Module, logits: Callable[[], Tensor]) -> Callable[[], Run]:
        def make() -> Run:
            def run() -> None:
                model.zero_grad(set_to_none=True)
                with torch.enable_grad():
                    F.cross_entropy(logits()[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()

            return run

        return make

    found = {"linstate": trained(decoder, lambda: decoder(ids)[0])}
    if other is not None:
        found[library] = trained(other, lambda: other(ids, use_cache=False).logits)
    return found


def _rows(case: Case, mode: str, made: Made, batch: int, tokens: int, plan: Plan, gpu: Gpu) -> Iterator[Row]:
    runs: dict[str, Run] = {}
    launched: dict[str, int] = {}
    for who, make in made.items():
        try:
            run = make()
            runtime.launches.clear()
            run()
            gpu.synchronize()
            launched[who] = sum(runtime.launches.values())
            runs[who] = run
        except Exception as error:  # no memory, or a program that cannot: the others are measured
            yield Row(case.name, mode, who, batch, tokens, reason=_said(error))
            gpu.empty_cache()
    timed = in_turn(gpu, runs, plan.rounds)
    ours = timed.get("linstate")
    for who, ms in timed.items():
        yield Row(
            *(case.name, mode, who, batch, tokens, ms, batch * tokens / ms * 1e3),
            times_ours=None if ours is None else ms / ours,
            launches=launched[who] if who == "linstate" else None,
        )


_FIRST = """
import sys, time, torch
from linstate.bench import models_cuda
from linstate.bench.model_cases import CASES, random_decoder
decoder = random_decoder(CASES[sys.argv[1]].config).to("cuda")
ids = torch.ones(1, int(sys.argv[2]), dtype=torch.int64, device="cuda")
torch.cuda.synchronize()
begin = time.perf_counter()
with torch.no_grad():
    _, state = decoder(ids, logits="last")
    decoder(ids[:, :1], state, logits="last")
torch.cuda.synchronize()
print(time.perf_counter() - begin)
"""


def cold(case: Case, tokens: int = 2048) -> Row:
    """The first prefill and the first token of ours in a new process whose caches of compiled programs are empty."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TRITON_CACHE_DIR": folder}
        command = [sys.executable, "-c", _FIRST, case.name, str(tokens)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.split()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return Row(case.name, "cold", "linstate", 1, tokens, reason=reason)
    return Row(case.name, "cold", "linstate", 1, tokens, ms=float(lines[-1]) * 1e3)


def sweep(names: list[str], plan: Plan, rates: Rates, gpu: Gpu) -> Iterator[Row]:
    """Every row of every model. Raises BackendError for a model that is not among :data:`CASES`."""
    for name in names:
        if name not in CASES:
            raise BackendError(f"there is no model {name!r} to measure; there are {', '.join(CASES)}")
        yield from measure(CASES[name], plan, rates, gpu)
        gpu.empty_cache()
        if plan.cold:
            yield cold(CASES[name])


def as_json(plan: Plan, rates: Rates, rows: list[Row]) -> dict[str, Any]:
    from linstate.bench.machine import machine

    return {
        "machine": machine(),
        "rates": asdict(rates),
        "plan": asdict(plan),
        "rows": [asdict(r) for r in rows],
    }
