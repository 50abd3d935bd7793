"""The chunked forms form nothing of size T x C x K: the largest tensor they make is a small multiple of their inputs.

Every tensor that an operation makes is looked at, views by the storage behind them, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from laws.op_cases import Case, Sizes, cases, op_of
from linstate.ops import chunks
from linstate.ops.chunks import CHUNK
from linstate.ops.selective_scan.torch_chunked import CHUNK as SCAN
from linstate.ops.softmax_attention.torch_blocked import BLOCK

B, T, H, K, V = 1, 1024, 2, 64, 64
PER_TOKEN = max(K, V)


class Largest(TorchDispatchMode):
    """The number of elements of the largest storage that is made inside, and who made it."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.maker = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                elements = tensor.untyped_storage().nbytes() // tensor.element_size()
                if elements > self.elements:
                    self.elements, self.maker = elements, f"{func} {list(tensor.shape)}"
        return result


def largest(run: Callable[[], Any]) -> Largest:
    with Largest() as seen:
        run()
    return seen


def gated(recurrence: str, tokens: int = T) -> list[Case]:
    found = [c.to(torch.float32) for c in cases(recurrence, Sizes(B=B, T=tokens, H=H, K=K, V=V))]
    return [c for c in found if "grouped" not in c.variant]


@pytest.mark.parametrize("recurrence", ["linear_attention", "delta_rule", "dplr"])
def test_matrix_recurrences_never_form_t_c_k_h(recurrence: str) -> None:
    """At most twice the queries (or the scores of T x C, which are as large where C = K): k and q side by side.

    T x C x K x H would be 64 times as much.
    """
    inputs = B * T * H * PER_TOKEN
    assert inputs >= B * T * H * CHUNK, "the scores of all chunks count as one input here"
    for case in gated(recurrence):
        seen = largest(lambda case=case: case.run(op_of(recurrence), form="chunked", backend="torch"))
        assert inputs <= seen.elements <= 2 * inputs, (
            f"{case}: {seen.elements / inputs:.2f} x the inputs: {seen.maker}"
        )


@pytest.mark.parametrize("recurrence", ["linear_attention", "delta_rule", "dplr"])
def test_gradients_do_not_form_it_either(recurrence: str) -> None:
    """Backward keeps a state for each chunk, T / C x K x V: as much as an input where C = K."""
    inputs = B * T * H * PER_TOKEN

    def run(case: Case) -> None:
        given = {name: t.requires_grad_() for name, t in case.tensors().items()}
        o, state = case.replaced(given).run(op_of(recurrence), form="chunked", backend="torch")
        torch.autograd.grad(o.sum() + state.sum(), list(given.values()))

    for case in gated(recurrence):
        seen = largest(lambda case=case: run(case))
        assert seen.elements <= 2 * inputs, f"{case}: {seen.elements / inputs:.2f} x the inputs: {seen.maker}"


@pytest.mark.parametrize("recurrence", ["linear_attention", "delta_rule", "dplr"])
def test_a_long_text_is_read_in_segments(recurrence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing larger than the output is made, whatever the chunks' own tensors are: here four segments of four chunks."""
    monkeypatch.setattr(chunks, "SEGMENT_ELEMENTS", T // 4 * B * H * K)
    for case in gated(recurrence):
        seen = largest(lambda case=case: case.run(op_of(recurrence), form="chunked", backend="torch"))
        assert seen.elements <= B * T * H * V, f"{case}: {seen.elements}: {seen.maker}"


def test_the_scan_forms_one_chunk_of_states() -> None:
    """C x K x V, not T x K x V; what is joined from all chunks is the output."""
    bound = max(B * SCAN * H * K * V, B * T * H * PER_TOKEN)
    for case in gated("selective_scan"):
        seen = largest(lambda case=case: case.run(op_of("selective_scan"), form="chunked", backend="torch"))
        assert seen.elements <= bound, f"{case}: {seen.elements / bound:.2f} x the bound: {seen.maker}"


def test_attention_forms_no_square() -> None:
    """No T x T: a block of 512 queries against the keys it sees; with a window, only those of the window and the block."""
    tokens, window = 4096, 100
    q, k, v = (torch.randn(1, tokens, 1, 8) for _ in "qkv")
    attention = op_of("softmax_attention")
    full = largest(lambda: attention(q, k, v, form="chunked", backend="torch"))
    assert full.elements <= BLOCK * tokens, full.maker
    near = largest(lambda: attention(q, k, v, window=window, form="chunked", backend="torch"))
    assert near.elements <= BLOCK * (BLOCK + window), near.maker


def test_the_measure_sees_what_it_is_for() -> None:
    """The decays of a chunk written out, exp(G_i - G_j) per channel, are seen."""
    g = -torch.rand(B, T, H, K)

    def naive() -> Tensor:
        chunks = g.unflatten(1, (-1, CHUNK)).cumsum(2)  # [B, N, C, H, K]
        return (chunks[:, :, :, None] - chunks[:, :, None]).exp()

    assert largest(naive).elements == B * T * H * K * CHUNK
    assert largest(lambda: g.expand(1000, B, T, H, K)).elements == g.numel(), "a view makes nothing"
