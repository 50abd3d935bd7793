"""The native softmax attention of many tokens against plain float64, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linstate.ops import native
from linstate.ops.native import attention as native_attention
from linstate.ops.softmax_attention import torch_blocked

pytestmark = pytest.mark.skipif(not native.available, reason=f"no native kernels: {native.reason}")

# B, T, keys, key heads, heads of one, K, V, window
SHAPES = [
    (1, 37, 100, 2, 3, 40, 24, None),
    (2, 249, 256, 1, 1, 64, 64, None),
    (1, 100, 163, 2, 4, 128, 96, 20),
    (2, 20, 90, 1, 2, 256, 256, None),
    (1, 130, 130, 1, 8, 16, 16, 64),
]


def case(
    B: int, T: int, S: int, hk: int, groups: int, K: int, V: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, keys and values with a layout that is not dense, and the first key of each row that counts."""
    torch.manual_seed(0)
    both = torch.randn(B, S, hk, K + V)
    return torch.randn(B, T, hk * groups, K), both[..., :K], both[..., K:], torch.tensor([0, 7][:B])


def definition(q: Tensor, k: Tensor, v: Tensor, first: Tensor, window: int | None) -> Tensor:
    groups, past = q.shape[2] // k.shape[2], k.shape[1] - q.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(groups, 2), v.double().repeat_interleave(groups, 2)
    row, col = past + torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
    seen = (col <= row) & (col > row - (window or len(col))) & (col >= first[:, None, None])  # [B, T, S]
    scores = torch.einsum("bthk, bshk -> bhts", q, k) * k.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhts, bshv -> bthv", weights, v)


@pytest.mark.parametrize("isa", native.isas(emulated=True))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_its_definition(isa: str, shape: tuple[int, ...]) -> None:
    *sizes, window = shape
    with native.using(isa):
        for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            q, k, v, first = (t.to(dtype) if t.is_floating_point() else t for t in case(*sizes))
            found = native_attention.attend(q, k, v, first, window, k.shape[-1] ** -0.5)
            expected = definition(q, k, v, first, window)
            assert float((found - expected).abs().max() / expected.abs().max()) <= bound


def test_bits_depend_on_no_threads_and_no_neighbour() -> None:
    q, k, v, first = (t.bfloat16() if t.is_floating_point() else t for t in case(2, 100, 230, 2, 4, 64, 64))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(native_attention.attend(q, k, v, first, None, 0.125))
        alone = native_attention.attend(q[1:], k[1:], v[1:], first[1:], None, 0.125)
        without_padding = native_attention.attend(q[1:], k[1:, 7:], v[1:, 7:], first[:1], None, 0.125)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    assert torch.equal(found[0][1:], alone) and torch.equal(alone, without_padding)


def test_scores_of_any_size() -> None:
    """The largest score comes late, or is so large that all before it counts nothing; no NaN, no Inf."""
    q, k, v, first = case(1, 64, 200, 1, 1, 32, 32)
    k[:, 150] *= 1e4
    k[:, :64] *= -1e4
    found = native_attention.attend(q, k, v, first, None, 1.0)
    assert torch.isfinite(found).all()
    assert float((found - definition(q * 32**0.5, k, v, first, None)).abs().max()) < 1e-4


@pytest.mark.skipif(not native.multiplies_bf16(), reason="this processor does not multiply bf16 numbers")
def test_it_serves_blocks_in_bf16() -> None:
    q, k, v, first = case(1, 64, 200, 2, 2, 32, 32)
    assert not native_attention.serves(q, k, v)
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    assert native_attention.serves(q, k, v) and not native_attention.serves(q[:, :1], k, v)
    assert not native_attention.serves(q.requires_grad_(), k, v)
    with torch.no_grad():
        found = torch_blocked.over(q, k, v, first, None, 0.2, True)
    assert torch.equal(found, native_attention.attend(q, k, v, first, None, 0.2))
