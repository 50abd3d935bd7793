"""Zeros of pages that are not written: they are zeros, they can be written, and they take no memory before that."""

from __future__ import annotations

import sys

import pytest
import torch

from linstate.engine import LanguageModel
from linstate.ops import zeros
from linstate.ops.softmax_attention import definition
from linstate.ops.zeros import LEAST, untouched_zeros
from linstate.serve.memory import resident, trim

proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is looked up in /proc")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_they_are_zeros_that_can_be_written(dtype: torch.dtype) -> None:
    for shape in ((1, LEAST, 2), (3, 0, 2), (2, 5)):
        made = untouched_zeros(shape, torch.empty(0, dtype=dtype))
        assert made.dtype == dtype
        assert torch.equal(made, torch.zeros(shape, dtype=dtype))
        made[:, -1:] = 3
        assert made.sum() == 3 * made[:, -1:].numel()


def test_where_no_mapping_is_left_they_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*args: object, **kwargs: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(zeros.mmap, "mmap", none_left)
    assert not untouched_zeros((LEAST,), torch.empty(0)).any()


def test_a_window_after_tokens_is_the_same_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of two lengths, from nothing to a full window: every cache to the bit."""
    found = {}
    for least in (0, 1 << 60):
        monkeypatch.setattr(definition, "LEAST", least)
        g = torch.Generator().manual_seed(0)
        cache = (torch.zeros(2, 15, 1, 4), torch.zeros(2, 15, 1, 3), torch.tensor([0, 4]))
        cache[0][1, -4:], cache[1][1, -4:] = 1.5, 2.5
        steps = []
        with torch.no_grad():
            for tokens in (1, 5, 0, 7, 40, 2):
                k, v = (torch.randn(2, tokens, 1, n, generator=g) for n in (4, 3))
                cache = definition.extend(cache, k, v, 16)
                steps.append(cache)
        found[least] = steps
    for some, same in zip(*found.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(some, same, strict=True))


@proc
def test_a_state_takes_the_memory_of_what_it_has_read() -> None:
    """Sixty states of a few hundred tokens, whose windows are of 9.4 MB each; and one that is loaded again."""
    model = LanguageModel.from_pretrained("pocket")
    held = [model.append(range(3, 400))]
    trim()
    before = resident()
    assert before is not None
    held += [model.append(range(n, n + 300)) for n in range(3, 63)]
    trim()
    after = resident()
    assert after is not None
    full = sum(state.nbytes for state in held[1:])
    assert after - before < full / 4
    back = type(held[0]).unpack(held[0].pack(), "it")
    assert all(torch.equal(t, back.tensors[name]) for name, t in held[0].tensors.items())
