"""The matmul cores of the native kernels, and the recurrences on the cores that round to bf16.

Every instruction set of this machine is tried, and the emulated ones: the same text as for AMX and AVX512-BF16, with their
instructions in plain code (csrc/tiles.hpp). A core is compared with the float64 product of *rounded* operands, so that a
wrong pair, a wrong column or another rounding shows, and only the order of a float32 sum is left open.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linstate import ops
from linstate.ops import native

pytestmark = pytest.mark.skipif(not native.available, reason=f"no native extension: {native.reason}")

ISAS = native.isas(emulated=True)
EMULATED = [name for name in ISAS if name not in native.isas()]
FULL, LOWER_K, LOWER_N = range(3)
UNIT = 2.0**-24  # of float32
BF16_UNIT = 2.0**-8  # of bf16: 8 bits of significand, rounded to nearest


def rounds(isa: str) -> bool:
    """Whether an instruction set's core for bf16 inputs rounds its operands to bf16."""
    return isa in ("amx", "emulated-amx", "emulated-avx512") or (
        isa == "avx512" and native.cpu_features()["avx512_bf16"]
    )


TILED = [name for name in ISAS if rounds(name)]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.using(request.param):
        yield request.param


@pytest.fixture(params=TILED)
def tiled(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.using(request.param):
        yield request.param


def padded(n: int) -> int:
    return (n + 15) // 16 * 16


def fenced(x: Tensor, rows: int, columns: int) -> Tensor:
    """x in the upper left of NaN: what a core must not read has consequences."""
    room = torch.full((rows, columns), float("nan"))
    room[: x.shape[0], : x.shape[1]] = x
    return room


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    bf16: bool = True,
    row_scale: Tensor | None = None,
    shape: int = FULL,
) -> Tensor:
    import linstate._native as _native

    (m, k), n = a.shape, b.shape[1]
    assert n == padded(n), "columns come in whole vectors"
    left, right = fenced(a, m + 1, k + 19), fenced(b, k + 3, n + 16)
    found = fenced(torch.full((m, n), float("nan")) if c is None else c, m + 2, n + 16)
    _native.core(
        bf16,
        False,
        left[:m, :k],
        right[:k, :n],
        found[:m, :n],
        c is not None,
        row_scale,
        shape,
    )
    assert found[m:].isnan().all() and found[:, n:].isnan().all(), "wrote outside of C"
    return found[:m, :n].clone()


def solve(lower: Tensor, x: Tensor, *, bf16: bool = True) -> Tensor:
    import linstate._native as _native

    m, n = x.shape
    left, found = fenced(lower, m + 1, m + 19), fenced(x, m + 2, n + 16)
    _native.core(
        bf16,
        True,
        left[:m, :m],
        None,
        found[:m, :n],
        True,
        None,
        FULL,
    )
    assert found[m:].isnan().all() and found[:, n:].isnan().all(), "wrote outside of X"
    return found[:m, :n].clone()


def as_multiplied(isa: str, bf16: bool, x: Tensor) -> Tensor:
    return (x.bfloat16() if bf16 and rounds(isa) else x).double()


def assert_sum(found: Tensor, a: Tensor, b: Tensor, begin: Tensor | float = 0.0) -> None:
    """found is begin + a b, summed in float32 in some order: (k + 3) roundings of a sum of absolute values, at most."""
    begin = torch.as_tensor(begin, dtype=torch.float64)
    allowed = (a.shape[1] + 3) * UNIT * (a.abs() @ b.abs() + begin.abs())
    worst = ((found.double() - (begin + a @ b)).abs() - allowed).max()
    assert worst <= 0, f"off by {worst:.2e} more than float32 sums may be"


SIZES = [
    (1, 16, 1),
    (5, 16, 3),
    (8, 48, 32),
    (16, 16, 32),
    (16, 64, 33),
    (17, 80, 31),
    (32, 32, 64),
    (33, 96, 70),
    (48, 112, 128),
    (64, 128, 64),
    (95, 256, 130),
    (128, 64, 256),
]


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("m,n,k", SIZES)
def test_product_of_any_size(isa: str, m: int, n: int, k: int, bf16: bool) -> None:
    torch.manual_seed(m * 1000 + k)
    a, b = torch.randn(m, k), torch.randn(k, n)
    assert_sum(gemm(a, b, bf16=bf16), as_multiplied(isa, bf16, a), as_multiplied(isa, bf16, b))


