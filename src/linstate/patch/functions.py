"""Stand-ins for the recurrence functions of Hugging Face's modeling files, on the kernels of :mod:`linstate.ops`.

Each has the names and the order of the arguments of the function that it stands in for, and its contract: layouts,
what is updated in place, what is returned. What theirs refuses for want of a package (``cu_seqlens``, ``seq_idx``) is
honoured here. The letters are theirs at the border and ours behind it: their P is our V, their state ``[B, H, P, N]``
the transpose of ours.

Source: transformers 5.23, ``models/*/modeling_*.py``; the bodies of one kind are the same in every family there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linstate.errors import ArgumentError
from linstate.mixers.rwkv4 import wkv
from linstate.ops import causal_conv1d, delta_rule, linear_attention, selective_scan
from linstate.ops.features import l2_norm
from linstate.types import state_dtype

DtLimit = tuple[float, float]
EMPTY = -1e4
"""A log decay that lets nothing through, or the logarithm of a weight of nothing: its exponential is zero."""


@dataclass
class Carried:
    """What a mixer knows and does not hand to its functions; :mod:`linstate.patch.methods` fills it in.

    Attributes:
        states: the state to begin from, one for each scan that the mixer will call.
        dt_limit: bounds of the step size. bounds: ``cu_seqlens`` of a packed call.
        mask: bool ``[B, T]``, False where a row is padded.
    """

    states: Iterator[Tensor] = field(default_factory=lambda: iter(()))
    dt_limit: DtLimit | None = None
    bounds: Tensor | None = None
    mask: Tensor | None = None


_carried: ContextVar[Carried | None] = ContextVar("carried", default=None)


@contextmanager
def carry(what: Carried) -> Iterator[None]:
    """Hand ``what`` to the stand-ins that are called inside, in this thread."""
    token = _carried.set(what)
    try:
        yield
    finally:
        _carried.reset(token)


def carried() -> Carried:
    return _carried.get() or Carried()


def boundaries(seq_idx: Tensor | None, cu_seqlens: Tensor | None, rows: int) -> Tensor | None:
    """``cu_seqlens [N + 1]`` of a packed call, or None. Raises ArgumentError if the batch has more than one row.

    Args:
        seq_idx: ``[1, T]``, the number of the sequence that each token belongs to.
    """
    if seq_idx is None and cu_seqlens is None:
        return None
    if rows != 1:
        raise ArgumentError(
            f"packed sequences lie along T in a batch of one row, got {rows} rows; flatten the batch, or pad it"
        )
    if cu_seqlens is not None:
        return cu_seqlens
    assert seq_idx is not None
    inner = seq_idx[0].diff().nonzero().flatten() + 1
    return torch.cat([inner.new_zeros(1), inner, inner.new_tensor([seq_idx.shape[1]])])


def padding(attention_mask: Any, given: Tensor | None) -> Tensor | None:
    """bool ``[B, T]`` of the tokens of this call, or None where none is padding."""
    if given is None or not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    mask = attention_mask[:, -given.shape[1] :].bool()
    return None if bool(mask.all()) else mask


def _unpacked(initial: Tensor | None, bounds: Tensor | None) -> None:
    if initial is not None and bounds is not None:
        raise ArgumentError(
            "a packed call cannot go on from a cache: whose state it is cannot be told; use padding"
        )


# ------------------------------------------------------------------------------------------------ the delta rule


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``torch_chunk_gated_delta_rule`` (g per head) and ``chunk_kimi_delta_attention`` (g per channel).

    ``query, key [B, T, Hk, K]``, ``value [B, T, Hv, V]``, ``g [B, T, Hv]`` or ``[B, T, Hv, K]``, ``beta [B, T, Hv]``,
    state ``[B, Hv, K, V]``. The chunks have our size, whatever ``chunk_size`` says.
    """
    if use_qk_l2norm_in_kernel:
        query, key = l2_norm(query), l2_norm(key)
    if initial_state is not None:
        initial_state = initial_state.to(state_dtype(query, key, value))
    if cu_seqlens is None:
        cu_seqlens = boundaries(kwargs.get("seq_idx"), kwargs.get("cu_seq_lens_q"), query.shape[0])
    o, state = delta_rule(query, key, value, beta, g, initial_state=initial_state, cu_seqlens=cu_seqlens)
    return o.to(query.dtype), state if output_final_state else None


