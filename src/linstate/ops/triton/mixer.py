"""What a mixer does between its projections, on a GPU: one token in one launch, many in four; the same for serving, in place in slots.

A mixer describes itself once, as a :class:`linstate.ops.fused.Plan`; the programs are ``kernels/mixer.py``, ``kernels/prepare.py`` and ``kernels/matrix.py``.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from linstate.errors import ArgumentError, BackendError
from linstate.ops.dispatch import Call, register
from linstate.ops.fused.plan import Operands, Plan
from linstate.ops.tensors import dense, plain, state_of
from linstate.ops.triton import matrix as matrix_ops
from linstate.ops.triton import table
from linstate.ops.triton.runtime import launch, unfit
from linstate.ops.triton.rwkv import check_places
from linstate.ops.triton.scan import run_conv

DECAYS = ("none", "head", "channel", "sigmoid", "exponential", "fixed")
NORMS = ("none", "head", "group", "centred")
GATES = ("none", "silu", "sigmoid")


class Workspace:
    """What a launch of ``mixer_step`` needs beside its arguments: outputs before the norm, and counters, zero between launches.

    Two launches that may run at the same time need one each. A graph is captured with one of its own.
    """

    def __init__(self, plan: Plan, rows: int, device: torch.device | str) -> None:
        self.room = torch.empty(rows * plan.hv * plan.columns, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(rows * plan.hk, dtype=torch.int32, device=device)


@cache
def _counters(device: torch.device, stream: int, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


def _workspace(plan: Plan, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room and counters for one call. Counters are kept for each stream, in sizes of powers of two; a capture has its own."""
    room = torch.empty(rows * plan.hv * plan.columns, dtype=torch.float32, device=device)
    count, stream = table.power(max(1, rows * plan.hk)), 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return room, torch.zeros(count, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    return room, _counters(device, stream, count)


def refuses(call: Call) -> str | None:
    """Why these programs do not take a call, or None."""
    mixed, matrix, plan, of = call["mixed"], call["matrix"], call["plan"], call["operands"]
    tensors = {f"tensor {i}": t for i, t in enumerate(of.given())}
    if why := unfit(
        {
            "asked": call["asked"],
            "mixed": mixed,
            "matrix": matrix,
            **{n: t for n, t in tensors.items() if t is not of.position},
        }
    ):
        return why
    if plan.norm == "none" and of.z is not None:
        return "an output gate comes with a norm"
    if (mixed.shape[1] != 1 or "bounds" in call) and not (plan.of_many and mixed.shape[1]):
        return "many tokens of features, rotations, normalisers and fixed decays are not taken at once"
    if not plain(mixed, matrix, *of.given())[0]:
        return "a gradient, torch.compile or a tensor of another kind is asked for"
    return None


@register("fused", "chunked", "triton", refuses=refuses, packs=True)
def many(
    plan: Plan,
    mixed: Tensor,
    matrix: Tensor | None,
    tail: Tensor | None,
    of: Operands,
    cu_seqlens: Tensor | None,
    bounds: list[int] | None,
    norm: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """Many tokens; arguments as in :func:`linstate.ops.fused.definition.run`."""
    return prefill(plan, mixed, matrix, tail, of, bounds)


@register("fused", "step", "triton", refuses=refuses)
def one(
    plan: Plan,
    mixed: Tensor,
    matrix: Tensor | None,
    tail: Tensor | None,
    of: Operands,
    cu_seqlens: Tensor | None,
    bounds: list[int] | None,
    norm: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """One token of every row; arguments as in :func:`linstate.ops.fused.definition.run`."""
    return step(plan, mixed, matrix, tail, of)


def step(
    plan: Plan, mixed: Tensor, matrix: Tensor | None, tail: Tensor | None, operands: Operands
) -> tuple[Tensor, Tensor, Tensor]:
    """One token of every row: y ``[B, 1, Hv V]``, the matrix state and the convolution's state after it, one launch."""
    rows = mixed.shape[0]
    y = mixed.new_empty((rows, 1, plan.hv * plan.v))
    after = mixed.new_empty((rows, plan.hv, plan.k, plan.columns), dtype=torch.float32)
    tail_after = mixed.new_empty((rows, max(0, plan.conv[2] - 1), plan.conv[1]), dtype=torch.float32)
    work = _workspace(plan, rows, mixed.device)
    tail = state_of("convolution", tail, tuple(tail_after.shape), mixed.device)
    matrix = state_of("matrix", matrix, tuple(after.shape), mixed.device)
    tensors = (y, *work, tail, tail_after, matrix, after, None)
    _launch(plan, dense(mixed), operands.ready(), *tensors)  # type: ignore[arg-type]
    return y, after, tail_after


def prefill(
    plan: Plan,
    mixed: Tensor,
    matrix: Tensor | None,
    tail: Tensor | None,
    operands: Operands,
    bounds: list[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Many tokens, as :func:`step`: the convolution, what chunks need with gates and unit lengths, the recurrence, and the norm with its gate.

    Four launches, and two more where batch x heads is small and the text is read in segments.
    """
    of, mixed = operands.ready(), dense(mixed)  # type: ignore[assignment]
    batch, tokens, _ = mixed.shape
    kind = matrix_ops.KINDS.index(plan.recurrence)
    conv_at, channels, taps = plan.conv
    rows = batch if bounds is None else len(bounds) - 1
    tail = state_of("convolution", tail, (rows, max(0, taps - 1), channels), mixed.device)
    matrix = state_of("matrix", matrix, (rows, plan.hv, plan.k, plan.v), mixed.device)
    offset = 0
    tail_after = mixed.new_empty((rows, max(0, taps - 1), channels), dtype=torch.float32)
    if taps:
        assert of.weight is not None
        x = mixed[..., conv_at : conv_at + channels]
        mixed, tail_after = run_conv(x, of.weight, of.bias, tail, "silu", bounds)
        offset = conv_at

    def part(at: int, heads: int, size: int) -> Tensor:
        return mixed[..., at - offset : at - offset + heads * size].unflatten(-1, (heads, size))

    q, k = part(plan.q_at, plan.hk, plan.k), part(plan.k_at, plan.hk, plan.k)
    v = part(plan.v_at, plan.hv, plan.v)
    if of.key is not None and of.value is not None:
        k, v = of.key.unflatten(-1, (plan.hk, plan.k)), of.value.unflatten(-1, (plan.hv, plan.v))
    g = of.step
    offset_too = g is not None and of.step_bias is not None
    if g is None and of.step_bias is not None:  # RWKV-5: the same for every token
        g = of.step_bias.expand(batch, tokens, -1)
    if g is not None and plan.decay != "head":
        g = g.unflatten(-1, (plan.hk, plan.k))
    more = matrix_ops.Fused(
        (None, None, of.rate, of.step_bias),
        _numbers(plan)[1:-1],
        {
            "FUSED": True,
            "OFFSET": offset_too,
            "UNIT": plan.unit_eps is not None,
            **{name: value for name, value in _choices(plan, of).items() if name in matrix_ops.OPTIONS},
        },
        of.skip,
    )
    inputs = (q, k, v, None, None, of.beta, g)
    o, after, _ = matrix_ops.read(kind, inputs, of.bonus, matrix, float(plan.scale), bounds, 0, False, more)
    return _norm_gate(plan, of, o), after, tail_after


def _norm_gate(plan: Plan, of: Operands, o: Tensor) -> Tensor:
    from linstate.ops.triton.kernels.mixer import norm_gate

    batch, tokens = o.shape[:2]
    y = o.new_empty((batch, tokens, plan.hv * plan.v))
    groups = plan.hk if plan.norm == "group" else plan.hv
    size = plan.hv * plan.v // groups
    rows = max(1, table.FINISH // table.power(size))
    count, z = batch * tokens * groups, of.z
    launch(
        norm_gate,
        -(-count // rows),
        *(o, of.norm, of.norm_bias, z, y, count, tokens),
        *((0, 0) if z is None else (z.stride(0), z.stride(1))),
        plan.norm_eps,
        GROUPS=groups,
        SIZE=size,
        BLOCK=table.power(size),
        ROWS=rows,
        WIDE=plan.norm != "head",
        CENTRED=plan.norm == "centred",
        BIAS=of.norm_bias is not None,
        GATE=GATES.index(plan.gate),
        GATE_FIRST=plan.gate_first,
        num_warps=8 if table.power(size) > table.FINISH else 4,
    )
    return y


def step_in_slots(
    plan: Plan,
    mixed: Tensor,
    slots: Tensor,
    states: Tensor,
    tails: Tensor | None,
    operands: Operands,
    *,
    out: Tensor | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """One token for each row of a batch, its states updated in place in a slot: one launch. With ``out`` and ``workspace`` nothing is allocated.

    Not the contract of the mixers, which mutate nothing. No two rows may name the same slot; a negative slot leaves a row out (y is zero), so
    a CUDA graph that was captured for B rows serves fewer.

    Args:
        mixed: ``[B, 1, D]``. slots: int32 or int64 ``[B]``.
        states: float32 ``[slots, Hv, K, columns]``. tails: float32 ``[slots, W - 1, channels]``, where the plan has a convolution; both without gaps.
        out: ``[B, 1, Hv V]`` in the dtype of ``mixed``, without gaps.

    Raises:
        ArgumentError: a shape or dtype does not fit. BackendError: Triton does not take these tensors.
    """
    name = "step_in_slots"
    rows = mixed.shape[0]
    if mixed.dim() != 3 or mixed.shape[1] != 1:
        raise ArgumentError(f"{name}: mixed must be [B, 1, D], one token a row, got {list(mixed.shape)}")
    y = mixed.new_empty((rows, 1, plan.hv * plan.v)) if out is None else out
    wanted = {
        "slots": (slots, (rows,), (torch.int32, torch.int64)),
        "states": (states, (states.shape[0], plan.hv, plan.k, plan.columns), (torch.float32,)),
        "out": (y, (rows, 1, plan.hv * plan.v), (mixed.dtype,)),
    }
    if plan.conv[2] > 1:
        if tails is None:
            raise ArgumentError(f"{name}: tails must hold the states of the convolution, got None")
        wanted["tails"] = (tails, (states.shape[0], plan.conv[2] - 1, plan.conv[1]), (torch.float32,))
    check_places(wanted, mixed.device)
    if why := unfit({"mixed": mixed, "states": states}):
        raise BackendError(f"{name}: triton: {why}")
    if workspace is None:
        work = _workspace(plan, rows, mixed.device)
    else:
        work = workspace.room, workspace.arrived
        if work[0].numel() < rows * plan.hv * plan.columns or work[1].numel() < rows * plan.hk:
            raise ArgumentError(f"{name}: the workspace is for fewer than {rows} rows")
    tensors = (y, *work, tails, tails, states, states, slots)
    _launch(plan, dense(mixed), operands.ready(), *tensors)  # type: ignore[arg-type]
    return y


def _launch(
    plan: Plan,
    mixed: Tensor,
    of: Operands,
    y: Tensor,
    room: Tensor,
    arrived: Tensor,
    tail: Tensor | None,
    tail_after: Tensor | None,
    before: Tensor | None,
    after: Tensor,
    slots: Tensor | None,
) -> None:
    from linstate.ops.triton.kernels.mixer import mixer_step

    config = table.mixer(plan.k, plan.columns)
    conv_at, channels, taps = plan.conv
    all_v = table.power(plan.columns)
    group = plan.hv // plan.hk
    turned = plan.rotary_base is not None
    speed = _speeds(mixed.device, plan.k, plan.rotary_base) if plan.rotary_base is not None else None
    launch(
        mixer_step,
        mixed.shape[0] * plan.hv * -(-plan.columns // config.block),
        *(mixed, of.key, of.value, of.weight, of.bias, of.beta, of.step, of.rate, of.step_bias, of.skip),
        *(of.bonus, of.norm, of.norm_bias, of.z, of.position, speed),
        *(y, room, arrived, tail, tail_after, before, after, slots),
        *(0 if t is None else t.stride(0) for t in (mixed, of.key, of.value, of.beta, of.step, of.z)),
        *_numbers(plan),
        0.0 if plan.normaliser_eps is None else plan.normaliser_eps,
        HK=plan.hk,
        GROUP=group,
        K=plan.k,
        V=plan.v,
        COLUMNS=plan.columns,
        BK=table.padded(plan.k),
        BV=config.block,
        ALL_V=all_v,
        HEADS=min(table.power(group), max(1, table.FINISH // all_v)),
        Q_AT=plan.q_at,
        K_AT=plan.k_at,
        V_AT=plan.v_at,
        CONV_AT=conv_at,
        D=channels,
        W=taps,
        WP=table.power(max(1, taps - 1)),
        BIAS=of.bias is not None,
        SPLIT=of.key is not None,
        STEPS=of.step is not None,
        DELTA=plan.recurrence == "delta_rule",
        UNIT=plan.unit_eps is not None,
        ELU=plan.elu_plus_one,
        TURNED=turned,
        BONUS=of.bonus is not None,
        CENTRE_BIAS=of.norm_bias is not None,
        **_choices(plan, of),
        START=before is not None,
        TAIL=tail is not None and taps > 1,
        SLOTS=slots is not None,
        num_warps=config.warps,
    )


@cache
def _speeds(device: torch.device, size: int, base: float) -> Tensor:
    """Turns a token of channels i and i + size / 2, float64 ``[size / 2]`` (``parts.rotate``): angles over 2 pi."""
    at = torch.arange(0, size, 2, dtype=torch.float64, device=device)
    return base ** (-at / size) / (2 * math.pi)


def _numbers(plan: Plan) -> tuple[float, ...]:
    unit = 0.0 if plan.unit_eps is None else plan.unit_eps
    limits = map(float, plan.limits)
    return float(plan.scale), unit, float(plan.beta_scale), float(plan.divisor), *limits, plan.norm_eps


def _choices(plan: Plan, of: Operands) -> dict[str, Any]:
    return {
        "DECAY": DECAYS.index(plan.decay),
        "STEPPED": plan.stepped_values,
        "SKIP": of.skip is not None,
        "NORM": NORMS.index(plan.norm),
        "GATE": GATES.index(plan.gate),
        "GATE_FIRST": plan.gate_first,
    }
