"""State spaces that do not change with time: ``S_t = (diag(A) + a b^T) S_{t-1} + B u_t``, ``y_t = Re(C . S_t)``."""

from __future__ import annotations

from torch import Tensor

from linstate.errors import ArgumentError
from linstate.ops import dispatch
from linstate.ops.checks import Shapes
from linstate.ops.state_space import definition, torch_chunked

__all__ = ["definition", "state_space", "torch_chunked"]


def state_space(
    u: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A complex linear state for each channel, with the same transition for every token.

    ``S_t[n] = A[n] S_{t-1}[n] + a[n] Re(sum_m b[m] S_{t-1}[m]) + B[n] u_t`` and ``y_t = Re(sum_n C[n] S_t[n])``, in each
    channel. Complex numbers are pairs of reals, the last axis. A real system has its eigenvalues in conjugate pairs; of
    each pair one stands here, and the factor 2 for the other belongs into b and C.
    S4D: no a, b. S4: a, b make the low rank of its DPLR form, which the bilinear discretisation keeps.

    Args:
        u: ``[B, T, D]``.
        A: ``[D, N, 2]``, magnitudes at most 1.
        B, C: ``[D, N, 2]``.
        a, b: ``[D, N, 2]``, or both None.
        initial_state: ``[B, D, N, 2]``, default zeros.
        cu_seqlens, form, backend: as in :func:`linstate.ops.linear_attention`.

    Returns:
        y ``[B, T, D]`` in u's dtype and the final state ``[B, D, N, 2]``, float32 (float64 for float64 inputs).

    Raises:
        ArgumentError: a shape, dtype or device does not fit. BackendError: no backend takes the call.

    Source: Gu, Goel, Re 2021 (arXiv 2111.00396); diagonal: Gu 2022 (2206.11893).
    """
    shapes = Shapes("state_space")
    shapes.bind("u", u, "B T D")
    for name, tensor in (("A", A), ("B", B), ("C", C), ("a", a), ("b", b)):
        if tensor is not None:
            shapes.bind(name, tensor, "D N 2")
    if (a is None) != (b is None):
        raise ArgumentError("state_space: give both a and b, or neither")
    if initial_state is not None:
        shapes.bind_state(initial_state, "B D N 2" if cu_seqlens is None else "S D N 2", u)
    return dispatch.run(
        "state_space",
        form,
        backend,
        sequences={"u": u},
        fixed={"A": A, "B": B, "C": C, "a": a, "b": b},
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )
