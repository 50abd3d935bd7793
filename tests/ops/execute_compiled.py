"""``python execute_compiled.py KIND GATE EVERY``: the programs of a recurrence as compiled for sm_90, executed on the CPU, beside the definition in float64.

KIND and GATE as in ``kernels/chunk.py``. EVERY: the states that are kept, which is how long a chunk is; 0 for a call with gradients. Prints the
largest error of each result, of its largest entry, as JSON. In a process of its own: Triton must not be interpreting.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from linstate.ops import delta_rule, dplr, linear_attention
from linstate.ops.triton import ahead, matrix, matrix_gradient, table
from ops.ptx import Memory, execute

SIZE = 32


class Device:
    """Memory with the inputs in it; what programs write begins as NaN."""

    def __init__(self, inputs: list[Tensor]) -> None:
        self.memory, self.places = Memory(1 << 25), dict[int, int]()
        for t in inputs:
            self.places[t.data_ptr()] = self.memory.put(raw(t))

    def place(self, t: Tensor) -> int:
        if t.data_ptr() not in self.places:
            self.places[t.data_ptr()] = self.memory.put(b"\xff" * max(16, len(raw(t))))
        return self.places[t.data_ptr()]

    def read(self, t: Tensor) -> Tensor:
        at = self.places[t.data_ptr()]
        found = self.memory.bytes[at : at + len(raw(t))].tobytes()
        return torch.frombuffer(bytearray(found), dtype=t.dtype).reshape(t.shape).double()

    def run(self, launches: list[ahead.Launch]) -> None:
        """Each compiled as for a call with these arguments; every other one with its last warp first."""
        import triton

        assembly: list[str] = []
        compile_ = triton.compile

        def remembered(*args: Any, **options: Any) -> Any:
            made = compile_(*args, **options)
            assembly.append(made.asm["ptx"])
            return made

        triton.compile = remembered
        for turn, launch in enumerate(launches):
            ahead.compiled(launch)
            fixed = {p.name for p in launch.program.params if p.do_not_specialize}
            values = []
            for name, value in zip(launch.program.arg_names, launch.arguments, strict=False):
                if isinstance(value, Tensor):
                    values.append(self.place(value))
                elif isinstance(value, float):
                    values.append(int(np.float32(value).view(np.uint32)))
                elif value is not None and (value != 1 or name in fixed):  # one is a constant then
                    values.append(value & (1 << 64) - 1)
            warps = launch.options["num_warps"]
            execute(assembly[-1], values, launch.programs, warps, self.memory, backwards=bool(turn % 2))


def raw(t: Tensor) -> bytes:
    return t.contiguous().view(torch.uint8).numpy().tobytes()


def main(kind: int, gate: int, every: int) -> dict[str, float]:
    torch.manual_seed(0)
    shape = (1, 70 if every else 40, 1, SIZE)
    q, k, v, b = (F.normalize(torch.randn(shape), dim=-1).bfloat16() for _ in range(4))
    a, beta = (-b.float() * torch.rand(shape)).bfloat16(), (2 * torch.rand(shape[:3])).bfloat16()
    g, start = -torch.rand(shape[: 2 + gate]), torch.randn(1, 1, SIZE, SIZE)
    given = {"q": q, "k": k, "v": v, "initial_state": start}
    given |= {"a": a, "b": b} if kind == 2 else {"beta": beta} if kind == 1 else {}
    given |= {"g": g} if gate else {}
    by_output, by_state = torch.randn(shape).bfloat16(), torch.randn(1, 1, SIZE, SIZE)
    tensors = [given.get(name) for name in ("q", "k", "v", "a", "b", "beta", "g", "bonus", "initial_state")]
    wide = {name: t.double().requires_grad_() for name, t in given.items()}
    op = (linear_attention, delta_rule, dplr)[kind]
    expected = op(**wide, scale=1.0, form="recurrent", backend="torch")
    pairs: list[tuple[str, Tensor, Tensor]] = []
    with ahead.recorded() as launches:
        if every:
            o, after, _ = matrix.run(kind, *tensors, 1.0, None, every, False)
        else:
            every = table.backward(kind, gate, SIZE, SIZE, False)[0].chunk
            o, after, kept = matrix.run(kind, *tensors, 1.0, None, every, True)
            found = matrix_gradient.run_backward(kind, *tensors, kept, by_output, by_state, 1.0, None)
            total = (expected[0] * by_output.double()).sum() + (expected[1] * by_state.double()).sum()
            by = dict(zip(wide, torch.autograd.grad(total, list(wide.values())), strict=True))
            names = ("q", "k", "v", "a", "b", "beta", "g", "bonus", "initial_state")
            pairs = [(f"by {n}", t, by[n]) for n, t in zip(names, found, strict=True) if n in by]
    pairs += [("output", o, expected[0]), ("state", after, expected[1])]
    device = Device([*given.values(), by_output, by_state])
    device.run(launches)
    return {
        name: float((device.read(t) - wanted).abs().max() / wanted.abs().max()) for name, t, wanted in pairs
    }


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:]))))
