"""On a GPU only: what the interpreter cannot show. The other tests of Triton programs run there as well."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from laws.laws import BOUND, check_drift, close
from laws.op_cases import Sizes, cases
from linstate.ops import delta_rule, linear_attention
from linstate.ops.triton.step import step_in_slots

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU; there is none here"),
]
LARGE = Sizes(B=1, T=4100, H=4, K=128, V=128)


@pytest.mark.parametrize("variant", ["no gate", "gate per head", "gate per channel"])
@pytest.mark.parametrize("recurrence", ["linear_attention", "delta_rule", "dplr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_long_texts(recurrence: str, variant: str, dtype: torch.dtype) -> None:
    """Many chunks, cut into segments, with gradients, against the chunked torch form in float64."""
    (case,) = (c for c in cases(recurrence, LARGE) if c.variant == variant)
    cast = case.to(dtype, gates=torch.float32)
    found = []
    for backend, wanted in (("triton", cast), ("torch", cast.to(torch.float64))):
        given = {name: t.detach().cuda().requires_grad_() for name, t in wanted.tensors().items()}
        from laws.op_cases import op_of

        o, state = wanted.replaced(given).run(op_of(recurrence), form="chunked", backend=backend)
        weights = torch.Generator("cuda").manual_seed(0)
        total = sum(
            (t.double() * torch.randn(t.shape, generator=weights, device="cuda")).sum() for t in (o, state)
        )
        found.append([o, state, *torch.autograd.grad(total, list(given.values()))])
    for number, (ours, theirs) in enumerate(zip(*found, strict=True)):
        close(ours, theirs, 3 * BOUND[dtype], f"{cast}: {number}")


def test_long_drift() -> None:
    """100,000 tokens in bfloat16."""
    (case,) = (
        c for c in cases("delta_rule", Sizes(B=1, T=100_000, H=2, K=64, V=64)) if c.variant == "gate per head"
    )
    cast = case.to(torch.bfloat16)
    runs = []
    for backend, wanted in (("triton", cast), ("torch", cast.to(torch.float64))):
        given = {name: t.cuda() for name, t in wanted.tensors().items()}
        runs.append(wanted.replaced(given).run(delta_rule, form="chunked", backend=backend))
    check_drift(runs[0], runs[1], BOUND[torch.bfloat16], "delta_rule")


def test_offsets_beyond_31_bits() -> None:
    """B T H K passes 2^31."""
    tokens, heads, size = 70_000, 64, 512 // 2
    q = torch.zeros((2, tokens, heads, size), dtype=torch.bfloat16, device="cuda")
    assert q.numel() > 2**31
    q[:, -1], k, v = 1.0, q, q
    o, state = linear_attention(q, k, v, scale=1.0, form="chunked", backend="triton")
    assert (o[:, -1] == size).all() and not o[:, :-1].any() and (state == 1).all()


def test_a_step_in_a_graph() -> None:
    """Captured once, replayed with other slots and other numbers."""
    (case,) = (
        c for c in cases("delta_rule", Sizes(B=4, T=1, H=2, K=64, V=64)) if c.variant == "gate per head"
    )
    cast = case.to(torch.float32)
    given = {name: t.cuda() for name, t in cast.sequences.items()}
    states, slots = cast.initial.cuda().repeat(2, 1, 1, 1), torch.arange(4, device="cuda")
    out = torch.empty_like(given["v"])
    step_in_slots("delta_rule", states.clone(), slots, out=out, **given)  # compiled before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step_in_slots("delta_rule", states, slots, out=out, **given)
    slots.copy_(torch.tensor([5, 4, -1, 0], device="cuda"))
    expected = replace(cast, initial=states[[5, 4, 0, 0]].cpu()).run(delta_rule, form="step", backend="torch")
    graph.replay()
    close(out[[0, 1]].cpu(), expected[0][[0, 1]], 1e-5, "output")
    close(states[[5, 4]].cpu(), expected[1][[0, 1]], 1e-5, "states")
    assert not out[2].any()
