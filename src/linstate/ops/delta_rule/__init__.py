"""The delta rule: ``S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T``, ``o_t = S_t^T q_t``."""

from __future__ import annotations

from torch import Tensor

from linstate.ops import dispatch
from linstate.ops.checks import Shapes
from linstate.ops.delta_rule import definition, torch_chunked
from linstate.ops.gates import bind_gate

__all__ = ["definition", "delta_rule", "torch_chunked"]


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    snapshots: int | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The (gated) delta rule over a sequence, from a state to a state.

    ``S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T`` and ``o_t = scale S_t^T q_t``:
    what the decayed state answers to k_t is replaced by v_t, by the share beta_t.

    Args:
        q, k: ``[B, T, Hk, K]``; k of norm <= 1 for a stable recurrence (see ``features.l2_norm``).
        v: ``[B, T, Hv, V]``, Hv a multiple of Hk.
        beta: ``[B, T, Hv]`` in [0, 1], or [0, 2] for negative eigenvalues.
        g: log decay <= 0: None, ``[Hv]``, ``[B, T, Hv]`` or ``[B, T, Hv or Hk, K]``.
        scale: factor on q, default ``K ** -0.5``.
        initial_state, cu_seqlens, snapshots, form, backend: as in :func:`linstate.ops.linear_attention`.

    Returns:
        o ``[B, T, Hv, V]`` in v's dtype and the final state ``[B, Hv, K, V]`` (with snapshots ``[B, N, Hv, K, V]``).

    Raises:
        ArgumentError: a shape, dtype or device does not fit. BackendError: no backend takes the call.

    Source: Schlag 2021 (arXiv 2102.11174), Yang 2024 (2406.06484); scalar gate Yang 2024 (2412.06464);
    gate per channel: Kimi Linear (2510.26692).

    >>> import torch
    >>> one = torch.ones(1, 1, 1, 1)
    >>> o, state = delta_rule(one, one, 3 * one, torch.ones(1, 1, 1), initial_state=7 * one)
    >>> state.item()  # the old value 7 is replaced, not added to
    3.0
    """
    shapes = Shapes("delta_rule")
    shapes.bind("q", q, "B T Hk K")
    shapes.bind("k", k, "B T Hk K")
    shapes.bind("v", v, "B T Hv V")
    shapes.groups()
    shapes.bind("beta", beta, "B T Hv")
    g = bind_gate(shapes, g)
    if initial_state is not None:
        shapes.bind_state(initial_state, "B Hv K V" if cu_seqlens is None else "S Hv K V", q, k, v)
    return dispatch.run(
        "delta_rule",
        form,
        backend,
        sequences={"q": q, "k": k, "v": v, "beta": beta, "g": g},
        fixed={"scale": shapes["K"] ** -0.5 if scale is None else scale},
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        snapshots=snapshots,
    )


delta_rule.transition = "dense"  # type: ignore[attr-defined]
