"""Diagonal plus low rank: ``S_t = (diag(exp g_t) + a_t b_t^T) S_{t-1} + k_t v_t^T``, ``o_t = S_t^T q_t``."""

from __future__ import annotations

from torch import Tensor

from linstate.ops import dispatch
from linstate.ops.checks import Shapes
from linstate.ops.dplr import definition, torch_chunked
from linstate.ops.gates import bind_gate

__all__ = ["definition", "dplr", "torch_chunked"]


def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    snapshots: int | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The diagonal-plus-rank-one recurrence over a sequence, from a state to a state.

    ``S_t = (diag(exp g_t) + a_t b_t^T) S_{t-1} + k_t v_t^T`` and ``o_t = scale S_t^T q_t``. RWKV-7 sets
    ``a = -kappa * eta``, ``b = kappa``; the delta rule is ``a = -beta k``, ``b = exp(g) k``, ``k = beta k``.

    Args:
        q, k, a, b: ``[B, T, Hk, K]``.
        v: ``[B, T, Hv, V]``, Hv a multiple of Hk.
        g: log decay <= 0: None, ``[Hv]``, ``[B, T, Hv]`` or ``[B, T, Hv or Hk, K]``.
        scale: factor on q, default ``K ** -0.5``.
        initial_state, cu_seqlens, snapshots, form, backend: as in :func:`linstate.ops.linear_attention`.

    Returns:
        o ``[B, T, Hv, V]`` in v's dtype and the final state ``[B, Hv, K, V]`` (with snapshots ``[B, N, Hv, K, V]``).

    Raises:
        ArgumentError: a shape, dtype or device does not fit. BackendError: no backend takes the call.

    Source: RWKV-7, Peng 2025 (arXiv 2503.14456).
    """
    shapes = Shapes("dplr")
    for name, tensor in (("q", q), ("k", k), ("a", a), ("b", b)):
        shapes.bind(name, tensor, "B T Hk K")
    shapes.bind("v", v, "B T Hv V")
    shapes.groups()
    g = bind_gate(shapes, g)
    if initial_state is not None:
        shapes.bind_state(initial_state, "B Hv K V" if cu_seqlens is None else "S Hv K V", q, k, v)
    return dispatch.run(
        "dplr",
        form,
        backend,
        sequences={"q": q, "k": k, "v": v, "a": a, "b": b, "g": g},
        fixed={"scale": shapes["K"] ** -0.5 if scale is None else scale},
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        snapshots=snapshots,
    )


dplr.transition = "dense"  # type: ignore[attr-defined]
