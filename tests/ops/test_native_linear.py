"""Packed weights: what goes in comes out, and a product with one is the product with the weight it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linstate.errors import ArgumentError
from linstate.ops import native
from linstate.ops.native import linear as native_linear
from linstate.ops.native.linear import FORMATS, linear, pack, unpack

pytestmark = pytest.mark.skipif(not native.available, reason="no native extension")
ISAS = native.isas(emulated=True)
SHAPES = [(32, 32), (48, 64), (7, 20), (130, 96)]  # [N, K]: whole panels, half a panel, neither, several


def weight(outputs: int, inputs: int) -> Tensor:
    torch.manual_seed(outputs * 1000 + inputs)
    return torch.randn(outputs, inputs)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_comes_back_to_the_bit(shape: tuple[int, int]) -> None:
    w = weight(*shape).bfloat16()
    assert torch.equal(unpack(pack(w)), w)


@pytest.mark.parametrize(("format", "steps"), [("int8", 127), ("int4", 8)])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_half_a_step_off_at_most(
    format: native_linear.Format, steps: int, shape: tuple[int, int]
) -> None:
    w = weight(*shape)
    w[0] = 0
    found = unpack(pack(w, format)).float()
    padded = F.pad(w, (0, -shape[1] % 32)).unflatten(-1, (-1, 32))
    step = padded.abs().amax(-1, keepdim=True) / steps
    off = (F.pad(found, (0, -shape[1] % 32)).unflatten(-1, (-1, 32)) - padded).abs()
    # int4 has codes -8 to 7, so what is as large as the largest with the other sign is a whole step off; both have a scale
    # and a result rounded to bf16.
    allowed = (0.5 if format == "int8" else 1.0) + steps * 2**-7
    assert (off <= step * allowed + 1e-9).all()
    assert (found[0] == 0).all()
    mean = off.sum() / (step.mean() * w.numel())
    assert 0.15 < mean < 0.35  # uniform within half a step: a quarter


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 2, 9, 40])
def test_a_product_is_that_of_the_weight_it_stands_for(
    isa: str, format: native_linear.Format, rows: int
) -> None:
    for shape in SHAPES:
        w = pack(weight(*shape), format)
        x = torch.randn(rows, shape[1]).bfloat16()
        expected = x.double() @ unpack(w).double().T
        with native.using(isa):
            found = linear(x.float(), w)
            narrow = linear(x, w)
        # One row multiplies codes before their scale rounds them to bf16: half of 2^-8 of a weight.
        bound = 1e-5 if format == "bf16" or rows > 1 else 4e-3
        size = (x.double().abs() @ unpack(w).double().abs().T).max()
        assert ((found - expected).abs() <= bound * size).all(), shape
        assert narrow.dtype is torch.bfloat16
        assert torch.equal(narrow, found.bfloat16()), shape


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_one_row_multiplies_codes_exactly(format: native_linear.Format) -> None:
    w = pack(weight(64, 64), format)
    x = torch.randn(1, 64).bfloat16()
    scales = w.scales
    assert scales is not None
    wide = scales.transpose(1, 2).flatten(0, 1).double().repeat_interleave(32, -1)  # [N, K]
    codes = (unpack(w).double() / wide).round()
    for isa in ISAS:
        with native.using(isa):
            found = linear(x.float(), w)
        assert torch.allclose(found.double(), x.double() @ (codes * wide).T, rtol=0, atol=2e-5), isa


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_does_not_depend_on_its_neighbours(format: native_linear.Format) -> None:
    w = pack(weight(80, 96), format)
    x = torch.randn(37, 96).bfloat16()
    whole = linear(x, w)
    assert torch.equal(linear(x[5:9], w), whole[5:9])
    if format == "bf16" and native.isa() != "amx":
        assert torch.equal(linear(x[5:6], w), whole[5:6])


@pytest.mark.parametrize("format", FORMATS)
def test_threads_change_nothing(format: native_linear.Format) -> None:
    w = pack(weight(2048, 512), format)
    x = torch.randn(40, 512).bfloat16()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = linear(x, w), linear(x[:1], w)
        torch.set_num_threads(3)
        for _ in range(20):
            assert torch.equal(linear(x, w), expected[0])
            assert torch.equal(linear(x[:1], w), expected[1])
    finally:
        torch.set_num_threads(before)


def test_bias_strides_and_shapes() -> None:
    w, bias = weight(40, 32), torch.randn(40)
    x = torch.randn(3, 5, 64).bfloat16()[..., 17:49]  # an odd offset, rows that do not follow each other
    for b in (bias, bias.bfloat16()):
        found = linear(x, pack(w), b)
        assert found.shape == (3, 5, 40)
        expected = F.linear(x.double(), w.bfloat16().double(), b.double())
        assert torch.allclose(found.double(), expected, atol=0.15, rtol=1e-2)
    assert linear(x[:0], pack(w)).shape == (0, 5, 40)


def test_what_does_not_fit_is_refused() -> None:
    w = pack(weight(32, 32))
    with pytest.raises(ArgumentError, match=r"\[\.\.\., 32\]"):
        linear(torch.zeros(1, 31), w)
    with pytest.raises(ArgumentError, match="float64"):
        linear(torch.zeros(1, 32, dtype=torch.float64), w)
    with pytest.raises(ArgumentError, match="bias"):
        linear(torch.zeros(1, 32), w, torch.zeros(31))
    with pytest.raises(ArgumentError, match="bf16, int8, int4"):
        pack(torch.zeros(32, 32), "int2")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="floating"):
        pack(torch.zeros(32, dtype=torch.int64))
