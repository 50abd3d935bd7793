"""The native attention of one token: the definition in float64 and torch's own kernel, on every instruction set; rows that lie anywhere."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linstate.ops import native
from linstate.ops.softmax_attention import KVCache, softmax_attention
from linstate.ops.softmax_attention.by_row import Rows

pytestmark = pytest.mark.skipif(not native.available, reason=str(native.reason))
BOUND = {torch.float32: 2e-6, torch.bfloat16: 5e-3}
# query heads, key heads, K, V: whole vectors and rests of them, groups of 1 to 7
SIZES = ((2, 2, 16, 8), (7, 1, 20, 13), (6, 2, 128, 64), (3, 1, 5, 3))
LENGTHS = (0, 1, 3, 64, 517)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def drawn(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, KVCache]:
    """A token, and a cache whose unused places are no numbers."""
    hq, hk, key, value = sizes
    g = torch.Generator().manual_seed(hq)
    q, k, v = (torch.randn(len(LENGTHS), 1, *x, generator=g) for x in ((hq, key), (hk, key), (hk, value)))
    places, length = max(LENGTHS), torch.tensor(LENGTHS)
    unused = torch.arange(places) < places - length[:, None]  # [B, S]
    held = [torch.randn(len(LENGTHS), places, hk, n, generator=g) for n in (key, value)]
    held = [t.masked_fill(unused[..., None, None], torch.nan).to(dtype) for t in held]
    q = 3 * q  # so that some places count much more than others
    return q.to(dtype), k.to(dtype), v.to(dtype), KVCache(held[0], held[1], length)


def exact(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, window: int | None) -> tuple[Tensor, KVCache]:
    """The definition in float64."""
    held = KVCache(cache.k.nan_to_num().double(), cache.v.nan_to_num().double(), cache.length)
    wide = (x.double() for x in (q, k, v))
    return softmax_attention(*wide, window=window, initial_state=held, form="recurrent", backend="torch")


@pytest.mark.parametrize("isa", native.isas(emulated=True))
@pytest.mark.parametrize("dtype", BOUND)
def test_it_is_the_definition(isa: str, dtype: torch.dtype) -> None:
    for sizes, window in product(SIZES, (None, 65, 1)):
        q, k, v, cache = drawn(sizes, dtype)
        expected, after = exact(q, k, v, cache, window)
        if window is not None:  # the op's caches of a window have W - 1 places
            cache = KVCache(
                cache.k[:, len(cache.k[0]) - window + 1 :].contiguous(),
                cache.v[:, len(cache.v[0]) - window + 1 :].contiguous(),
                cache.length.clamp(max=window - 1),
            )
        with native.using(isa):
            found, held = softmax_attention(
                q, k, v, window=window, initial_state=cache, form="step", backend="native"
            )
            rows = KVCache(Rows.of(cache.k, cache.length), Rows.of(cache.v, cache.length), cache.length)  # type: ignore[arg-type]
            same, kept = softmax_attention(q, k, v, window=window, initial_state=rows)
        for row in range(len(LENGTHS)):
            assert relative(found[row], expected[row]) < BOUND[dtype], (sizes, window, row)
        assert torch.equal(found, same)
        for tensor, by_row, definition in ((held.k, kept.k, after.k), (held.v, kept.v, after.v)):
            for row, used in enumerate(after.length.tolist()):
                newest = definition[row, definition.shape[1] - used :].to(dtype)
                assert torch.equal(tensor[row, tensor.shape[1] - used :], newest)
                assert torch.equal(by_row.rows[row].tensor, newest)  # type: ignore[attr-defined]
        assert torch.equal(held.length, after.length)


def test_it_is_torchs_kernel() -> None:
    q, k, v, cache = drawn((6, 2, 128, 64), torch.float32)
    found, _ = softmax_attention(q, k, v, initial_state=cache, form="step", backend="native")
    for row, used in enumerate(LENGTHS):
        keys, values = (
            torch.cat([held[row, held.shape[1] - used :], new[row]]).transpose(0, 1)  # [Hk, S, *]
            for held, new in ((cache.k, k), (cache.v, v))
        )
        expected = F.scaled_dot_product_attention(q[row].transpose(0, 1), keys, values, enable_gqa=True)
        torch.testing.assert_close(found[row, 0], expected[:, 0], rtol=1e-5, atol=1e-6)


def test_threads_and_scores_of_any_size_change_nothing() -> None:
    """Scores of thousands, all alike, and far apart: no overflow; the same bits on any number of threads."""
    q, k, v, cache = drawn((6, 2, 128, 64), torch.float32)
    before = torch.get_num_threads()
    for factor in (0.0, 1.0, 1000.0):
        expected, _ = exact(factor * q, k, v, cache, None)
        found = []
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                o, _ = softmax_attention(factor * q, k, v, initial_state=cache, form="step", backend="native")
                found.append(o)
        finally:
            torch.set_num_threads(before)
        assert torch.equal(*found)
        assert relative(found[0], expected) < 1e-4 if factor > 1 else relative(found[0], expected) < 2e-6


def test_many_places_round_no_worse() -> None:
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 50_000, 1, n, generator=g) for n in (16, 24))
    q, new_k, new_v = (torch.randn(1, 1, h, n, generator=g) for h, n in ((2, 16), (1, 16), (1, 24)))
    cache = KVCache(k, v, torch.tensor([50_000]))
    found, _ = softmax_attention(q, new_k, new_v, initial_state=cache, form="step", backend="native")
    expected, _ = exact(q, new_k, new_v, cache, None)
    assert relative(found, expected) < 2e-6


def test_what_it_refuses() -> None:
    q, k, v, cache = drawn((2, 2, 16, 8), torch.float32)
    wider = KVCache(cache.k, torch.cat([cache.v, cache.v], -1)[..., :8], cache.length)
    mixed = KVCache(cache.k.bfloat16(), cache.v.bfloat16(), cache.length)
    for held, why in ((wider, "gaps"), (mixed, "one dtype")):
        with pytest.raises(Exception, match=why):
            softmax_attention(q, k, v, initial_state=held, form="step", backend="native")
        softmax_attention(q, k, v, initial_state=held)  # torch serves
    with pytest.raises(Exception, match="gradient"):
        softmax_attention(q.requires_grad_(), k, v, initial_state=cache, form="step", backend="native")