@pytest.mark.parametrize("m,n,k", [(7, 16, 5), (40, 80, 33), (64, 128, 64), (130, 32, 96)])
def test_product_added_to_what_is_there(isa: str, m: int, n: int, k: int) -> None:
    torch.manual_seed(m)
    a, b, c, factor = torch.randn(m, k), torch.randn(k, n), torch.randn(m, n), torch.rand(m)
    left, right = as_multiplied(isa, True, a), as_multiplied(isa, True, b)
    assert_sum(gemm(a, b, c), left, right, c.double())  # C itself is not rounded to bf16
    assert_sum(gemm(a, b, c, row_scale=factor), left, right, (c * factor[:, None]).double())


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("m", [1, 15, 16, 17, 31, 32, 33, 48, 63, 64])
def test_triangles(isa: str, m: int, bf16: bool) -> None:
    torch.manual_seed(m)
    a, b = torch.randn(m, m).tril(), torch.randn(m, 48)
    assert_sum(gemm(a, b, shape=LOWER_K, bf16=bf16), as_multiplied(isa, bf16, a), as_multiplied(isa, bf16, b))

    n = padded(m)
    a, b = torch.randn(m, 40), torch.randn(40, n)
    left, right = as_multiplied(isa, bf16, a), as_multiplied(isa, bf16, b)
    wanted = torch.ones(m, n).tril().bool()
    found = gemm(a, b, shape=LOWER_N, bf16=bf16)
    assert_sum(torch.where(wanted, found, (left @ right).float()), left, right)


def test_a_column_does_not_depend_on_its_place(isa: str) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(50, 70), torch.randn(70, 160)
    whole = gemm(a, b)
    for begin in range(0, 160, 32):  # the cuts that threads may make
        assert torch.equal(gemm(a, b[:, begin : begin + 32]), whole[:, begin : begin + 32])


def test_operands_are_rounded_to_nearest_even(tiled: str) -> None:
    """One product of a number and 1 is that number as the core saw it: on either side, at every place of a vector."""
    torch.manual_seed(0)
    ties = torch.arange(0x3F80, 0x3F90, dtype=torch.int32) * 65536 + 0x8000  # halfway between two bf16
    near = torch.cat([ties - 1, ties, ties + 1]).view(torch.float32)
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3.4e38, -3.4e38, 2.0**-126])
    values = torch.cat([near, -near, special, torch.randn(88) * 1e3])  # 192
    expected = values.bfloat16().float()
    assert not torch.equal(expected[:48].abs(), near.abs()), "the ties are no ties"
    right = gemm(torch.ones(1, 1), values[None])
    assert torch.equal(right[0].nan_to_num(7.0), expected.nan_to_num(7.0)) and right.isnan().sum() == 1
    left = gemm(values[:, None], torch.ones(1, 16))
    assert torch.equal(left[:, 3].nan_to_num(7.0), expected.nan_to_num(7.0)) and left.isnan().sum() == 16


def test_every_pair_meets_its_partner(tiled: str) -> None:
    """A permutation as the left operand brings each row of the right one to its place, exactly."""
    torch.manual_seed(0)
    order = torch.randperm(160)
    b = torch.randn(160, 64)
    assert torch.equal(gemm(torch.eye(160)[order], b), b.bfloat16().float()[order])


@pytest.mark.parametrize("m", [1, 2, 15, 16, 17, 24, 32, 40, 47, 48, 49, 64])
def test_solve(isa: str, m: int) -> None:
    """The error is at most what rounding the operands left of the 16 x 16 blocks on the diagonal makes of it.

    With d the deviation of a row's sum, |d| <= (2 u + u^2) |L| |X| over those blocks (u: the unit of bf16), the solution
    is off by (I - L)^-1 d: entry by entry at most |(I - L)^-1| |d|. Inside a diagonal block nothing is rounded to bf16.
    """
    torch.manual_seed(m)
    lower = (torch.randn(m, m) / m**0.5).tril(-1)
    x = torch.randn(m, 80)
    inverse = torch.linalg.inv(torch.eye(m).double() - lower.double())
    expected = inverse @ x.double()
    block = torch.arange(m) // 16
    left = lower.double().abs() * (block[:, None] != block[None])
    rounding = 2 * BF16_UNIT + BF16_UNIT**2 if rounds(isa) else 0.0
    float32 = 2 * (m + 3) * UNIT * (lower.double().abs() @ expected.abs() + x.double().abs())
    found = solve(lower, x).double()
    first = inverse.abs() @ (rounding * (left @ expected.abs()) + float32)
    # the rounded solution of earlier blocks enters the later ones: second order in the error itself
    allowed = first + inverse.abs() @ (rounding * (left @ first)) * 2
    assert ((found - expected).abs() <= allowed).all(), ((found - expected).abs() / allowed).max()
    if rounds(isa) and m > 32:  # and it is bf16 that was multiplied: float32 would be a thousand times closer
        assert (found - expected).abs().max() > 1e-4


