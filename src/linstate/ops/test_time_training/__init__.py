"""Test-time training: the state is an inner model, and reading a token is a gradient step of its loss."""

from __future__ import annotations

import torch
from torch import Tensor

from linstate.errors import ArgumentError
from linstate.ops import dispatch
from linstate.ops.checks import Shapes, check_cu_seqlens
from linstate.ops.test_time_training import definition, torch_chunked
from linstate.types import LayerState, state_dtype

__all__ = ["definition", "test_time_training", "torch_chunked"]


def test_time_training(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    W1: Tensor,
    W2: Tensor | None = None,
    *,
    norm_weight: Tensor,
    norm_bias: Tensor,
    share: Tensor,
    eps: float = 1e-6,
    initial_state: LayerState | None = None,
    cu_seqlens: Tensor | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, LayerState]:
    """Read a sequence by training an inner model on it, from a state to a state.

    The inner model ``f(x; W) = x + layer_norm([x, 1] W1)``, or ``x + layer_norm([gelu([x, 1] W1), 1] W2)``, learns to give
    v for k. In each mini-batch of C tokens, with W the weights before it and c = 0 .. C-1 a token's place in it,

        G_t = G_{t-1} + lr_t grad_W |f(k_t; W) - v_t|^2 / 2      W_t = W - share_c G_t      o_t = f(q_t; W_t)

    and behind its last token W becomes W_t and G zero.

    Args:
        q, k, v: ``[B, T, H, K]``.
        lr: inner learning rates >= 0, ``[B, T, H]``.
        W1: the first weights ``[H, K + 1, F]``, their last row the bias; F is K without W2. W2: ``[H, F + 1, K]``.
        norm_weight, norm_bias: of the inner layer norm, ``[H, K]``. eps: in its root.
        share: the learning rate's factor by the place in a mini-batch, ``[C]``; C is the size of a mini-batch.
        initial_state: what has been learned: ``W1`` (and ``W2``), by how much the weights have moved from the first ones,
            ``[B, H, K + 1, F]``; ``G1`` (``G2``), the gradients of the unfinished mini-batch, and how many tokens it has,
            ``count [B]`` int64. Float32 (float64 for float64 inputs), default zeros.
        cu_seqlens, form, backend: as in :func:`linstate.ops.linear_attention`.

    Returns:
        o ``[B, T, H, K]`` in v's dtype and the state after.

    Raises:
        ArgumentError: a shape, dtype or device does not fit. BackendError: no backend takes the call.

    Source: Sun 2024 (arXiv 2407.04620), sections 2.1 to 2.7.

    >>> import torch
    >>> k = torch.tensor([[[[1.0, -1.0]]]])
    >>> o, state = test_time_training(k, k, 3 * k, torch.ones(1, 1, 1), torch.zeros(1, 3, 2), eps=1.0,
    ...     norm_weight=torch.ones(1, 2), norm_bias=torch.zeros(1, 2), share=torch.tensor([0.5, 0.5]))
    >>> state["count"].item(), state["G1"].abs().sum().item()  # one token of two: its gradient waits
    (1, 12.0)
    """
    op = "test_time_training"
    shapes = Shapes(op)
    shapes.bind("q", q, "B T H K")
    shapes.bind("k", k, "B T H K")
    shapes.bind("v", v, "B T H K")
    shapes.bind("lr", lr, "B T H")
    shapes.bind("norm_weight", norm_weight, "H K")
    shapes.bind("norm_bias", norm_bias, "H K")
    shapes.bind("share", share, "C")
    layers = [W1] if W2 is None else [W1, W2]
    shapes.bind("W1", W1, f"H {shapes['K'] + 1} {'F' if len(layers) == 2 else 'K'}")
    if W2 is not None:
        shapes.bind("W2", W2, "H F1 K")
        if shapes["F1"] != shapes["F"] + 1:
            raise ArgumentError(
                f"{op}: W2 must have a row for each column of W1 ({shapes['F']}) and one for the bias, got {shapes['F1']}"
            )
    if not shapes["C"]:
        raise ArgumentError(f"{op}: share must have at least one entry: a mini-batch has a token")
    bounds = None if cu_seqlens is None else check_cu_seqlens(op, cu_seqlens, *q.shape[:2])
    rows, dtype = q.shape[0] if bounds is None else len(bounds) - 1, state_dtype(q, k, v)
    if initial_state is None:
        initial_state = empty_state(layers, rows, dtype, v.device)
    else:
        _check_state(initial_state, layers, rows, shapes, dtype)
    fixed = {
        "layers": layers,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "share": share,
        "eps": eps,
    }
    sequences = {"q": q, "k": k, "v": v, "lr": lr}
    if bounds is None:
        kernel = dispatch.choose(op, form, backend, {**sequences, **fixed, "tokens": q.shape[1]})
        return kernel.run(**sequences, **fixed, initial_state=initial_state)
    kernel = dispatch.choose(
        op, form, backend, {**sequences, **fixed, "tokens": q.shape[1], "bounds": bounds}
    )
    outputs, states = [], []
    for row, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        part = {name: x[:, start:end] for name, x in sequences.items()}
        before = {name: x[row : row + 1] for name, x in initial_state.items()}
        o, after = kernel.run(**part, **fixed, initial_state=before)
        outputs.append(o)
        states.append(after)
    return torch.cat(outputs, 1), {name: torch.cat([s[name] for s in states]) for name in initial_state}


def empty_state(
    layers: list[Tensor], rows: int, dtype: torch.dtype, device: torch.device | str
) -> LayerState:
    """Nothing learned yet: zeros, for ``layers [H, K_l + 1, F_l]``."""
    zeros = [torch.zeros((rows, *w.shape), dtype=dtype, device=device) for w in layers]
    count = torch.zeros(rows, dtype=torch.int64, device=device)
    return definition.as_state(zeros, [torch.zeros_like(w) for w in zeros], count)


def _check_state(
    state: LayerState, layers: list[Tensor], rows: int, shapes: Shapes, dtype: torch.dtype
) -> None:
    op, want = shapes.op, empty_state(layers, 0, dtype, "meta")
    if not isinstance(state, dict):
        raise ArgumentError(f"{op}: initial_state must be a tensor for each name, got {type(state).__name__}")
    if state.keys() != want.keys():
        raise ArgumentError(f"{op}: initial_state must hold {sorted(want)}, got {sorted(state)}")
    count = state["count"]
    for name in (key for key in want if key != "count"):
        size = " ".join(map(str, want[name].shape[1:]))
        shapes.bind(f"initial_state.{name}", state[name], f"Rows {size}")
        if state[name].dtype != dtype:
            raise ArgumentError(
                f"{op}: initial_state.{name} must be {dtype} (float64 for float64 inputs, else float32), "
                f"got {state[name].dtype}"
            )
    if shapes["Rows"] != rows or count.shape != (rows,):
        raise ArgumentError(
            f"{op}: initial_state must hold {rows} rows, got {shapes['Rows']} and count {list(count.shape)}"
        )
    device = layers[0].device
    if count.dtype != torch.int64 or count.device != device:
        raise ArgumentError(
            f"{op}: initial_state.count must be int64 on {device}, got {count.dtype} on {count.device}"
        )
    if bool(((count < 0) | (count >= shapes["C"])).any()):
        raise ArgumentError(f"{op}: initial_state.count must lie in [0, {shapes['C']}), got {count.tolist()}")
