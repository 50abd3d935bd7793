"""``deltaproduct`` and ``kimi_delta`` (beta up to 2) are their papers' layers around FLA's naive recurrences.

FLA's layers need Triton; what stands around their recurrence is written here with torch's own convolution and norms.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linstate.mixers.deltaproduct import DeltaProduct
from linstate.mixers.kimi_delta import KimiDelta
from oracles.oracle import fla_naive, hold, pieces, randomise

pytestmark = pytest.mark.oracle

D, K, V = 48, 16, 20
GATES = {"A_log": lambda u: 2 * u - 2, "dt_bias": lambda u: 2 * u - 4}


def projections(ours: nn.Module, x: Tensor, sizes: list[int]) -> list[Tensor]:
    """Parts of ``W x``, the first of them behind the short convolution, and the convolution's last inputs at the end."""
    first, *rest = F.linear(x, ours.in_proj.weight).split(sizes, dim=-1)
    taps = ours.conv.weight
    convolved = F.conv1d(F.pad(first.transpose(1, 2), (3, 0)), taps[:, None], groups=len(taps)).transpose(
        1, 2
    )
    return [F.silu(convolved), *rest, F.pad(first, (0, 0, 3, 0))[:, -3:]]


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def by_pieces(ours: nn.Module, inputs: list[Tensor]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """What their layer gives for each piece: it reads everything up to the piece's end from nothing."""
    found = []
    for i, x in enumerate(inputs):
        y, state = reference(ours, torch.cat(inputs[: i + 1], dim=1))
        found.append((y[:, -x.shape[1] :], state))
    return found


def reference(ours: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return _product(ours, x) if isinstance(ours, DeltaProduct) else _kimi(ours, x)


def _product(ours: DeltaProduct, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    n, hk, hv = ours.steps, ours.hk, ours.hv
    qkv = [hk * K, n * hk * K, n * hv * V]
    inner, z, beta, a, tail = projections(ours, x, [sum(qkv), hv * V, n * hv, hv if ours.decays else 0])
    q, k, v = inner.split(qkv, dim=-1)
    wide = hv // hk
    q = unit(q.unflatten(-1, (hk, K))).repeat_interleave(wide, dim=2)
    k = unit(k.unflatten(-1, (n, hk, K)).flatten(1, 2)).repeat_interleave(wide, dim=2)  # step by step in time
    v = v.unflatten(-1, (n, hv, V)).flatten(1, 2)
    beta = beta.sigmoid().unflatten(-1, (n, hv)).flatten(1, 2) * ours.beta_scale
    g = -ours.A_log.exp() * F.softplus(a + ours.dt_bias) if ours.decays else None
    naive = fla_naive("gated_delta_product/naive").naive_recurrent_gated_delta_product
    o, state = naive(q, k, v, g, beta, K**-0.5, output_final_state=True, num_householder=n)
    o = F.rms_norm(o, (V,), ours.norm.weight, 1e-5) * F.silu(z.unflatten(-1, (hv, V)))
    return F.linear(o.flatten(-2), ours.out_proj.weight), {"S": state, "conv": tail}


def _kimi(ours: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    h = ours.hv
    qkv = [h * K, h * K, h * V]
    inner, beta, f, z, tail = projections(ours, x, [sum(qkv), h, V, V])
    q, k, v = (part.unflatten(-1, (h, -1)) for part in inner.split(qkv, dim=-1))
    g = F.softplus(F.linear(f, ours.decay_proj.weight) + ours.dt_bias).unflatten(-1, (h, K))
    g = -ours.A_log.exp()[:, None] * g
    naive = fla_naive("kda/naive").naive_recurrent_kda
    o, state = naive(unit(q), unit(k), v, g, beta.sigmoid() * ours.beta_scale, output_final_state=True)
    z = F.linear(z, ours.gate_proj.weight).unflatten(-1, (h, V))
    o = F.rms_norm(o, (V,), ours.norm.weight, 1e-5) * z.sigmoid()
    return F.linear(o.flatten(-2), ours.out_proj.weight), {"S": state, "conv": tail}


@pytest.mark.parametrize(("heads", "v_heads"), [(3, 3), (2, 4)])
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize(("steps", "decay"), [(1, True), (2, True), (2, False), (3, True)])
@torch.no_grad()
def test_deltaproduct(steps: int, decay: bool, negative: bool, heads: int, v_heads: int) -> None:
    torch.manual_seed(0)
    ours = DeltaProduct(
        D,
        num_heads=heads,
        head_dim=K,
        num_v_heads=v_heads,
        v_head_dim=V,
        steps=steps,
        decay=decay,
        negative_eigenvalues=negative,
    )
    randomise(ours, **GATES)
    inputs = pieces(D)
    hold(ours, by_pieces(ours, inputs), inputs)


@pytest.mark.parametrize("negative", [False, True])
@torch.no_grad()
def test_kimi_delta(negative: bool) -> None:
    torch.manual_seed(0)
    ours = KimiDelta(D, num_heads=3, head_dim=K, v_head_dim=V, negative_eigenvalues=negative)
    randomise(ours, **GATES)
    inputs = pieces(D)
    hold(ours, by_pieces(ours, inputs), inputs)


@torch.no_grad()
def test_steps_that_do_nothing() -> None:
    """With a second step whose beta is zero, DeltaProduct is its first step: Gated DeltaNet."""
    torch.manual_seed(0)
    two, one = (DeltaProduct(D, num_heads=3, head_dim=K, v_head_dim=V, steps=n) for n in (2, 1))
    randomise(two, **GATES)
    qkv, gates = two.in_proj.weight.split(
        [3 * (3 * K + 2 * V), two.in_proj.out_features - 3 * (3 * K + 2 * V)]
    )
    q, k, _, v, _ = qkv.split([3 * K, 3 * K, 3 * K, 3 * V, 3 * V])
    z, beta, _, a = gates.split([3 * V, 3, 3, 3])
    taps = torch.cat(
        [t for i, t in enumerate(two.conv.weight.split([3 * K] * 3 + [3 * V] * 2)) if i in (0, 1, 3)]
    )
    rest = {name: t for name, t in two.state_dict().items() if name not in ("in_proj.weight", "conv.weight")}
    one.load_state_dict({**rest, "in_proj.weight": torch.cat([q, k, v, z, beta, a]), "conv.weight": taps})

    inputs = pieces(D)
    off = torch.zeros(1, 1, two.in_proj.out_features)
    off[..., -6:-3] = -1e4  # beta of the second step before its sigmoid
    two.in_proj.register_forward_hook(lambda module, given, out: out + off)
    expected, state = [], None
    for x in inputs:
        y, state = two(x, state)
        expected.append((y, {"S": state["S"]}))
    hold(one, expected, inputs)
