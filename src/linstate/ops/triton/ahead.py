"""What the programs of a call take on a GPU that is not there: compiled ahead of time for a named architecture.

:func:`recorded` collects what a call would launch, with the arguments it would be launched with; on tensors of the device ``meta`` nothing is
allocated. :func:`compiled` compiles one such launch and says what it takes. Neither needs a GPU, but Triton must not be
interpreting.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linstate.errors import BackendError
from linstate.ops.triton import runtime

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Launch:
    """A program, how many of it, and what it is told."""

    program: Any
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Resources:
    """Of one thread: registers, and bytes of spilled ones. Of one program: bytes of shared memory, warps. Seconds to compile."""

    name: str
    registers: int
    spilled: int
    shared: int
    warps: int
    seconds: float


@contextmanager
def recorded(processors: int = 132) -> Iterator[list[Launch]]:
    """Within, launches are collected instead of made, for a chip of so many multiprocessors (132: H100, H200)."""
    found: list[Launch] = []

    def instead(program: Any, programs: int, *arguments: Any, **options: Any) -> None:
        if programs:
            found.append(Launch(program, programs, arguments, options))

    send, of_device = runtime.send, runtime.processors
    runtime.send, runtime.processors = instead, lambda index: processors  # type: ignore[assignment]
    try:
        yield found
    finally:
        runtime.send, runtime.processors = send, of_device


def compiled(launch: Launch, capability: int = 90) -> Resources:
    """Compile a launch for compute capability ``capability`` (90: H100, H200).

    Raises:
        BackendError: Triton is interpreting, or a program does not compile.
    """
    if runtime.interpreted():
        raise BackendError(
            "Triton is interpreting (TRITON_INTERPRET): nothing is compiled; unset it and start again"
        )
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    program, settings = launch.program, dict(launch.options)
    warps = settings.pop("num_warps", 4)
    hints = {"num_warps": warps, "num_stages": settings.pop("num_stages", 3)}
    signature, constants, attributes = {}, dict[tuple[int, ...], Any](), dict[tuple[int, ...], Any]()
    given = dict(zip(program.arg_names, launch.arguments, strict=False)) | settings
    fixed = {p.name for p in program.params if p.do_not_specialize}
    for number, name in enumerate(program.arg_names):
        value = given[name]
        one = isinstance(value, int) and value == 1 and name not in fixed
        if name in settings or value is None or one:
            signature[name], constants[number,] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], attributes[number,] = _TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and name not in fixed:
                attributes[number,] = [["tt.divisibility", 16]]
    start = time.perf_counter()
    source = ASTSource(fn=program, signature=signature, constexprs=constants, attrs=attributes)
    try:
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=hints)
    except Exception as error:  # of many kinds, from the front end to ptxas
        raise BackendError(f"{program.__name__} does not compile for sm_{capability}: {error}") from error
    seconds = time.perf_counter() - start
    registers, spilled = _usage(made.asm["cubin"])
    return Resources(program.__name__, registers, spilled, made.metadata.shared, warps, seconds)


def _usage(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.cubin"
        file.write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", str(file)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if found is None:
        raise BackendError(f"cuobjdump says nothing of registers: {said[:200]!r}")
    return int(found[1]), int(found[2])


# ------------------------------------------------------------------------------- the programs of usual calls


def calls(
    size: int, dtype: torch.dtype, *, tokens: int = 8192, heads: int = 16
) -> dict[str, Callable[[], None]]:
    """Calls of every recurrence with B = 1, forward and backward, by name; gates in float32, as the mixers make them."""
    from linstate.ops.fused.plan import Operands, Plan
    from linstate.ops.triton import matrix, matrix_gradient, mixer, rwkv, scan, step, table

    def of(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    wide = torch.float32
    line, rows = (1, tokens, heads), (1, tokens, heads, size)
    gates = {0: lambda *_: None, 1: lambda *s: of(*s[:-1], kind=wide), 2: lambda *s: of(*s, kind=wide)}
    start = of(1, heads, size, size, kind=wide)

    def on_matrix(kind: int, gate: int) -> None:
        a, b = (of(*rows), of(*rows)) if kind == 2 else (None, None)
        beta = of(*line) if kind == 1 else None
        given = (kind, of(*rows), of(*rows), of(*rows), a, b, beta, gates[gate](*rows), None, start)
        every = table.backward(kind, gate, size, size, dtype != torch.bfloat16)[0].chunk
        o, after, kept = matrix.run(*given, 1.0, None, every, True)
        matrix_gradient.run_backward(*given, kept, o, after, 1.0, None)

    def on_scan() -> None:
        states, values = 16, of(*rows)
        q, g, A = of(1, tokens, 1, states), of(*rows, kind=wide), of(heads, states, size, kind=wide)
        given = (q, q, values, g, A, of(1, heads, states, size, kind=wide))
        o, after, kept = scan.run_scan(*given, 1.0, None, scan.SPAN)
        scan.run_scan_backward(*given, kept, o, after, 1.0, None)

    def on_conv() -> None:
        x, weight = of(1, tokens, heads * size), of(heads * size, 4)
        y, after = scan.run_conv(x, weight, None, None, "silu", None)
        scan.run_conv_backward(x, weight, None, None, y, after, "silu", None)

    def on_step() -> None:
        q, beta = of(1, 1, heads, size), of(1, 1, heads)
        step.run(1, q, q, q, None, None, beta, beta, None, 1.0, start, start, q, None)

    def on_mixer(**choices: Any) -> None:
        keys, groups = heads * size, choices.get("hk", heads)
        conv = (0, 2 * groups * size + keys, 4) if choices.pop("conv", True) else (0, 0, 0)
        sizes = {"hk": groups, "hv": heads, "k": size, "v": size, "conv": conv}
        places = {"q_at": 0, "k_at": groups * size, "v_at": 2 * groups * size}
        plan = Plan(**{**sizes, **places, "scale": 1.0, "norm_eps": 1e-6, **choices})
        decays = plan.decay in ("head", "channel")
        operands = Operands(
            weight=of(conv[1], 4) if conv[1] else None,
            beta=of(*line) if plan.recurrence == "delta_rule" else None,
            step=of(*line) if plan.decay == "head" else of(1, tokens, groups * size),
            rate=of(heads, kind=wide) if decays else None,
            step_bias=of(heads if plan.decay == "head" else keys, kind=wide) if decays else None,
            skip=of(heads, kind=wide) if plan.stepped_values else None,
            norm=of(keys),
            z=of(1, tokens, keys),
        )
        tail = of(1, conv[2] - 1, conv[1], kind=wide) if conv[2] else None
        mixed = of(1, tokens, 2 * groups * size + keys)
        mixer.prefill(plan, mixed, start, tail, operands, None)
        all_of = {name: getattr(operands, name) for name in operands.__slots__}
        one = {n: t[:, :1] if t is not None and t.dim() == 3 else t for n, t in all_of.items()}
        mixer.step(plan, mixed[:, :1], start, tail, Operands(**one))

    plans: dict[str, dict[str, Any]] = {
        "gated_deltanet": {"recurrence": "delta_rule", "unit_eps": 1e-6, "decay": "head", "gate": "silu"},
        "kimi_delta": {"recurrence": "delta_rule", "unit_eps": 1e-6, "decay": "channel", "gate": "sigmoid"},
        "gla": {"recurrence": "linear_attention", "decay": "sigmoid", "conv": False, "gate": "silu"},
        "mamba2": {
            **{"recurrence": "linear_attention", "decay": "head", "gate": "silu", "gate_first": True},
            **{"hk": 1, "norm": "group", "stepped_values": True},
        },
    }

    found: dict[str, Callable[[], None]] = {
        f"{name}, gate {gate}": lambda kind=kind, gate=gate: on_matrix(kind, gate)  # type: ignore[misc]
        for kind, name in enumerate(matrix.KINDS)
        for gate in (0, 1, 2)
    }

    def on_rwkv7() -> None:
        keys, weights = of(1, tokens, heads * size), of(heads * size)
        rwkv.shift(of(1, tokens, heads * size), None, of(6, heads * size), None)
        for count in (tokens, 1):
            t = keys[:, :count]
            operands = rwkv.Operands(
                t, t, t, t, t, t, t, t, weights, weights, of(heads, size), weights, weights
            )
            rwkv.time_mix(operands, 1e-5, start, None)

    found["mixer rwkv7"] = on_rwkv7
    found |= {
        f"mixer {name}": lambda choices=choices: on_mixer(**choices)  # type: ignore[misc]
        for name, choices in plans.items()
    }
    return found | {"selective_scan": on_scan, "causal_conv1d": on_conv, "step": on_step}


def main() -> None:
    """A table of what the programs take, or a JSON object for each: ``python -m linstate.ops.triton.ahead``."""
    import linstate.ops  # noqa: F401  # enters everything

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--only", default="", help="only calls with this in their name")
    parser.add_argument("--size", type=int, default=128, help="K and V")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--capability", type=int, default=90, help="90: H100 and H200")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    seen: set[tuple[Any, ...]] = set()
    for name, call in calls(asked.size, getattr(torch, asked.dtype)).items():
        if asked.only not in name:
            continue
        with recorded() as launches:
            call()
        for launch in launches:
            settings = launch.options
            same = (launch.program.__name__, *sorted((key, str(value)) for key, value in settings.items()))
            if same in seen:
                continue
            seen.add(same)
            found = compiled(launch, asked.capability)
            shape = {"chunk": settings.get("C"), "block": settings.get("BV", settings.get("BD"))}
            summary = settings.get("SUMMARY", False)
            if asked.json:
                print(json.dumps({"call": name, "summary": summary, **shape, **asdict(found)}), flush=True)
            else:
                title = f"`{found.name}`{' of summaries' if summary else ''}"
                cells = (
                    shape["chunk"] or "",
                    shape["block"] or "",
                    found.warps,
                    found.registers,
                    found.spilled,
                )
                print(f"| {name} | {title} | {' | '.join(map(str, cells))} | {found.shared:,} |", flush=True)


if __name__ == "__main__":
    main()
