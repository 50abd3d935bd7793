"""What a text does to whatever was read before it: the linear map ``P`` in ``S -> P S + H`` of every layer.

A recurrence is linear in its state, so ``P`` is the state after the text from an identity, less the state after it from nothing.
The inputs of a layer are those that the text gives when it is read from nothing: each layer's input is caught, and the layer
is run on it a second time, from the identity.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from linstate.engine.language_model import LanguageModel
from linstate.engine.reader import call
from linstate.errors import CompositionError
from linstate.mixers.base import Mixer
from linstate.state.composition import Transition, Transitions
from linstate.types import LayerState, under

NAME = "S"


def transitions(model: LanguageModel, ids: Iterable[int]) -> Transitions:
    """``layers.<i>.mixer.S -> P`` of a text; costs about two readings.

    Raises CompositionError: a layer keeps something else than one linear state.
    """
    decoder, grid, rest = model.decoder, model.grid, list(ids)
    mixers = {i: block.mixer for i, block in enumerate(decoder.blocks()) if block.mixer is not None}
    matrix = {i: _is_matrix(i, mixer) for i, mixer in mixers.items()}
    if decoder.shared_blocks is not None:
        raise CompositionError("the shared blocks keep keys and values, so texts have no transition")
    tensors = decoder.init_state(1)
    probes = {i: _identity(under(f"layers.{i}.mixer", tensors)[NAME], m) for i, m in matrix.items()}
    for at in range(0, len(rest), grid):
        with _inputs(mixers.values()) as caught:
            _, after = call(decoder, rest[at : at + grid], tensors, "none")
        for x, (i, mixer) in zip(caught, mixers.items(), strict=True):
            probes[i] = _run(mixer, x, under(f"layers.{i}.mixer", tensors), probes[i])
        tensors = after
    made: Transitions = {}
    for i, probe in probes.items():
        name = f"layers.{i}.mixer.{NAME}"
        found = probe - tensors[name]
        made[name] = Transition(matrix[i], _assembled(found) if matrix[i] else found)
    return made


def _run(mixer: Mixer, x: Tensor, before: LayerState, probe: Tensor) -> Tensor:
    """The state ``[R, ...]`` after the input ``x [1, T, D]`` from the probes ``[R, ...]``, short memories as they are."""
    rows = probe.shape[0]
    state = {
        name: probe if name == NAME else t.expand(rows, *t.shape[1:]).contiguous()
        for name, t in before.items()
    }
    with torch.no_grad():
        return mixer(x.expand(rows, -1, -1).contiguous(), state)[1][NAME]


def _is_matrix(layer: int, mixer: Mixer) -> bool:
    """Whether texts act on this layer's state as a matrix on each column (True) or on each number (False), by trial.

    Raises CompositionError: neither is so.
    """
    state = mixer.init_state(1, device=mixer.device)
    plain = type(mixer).add.__func__ is Mixer.add.__func__  # type: ignore[attr-defined]
    if NAME in state and mixer.summed == (NAME,) and mixer.composition != "refused" and plain:
        empty = state[NAME]
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 2, mixer.d_model, generator=generator).to(empty)
        start = torch.randn(empty.shape, generator=generator).to(empty)
        nothing = _run(mixer, x, state, empty)
        wanted = _run(mixer, x, state, start) - nothing
        for matrix in (True, False):
            found = _run(mixer, x, state, _identity(empty, matrix)) - nothing
            got = Transition(matrix, _assembled(found) if matrix else found).act(start)
            if bool((got - wanted).norm() < 1e-3 * wanted.norm()):
                return matrix
    raise CompositionError(
        f"layer {layer} ({type(mixer).__name__}) keeps more than one linear state, so its texts have no transition; "
        "compose by sum or average"
    )


@contextmanager
def _inputs(mixers: Iterable[Mixer]) -> Iterator[list[Tensor]]:
    """Inside, the inputs of each mixer are caught in the order of the calls."""
    caught: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        caught.append(arguments[0].detach())

    hooks = [mixer.register_forward_pre_hook(keep) for mixer in dict.fromkeys(mixers)]
    try:
        yield caught
    finally:
        for hook in hooks:
            hook.remove()


def _identity(empty: Tensor, matrix: bool) -> Tensor:
    """States to begin with: ones, or for ``[1, H, K, V]`` the columns of the identity, V in a row ``[R, H, K, V]``."""
    if not matrix:
        return torch.ones_like(empty)
    _, heads, keys, values = empty.shape
    rows = -(-keys // values)
    columns = torch.eye(keys, rows * values, dtype=empty.dtype, device=empty.device)  # [K, R V]
    made = columns.view(keys, rows, values).transpose(0, 1)  # [R, K, V]
    return made[:, None].expand(rows, heads, keys, values).contiguous()


def _assembled(found: Tensor) -> Tensor:
    """The inverse of :func:`_identity`: ``[R, H, K, V] -> [1, H, K, K]``."""
    rows, heads, keys, values = found.shape
    joined = found.permute(1, 2, 0, 3).reshape(heads, keys, rows * values)  # [H, K, R V]
    return joined[None, :, :, :keys].contiguous()
