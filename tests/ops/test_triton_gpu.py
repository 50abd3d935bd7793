"""On a GPU only: what the interpreter cannot show. The other tests of Triton programs run there as well."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from laws.laws import BOUND, check_drift, close
from laws.mixer_cases import build
from laws.op_cases import Sizes, cases, op_of
from linstate.ops import delta_rule, linear_attention
from linstate.ops.fused import Operands, Plan
from linstate.ops.triton import mixer as mixer_programs
from linstate.ops.triton import runtime
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


def test_a_mixer_step_in_a_graph() -> None:
    """All of Gated DeltaNet between its projections: captured once with its own workspace, replayed with other tokens and slots."""
    mixer = build("gated_deltanet", {"num_heads": 2, "num_v_heads": 4, "head_dim": 64}, torch.bfloat16).cuda()
    plan = mixer.plan
    assert isinstance(plan, Plan)
    x = torch.randn(3, 9, mixer.d_model, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        _, state = mixer(x[:, :7])
        y, after = mixer(x[:, 7:8], state)
        z, _ = mixer(x[:, 8:], after)
    states, tails = (
        t.repeat(2, *(1,) * (t.dim() - 1)).contiguous() for t in (state["S"], state["conv"])
    )  # slots 3 to 5 are 0 to 2
    token, slots = x[:, 7:8].clone(), torch.tensor([3, 4, 5], device="cuda")
    out = torch.empty(3, 1, plan.hv * plan.v, dtype=torch.bfloat16, device="cuda")
    work = mixer_programs.Workspace(plan, 3, "cuda")

    def step(states: torch.Tensor, tails: torch.Tensor) -> None:
        qkv, *rest = mixer.in_proj(token).split(mixer.sizes, dim=-1)
        beta, a, gate = mixer.raw_gates(*rest)
        operands = Operands(
            weight=mixer.conv.weight,
            beta=beta,
            step=a,
            rate=mixer.A_log,
            step_bias=mixer.dt_bias,
            norm=mixer.norm.weight,
            z=gate,
        )
        mixer_programs.step_in_slots(plan, qkv, slots, states, tails, operands, out=out, workspace=work)

    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        step(states.clone(), tails.clone())  # compiled before it is captured
        with torch.cuda.graph(graph):
            step(states, tails)
    for t, expected in ((7, y), (8, z)):
        token.copy_(x[:, t : t + 1])
        graph.replay()
        with torch.no_grad():
            close(mixer.out_proj(out).float().cpu(), expected.float().cpu(), 1e-2, f"token {t}")
    assert not work.arrived.any()


def test_a_mixer_in_streams_at_once() -> None:
    """Counters are those of a stream."""
    mixer = build("mamba2", {"num_heads": 4, "head_dim": 64}, torch.float32).cuda()
    x = torch.randn(2, 1, mixer.d_model, device="cuda")
    with torch.no_grad():
        expected, _ = mixer(x)
        streams = [torch.cuda.Stream() for _ in range(4)]
        torch.cuda.synchronize()
        found = []
        for _ in range(50):
            for stream in streams:
                with torch.cuda.stream(stream):
                    found.append(mixer(x)[0])
        torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in found)


@pytest.mark.parametrize("name", ["gated_deltanet", "kimi_delta", "gla", "mamba2", "rwkv7", "rwkv6"])
def test_mixers_at_length(name: str) -> None:
    """Many segments in bfloat16 in one call, and in two, against the ops one by one, which the laws hold; launches counted."""
    mixer = build(name, {"num_heads": 4, "head_dim": 64}, torch.bfloat16).cuda()
    x = torch.randn(1, 5000, mixer.d_model, dtype=torch.bfloat16, device="cuda")
    with torch.enable_grad():  # with gradients nothing is made in passing
        expected, after = mixer(x.clone().requires_grad_())
    with torch.no_grad():
        runtime.launches.clear()
        y, state = mixer(x)
        assert sum(runtime.launches.values()) <= 6, dict(runtime.launches)
        first, between = mixer(x[:, :2100])
        second, other = mixer(x[:, 2100:], between)
    for found, left in ((y, state), (torch.cat([first, second], 1), other)):
        close(found.float().cpu(), expected.detach().float().cpu(), 3e-2, name)
        close(left["S"].cpu(), after["S"].detach().cpu(), 3e-2, f"{name}: state")
