"""Types of the compiled module (csrc/module.cpp, csrc/bind_*.cpp)."""

import torch

_Sequence = (
    tuple[int, int, int, int, bool] | None
)  # address, strides of batch, time and head, whether bfloat16
_Row = tuple[int, int, bool] | None  # address, stride of batch, whether bfloat16

def version() -> str: ...
def cpu_features() -> dict[str, bool]: ...
def isas(emulated: bool = False) -> list[str]: ...
def isa() -> str: ...
def use(isa: str) -> None: ...
def join_team(parallel: int, thread_number: int, most_threads: int) -> None: ...
def matrix(
    kind: int,
    sizes: tuple[int, ...],
    tensors: tuple[_Sequence, ...],
    gate: int,
    scale: float,
    bounds: int | None,
    bonus: int | None,
    before: int | None,
    after: int,
    out: _Sequence,
    snapshots: int | None,
    every: int,
    snapshot_count: int,
    threads: int,
) -> None: ...
def attend_rows(
    sizes: tuple[int, int, int, int, int],
    tensors: tuple[_Sequence, ...],
    strides: tuple[int, int, int, int],
    narrow: bool,
    scale: float,
    rows: int,
    most: int,
    out: _Sequence,
    threads: int,
) -> None: ...
def core(
    bf16: bool,
    solve: bool,
    sizes: tuple[int, int, int],
    a: tuple[int, int],
    b: tuple[int, int] | None,
    c: tuple[int, int],
    keep: bool,
    row_scale: int | None,
    shape: int,
) -> None: ...
def scan(
    sizes: tuple[int, ...],
    tensors: tuple[_Sequence, ...],
    rates: int | None,
    scale: float,
    bounds: int | None,
    before: int | None,
    after: int,
    out: _Sequence,
    snapshots: int | None,
    every: int,
    snapshot_count: int,
    threads: int,
) -> None: ...
def conv(
    sizes: tuple[int, ...],
    x: _Sequence,
    weight: _Sequence,
    bias: _Sequence,
    silu: bool,
    bounds: int | None,
    before: int | None,
    after: int,
    out: _Sequence,
    threads: int,
) -> None: ...
def step(
    kind: int,
    sizes: tuple[int, ...],
    tensors: tuple[_Sequence, ...],
    gate: int,
    scale: float,
    bonus: int | None,
    before: int | None,
    after: int,
    out: _Sequence,
    threads: int,
) -> None: ...
def mixer(
    sizes: tuple[int, ...],
    numbers: tuple[float, ...],
    rows: int,
    tensors: tuple[_Row, ...],
    tail_before: int | None,
    tail_after: int | None,
    before: int | None,
    after: int,
    out: _Row,
    threads: int,
) -> None: ...
def shift(
    rows: int,
    n: int,
    count: int,
    x: tuple[int, int, bool],
    mix: tuple[int, int, bool],
    out: tuple[int, int, bool],
    before: int | None,
    after: int,
    threads: int,
) -> None: ...
def rwkv7(
    rows: int,
    heads: int,
    size: int,
    eps: float,
    tensors: tuple[_Row, ...],
    out: tuple[int, int, bool],
    before: int | None,
    after: int,
    threads: int,
) -> None: ...
def linear(
    format: int,
    rows: int,
    n: int,
    k: int,
    x: tuple[int, int],
    weight: int,
    scales: int | None,
    bias: tuple[int, bool] | None,
    out: tuple[int, int, bool],
    threads: int,
) -> None: ...
def norm(
    rows: int,
    groups: int,
    size: int,
    centre: bool,
    eps: float,
    x: tuple[int, int, int, bool],
    weight: tuple[int, int, int, bool] | None,
    weight_plus: float,
    bias: tuple[int, int, int, bool] | None,
    gate: int,
    z: tuple[int, int, int, bool] | None,
    out: tuple[int, int, int, bool],
    threads: int,
) -> None: ...
def gated(rows: int, n: int, x: tuple[int, int], out: int, threads: int) -> None: ...
def activate(kind: int, n: int, x: int, out: int, threads: int) -> None: ...
def attend(
    sizes: tuple[int, ...],
    numbers: tuple[float, ...],
    tensors: tuple[_Row, ...],
    out: _Row,
    states: list[int],
    threads: int,
) -> None: ...
def embed(
    format: int, rows: int, n: int, k: int, ids: int, weight: int, scales: int | None, out: int
) -> None: ...
def memory(bytes: int, kept: bool) -> torch.Tensor: ...

class Program:
    def __init__(self) -> None: ...
    size: int
    def add(self, n: int, x: int, y: int, read: int | None, fresh: bool) -> None: ...
    def run(self, states: list[int], count: int, past: bool, threads: int) -> None: ...

def mixer_gates(
    sizes: tuple[int, ...],
    numbers: tuple[float, ...],
    rows: int,
    tensors: tuple[_Row, ...],
    outs: tuple[_Row, ...],
    threads: int,
) -> None: ...
def mixer_finish(
    sizes: tuple[int, ...],
    numbers: tuple[float, ...],
    rows: int,
    tensors: tuple[_Row, ...],
    made: _Row,
    out: _Row,
    threads: int,
) -> None: ...
def shift_tokens(
    rows: int,
    tokens: int,
    n: int,
    count: int,
    x: _Row,
    mix: _Row,
    out: _Row,
    before: int | None,
    threads: int,
) -> None: ...
def rwkv7_gates(
    rows: int, heads: int, size: int, tensors: tuple[_Row, ...], outs: tuple[_Row, ...], threads: int
) -> None: ...
def rwkv7_finish(
    rows: int,
    heads: int,
    size: int,
    eps: float,
    tensors: tuple[_Row, ...],
    made: _Row,
    out: _Row,
    threads: int,
) -> None: ...
def stream(n: int, x: int, y: int, out: int, threads: int) -> None: ...
def attention(
    sizes: tuple[int, ...],
    scale: float,
    tensors: tuple[_Sequence, ...],
    first: int,
    out: _Sequence,
    threads: int,
) -> None: ...
