"""Packed sequences as the libraries around transformers say them: where each begins, as our ``cu_seqlens``.

Collators put several texts into one row and say where they begin in one of three ways, or in all: ``position_ids`` that begin
again, ``cu_seq_lens_q`` (boundaries), ``seq_idx`` (a number for each text). All are read, held against each other, and
made one thing; a model that ignores them lets each text see the ones before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linstate.errors import ArgumentError


def packed_boundaries(
    shape: tuple[int, int],
    *,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor | None:
    """Boundaries ``[N + 1]`` int64 of the N sequences in B rows of T tokens laid end to end, or None: each row is one sequence.

    Args:
        shape: B and T. mask: ``[B, T]``, whose zeros are padding: positions there mean nothing.

    Raises:
        ArgumentError: they contradict each other, positions jump, or packed rows have padding.
    """
    found: dict[str, Tensor] = {}
    if position_ids is not None:
        found["position_ids"] = _of_positions(shape, position_ids, mask)
    if seq_idx is not None:
        _check_shape("seq_idx", seq_idx, shape)
        changes = torch.ones(shape, dtype=torch.bool, device=seq_idx.device)
        changes[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        found["seq_idx"] = _bounds(changes)
    for name, given in (("cu_seq_lens_q", cu_seq_lens_q), ("cu_seq_lens_k", cu_seq_lens_k)):
        if given is not None:
            found[name] = given.reshape(-1).to(torch.int64)
    if not found:
        return None
    first, bounds = next(iter(found.items()))
    for name, other in found.items():
        if not torch.equal(other.cpu(), bounds.cpu()):
            raise ArgumentError(
                f"{first} and {name} say that packed sequences begin at different places: "
                f"{bounds.tolist()[:8]} and {other.tolist()[:8]}"
            )
    if len(bounds) - 1 == shape[0]:
        rows = torch.arange(shape[0] + 1, device=bounds.device) * shape[1]
        if torch.equal(bounds, rows):
            return None
    if mask is not None and not bool(mask.all()):
        raise ArgumentError("rows that hold several sequences may have no padding: leave attention_mask away")
    return bounds


def _check_shape(name: str, given: Tensor, shape: tuple[int, int]) -> None:
    if tuple(given.shape) != shape:
        raise ArgumentError(f"{name} must be {list(shape)}, as input_ids is, got {list(given.shape)}")


def _of_positions(shape: tuple[int, int], given: Tensor, mask: Tensor | None) -> Tensor:
    """Boundaries where positions begin again."""
    if given.dim() == 1:
        given = given[None]
    if given.shape[0] == 1 < shape[0]:
        given = given.expand(shape)
    _check_shape("position_ids", given, shape)
    begins = torch.zeros(shape, dtype=torch.bool, device=given.device)
    begins[:, 0] = True
    counts = torch.ones(shape, dtype=torch.bool, device=given.device) if mask is None else mask.bool()
    both = counts[:, 1:] & counts[:, :-1]  # padding has whatever positions
    goes_on = given[:, 1:] == given[:, :-1] + 1
    again = given[:, 1:] == 0
    if bool((both & ~goes_on & ~again).any()):
        raise ArgumentError(
            "position_ids must count up by one, or begin again at 0 where another sequence begins: a recurrent model reads tokens "
            "in the order in which they come"
        )
    begins[:, 1:] = both & ~goes_on
    return _bounds(begins)


def _bounds(begins: Tensor) -> Tensor:
    flat = begins.flatten()
    end = torch.tensor([flat.numel()], device=flat.device)
    return torch.cat([flat.nonzero()[:, 0], end])