def gated_delta_rule_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``torch_recurrent_gated_delta_rule`` and ``recurrent_kimi_delta_attention``: as above, without ``chunk_size``."""
    return gated_delta_rule(
        query,
        key,
        value,
        g,
        beta,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        **kwargs,
    )


# --------------------------------------------------------------------------------------------------------- Mamba


def mamba_selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba's scan. ``hidden_states, dt, z [B, D, T]``, ``A [D, N]``, ``B, C [B, N, T]``, state ``[B, D, N]``.

    Theirs begins from zeros; this one from the state that the mixer carries, if it has one.
    """
    x = hidden_states.transpose(1, 2)  # [B, T, D]
    step = _step_size(dt.transpose(1, 2), delta_bias, delta_softplus, None)
    state = next(carried().states, None)
    bounds = carried().bounds
    _unpacked(state, bounds)
    o, after = selective_scan(
        C.transpose(1, 2)[:, :, None],  # [B, T, 1, N]
        B.transpose(1, 2)[:, :, None],
        (step * x)[:, :, None],  # [B, T, 1, D]
        step[:, :, None],
        A.t()[None].to(step.dtype),  # [1, N, D]
        initial_state=None if state is None else state.transpose(1, 2)[:, None].to(step.dtype),
        cu_seqlens=bounds,
    )
    out = o[:, :, 0]
    if D is not None:
        out = out + x * D
    out = out.transpose(1, 2)  # [B, D, T]
    if z is not None:
        out = out * F.silu(z)
    return (out, after[:, 0].transpose(1, 2)) if return_last_state else out