# ------------------------------------------------------------------------------------------------- recurrences

ONE_ROUNDING = BF16_UNIT / math.sqrt(6)  # to bf16, of many numbers: the root of the mean square, relative
GATES = ("none", "scalar", "channel")


def call(recurrence: str, tokens: int, k_dim: int, v_dim: int, gate: str) -> dict[str, Tensor | None]:
    torch.manual_seed(tokens + k_dim)
    b, hk, hv = 1, 1, 2
    q, k = (F.normalize(torch.randn(b, tokens, hk, k_dim), dim=-1) for _ in range(2))
    given = {"q": q, "k": k, "v": torch.randn(b, tokens, hv, v_dim)}
    if recurrence == "delta_rule":
        given["beta"] = torch.rand(b, tokens, hv)
    if recurrence == "dplr":
        given["a"], given["b"] = -k * torch.rand(b, tokens, hk, 1), k
    if gate != "none":
        shape = (b, tokens, hv) if gate == "scalar" else (b, tokens, hv, k_dim)
        given["g"] = -torch.rand(shape) * 0.5
    cast = {name: t.bfloat16() for name, t in given.items()}
    if gate == "none":
        cast["g"] = None  # type: ignore[assignment]
    return cast | {"initial_state": torch.randn(b, hv, k_dim, v_dim)}


def run(recurrence: str, given: dict[str, Tensor | None], **how: str) -> tuple[Tensor, Tensor]:
    return getattr(ops, recurrence)(**given, **how)


def double(given: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if t is None else t.double() for name, t in given.items()}


def deviation(found: Tensor, expected: Tensor) -> float:
    """In the norm of the whole, relative."""
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("recurrence", ["linear_attention", "delta_rule", "dplr"])
@pytest.mark.parametrize(
    "tokens,k_dim,v_dim",
    [(1, 16, 16), (63, 17, 33), (63, 65, 33), (64, 64, 64), (150, 80, 48), (257, 128, 128)],
)
def test_recurrences_within_a_rounding_of_the_definition(
    tiled: str, recurrence: str, tokens: int, k_dim: int, v_dim: int, gate: str
) -> None:
    """On bf16 inputs, against the definition in float64, in the norm of the whole: roundings add up as independent errors.

    One rounding to bf16 is off by at most u = 2^-8 and by 1.6e-3 in the root of the mean square (u / sqrt 3, and 1 / sqrt 2
    for the numbers between two powers of two). An output stands behind at most six on its heaviest path (the state's rows
    and columns or the scores, the solution and what it was made from, the output itself), a state behind four. A quarter
    is added for the few numbers of small cases. Truncating where it should round is off by 3.3e-3 each time, and more as
    its errors have one sign.
    """
    given = call(recurrence, tokens, k_dim, v_dim, gate)
    expected, state = run(recurrence, double(given), form="recurrent", backend="torch")
    o, after = run(recurrence, given, form="chunked", backend="native")
    assert o.dtype == torch.bfloat16 and after.dtype == torch.float32
    assert deviation(o, expected) < 1.25 * math.sqrt(6) * ONE_ROUNDING
    assert deviation(after, state) < 1.25 * math.sqrt(4) * ONE_ROUNDING
    if (
        recurrence == "linear_attention" and gate == "none"
    ):  # k and v are bf16 already, and the state is never rounded
        assert deviation(after, state) < 1e-6


@pytest.mark.parametrize("k_dim", [6, 16, 32, 64, 128])
def test_keys_of_few_channels(tiled: str, k_dim: int) -> None:
    """The hardest case for rounded operands: keys far from orthogonal, beta up to 2, no gate. The law for bf16 holds.

    Below 64 channels the delta rule computes in float32 (csrc/bind/matrix.cpp), and is as good as that.
    """
    for seed in range(4):
        given = call("delta_rule", 150 + seed, k_dim, 16, "none")
        beta, q = given["beta"], given["q"]
        assert beta is not None and q is not None
        given["beta"], given["q"] = 2 * beta, torch.randn_like(q)
        expected, state = run("delta_rule", double(given), form="chunked", backend="torch")
        o, after = run("delta_rule", given, form="chunked", backend="native")
        assert (o.double() - expected).abs().max() < 1e-2 * expected.abs().max()
        assert (after.double() - state).abs().max() < (1e-2 if k_dim >= 64 else 1e-5) * state.abs().max()


