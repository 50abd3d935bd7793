"""RWKV: the shift before the projections, and RWKV-7's time mix between them; natively (many tokens: ``ops/native/block.py``) or on a GPU (``ops/triton/rwkv.py``).

The torch paths of ``mixers/rwkv7.py`` and of its channel mix are the definitions; ``csrc/rwkv.hpp`` has the same equations,
in float32 between reading and writing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from linstate.errors import ArgumentError
from linstate.ops import dispatch, native
from linstate.ops.checks import check_cu_seqlens
from linstate.ops.native import block, lib
from linstate.ops.native.program import note_state
from linstate.ops.native.tensors import rows
from linstate.ops.tensors import state_of
from linstate.ops.triton import runtime
from linstate.ops.triton.runtime import LARGEST


def on_gpu(t: Tensor) -> bool:
    """Whether Triton's programs serve a tensor: elsewhere than on the CPU, or there in tests of them."""
    return not t.is_cpu or (runtime.interpreter_serves and runtime.interpreted())


def serves(mixer: nn.Module, projected: Tensor, matrix: Tensor | None, cu_seqlens: Tensor | None) -> bool:
    """Whether these calls take a time mix: no gradient, and the backend table gives ``dplr`` to ``native`` or ``triton``."""
    one = cu_seqlens is None and projected.shape[1] == 1
    device = on_gpu(projected)
    many = of_many(mixer.head_dim, projected, cu_seqlens)  # type: ignore[arg-type]
    if (native.reason and not device) or not (one or (many and projected.shape[1] > 0)):
        return False
    if type(projected) is not Tensor or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and (
        projected.requires_grad
        or (matrix is not None and matrix.requires_grad)
        or any(p.requires_grad for p in mixer.parameters())
    ):
        return False
    some = projected[..., :1]  # of sizes it has been asked
    call: dispatch.Call = {
        "tokens": projected.shape[1],
        "k": some,
        "v": some,
        "initial_state": matrix,
        "asked": "auto",
    }
    form = "step" if one else "chunked"
    if not device:
        return dispatch.choose("dplr", form, "auto", call).backend == "native"
    if runtime.unfit(
        {"asked": "auto", "mixed": projected, **{f"tensor {i}": p for i, p in enumerate(mixer.parameters())}}
    ):
        return False
    return dispatch.choose("dplr", form, "auto", call).backend == "triton"


def of_many(head_dim: int, x: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether many tokens of RWKV-7 can be taken at once; packed ones only on a GPU."""
    return head_dim <= LARGEST and (cu_seqlens is None or on_gpu(x))


def shift(
    x: Tensor, before: Tensor | None, mix: Tensor, *, cu_seqlens: Tensor | None = None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """``lerp(x_t, x_{t-1}, mix_m)`` for M rates, ``[B, T, D]`` each, and the last x as the state ``[B, 1, D]``, without gradients.

    Args:
        x: ``[B, T, D]``, float32 or bfloat16. before: the token before, ``[B, 1, D]``, or None: zeros. mix: ``[M, D]``.
        cu_seqlens: of packed sequences, on a GPU.
    """
    if on_gpu(x):
        from linstate.ops.triton import rwkv

        return rwkv.shift(x, before, mix, _bounds(x, cu_seqlens))
    if x.shape[1] != 1:
        return block.shift(x, before, mix)
    count, _, size = x.shape
    before = state_of("shift", before, (count, 1, size))
    y = torch.empty((mix.shape[0], count, 1, size), dtype=x.dtype)
    after = torch.empty((count, 1, size), dtype=torch.float32)
    call = (rows(x), rows(mix), y)
    lib.shift(*call, (before,), (after,), torch.get_num_threads())
    note_state("shift", call, (before, after))
    return y.unbind(0), after


def _bounds(x: Tensor, cu_seqlens: Tensor | None) -> list[int] | None:
    return None if cu_seqlens is None else check_cu_seqlens("dplr", cu_seqlens, x.shape[0], x.shape[1])


def time_mix(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    rate: Tensor,
    value: tuple[Tensor, Tensor] | None,
    gate: Tensor,
    k_k: Tensor,
    k_a: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    matrix: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The output ``[B, T, H K]`` before the last projection and the state ``[B, H, K, K]``, without gradients.

    Args:
        r, k, v, gate: ``[B, T, H K]`` as projected. decay, rate: w and a before their sigmoids.
        value: what mixes v with the first layer's, before its sigmoid, and that; None in the first layer.
        k_k, k_a: ``[H K]``. r_k: ``[H, K]``. weight, bias: of the norm of heads, with ``eps``. matrix: the state before.
        cu_seqlens: of packed sequences, on a GPU.
    """
    if on_gpu(r):
        from linstate.ops.triton import rwkv

        rate_of_value, first = value or (None, None)
        operands = rwkv.Operands(
            r, k, v, decay, rate, rate_of_value, first, gate, k_k, k_a, r_k, weight, bias
        )
        return rwkv.time_mix(operands, eps, matrix, _bounds(r, cu_seqlens))
    count, (heads, size) = r.shape[0], r_k.shape
    rate_of_value, first = value or (None, None)
    given = (r, k, v, decay, rate, rate_of_value, first, gate, k_k, k_a, r_k, weight, bias)
    if first is not None and first.shape != v.shape:
        raise ArgumentError(
            f"the first layer's values must have the shape {list(v.shape)} of this layer's, got {list(first.shape)}"
        )
    if r.shape[1] != 1:
        return block.time_mix(given, heads, eps, matrix)
    matrix = state_of("matrix", matrix, (count, heads, size, size))
    y = torch.empty(r.shape, dtype=r.dtype)
    after = torch.empty((count, heads, size, size), dtype=torch.float32)
    call: Any = (heads, eps, *[rows(t) for t in given], y)
    arguments: Any = (*call, (matrix,), (after,), torch.get_num_threads())
    lib.rwkv7(*arguments)
    note_state("rwkv7", call, (matrix, after))
    return y, after
