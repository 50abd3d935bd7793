"""``infini_attention`` and ``memory_of_states`` against their papers' formulas, one head and one token at a time.

No implementation of these that is not ours could be had as a package. What stands here uses no op, no state and no
segments laid side by side: every token looks back over the whole text.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from laws.laws import (
    BOUND,
    check_causality,
    check_constant_memory,
    check_no_tokens,
    check_packing,
    check_purity,
    check_rows,
    check_split_and_carry,
    check_token_by_token,
)
from laws.mixer_cases import build, mixer_subject
from linstate.errors import ConfigError
from linstate.mixers.infini_attention import InfiniAttention
from linstate.mixers.memory_of_states import MemoryOfStates
from oracles.oracle import agree, hold, pieces, randomise

pytestmark = pytest.mark.oracle

D, H, K = 48, 3, 16


def phi(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, x.exp())


def turned(x: Tensor, place: int) -> Tensor:
    """Rotary embedding of ``x [K]`` with complex numbers."""
    half = x.shape[-1] // 2
    angle = place * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    z = torch.complex(x[:half].double(), x[half:].double()) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag]).float()


@pytest.mark.parametrize("delta", [False, True])
@torch.no_grad()
def test_infini_attention(delta: bool) -> None:
    """Equations 3 to 8 of the paper. A window of 10: none of the cuts is at a segment's end."""
    torch.manual_seed(0)
    W = 10
    ours = InfiniAttention(D, window=W, num_heads=H, head_dim=K, delta=delta)
    randomise(ours)
    inputs = pieces(D)
    x = torch.cat(inputs, 1)
    q, k, v = F.linear(x, ours.in_proj.weight).unflatten(-1, (3, H, K)).unbind(2)
    o = torch.zeros_like(q)
    ends = [sum(part.shape[1] for part in inputs[: i + 1]) for i in range(3)]
    memories = {end: torch.zeros(2, H, K, K) for end in ends}
    norms = {end: torch.zeros(2, H, K) for end in ends}
    for b in range(2):
        for h in range(H):
            M, z = torch.zeros(K, K), torch.zeros(K)
            for t in range(x.shape[1]):
                start = t // W * W
                if t == start and t:
                    old, before = M.clone(), z.clone()
                    for s in range(start - W, start):
                        key = phi(k[b, s, h])
                        known = key @ old / (key @ before) if delta and before.any() else torch.zeros(K)
                        M, z = M + torch.outer(key, v[b, s, h] - known), z + key
                query = phi(q[b, t, h])
                memory = query @ M / (query @ z) if t >= W else torch.zeros(K)
                near = torch.stack([turned(k[b, s, h], s - start) for s in range(start, t + 1)])
                weights = (near @ turned(q[b, t, h], t - start) / K**0.5).softmax(0)
                gate = torch.sigmoid(ours.beta[h])
                o[b, t, h] = gate * memory + (1 - gate) * (weights @ v[b, start : t + 1, h])
                if t + 1 in ends:
                    memories[t + 1][b, h], norms[t + 1][b, h] = M, z
    y = F.linear(o.flatten(-2), ours.out_proj.weight).split([part.shape[1] for part in inputs], dim=1)
    states = [{"S": torch.cat([memories[end], norms[end][..., None]], -1)} for end in ends]
    hold(ours, list(zip(y, states, strict=True)), inputs)


@torch.no_grad()
def test_infini_attention_is_linear_attention_over_the_segments_before() -> None:
    """The "Linear" update, with a gate that is open for the memory only: equation 7 of Katharopoulos 2020, masked."""
    torch.manual_seed(0)
    W, T = 7, 40
    ours = InfiniAttention(D, window=W, num_heads=H, head_dim=K, delta=False)
    randomise(ours)
    ours.beta.fill_(40.0)
    x = torch.randn(2, T, D)
    q, k, v = F.linear(x, ours.in_proj.weight).unflatten(-1, (3, H, K)).transpose(1, 3).unbind(2)
    segment = torch.arange(T) // W
    weights = (phi(q) @ phi(k).transpose(-1, -2)) * (segment[:, None] > segment)
    o = weights @ v / weights.sum(-1, keepdim=True).clamp(min=1e-9)
    agree("output", ours(x)[0], F.linear(o.transpose(1, 2).flatten(-2), ours.out_proj.weight))


