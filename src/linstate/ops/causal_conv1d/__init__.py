"""A short causal convolution along time, channel by channel: ``y_t = act(sum_w weight_w x_{t-W+1+w} + bias)``."""

from __future__ import annotations

from torch import Tensor

from linstate.errors import ArgumentError
from linstate.ops import dispatch
from linstate.ops.causal_conv1d import definition, torch_chunked
from linstate.ops.checks import Shapes

__all__ = ["causal_conv1d", "definition", "torch_chunked"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution, from a state (the last W - 1 inputs) to a state.

    Args:
        x: ``[B, T, D]``.
        weight: ``[D, W]``; ``weight[:, -1]`` meets the newest token. bias: ``[D]``.
        activation: None or ``"silu"``.
        initial_state: ``[B, W - 1, D]``, oldest first, default zeros.
        cu_seqlens, form, backend: as in :func:`linstate.ops.linear_attention`.

    Returns:
        y ``[B, T, D]`` in x's dtype and the state ``[B, W - 1, D]``, float32 (float64 for float64 inputs).

    Raises:
        ArgumentError: a shape, dtype, device or activation does not fit.
    """
    shapes = Shapes("causal_conv1d")
    shapes.bind("x", x, "B T D")
    shapes.bind("weight", weight, "D W")
    if shapes["W"] < 1:
        raise ArgumentError("causal_conv1d: weight must have at least one tap, got [D, 0]")
    if bias is not None:
        shapes.bind("bias", bias, "D")
    if activation not in (None, "silu"):
        raise ArgumentError(f"causal_conv1d: activation must be None or 'silu', got {activation!r}")
    if initial_state is not None:
        shapes.bind_state(initial_state, f"{'B' if cu_seqlens is None else 'S'} {shapes['W'] - 1} D", x)
    return dispatch.run(
        "causal_conv1d",
        form,
        backend,
        sequences={"x": x},
        fixed={"weight": weight, "bias": bias, "activation": activation},
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )
