"""The native scan, convolution and steps against the float64 definition, with every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from linstate.errors import BackendError
from linstate.ops import causal_conv1d, delta_rule, dplr, linear_attention, native, selective_scan

pytestmark = pytest.mark.skipif(not native.available, reason=f"no native extension: {native.reason}")

LENGTHS = (0, 1, 63, 64, 65, 200)
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(params=native.isas() or [None])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.using(request.param):
        yield request.param


class Draw:
    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.random)

    def gates(self, *shape: int) -> Tensor:
        """Log decays: slow and fast ones, none at all, and such that nothing is left."""
        choice = torch.randint(0, 4, shape, generator=self.random)
        return -self.uniform(*shape) * torch.tensor([0.05, 5.0, 0.0, 1e4])[choice]


def within(found: Tensor, expected: Tensor, bound: float, what: str) -> None:
    assert found.shape == expected.shape, what
    if found.numel():
        assert torch.isfinite(found).all(), what
        error = (found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        assert error <= bound, f"{what}: off by {error:.1e}, allowed {bound:.0e}"


def double(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() if torch.is_tensor(x) else x for name, x in arguments.items()}


def against_the_definition(
    op: Callable[..., tuple[Tensor, Tensor]], what: str, arguments: dict[str, Any], bound: float, **how: Any
) -> tuple[Tensor, Tensor]:
    o, state = op(**arguments, **how, backend="native")
    expected, after = op(**double(arguments), **{**how, "form": "recurrent"}, backend="torch")
    within(o, expected, bound, f"{what}: output")
    within(state, after, min(bound, 1e-5), f"{what}: state")
    return o, state


def scan_arguments(
    draw: Draw, tokens: int, sizes: tuple[int, int, int, int], reads: bool, rates: bool, rows: int = 2
) -> dict[str, Any]:
    hk, hv, k, v = sizes
    k = k if reads else 1
    gates = draw.gates(rows, tokens, hv, v)
    return {
        "q": draw.normal(rows, tokens, hk, k) if reads else None,
        "k": draw.normal(rows, tokens, hk, k) if reads else None,
        "v": draw.normal(rows, tokens, hv, v),
        "g": -gates if rates else gates,
        "A": -draw.uniform(hv, k, v) * 2 if rates else None,
        "initial_state": draw.normal(rows, hv, k, v),
    }


# (Hk, Hv, K, V): whole vectors and not, more columns than one tile, more states than a tile is made for
SCAN_SIZES = [(1, 1, 16, 72), (2, 4, 3, 5), (1, 1, 4, 1100), (1, 2, 160, 33)]


@pytest.mark.parametrize("sizes", SCAN_SIZES, ids=str)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_scan(isa: str, tokens: int, sizes: tuple[int, int, int, int]) -> None:
    draw = Draw(tokens)
    for reads in (True, False):
        for rates in (True, False):
            arguments = scan_arguments(draw, tokens, sizes, reads, rates)
            what = f"q and k: {reads}, A: {rates}"
            against_the_definition(selective_scan, what, arguments, 1e-5, form="chunked", scale=0.7)


@pytest.mark.parametrize("reads", [True, False])
def test_scan_in_bfloat16(isa: str, reads: bool) -> None:
    arguments = scan_arguments(Draw(1), 65, (1, 2, 16, 40), reads, True)
    for name in ("q", "k", "v"):
        arguments[name] = None if arguments[name] is None else arguments[name].bfloat16()
    against_the_definition(selective_scan, "g float32", arguments, 1e-2, form="chunked")
    arguments["g"], arguments["A"] = arguments["g"].bfloat16(), arguments["A"].bfloat16()
    against_the_definition(selective_scan, "g bfloat16", arguments, 1e-2, form="chunked")


def test_slow_decays_keep_their_time_constant(isa: str) -> None:
    """A relative error of exp(g) itself, rather than of 1 - exp(g), would add up over so many tokens."""
    tokens, v = 20000, 32
    g = -torch.logspace(-4, 0, v).expand(1, tokens, 1, v)
    ones = torch.ones(1, tokens, 1, v)
    _, state = selective_scan(None, None, ones, g, backend="native", form="chunked")
    exact = -torch.expm1(g[0, 0].double() * tokens) / -torch.expm1(g[0, 0].double())
    # decay and state are rounded to float32 at every token, by 2^-24 at most, which adds up over 1 / (1 - exp(g)) of them
    allowed = 2e-6 + 2**-23 / -torch.expm1(g[0, 0].double())
    assert ((state[0, :, 0] / exact - 1).abs() <= allowed).all()


def test_scan_of_a_gate_that_leaves_nothing(isa: str) -> None:
    v = torch.zeros(1, 3, 1, 16)
    state = torch.full((1, 1, 2, 16), 1e30)
    qk, step = torch.ones(1, 3, 1, 2), torch.full((1, 3, 1, 16), 1e4)
    o, after = selective_scan(qk, qk, v, step, -torch.ones(1, 2, 16), initial_state=state, backend="native")
    assert not o.any() and not after.any()
    o, after = selective_scan(
        qk, qk, v, 0 * step, -torch.ones(1, 2, 16), initial_state=state, backend="native"
    )
    assert torch.equal(after, state), "a gate of zero keeps every bit"


def test_scan_reads_any_strides(isa: str) -> None:
    draw = Draw(2)
    tokens, v, k = 70, 24, 5
    projected = draw.normal(2, tokens, 2 * k + 3 * v)
    q, key, value, g, _ = projected.split([k, k, v, v, v], dim=-1)
    arguments = {
        "q": q[:, :, None],
        "k": key[:, :, None],
        "v": value[:, :, None],
        "g": -g[:, :, None].abs(),
        "initial_state": draw.normal(2, 1, v, k).transpose(-1, -2),
    }
    against_the_definition(selective_scan, "slices of a projection", arguments, 1e-5, form="chunked")
    arguments["v"] = draw.normal(2, tokens, v, 1).transpose(-1, -2)
    arguments["g"] = -draw.uniform(2, 1, v, tokens).permute(0, 3, 1, 2)
    against_the_definition(selective_scan, "transposed", arguments, 1e-5, form="chunked")
    arguments["g"] = -draw.uniform(2, tokens, 1, 1).expand(-1, -1, 1, v)
    against_the_definition(selective_scan, "expanded", arguments, 1e-5, form="chunked")


def test_scan_of_packed_sequences_is_that_of_each(isa: str) -> None:
    draw, edges = Draw(3), [0, 0, 1, 66, 130, 200]
    arguments = scan_arguments(draw, 200, (1, 2, 4, 20), True, True, rows=1)
    arguments["initial_state"] = draw.normal(5, 2, 4, 20)
    o, state = selective_scan(**arguments, cu_seqlens=torch.tensor(edges), backend="native")
    for row, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        part = {name: x[:, a:b] if name in "qkvg" else x for name, x in arguments.items()}
        part["initial_state"] = arguments["initial_state"][row : row + 1]
        alone, after = selective_scan(**part, backend="native")
        assert torch.equal(o[:, a:b], alone) and torch.equal(state[row : row + 1], after)


def test_no_bit_depends_on_cuts_or_threads(isa: str) -> None:
    arguments = scan_arguments(Draw(4), 200, (1, 1, 4, 4000), True, True, rows=1)
    whole, state = selective_scan(**arguments, backend="native")
    carried, pieces = arguments["initial_state"], []
    for a, b in ((0, 1), (1, 64), (64, 70), (70, 200)):
        part = {name: x[:, a:b] if name in "qkvg" else x for name, x in arguments.items()}
        o, carried = selective_scan(**{**part, "initial_state": carried}, backend="native")
        pieces.append(o)
    assert torch.equal(torch.cat(pieces, dim=1), whole) and torch.equal(carried, state)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        o, after = selective_scan(**arguments, backend="native")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(o, whole) and torch.equal(after, state)


def learned(arguments: dict[str, Any]) -> dict[str, Any]:
    return {n: x.detach().clone().requires_grad_() if torch.is_tensor(x) else x for n, x in arguments.items()}


def gradients(
    op: Callable[..., tuple[Tensor, Tensor]], arguments: dict[str, Any], **how: Any
) -> dict[str, Tensor]:
    given = learned(arguments)
    o, state = op(**given, **how)
    (o.square().sum() + state.square().sum()).backward()
    return {name: x.grad for name, x in given.items() if torch.is_tensor(x)}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reads", [True, False])
def test_gradients_of_the_scan_are_those_of_the_torch_form(
    reads: bool, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("linstate.ops.native.scan.SEGMENT", 64)  # several segments
    arguments = scan_arguments(Draw(5), 200, (1, 2, 3, 7), reads, True, rows=1)
    arguments["g"] = arguments["g"].clamp(max=1.0)
    how = {}
    if packed:
        how = {"cu_seqlens": torch.tensor([0, 0, 90, 200])}
        arguments["initial_state"] = Draw(6).normal(3, 2, 3 if reads else 1, 7)
    found = gradients(selective_scan, arguments, backend="native", **how)
    expected = gradients(selective_scan, double(arguments), backend="torch", **how)
    for name, gradient in expected.items():
        within(found[name], gradient, 1e-5, name)


# ---------------------------------------------------------------------------------------- the short convolution


@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_convolution(isa: str, tokens: int, width: int) -> None:
    draw = Draw(tokens)
    for channels in (16, 5, 1030):
        for dtype in (torch.float32, torch.bfloat16):
            for bias, activation in ((None, None), (draw.normal(channels), "silu")):
                arguments = {
                    "x": draw.normal(2, tokens, channels).to(dtype),
                    "weight": draw.normal(channels, width).to(dtype),
                    "bias": bias,
                    "initial_state": draw.normal(2, width - 1, channels),
                }
                how = {"activation": activation, "form": "chunked"}
                what = f"{channels} channels, {dtype}, {activation}"
                against_the_definition(causal_conv1d, what, arguments, BOUND[dtype], **how)
                arguments["initial_state"] = None
                against_the_definition(causal_conv1d, f"{what}, no state", arguments, BOUND[dtype], **how)


def test_convolution_of_any_strides_and_huge_inputs(isa: str) -> None:
    draw = Draw(7)
    weight = draw.normal(4, 24).t()
    _, x, _ = draw.normal(2, 70, 60).split([30, 24, 6], dim=-1)
    against_the_definition(causal_conv1d, "a slice", {"x": x, "weight": weight}, 1e-5, activation="silu")
    x = 1e3 * draw.normal(2, 24, 70).transpose(1, 2)
    against_the_definition(causal_conv1d, "transposed", {"x": x, "weight": weight}, 1e-5, activation="silu")


def test_convolution_of_packed_sequences_cuts_and_threads(isa: str) -> None:
    draw, edges = Draw(8), [0, 0, 1, 3, 130, 700]
    x, weight, bias = draw.normal(1, 700, 300), draw.normal(300, 4), draw.normal(300)
    state = draw.normal(5, 3, 300)
    y, after = causal_conv1d(
        x, weight, bias, initial_state=state, cu_seqlens=torch.tensor(edges), backend="native"
    )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for row, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
            alone, tail = causal_conv1d(
                x[:, a:b], weight, bias, initial_state=state[row : row + 1], backend="native"
            )
            assert torch.equal(y[:, a:b], alone) and torch.equal(after[row : row + 1], tail)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_of_the_convolution_are_those_of_the_torch_form(bias: bool, packed: bool) -> None:
    draw = Draw(9)
    arguments = {
        "x": draw.normal(1, 90, 10),
        "weight": draw.normal(10, 4),
        "bias": draw.normal(10) if bias else None,
        "initial_state": draw.normal(3 if packed else 1, 3, 10),
    }
    how: dict[str, Any] = {"activation": "silu"}
    if packed:
        how["cu_seqlens"] = torch.tensor([0, 0, 20, 90])
    found = gradients(causal_conv1d, arguments, backend="native", **how)
    expected = gradients(causal_conv1d, double(arguments), backend="torch", **how)
    for name, gradient in expected.items():
        within(found[name], gradient, 1e-5, name)


# ---------------------------------------------------------------------------------------------------- one token

# (B, Hk, Hv, K, V): whole vectors and not, one channel more (the normaliser of the Linear Transformer)
STEP_SIZES = [(1, 2, 2, 128, 128), (3, 2, 4, 7, 5), (2, 1, 2, 16, 65), (64, 1, 1, 4, 8)]


def step_arguments(draw: Draw, sizes: tuple[int, ...], gate: str) -> dict[str, Any]:
    rows, hk, hv, k, v = sizes
    shapes = {"none": None, "fixed": (hv,), "head": (rows, 1, hv), "channel": (rows, 1, hv, k)}
    shapes["channel of k's heads"] = (rows, 1, hk, k)
    shape = shapes[gate]
    unit = torch.nn.functional.normalize
    return {
        "q": draw.normal(rows, 1, hk, k),
        "k": unit(draw.normal(rows, 1, hk, k), dim=-1),
        "v": draw.normal(rows, 1, hv, v),
        "g": None if shape is None else draw.gates(*shape),
        "initial_state": draw.normal(rows, hv, k, v),
    }


def step_calls(draw: Draw, arguments: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(name, op, its arguments)."""
    rows, _, hv, _ = arguments["v"].shape
    b = torch.nn.functional.normalize(draw.normal(*arguments["k"].shape), dim=-1)
    yield "linear_attention", linear_attention, arguments
    yield "with bonus", linear_attention, {**arguments, "bonus": draw.normal(hv, b.shape[-1])}
    yield "delta_rule", delta_rule, {**arguments, "beta": 2 * draw.uniform(rows, 1, hv)}
    yield "dplr", dplr, {**arguments, "a": -b * draw.uniform(*b.shape), "b": b}


