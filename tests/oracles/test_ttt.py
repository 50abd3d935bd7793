"""``ttt_linear`` and ``ttt_mlp`` against torch's own gradients of the inner loss, and FLA's naive TTT-Linear.

The reference here is the paper's own statement, token by token: write down f and the loss of section 2.7, ask
``torch.autograd`` for the gradient, take the step. Nothing of it is shared with the op but the equations.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linstate.mixers._ttt import TTTMixer
from linstate.mixers.ttt_linear import TTTLinear
from linstate.mixers.ttt_mlp import TTTMLP
from linstate.ops import test_time_training as read
from oracles.oracle import BOUND, agree, deviation, fla_naive, hold, pieces, randomise

pytestmark = pytest.mark.oracle

D, H, K, C = 48, 3, 16, 8


class Inner(torch.nn.Module):
    """One head's inner model of one row."""

    def __init__(self, layers: list[Tensor], weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.layers = torch.nn.ParameterList(w.clone() for w in layers)  # [K_l + 1, F_l]
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        z = x
        for i, w in enumerate(self.layers):
            z = (F.gelu(z, approximate="tanh") if i else z) @ w[:-1] + w[-1]
        return x + F.layer_norm(z, z.shape, self.weight, self.bias, 1e-6)


def turn(x: Tensor, place: int) -> Tensor:
    """Rotary embedding of one vector ``[K]`` with complex numbers."""
    half = x.shape[-1] // 2
    angle = place * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    z = torch.complex(x[:half].double(), x[half:].double()) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag]).float()


