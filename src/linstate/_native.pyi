"""Types of the compiled module (csrc/module.cpp). Tensors come as addresses and strides."""

Place = tuple[int, int, int, int, bool]  # address, strides of batch, time and head, whether bfloat16

def version() -> str: ...
def cpu_features() -> dict[str, bool]: ...
def isas(emulated: bool = False) -> list[str]: ...
def isa() -> str: ...
def use(isa: str) -> None: ...
def matrix(
    kind: int,
    sizes: tuple[int, ...],
    tensors: tuple[Place | None, ...],
    gate: int,
    scale: float,
    bounds: int | None,
    bonus: int | None,
    before: int | None,
    after: int,
    out: Place | None,
    snapshots: int | None,
    every: int,
    snapshot_count: int,
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
