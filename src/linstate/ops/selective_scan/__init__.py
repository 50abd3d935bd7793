"""Scans with an elementwise decay: ``S_t = exp(g_t A) * S_{t-1} + k_t v_t^T``, ``o_t = S_t^T q_t``."""

from __future__ import annotations

from torch import Tensor

from linstate.errors import ArgumentError
from linstate.ops import dispatch
from linstate.ops.checks import Shapes
from linstate.ops.selective_scan import definition, torch_chunked

__all__ = ["definition", "selective_scan", "torch_chunked"]


def selective_scan(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    g: Tensor,
    A: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    snapshots: int | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A scan whose decay differs in every entry of the state.

    ``S_t[n, d] = exp(g_t[d] A[n, d]) S_{t-1}[n, d] + k_t[n] v_t[d]`` and ``o_t[d] = scale sum_n q_t[n] S_t[n, d]``.
    Mamba: q = C, k = B, v = dt x, g = dt, A. RG-LRU, HGRN, minGRU: q = k = A = None (K = 1), g the log gate.

    Args:
        q, k: ``[B, T, Hk, K]``, or both None for K = 1 and ones.
        v: ``[B, T, Hv, V]``, Hv a multiple of Hk.
        g: ``[B, T, Hv, V]``: step sizes >= 0 where A is given, else log decays <= 0.
        A: ``[Hv, K, V]`` <= 0.
        scale: factor on q, default 1 (there is no inner product over K to be kept in size).
        initial_state, cu_seqlens, snapshots, form, backend: as in :func:`linstate.ops.linear_attention`.

    Returns:
        o ``[B, T, Hv, V]`` in v's dtype and the final state ``[B, Hv, K, V]`` (with snapshots ``[B, N, Hv, K, V]``).

    Raises:
        ArgumentError: a shape, dtype or device does not fit. BackendError: no backend takes the call.

    Source: Gu & Dao 2023 (arXiv 2312.00752); RG-LRU: De 2024 (2402.19427).
    """
    shapes = Shapes("selective_scan")
    shapes.bind("v", v, "B T Hv V")
    shapes.bind("g", g, "B T Hv V")
    if (q is None) != (k is None):
        raise ArgumentError("selective_scan: give both q and k, or neither")
    if q is None or k is None:
        shapes.sizes.update(Hk=1, K=1)
    else:
        shapes.bind("q", q, "B T Hk K")
        shapes.bind("k", k, "B T Hk K")
    shapes.groups()
    if A is not None:
        shapes.bind("A", A, "Hv K V")
    if initial_state is not None:
        shapes.bind_state(initial_state, "B Hv K V" if cu_seqlens is None else "S Hv K V", q, k, v)
    return dispatch.run(
        "selective_scan",
        form,
        backend,
        sequences={"q": q, "k": k, "v": v, "g": g},
        fixed={"A": A, "scale": 1.0 if scale is None else scale},
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        snapshots=snapshots,
    )


selective_scan.transition = "elementwise"  # type: ignore[attr-defined]
