"""The definition of the time-invariant state space: a plain loop over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from linstate.ops.dispatch import register
from linstate.types import state_dtype


def as_complex(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``[..., 2]`` pairs of reals -> ``[...]`` complex, with parts of ``dtype``."""
    return torch.view_as_complex(x.to(dtype).contiguous())


def begin(u: Tensor, A: Tensor, initial_state: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The state to begin from, ``[B, D, N]`` complex."""
    if initial_state is None:
        initial_state = u.new_zeros((u.shape[0], *A.shape), dtype=dtype)
    return as_complex(initial_state, dtype)


@register("state_space", "step", "torch")
@register("state_space", "recurrent", "torch")
def recurrent(
    u: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``S = A * S + a Re(b . S) + B u``, ``y = Re(C . S)``."""
    dtype = state_dtype(u)
    state = begin(u, A, initial_state, dtype)
    A, B, C = (as_complex(x, dtype) for x in (A, B, C))  # [D, N] each
    low_rank = None if a is None or b is None else (as_complex(a, dtype), as_complex(b, dtype))
    outputs = []
    for t in range(u.shape[1]):
        moved = A * state  # [B, D, N]
        if low_rank is not None:
            into, out_of = low_rank
            moved = moved + into * (out_of * state).sum(-1, keepdim=True).real
        state = moved + B * u[:, t, :, None].to(dtype)
        outputs.append((C * state).sum(-1).real)  # [B, D]
    y = torch.stack(outputs, dim=1) if outputs else u
    return y.to(u.dtype), torch.view_as_real(state).clone()