def mamba_selective_state_update(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """One token of Mamba; ``state [B, D, N]`` is updated in place. ``hidden_states, dt, z [B, D]``, ``B, C [B, N]``."""
    step = _step_size(dt, dt_bias, dt_softplus, None)  # [B, D]
    after = state.float() * torch.exp(step[..., None] * A.float())
    after = torch.addcmul(after, (step * hidden_states)[..., None], B.float()[:, None])  # [B, D, N]
    state.copy_(after)
    out = (after @ C.float()[..., None]).squeeze(-1)  # [B, D]
    if D is not None:
        out = out + hidden_states * D
    if z is not None:
        out = out * F.silu(z)
    return out.to(hidden_states.dtype)


# ------------------------------------------------------------------------------------------------------- Mamba-2


def mamba2_chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: DtLimit = (0.0, float("inf")),
    return_final_states: bool = False,
    seq_idx: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2's chunked scan. ``hidden_states [B, T, H, P]``, ``dt [B, T, H]``, ``A [H]``, ``B, C [B, T, G, N]``, state ``[B, H, P, N]``."""
    step = _step_size(dt, dt_bias, dt_softplus, dt_limit)  # [B, T, H]
    bounds = boundaries(seq_idx, kwargs.get("cu_seq_lens_q"), hidden_states.shape[0])
    _unpacked(initial_states, bounds)
    v = hidden_states * step[..., None].to(hidden_states.dtype)
    initial = None if initial_states is None else initial_states.transpose(2, 3).to(state_dtype(v))
    o, after = linear_attention(
        C, B, v, step * A.to(step.dtype), scale=1.0, initial_state=initial, cu_seqlens=bounds
    )
    if D is not None:
        o = o + hidden_states * D[..., None].to(o.dtype)
    return (o, after[-hidden_states.shape[0] :].transpose(2, 3)) if return_final_states else o


def mamba2_selective_state_update(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """One token of Mamba-2; ``state [B, H, P, N]`` is updated in place.

    ``hidden_states, dt [B, H, P]``, ``A [H, P, N]``, ``B, C [B, G, N]``, ``D, dt_bias [H, P]``: what belongs to a head
    comes expanded, and is narrowed again where it is. The step size is bounded as in the chunked scan, theirs is not.
    """
    batch, heads, size = hidden_states.shape
    narrow = dt.stride(-1) == 0 and A.stride(-1) == 0 and A.stride(-2) == 0
    if narrow:
        dt, A = dt[..., :1], A[..., :1, :1]
        dt_bias = None if dt_bias is None else dt_bias[..., :1]
    step = _step_size(dt, dt_bias, dt_softplus, carried().dt_limit)  # [B, H, 1 or P]
    k, q = (
        t.float().repeat_interleave(heads // t.shape[1], dim=1).flatten(0, 1) for t in (B, C)
    )  # [B H, N] each
    wide = state if state.dtype == torch.float32 and state.is_contiguous() else state.float().contiguous()
    decay = torch.exp(step[..., None] * A.float())
    wide = wide * decay if torch.is_grad_enabled() else wide.mul_(decay)  # autograd keeps what it multiplied
    flat = wide.view(batch * heads, size, -1)  # [B H, P, N]
    flat.baddbmm_((step * hidden_states).view(-1, size, 1), k[:, None])
    if wide is not state:
        state.copy_(wide)
    out = torch.bmm(flat, q[..., None]).view(batch, heads, size)
    if D is not None:
        out = out + hidden_states * D
    if z is not None:
        out = out * F.silu(z)
    return out.to(hidden_states.dtype)


def _step_size(dt: Tensor, bias: Tensor | None, softplus: bool, limit: DtLimit | None) -> Tensor:
    """The step size from its projection, in the dtype of states; ``bias`` along the last axis or axes."""
    step = dt.to(state_dtype(dt))
    if bias is not None:
        step = step + bias.to(step.dtype)
    if softplus:
        step = F.softplus(step)
    return step if limit is None else step.clamp(*limit)


def fused(*args: Any, **kwargs: Any) -> None:
    """``mamba_inner_fn``, ``mamba2_split_conv1d_scan_combined``: None lets the mixer go on with the functions above."""


# ------------------------------------------------------------------------------------------- the short convolution


def causal_conv1d_fn(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The convolution over a sequence: ``hidden_states [B, D, T]``, ``weight [D, W]``."""
    bounds = boundaries(seq_idx, kwargs.get("cu_seq_lens_q"), hidden_states.shape[0])
    ours = "silu" if activation in ("silu", "swish") else None
    y, _ = causal_conv1d(hidden_states.transpose(1, 2), weight, bias, activation=ours, cu_seqlens=bounds)
    y = y.transpose(1, 2)  # [B, D, T]
    return y if activation is None or ours else _activated(y, activation)


def causal_conv1d_update(
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """The next tokens, ``[B, D, T]`` (nearly always T = 1); ``conv_state [B, D, W]``, the last inputs, is moved on in place."""
    tokens, width = hidden_states.shape[-1], weight.shape[-1]
    window = torch.cat([conv_state, hidden_states.to(conv_state.dtype)], dim=-1)  # [B, D, W + T]
    conv_state.copy_(window[..., tokens:])
    if tokens == 1:
        y = (window[..., -width:].to(weight.dtype) * weight).sum(-1, keepdim=True)
        y = y if bias is None else y + bias[:, None]
    else:
        y = F.conv1d(window.to(weight.dtype), weight[:, None], bias, groups=len(weight))[..., -tokens:]
    return _activated(y, activation).to(hidden_states.dtype)


def _activated(y: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return y
    from transformers.activations import ACT2FN

    return ACT2FN[activation](y)


# -------------------------------------------------------------------------------------------------------- RWKV-4


def rwkv_linear_attention(
    time_decay: Tensor,
    time_first: Tensor,
    key: Tensor,
    value: Tensor,
    state: tuple[Tensor, ...] | list[Tensor] | None = None,
    return_state: bool = False,
) -> tuple[Tensor, list[Tensor] | None]:
    """RWKV-4's average. ``key, value [B, T, D]``; state: numerator, denominator and maximum ``[B, D]`` each, not touched.

    Rows whose begin is padding (:attr:`Carried.mask`) are packed, so padding is not read at all.
    """
    batch, count, size = key.shape
    mask, bounds = carried().mask, None
    if count == 1 and mask is None and state is not None:
        return _wkv_step(time_decay, time_first, key[:, 0], value[:, 0], *state)
    if mask is not None:
        lengths = mask.sum(1)
        bounds = F.pad(lengths.cumsum(0), (1, 0))
        key, value = key[mask][None], value[mask][None]
    if state is None:
        sums, highest = key.new_zeros(batch, 2, 1, size, dtype=torch.float32), None
    else:
        sums, highest = torch.stack([state[0], state[1]], dim=1)[:, :, None].float(), state[2][:, None]
    o, sums, highest = wkv(key, value, time_decay, time_first, sums, highest, bounds)
    if mask is not None:
        o = o.new_zeros(*mask.shape, size).masked_scatter(mask[..., None], o)
    after = [sums[:, 0, 0], sums[:, 1, 0], highest[:, 0]] if return_state or state is not None else None
    return o, after


def _wkv_step(
    decay: Tensor, bonus: Tensor, k: Tensor, v: Tensor, num: Tensor, den: Tensor, highest: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """One token ``[B, D]`` of :func:`linstate.mixers.rwkv4.wkv`, in so few passes that nothing is to be gained from a kernel."""
    k = k.float()
    top = torch.maximum(highest, k + bonus)
    old, new = torch.exp(highest - top), torch.exp(k + bonus - top)
    o = (old * num + new * v) / (old * den + new)
    faded = highest - torch.exp(decay)
    after = torch.maximum(faded, k)
    old, new = torch.exp(faded - after), torch.exp(k - after)
    return o.to(v.dtype)[:, None], [old * num + new * v, old * den + new, after]


@dataclass(frozen=True)
class StandIn:
    """A function of ours, and what it mends beside the speed."""

    run: Callable[..., Any]
    mends: str


_FAST = "the chunked form in plain torch (FLA's kernels fail without a GPU)"
_CONVOLUTION = StandIn(causal_conv1d_fn, "a slow grouped conv1d; packed sequences")

FUNCTIONS: dict[str, StandIn] = {
    "torch_chunk_gated_delta_rule": StandIn(gated_delta_rule, _FAST),
    "torch_recurrent_gated_delta_rule": StandIn(
        gated_delta_rule_step, "a step in a dozen passes over the state"
    ),
    "chunk_kimi_delta_attention": StandIn(gated_delta_rule, f"{_FAST}; T x 64 x D x H numbers in memory"),
    "recurrent_kimi_delta_attention": StandIn(
        gated_delta_rule_step, "a step in a dozen passes over the state"
    ),
    "mamba_selective_scan": StandIn(mamba_selective_scan, "a loop over tokens; it began from zeros"),
    "mamba_selective_state_update": StandIn(
        mamba_selective_state_update, "a step in more passes over the state"
    ),
    "mamba_inner_fn": StandIn(fused, "kernels of mamba-ssm, which fail without a GPU"),
    "mamba2_chunk_scan": StandIn(mamba2_chunk_scan, "the chunked form in plain torch; packed sequences"),
    "mamba2_selective_state_update": StandIn(
        mamba2_selective_state_update,
        "a step in a dozen passes over the state; the step size was not bounded",
    ),
    "mamba2_split_conv1d_scan_combined": StandIn(fused, "kernels of mamba-ssm, which fail without a GPU"),
    "causal_conv1d_fn": _CONVOLUTION,
    "causal_conv1d_update": StandIn(causal_conv1d_update, "a grouped conv1d for one token"),
    "rwkv_linear_attention_cpu": StandIn(rwkv_linear_attention, "a loop over tokens"),
}
"""Name in a modeling file -> what stands in for it."""