@pytest.mark.parametrize("top_k", [1, 2, 4])
@torch.no_grad()
def test_memory_of_states(top_k: int) -> None:
    """Segments of 6 and 4 slots: at the end 12 segments have passed, of which 8 are gone."""
    torch.manual_seed(0)
    C, M = 6, 4
    ours = MemoryOfStates(D, num_heads=H, head_dim=K, segment=C, slots=M, top_k=top_k)
    randomise(ours)
    inputs = pieces(D)
    x = torch.cat(inputs, 1)
    inner = H * K
    qkv, u, beta = F.linear(x, ours.in_proj.weight).split([3 * inner, inner, H], dim=-1)
    padded = F.pad(qkv, (0, 0, 3, 0)).transpose(1, 2)
    qkv = F.silu(F.conv1d(padded, ours.conv.weight[:, None], groups=3 * inner)).transpose(1, 2)
    q, k, v = qkv.unflatten(-1, (3, H, K)).unbind(2)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    u, rate = u.unflatten(-1, (H, K)), beta.sigmoid()
    o = torch.zeros_like(q)
    dropped = 0
    for b in range(2):
        for h in range(H):
            past: list[tuple[Tensor, Tensor]] = []
            S, keys = torch.zeros(K, K), []
            for t in range(x.shape[1]):
                key = k[b, t, h]
                S = S + rate[b, t, h] * torch.outer(key, v[b, t, h] - key @ S)
                keys.append(key)
                scores = [u[b, t, h] @ torch.stack(keys).mean(0)]
                known = past[-M:]
                ranked = sorted(known, key=lambda entry: -float(u[b, t, h] @ entry[1]))
                dropped += len(ranked) - len(ranked[:top_k])
                scores += [u[b, t, h] @ mean for _, mean in ranked[:top_k]]
                gamma = torch.stack(scores).softmax(0)
                answers = torch.stack([q[b, t, h] @ one for one in (S, *(s for s, _ in ranked[:top_k]))])
                o[b, t, h] = gamma @ answers
                if len(keys) == C:
                    past.append((S, torch.stack(keys).mean(0)))
                    S, keys = torch.zeros(K, K), []
    assert (dropped > 0) == (top_k < M)
    normed = F.rms_norm(o, (K,), ours.norm.weight, 1e-6)
    y = F.linear(normed.flatten(-2), ours.out_proj.weight).split([part.shape[1] for part in inputs], dim=1)
    hold(ours, [(part, {}) for part in y], inputs)


def test_the_laws_hold_for_a_memory_of_states_whose_slots_overflow() -> None:
    """With its default segment the laws' texts are too short for that."""
    options = {"num_heads": 2, "head_dim": 16, "segment": 3, "slots": 3, "top_k": 2}
    mixer, bound = build("memory_of_states", options), BOUND[torch.float64]
    subject = mixer_subject("memory_of_states", mixer, rows=3, tokens=20)
    check_split_and_carry(subject, range(21), bound)
    check_token_by_token(subject, bound)
    check_no_tokens(subject)
    check_rows(subject, bound)
    check_packing(subject, (3, 0, 20), bound)
    check_causality(subject, (0, 2, 3, 10, 19))
    check_purity(subject)
    alone = mixer_subject(
        "memory_of_states", build("memory_of_states", options, torch.float32), 1, 300, before=0
    )
    check_constant_memory(mixer.float().state_bytes, alone)


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"top_k lie in \[1, slots\], got 64, 9 and 8 slots"):
        MemoryOfStates(D, top_k=9)
    with pytest.raises(ConfigError, match="window must be at least 1 token, got 0"):
        InfiniAttention(D, window=0)