@pytest.mark.parametrize("sizes", STEP_SIZES, ids=str)
@pytest.mark.parametrize("gate", ["none", "fixed", "head", "channel", "channel of k's heads"])
def test_step(isa: str, gate: str, sizes: tuple[int, ...]) -> None:
    draw = Draw(11)
    for name, op, arguments in step_calls(draw, step_arguments(draw, sizes, gate)):
        before = arguments["initial_state"].clone()
        against_the_definition(op, name, arguments, 1e-5, form="step")
        assert torch.equal(arguments["initial_state"], before), "the state is not changed in place"
        against_the_definition(
            op, f"{name}, no state", {**arguments, "initial_state": None}, 1e-5, form="step"
        )
        rounded = {
            n: x.bfloat16() if torch.is_tensor(x) and n in "qkvab" else x for n, x in arguments.items()
        }
        against_the_definition(op, f"{name}, bfloat16", rounded, 1e-2, form="step")


def test_step_of_any_strides_and_threads(isa: str) -> None:
    draw = Draw(12)
    arguments = step_arguments(draw, (1, 1, 2, 250, 1030), "channel")  # worth three threads
    q, _, k, _ = draw.normal(1, 1, 1, 520).split([250, 10, 250, 10], dim=-1)
    arguments |= {"q": q, "k": torch.nn.functional.normalize(k, dim=-1)}
    arguments["v"] = draw.normal(1, 1, 1030, 2).transpose(-1, -2)
    arguments["initial_state"] = draw.normal(1, 2, 1030, 250).transpose(-1, -2)
    for name, op, given in step_calls(draw, arguments):
        o, state = against_the_definition(op, name, given, 1e-5, form="step")
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(4)
            shared, after = op(**given, form="step", backend="native")
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(o, shared) and torch.equal(state, after), name


def test_a_step_with_a_gradient_is_left_to_the_torch_form() -> None:
    arguments = learned(step_arguments(Draw(13), (1, 1, 1, 8, 8), "head"))
    with pytest.raises(BackendError, match="a gradient"):
        linear_attention(**arguments, backend="native")
    o, _ = linear_attention(**arguments)
    assert o.requires_grad
    with torch.no_grad():
        linear_attention(**arguments, backend="native")
