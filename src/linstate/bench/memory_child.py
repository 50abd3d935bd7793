"""The process in which :mod:`linstate.bench.memory` measures one call."""

from __future__ import annotations

import json
import sys

import torch

from linstate.bench.cases import CASES, Shape
from linstate.bench.memory import extra_bytes
from linstate.bench.ops import PROBE, implementations
from linstate.ops import native


def _main(case: str, who: str, tokens: str, heads: str, size: str, dtype: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    chosen = CASES[case]
    shape = chosen.at(Shape(int(tokens), int(heads), int(size), getattr(torch, dtype)))
    (found,) = implementations(chosen, native.isas(), who=who)
    few = Shape(PROBE, shape.heads, shape.size, shape.dtype)
    with torch.no_grad():
        found.bind(chosen.inputs(few), few)()
    run = found.bind(chosen.inputs(shape), shape)
    print(json.dumps({"extra_bytes": extra_bytes(run)}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