def by_autograd(mixer: TTTMixer, x: Tensor, stops: list[int]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Output for ``x [B, T, D]``, and the weights, gradients and counts after ``stops`` tokens."""
    inner = H * K
    q, k, v = F.linear(x, mixer.in_proj.weight[: 3 * inner]).unflatten(-1, (3, H, K)).unbind(2)
    rate = torch.sigmoid(F.linear(x, mixer.in_proj.weight[3 * inner :], mixer.lr_bias)) * mixer.base_lr / K
    first = [getattr(mixer, name) for name in mixer.layers]
    o = torch.zeros(*x.shape[:2], H, K)
    after = [{f"{kind}{i}": torch.zeros(x.shape[0], *w.shape) for kind in "WG" for i, w in enumerate(first, 1)}
             for _ in stops]  # fmt: skip
    for b in range(x.shape[0]):
        for h in range(H):
            weight, bias = (p.unflatten(0, (H, K))[h] for p in (mixer.norm_weight, mixer.norm_bias))
            model = Inner([w[h] for w in first], weight, bias)
            waiting = [torch.zeros_like(w) for w in model.layers]
            for t in range(x.shape[1]):
                c = t % C
                with torch.enable_grad():
                    loss = (model(turn(k[b, t, h], c)) - v[b, t, h]).square().sum() / 2
                    gradients = torch.autograd.grad(loss, list(model.layers))
                waiting = [g + rate[b, t, h] * new for g, new in zip(waiting, gradients, strict=True)]
                share = torch.relu(1 / (c + 1) + mixer.share[c] / (c + 1))
                moved = [w - share * g for w, g in zip(model.layers, waiting, strict=True)]
                o[b, t, h] = Inner(moved, weight, bias)(turn(q[b, t, h], c))
                if c == C - 1:
                    model, waiting = Inner(moved, weight, bias), [torch.zeros_like(g) for g in waiting]
                if t + 1 in stops:
                    found = after[stops.index(t + 1)]
                    for i, (w, g) in enumerate(zip(model.layers, waiting, strict=True), 1):
                        found[f"W{i}"][b, h], found[f"G{i}"][b, h] = w - first[i - 1][h], g
    for found, stop in zip(after, stops, strict=True):
        found["count"] = torch.full((x.shape[0],), stop % C)
    normed = F.layer_norm(o.flatten(-2), (inner,), mixer.norm.weight, mixer.norm.bias, 1e-6)
    return F.linear(normed, mixer.out_proj.weight), after


@pytest.mark.parametrize("kind", [TTTLinear, TTTMLP])
@torch.no_grad()
def test_the_gradient_is_the_loss_s(kind: type[TTTLinear] | type[TTTMLP]) -> None:
    """In pieces of 41, 36 and 1 tokens: none of the cuts is at the end of a mini-batch of 8."""
    torch.manual_seed(0)
    ours = kind(D, num_heads=H, head_dim=K, mini_batch=C, base_lr=2.0)
    randomise(ours, share=lambda u: u - 0.5)
    inputs = pieces(D)
    stops = [sum(x.shape[1] for x in inputs[: i + 1]) for i in range(len(inputs))]
    y, after = by_autograd(ours, torch.cat(inputs, 1), stops)
    parts = y.split([x.shape[1] for x in inputs], dim=1)
    compared = [{n: t for n, t in s.items() if t.abs().max() > 0} for s in after]
    assert "G1" in compared[0] and compared[0]["count"][0] > 0, "the cut must be inside a mini-batch"
    for found, state in zip(_states(ours, inputs), after, strict=True):
        assert found.keys() == state.keys()
        assert torch.equal(found["count"], state["count"])
    hold(ours, list(zip(parts, compared, strict=True)), inputs)


def _states(mixer: TTTMixer, inputs: list[Tensor]) -> list[dict[str, Tensor]]:
    state, found = None, []
    for x in inputs:
        state = mixer(x, state)[1]
        found.append(state)
    return found


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
@torch.no_grad()
def test_the_weights_are_those_of_fla_s_ttt_linear(form: str) -> None:
    """FLA's inner weights and biases after whole mini-batches, from a state.

    Traps: q is scaled in place, and by K^-1/2; the rate stands with the reading token only (our ``share``); the answer
    adds the inner model's output, where paper and authors add q, so it is that output which is compared; in a mini-batch
    that is not full, zeros of the padding are learned from. So the lengths here are multiples of a mini-batch.
    """
    torch.manual_seed(0)
    theirs = fla_naive("ttt/naive").chunk_ttt_linear_ref
    B, T, size, cut = 2, 5 * C, 12, 2 * C
    q, k, v = (torch.randn(B, T, H, size) for _ in range(3))
    weight, bias, share = torch.rand(H, size) + 0.5, torch.randn(H, size) / 3, torch.rand(C) / size
    W1 = torch.randn(H, size + 1, size) / size**0.5
    eta = share.repeat(T // C)[None, :, None, None].expand(B, T, H, 1)
    matrix = W1.expand(B, -1, -1, -1)
    theirs_state, state = (matrix[:, :, :-1].clone(), matrix[:, :, -1:].clone()), None
    for start, end in ((0, cut), (cut, T)):
        part = slice(start, end)
        o, *theirs_state = theirs(
            q[:, part].clone(), k[:, part], v[:, part], weight, bias, eta[:, part], scale=1.0, mini_batch_size=C,
            initial_state=theirs_state[0], initial_state_bias=theirs_state[1], output_final_state=True,
        )  # fmt: skip
        found, state = read(
            q[:, part], k[:, part], v[:, part], torch.ones(B, end - start, H), W1, norm_weight=weight,
            norm_bias=bias, share=share, initial_state=state, form=form,
        )  # fmt: skip
        now = W1 + state["W1"]
        agree("weights", now[:, :, :-1], theirs_state[0])
        agree("bias", now[:, :, -1:], theirs_state[1])
        # o = z + layer_norm(z) and ours = q + layer_norm(z): the layer norm of their z is ours without q
        normed = found - q[:, part]
        agree("answer", F.layer_norm(o - normed, (size,), eps=1e-6) * weight + bias, normed)
        assert deviation(now[:, :, :-1], matrix[:, :, :-1]) > 100 * BOUND, "nothing was learned"
