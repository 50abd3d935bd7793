"""Parts that several mixers are made of; each has one home and one name here."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linstate.errors import ArgumentError
from linstate.mixers.base import Place
from linstate.ops import causal_conv1d
from linstate.types import state_dtype


def heads(x: Tensor, count: int) -> Tensor:
    """``[B, T, H * D] -> [B, T, H, D]``."""
    return x.unflatten(-1, (count, -1))


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last axis, computed in float32 (float64 for float64).

    With ``groups`` the axis is cut into equal groups, each with its own rms. ``weight=False``: there is none (SRMSNorm).
    ``centred``: the weight is kept as its distance from one (Gemma, Qwen3-Next: in bfloat16 that keeps more of it).
    """

    def __init__(
        self, size: int, eps: float = 1e-6, groups: int = 1, *, weight: bool = True, centred: bool = False
    ) -> None:
        super().__init__()
        self.eps, self.groups, self.centred = eps, groups, centred
        self.weight = nn.Parameter(torch.full((size,), 0.0 if centred else 1.0)) if weight else None

    def scale(self, dtype: torch.dtype) -> Tensor | None:
        """What the normed vector is multiplied by, ``[size]``; None for nothing."""
        if self.weight is None:
            return None
        return 1 + self.weight.to(dtype) if self.centred else self.weight.to(dtype)

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``x [..., D]``, rounded to ``dtype`` first: what is read of a residual stream in float32."""
        x = x if dtype is None else x.to(dtype)
        wide = x if x.dtype == torch.float64 else x.float()
        weight = self.scale(wide.dtype)
        if self.groups > 1:
            normed = F.rms_norm(
                heads(wide, self.groups), (x.shape[-1] // self.groups,), eps=self.eps
            ).flatten(-2)
            return (normed if weight is None else normed * weight).to(x.dtype)
        return F.rms_norm(wide, (x.shape[-1],), weight, self.eps).to(x.dtype)


class HeadNorm(nn.Module):
    """Group norm with a group for each head: mean 0 and variance 1 over V, then weight and (with ``bias``) bias per channel.

    ``o [B, T, H, V] -> [B, T, H * V]``, computed in float32 (float64 for float64).
    """

    def __init__(self, heads: int, size: int, eps: float = 1e-5, *, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(heads * size))
        self.bias = nn.Parameter(torch.zeros(heads * size)) if bias else None

    def forward(self, o: Tensor) -> Tensor:
        wide = o if o.dtype == torch.float64 else o.float()
        normed = F.layer_norm(wide, (o.shape[-1],), eps=self.eps).flatten(-2)  # [B, T, H * V]
        normed = normed * self.weight.to(wide.dtype)
        return (normed if self.bias is None else normed + self.bias.to(wide.dtype)).to(o.dtype)


class GatedRMSNorm(RMSNorm):
    """``rms_norm(o) * gate(z)`` over the last axis: the output gate of most mixers. ``gate``: "silu" or "sigmoid"."""

    def __init__(self, size: int, eps: float = 1e-6, gate: str = "silu") -> None:
        super().__init__(size, eps)
        self.gate = F.silu if gate == "silu" else torch.sigmoid

    def forward(self, o: Tensor, z: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(o) * self.gate(z)


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over the last ``width`` tokens with SiLU; its state is ``[B, W - 1, D]``."""

    def __init__(
        self, channels: int, width: int = 4, *, bias: bool = False, activation: str | None = "silu"
    ) -> None:
        super().__init__()
        self.width, self.channels, self.activation = width, channels, activation
        self.weight = nn.Parameter(torch.empty(channels, width).uniform_(-(width**-0.5), width**-0.5))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(
        self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``x [B, T, D]`` -> y ``[B, T, D]`` and the last W - 1 inputs."""
        return causal_conv1d(
            x, self.weight, self.bias, activation=self.activation, initial_state=state, cu_seqlens=cu_seqlens
        )

    def init_state(self, batch: int, device: torch.device | str | None) -> Tensor:
        return torch.zeros(
            batch, self.width - 1, self.channels, device=device, dtype=state_dtype(self.weight)
        )


@torch.no_grad()
def begin_as_induction(
    in_proj: nn.Linear,
    conv: ShortConvolution,
    out_proj: nn.Linear,
    keys: int,
    values: int,
    size: float = 0.02,
) -> None:
    """Set weights so that a layer recalls before it has learned anything: what followed when these tokens last came?

    ``in_proj`` makes q, k ``[keys]`` and v ``[values]``, which go through ``conv``. q and k are the same random projection of
    the last tokens, k one token late, so that token t is stored under the tokens before it and is found again when they
    return; W_o undoes W_v, times ``size``. In half of the channels of q and k each stands for one distance, in the others all distances count,
    less with distance: exact order matters to the ones, not to the others.

    Source: mimetic initialisation, Trockman 2024, arXiv 2410.11135; shifted keys as in the induction heads of Olsson 2022.
    """
    reach, width = conv.width - 1, in_proj.in_features
    projection = torch.randn(keys, width) / width**0.5
    unit = nn.init.orthogonal_(torch.empty(values, width))
    in_proj.weight.normal_(std=0.02)
    in_proj.weight[: 2 * keys] = projection.repeat(2, 1)
    in_proj.weight[2 * keys : 2 * keys + values] = unit
    out_proj.weight.copy_(size * unit.T)
    taps = torch.zeros(keys, reach)  # [keys, distance]
    channels = torch.arange(keys)
    taps[channels, channels % reach] = 1.0
    taps[keys // 2 :] = 0.75 ** torch.arange(reach)
    weight = conv.weight.zero_()  # the newest token is last
    weight[:keys, 1:] = taps.flip(1)
    weight[keys : 2 * keys, :-1] = taps.flip(1)
    weight[2 * keys :, -1] = 1.0
    in_proj.keep_init = out_proj.keep_init = True  # type: ignore[assignment]


class LowRank(nn.Module):
    """``W_2 act(W_1 x) + bias``: a projection through ``rank`` channels. ``activation``: None or a function."""

    def __init__(
        self,
        size: int,
        to: int,
        rank: int,
        activation: Callable[[Tensor], Tensor] | None = None,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.narrow = nn.Linear(size, rank, bias=False)
        self.widen = nn.Linear(rank, to, bias=bias)

    @torch.no_grad()
    def reset(self) -> None:
        """RWKV-7's initial values: at first the result is the bias (0.1 orthogonal times zero)."""
        nn.init.zeros_(self.narrow.weight)
        nn.init.orthogonal_(
            self.widen.weight, gain=0.1 * max(1.0, self.narrow.out_features / self.widen.out_features) ** 0.5
        )
        for projection in (self.narrow, self.widen):
            projection.keep_init = True  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.widen(self.activated(self.narrow(x)))

    def activated(self, inner: Tensor) -> Tensor:
        """What stands between its two projections, of ``inner [B, T, rank]``."""
        return inner if self.activation is None else self.activation(inner)


def side_by_side(*each: tuple[LowRank, Tensor]) -> list[Tensor]:
    """Several of them, each of its own input, a stage at a time: a recorded token runs what is beside each other as one."""
    inner = [layer.narrow(x) for layer, x in each]  # [B, T, rank] each
    inner = [layer.activated(t) for (layer, _), t in zip(each, inner, strict=True)]
    return [layer.widen(t) for (layer, _), t in zip(each, inner, strict=True)]


class GateFloor(nn.Module):
    """Forget gates with a lower bound that rises with depth (HGRN, HGRN2): ``f = floor + (1 - floor) sigmoid(x)``.

    The floor of layer i is ``sum_{1 <= j <= i} softmax_j(gamma)_j``, gamma ``[layers, size]`` with a row for each layer
    of the model. It is one weight of the model: the first layer of a kind holds it and hands it on under ``name``.
    """

    def __init__(self, size: int, place: Place, name: str) -> None:
        super().__init__()
        self.layer, self.name = place.layer, name
        holds = place.first and place.layers > 1
        self.gamma = nn.Parameter(torch.zeros(place.layers, size)) if holds else None

    def forward(self, x: Tensor, shared: dict[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        """``log f`` and ``1 - f`` for ``x [B, T, size]``. Raises ArgumentError if gamma was not handed on."""
        gamma: Tensor | None = self.gamma
        if gamma is not None and shared is not None:
            shared[self.name] = gamma
        if self.layer == 0:
            return F.logsigmoid(x), torch.sigmoid(-x)
        if gamma is None:
            if shared is None or self.name not in shared:
                raise ArgumentError(
                    f"shared must hold {self.name!r}, the gamma of the model's first layer of this kind"
                )
            gamma = shared[self.name]
        share = gamma.to(x.dtype).log_softmax(0)  # [layers, size]
        floor = share[1 : self.layer + 1].logsumexp(0)
        rest = torch.cat([share[:1], share[self.layer + 1 :]]).logsumexp(0)  # log(1 - floor)
        return torch.logaddexp(floor, rest + F.logsigmoid(x)), (rest + F.logsigmoid(-x)).exp()


def token_shift(x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The token before each token of ``x [B, T, D]``, and the last one: the state ``[B, 1, D]``, at first zeros.

    It is the causal convolution with the taps (1, 0).
    """
    if x.shape[1] == 1 and cu_seqlens is None and state is not None:
        if state.shape != x.shape:
            raise ArgumentError(
                f"token_shift: the state must have the shape {list(x.shape)} of its input, got {list(state.shape)}"
            )
        return state.to(x.dtype), x.to(state.dtype)
    taps = x.new_tensor([1.0, 0.0]).expand(x.shape[-1], 2)  # [D, W]
    return causal_conv1d(x, taps, initial_state=state, cu_seqlens=cu_seqlens)


def running_max(k: Tensor, g: Tensor, before: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """``m_t = max(m_{t-1} + g_t, k_t)``: what keeps sums of ``exp(k)`` under decays ``exp(g)`` in range.

    A sum that is kept divided by ``exp(m_t)`` decays by ``exp(m_{t-1} + g_t - m_t)`` and takes in ``exp(k_t - m_t)``:
    both at most one, whatever k is.

    Args:
        k, g: ``[B, T, D]``.
        before: ``m_0``, ``[B, 1, D]`` (``[N, 1, D]`` for N packed sequences).

    Returns:
        m ``[B, T, D]`` float64, rounded to float32 for a float32 ``before``: the state that it will be.
    """
    if cu_seqlens is not None:
        pieces = enumerate(pairwise(cu_seqlens.tolist()))
        found = [running_max(k[:, a:b], g[:, a:b], before[row : row + 1], None) for row, (a, b) in pieces]
        return torch.cat(found, dim=1)
    total = g.double().cumsum(1)
    highest = torch.cummax(k.double() - total, dim=1).values
    return (total + torch.maximum(highest, before.double())).to(before.dtype).double()


def plain_linear(layer: nn.Module) -> bool:
    """Whether a layer is what its weight says and nothing more, so that who reads ``layer.weight`` computes what calling it does.

    An adapter (LoRA) wraps the layer and shows the weight without itself; hooks may change anything.
    """
    return type(layer) is nn.Linear and not (layer._forward_hooks or layer._forward_pre_hooks)


def positions(before: Tensor | None, x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Positions ``[B, T]`` of the tokens of ``x [B, T, D]``, and how many tokens each row has read after them.

    ``before`` and the second result are states, int64 ``[B]`` (``[N]`` for N packed sequences).
    """
    offsets = torch.arange(x.shape[1], device=x.device)
    if cu_seqlens is None:
        before = offsets.new_zeros(x.shape[0]) if before is None else before
        return before[:, None] + offsets, before + x.shape[1]
    bounds = cu_seqlens.to(x.device, torch.int64)
    lengths = bounds.diff()  # [N]
    before = torch.zeros_like(lengths) if before is None else before
    return (offsets + (before - bounds[:-1]).repeat_interleave(lengths))[None], before + lengths


def init_log_uniform_dt(size: int, low: float = 1e-3, high: float = 0.1) -> Tensor:
    """A bias so that ``softplus(bias)`` is log-uniform in [low, high] (Mamba's step sizes)."""
    dt = torch.exp(torch.empty(size).uniform_(math.log(low), math.log(high))).clamp(min=1e-4)
    return dt + torch.log(-torch.expm1(-dt))