def test_errors_do_not_grow_with_the_text(tiled: str) -> None:
    """The state itself is never rounded, only what is read of it and added to it: 32 chunks are as good as 2."""
    errors = []
    for tokens in (128, 2048):
        given = call("delta_rule", tokens, 64, 64, "scalar")
        expected, state = run("delta_rule", double(given), form="chunked", backend="torch")
        o, after = run("delta_rule", given, form="chunked", backend="native")
        errors.append(max(deviation(o, expected), deviation(after, state)))
    assert errors[1] < 1.5 * errors[0]


def test_float32_inputs_are_not_rounded(isa: str) -> None:
    given = {
        name: t if t is None else t.float() for name, t in call("delta_rule", 130, 64, 64, "channel").items()
    }
    expected, state = run("delta_rule", double(given), form="recurrent", backend="torch")
    o, after = run("delta_rule", given, form="chunked", backend="native")
    assert deviation(o, expected) < 1e-6 and deviation(after, state) < 1e-6


@pytest.mark.parametrize("gate", ["scalar", "channel"])
@pytest.mark.parametrize("recurrence", ["linear_attention", "delta_rule", "dplr"])
def test_a_closed_gate_leaves_exact_zeros(tiled: str, recurrence: str, gate: str) -> None:
    """g = -1e4 at token 40, inside a chunk and a block: nothing of before is left, to the bit; and at the last token."""
    given = call(recurrence, 100, 64, 32, gate)
    assert given["g"] is not None
    for token in (40, 99):
        given["g"][:, token] = -1e4
        if recurrence == "dplr":  # its low rank has no gate: b is what reads the state before
            assert given["b"] is not None
            given["b"][:, token] = 0
    o, after = run(recurrence, given, form="chunked", backend="native")
    other = {name: None if t is None else t.clone() for name, t in given.items()}
    for name in ("k", "v", "q"):
        t = other[name]
        assert t is not None
        t[:, :40] = torch.randn_like(t[:, :40])
    other["initial_state"] = None
    o_other, after_other = run(recurrence, other, form="chunked", backend="native")
    assert torch.equal(o[:, 40:], o_other[:, 40:]) and torch.equal(after, after_other)
    assert not torch.equal(o[:, :40], o_other[:, :40])
    assert after.abs().max() > 0
    assert given["v"] is not None
    given["v"][:, 99] = 0  # the last token's own product was all that was left
    _, after = run(recurrence, given, form="chunked", backend="native")
    assert (after == 0).all()


@pytest.mark.parametrize("recurrence", ["linear_attention", "delta_rule", "dplr"])
def test_cut_on_the_grid_and_threads_change_no_bit(tiled: str, recurrence: str) -> None:
    given = call(recurrence, 200, 64, 96, "scalar")
    o, after = run(recurrence, given, form="chunked", backend="native")
    first = {n: t if t is None or n == "initial_state" else t[:, :128] for n, t in given.items()}
    second = {n: t if t is None or n == "initial_state" else t[:, 128:] for n, t in given.items()}
    o_first, between = run(recurrence, first, form="chunked", backend="native")
    o_second, after_second = run(
        recurrence, second | {"initial_state": between}, form="chunked", backend="native"
    )
    assert torch.equal(o, torch.cat([o_first, o_second], dim=1)) and torch.equal(after, after_second)

    threads = torch.get_num_threads()
    torch.set_num_threads(5)  # more than the two heads: columns are shared out
    try:
        o_five, after_five = run(recurrence, given, form="chunked", backend="native")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(o, o_five) and torch.equal(after, after_five)


# ---------------------------------------------------------------------------------------------------- choosing


def test_emulated_sets_are_hidden() -> None:
    assert not set(EMULATED) & set(native.isas())
    assert native.isas() == ISAS[: len(native.isas())]
    if native.cpu_features()["avx2"]:
        assert {"emulated-amx", "emulated-avx512", "wide"} <= set(EMULATED)


@pytest.mark.parametrize("wanted", [None, "portable", *EMULATED[:1]])
def test_chosen_by_name_only(wanted: str | None) -> None:
    environment = {n: v for n, v in os.environ.items() if n != "LINSTATE_ISA"}
    if wanted is not None:
        environment["LINSTATE_ISA"] = wanted
    code = "from linstate.ops import native; print(native.isa())"
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert found == (wanted or native.isas()[0])
