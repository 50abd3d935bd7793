"""Linear attention with optional decay: ``S_t = diag(exp g_t) S_{t-1} + k_t v_t^T``, ``o_t = S_t^T q_t``."""

from __future__ import annotations

from torch import Tensor

from linstate.ops import dispatch
from linstate.ops.checks import Shapes
from linstate.ops.gates import bind_gate
from linstate.ops.linear_attention import definition, torch_chunked

__all__ = ["definition", "linear_attention", "torch_chunked"]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    snapshots: int | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Linear attention over a sequence, from a state to a state.

    ``S_t = diag(exp g_t) S_{t-1} + k_t v_t^T`` and ``o_t = scale S_t^T q_t``. With ``bonus`` u the output is
    read before the update, ``o_t = scale (S_{t-1} + diag(u) k_t v_t^T)^T q_t`` (RWKV-5, RWKV-6).

    Args:
        q, k: ``[B, T, Hk, K]``.
        v: ``[B, T, Hv, V]``, Hv a multiple of Hk.
        g: log decay <= 0: None, ``[Hv]`` (fixed), ``[B, T, Hv]`` or ``[B, T, Hv or Hk, K]``.
        bonus: ``[Hv, K]``.
        scale: factor on q, default ``K ** -0.5``.
        initial_state: ``[B, Hv, K, V]`` float32 (float64 for float64 inputs), default zeros.
        cu_seqlens: ``[N + 1]`` boundaries of N sequences packed along T (then B = 1, states ``[N, ...]``).
        snapshots: tokens between states to return, a multiple of 64 (a chunk). The second result is then
            ``[B, N, Hv, K, V]``, N = ceil(T / snapshots): the states after ``snapshots``, ``2 * snapshots``, ...
            tokens, and last the final state (which also fills what a shorter packed sequence leaves free). The
            native kernels write them on their way; others are called for each piece.
        form: ``auto``, ``recurrent`` (the definition), ``chunked`` or ``step`` (T = 1).
        backend: ``auto``, ``torch``, ``native`` or ``triton``.

    Returns:
        o ``[B, T, Hv, V]`` in v's dtype and the final state ``[B, Hv, K, V]`` (with snapshots ``[B, N, Hv, K, V]``).

    Raises:
        ArgumentError: a shape, dtype or device does not fit. BackendError: no backend takes the call.

    Source: Katharopoulos 2020 (arXiv 2006.16236); with gates Yang 2023 (2312.06635), Dao & Gu 2024 (2405.21060).

    >>> import torch
    >>> q = k = v = torch.ones(1, 3, 1, 1)
    >>> o, state = linear_attention(q, k, v)
    >>> o.flatten().tolist(), state.item()
    ([1.0, 2.0, 3.0], 3.0)
    """
    shapes = Shapes("linear_attention")
    shapes.bind("q", q, "B T Hk K")
    shapes.bind("k", k, "B T Hk K")
    shapes.bind("v", v, "B T Hv V")
    shapes.groups()
    g = bind_gate(shapes, g)
    if bonus is not None:
        shapes.bind("bonus", bonus, "Hv K")
    if initial_state is not None:
        shapes.bind_state(initial_state, "B Hv K V" if cu_seqlens is None else "S Hv K V", q, k, v)
    return dispatch.run(
        "linear_attention",
        form,
        backend,
        sequences={"q": q, "k": k, "v": v, "g": g},
        fixed={"bonus": bonus, "scale": shapes["K"] ** -0.5 if scale is None else scale},
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        snapshots=snapshots,
    )


linear_attention.transition = "elementwise"  # type: ignore[attr-defined]
