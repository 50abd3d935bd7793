"""Caches row by row: the definition's numbers for rows of any length, the same bits beside any neighbour, forks that stay apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linstate.ops.softmax_attention import KVCache, softmax_attention
from linstate.ops.softmax_attention.by_row import Rows

HEADS, KEYS, KEY, VALUE = 4, 2, 16, 8
LENGTHS = (0, 3, 70, 41)


def token(seed: int, rows: int = len(LENGTHS)) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, KEY), (KEYS, KEY), (KEYS, VALUE))
    q, k, v = (torch.randn(rows, 1, *shape, generator=g) for shape in shapes)
    return q, k, v


def filled(window: int | None) -> KVCache:
    """Rows of different lengths, aligned to the right; what does not count is no number."""
    places = 80 if window is None else window - 1
    g = torch.Generator().manual_seed(1)
    k = torch.randn(len(LENGTHS), places, KEYS, KEY, generator=g)
    v = torch.randn(len(LENGTHS), places, KEYS, VALUE, generator=g)
    length = torch.tensor(LENGTHS).clamp(max=places)
    unused = torch.arange(places) < places - length[:, None]  # [B, S]
    return KVCache(
        k.masked_fill(unused[..., None, None], torch.nan),
        v.masked_fill(unused[..., None, None], torch.nan),
        length,
    )


def by_row(cache: KVCache) -> KVCache:
    return KVCache(Rows.of(cache.k, cache.length), Rows.of(cache.v, cache.length), cache.length)  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("window", [None, 42, 1])
def test_it_is_the_definition(window: int | None, dtype: torch.dtype, bound: float) -> None:
    cache = filled(window)
    cache = KVCache(cache.k.to(dtype), cache.v.to(dtype), cache.length)
    plain = KVCache(cache.k.nan_to_num(), cache.v.nan_to_num(), cache.length)
    rows, seen = by_row(cache), []
    for seed in range(90):  # a buffer's room is used up and made anew
        q, k, v = (x.to(dtype) for x in token(seed))
        expected, plain = softmax_attention(q, k, v, window=window, initial_state=plain, form="recurrent")
        found, rows = softmax_attention(q, k, v, window=window, initial_state=rows)
        assert float((found - expected).double().norm() / expected.double().norm()) < bound
        assert torch.equal(rows.length, plain.length)
        seen.append(found)
    places = None if window is None else window - 1
    for held, tensor in ((rows.k, plain.k), (rows.v, plain.v)):
        dense = held.dense(places)  # type: ignore[operator]
        for row, length in enumerate(plain.length.tolist()):
            assert torch.equal(dense[row, dense.shape[1] - length :], tensor[row, tensor.shape[1] - length :])
    assert len({float(o.double().sum()) for o in seen}) == len(seen)


def test_a_row_has_the_same_bits_beside_any_neighbour() -> None:
    cache = filled(None)
    whole = by_row(cache)
    each = [by_row(KVCache(*(t[i : i + 1] for t in cache))) for i in range(len(LENGTHS))]
    for seed in range(5):
        q, k, v = token(seed)
        found, whole = softmax_attention(q, k, v, initial_state=whole)
        for i in range(len(LENGTHS)):
            o, each[i] = softmax_attention(*(x[i : i + 1] for x in (q, k, v)), initial_state=each[i])
            assert torch.equal(o[0], found[i])


@pytest.mark.parametrize("window", [None, 42, 1])
def test_several_tokens_are_those_tokens_one_by_one(window: int | None) -> None:
    one = several = by_row(filled(window))
    for tokens in (5, 60, 1):
        parts = [token(100 * tokens + i) for i in range(tokens)]
        expected = []
        for part in parts:
            o, one = softmax_attention(*part, window=window, initial_state=one)
            expected.append(o)
        together = [torch.cat(x, dim=1) for x in zip(*parts, strict=True)]
        found, several = softmax_attention(*together, window=window, initial_state=several)
        torch.testing.assert_close(found, torch.cat(expected, dim=1), rtol=1e-5, atol=1e-6)
        assert torch.equal(one.length, several.length)
        for a, b in ((one.k, several.k), (one.v, several.v)):
            assert torch.equal(a.dense(None), b.dense(None))  # type: ignore[operator]


def test_forks_of_one_row_do_not_write_into_each_other() -> None:
    _, start = softmax_attention(*token(0), initial_state=by_row(filled(None)))  # now with room behind it
    before = start.k.dense(None).clone()  # type: ignore[operator]
    ends = []
    for seed in (1, 2):
        state = start
        for step in range(3):
            _, state = softmax_attention(*token(10 * seed + step), initial_state=state)
        ends.append(state)
    assert torch.equal(start.k.dense(None), before)  # type: ignore[operator]
    for seed, end in zip((1, 2), ends, strict=True):
        newest = torch.cat([token(10 * seed + step)[1] for step in range(3)], dim=1)
        assert torch.equal(end.k.dense(None)[:, -3:], newest)  # type: ignore[operator]


def test_a_row_that_only_fills_a_batch_sees_itself() -> None:
    cache = by_row(filled(None))
    k, v = (Rows([held.rows[2], None, None]) for held in (cache.k, cache.v))  # type: ignore[attr-defined]
    q, new_k, new_v = token(3, rows=3)
    o, after = softmax_attention(q, new_k, new_v, initial_state=KVCache(k, v, torch.tensor([70, 0, 0])))  # type: ignore[arg-type]
    assert torch.equal(o[1:], new_v[1:].repeat_interleave(HEADS // KEYS, dim=2))
    assert after.k.rows[1] is None and after.length[0] == 71  # type: ignore[attr-defined]
