"""Nothing becomes an address before it is checked: native calls with arguments of any kind give a result or an error, and no more.

Inputs lie among NaN and outputs among marks, so that reading or writing beside them shows; ``make asan`` runs this file, where the
sanitizer sees what does not show.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linstate import ops
from linstate.errors import ArgumentError, BackendError
from linstate.ops import native
from linstate.ops.fused.plan import Plan
from linstate.ops.native import lib, linear, norm, row_attention
from linstate.ops.native.plan import carried_out
from linstate.ops.softmax_attention import KVCache, softmax_attention

pytestmark = pytest.mark.skipif(not native.available, reason=str(native.reason))

MARK = 77


def fenced(t: Tensor, fill: float = float("nan")) -> Tensor:
    """The same numbers in the midst of others."""
    around = torch.full((t.numel() + 64,), fill if t.is_floating_point() else 10**6).to(t.dtype)
    inner = around[32 : 32 + t.numel()].view(t.shape)
    return inner.copy_(t)


def misaligned(t: Tensor) -> Tensor:
    """At an odd address."""
    memory = bytearray(t.numel() * t.element_size() + 16)
    return torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=1).view(t.shape)


MUTATIONS: list[Callable[[Tensor], Any]] = [
    lambda t: t.double(),
    lambda t: t.to(torch.float16),
    lambda t: t.bfloat16(),
    lambda t: t.to(torch.int64),
    lambda t: t.to(torch.int32),
    lambda t: t[..., :-1],
    lambda t: torch.cat([t, t], -1),
    lambda t: torch.cat([t, t], 0),
    lambda t: t[:0],
    lambda t: t[..., :0],
    lambda t: t[0],
    lambda t: t[None],
    lambda t: t.flatten(),
    lambda t: t.reshape(-1, 1),
    lambda t: t.transpose(0, -1),
    lambda t: torch.cat([t, t], -1)[..., ::2],
    lambda t: torch.stack([t, t], -1)[..., 0],
    lambda t: t[..., :1].expand(t.shape),
    lambda t: t.flatten()[0].expand(t.shape),
    lambda t: t.flip(0),
    lambda t: torch.empty(t.shape, device="meta", dtype=t.dtype),
    lambda t: t.to_sparse(),
    misaligned,
    lambda t: t.requires_grad_() if t.is_floating_point() else t,
    lambda t: t * 1e38 if t.is_floating_point() else t + 10**9,
    lambda t: -t,
    lambda t: None,
    lambda t: t.tolist(),
]


def mutated(draw: random.Random, arguments: dict[str, Any]) -> dict[str, Any]:
    """With one or two tensors (or members of one) changed."""
    changed = dict(arguments)
    names = [name for name, value in arguments.items() if isinstance(value, Tensor | tuple)]
    for name in draw.sample(names, draw.choice((1, 1, 2))):
        value = changed[name]
        change = draw.choice(MUTATIONS)
        try:
            if isinstance(value, tuple):
                place = draw.randrange(len(value))
                parts = [change(t) if i == place else t for i, t in enumerate(value)]
                changed[name] = type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
            else:
                changed[name] = change(value)
        except (
            RuntimeError,
            TypeError,
            IndexError,
            ValueError,
        ):  # of torch: this tensor cannot be changed so
            continue
    return changed


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return fenced(torch.randn(*shape).to(dtype))


def public_calls(dtype: torch.dtype, tokens: int) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Ops and arguments that fit."""
    q, k, v = (normal(2, tokens, heads, size, dtype=dtype) for heads, size in ((2, 8), (2, 8), (4, 6)))
    state = normal(2, 4, 8, 6)
    decay = fenced(-torch.rand(2, tokens, 4))
    qkv = {"q": q, "k": k, "v": v}
    cache = KVCache(normal(2, 9, 2, 8, dtype=dtype), normal(2, 9, 2, 6, dtype=dtype), torch.tensor([9, 4]))
    x = normal(2, tokens, 12, dtype=dtype)
    return {
        "linear_attention": (ops.linear_attention, qkv | {"g": decay, "initial_state": state}),
        "delta_rule": (
            ops.delta_rule,
            qkv | {"beta": fenced(torch.rand(2, tokens, 4)), "g": decay, "initial_state": state},
        ),
        "dplr": (ops.dplr, qkv | {"a": 0.1 * q, "b": 0.1 * k, "initial_state": state}),
        "selective_scan": (
            ops.selective_scan,
            qkv
            | {"g": fenced(torch.rand(2, tokens, 4, 6)), "A": -torch.rand(4, 8, 6), "initial_state": state},
        ),
        "causal_conv1d": (
            ops.causal_conv1d,
            {"x": x, "weight": normal(12, 4), "bias": normal(12), "initial_state": normal(2, 3, 12)},
        ),
        "softmax_attention": (
            softmax_attention,
            {"q": normal(2, tokens, 4, 8, dtype=dtype), "k": k, "v": normal(2, tokens, 2, 6, dtype=dtype)}
            | {"initial_state": cache},
        ),
    }


@pytest.mark.parametrize("name", list(public_calls(torch.float32, 1)))
def test_ops_take_what_they_say_and_refuse_the_rest(name: str) -> None:
    draw, answered = random.Random(name), 0
    torch.manual_seed(0)
    for turn in range(80):
        tokens = draw.choice((1, 5))
        call, arguments = public_calls(draw.choice((torch.float32, torch.bfloat16)), tokens)[name]
        given = mutated(draw, arguments) if turn else arguments
        form = draw.choice(("auto", "step" if tokens == 1 else "chunked"))
        try:
            found, _ = call(**given, form=form, backend="native" if form != "auto" else "auto")
        except (ArgumentError, BackendError):
            continue
        except RuntimeError as error:  # torch's attention says so itself
            assert "same dtype" in str(error)
            continue
        answered += 1
        with torch.no_grad():
            expected, _ = call(**given, form="auto", backend="torch")
        finite = expected.isfinite() & (expected.abs() < 1e30)
        assert found.shape == expected.shape
        assert torch.allclose(found[finite].double(), expected[finite].double(), rtol=0.1, atol=0.1), given
    assert answered >= 10


def native_calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """What the room calls, and arguments that fit. Outputs begin with ``out``."""
    bf16 = torch.bfloat16
    packed = linear.pack(torch.randn(40, 64), "int8")
    q, k, v = normal(2, 1, 4, 8), normal(2, 1, 2, 8), normal(2, 1, 2, 6)
    keys = {"q": normal(2, 1, 2, 8), "k": k, "v": normal(2, 1, 4, 6)}
    states = {"before": normal(2, 4, 8, 6), "out_after": normal(2, 4, 8, 6)}
    plan = lib.AttendPlan(
        hq=4, hk=2, k=8, v=6, turned=4, eps=1e-6, weight_plus=0.0, scale=0.3, rotary_base=1e4
    )
    one = torch.tensor([3])
    cache = (normal(1, 5, 2, 8, dtype=bf16), normal(1, 5, 2, 6, dtype=bf16), one, one.clone())
    grown = (normal(1, 6, 2, 8, dtype=bf16), normal(1, 6, 2, 6, dtype=bf16), one.clone(), one.clone())
    step = keys | {"a": None, "b": None, "beta": fenced(torch.rand(2, 1, 4)), "g": None, "bonus": None}
    return {
        "norm": (
            lambda x, weight, z, out: lib.norm(
                x, 2, 1e-6, False, weight, 0.0, None, lib.OutputGate.silu, z, out, 1
            ),
            {"x": normal(3, 16), "weight": normal(16), "z": normal(3, 16), "out": normal(3, 16)},
        ),
        "gated": (
            lambda x, out: lib.gated(x, out, 1),
            {"x": normal(3, 16, dtype=bf16), "out": normal(3, 8, dtype=bf16)},
        ),
        "linear": (
            lambda x, words, scales, bias, out: lib.linear(lib.Format.int8, x, words, scales, bias, out, 1),
            {"x": normal(3, 64, dtype=bf16), "words": fenced(packed.words), "scales": fenced(packed.scales)}  # type: ignore[arg-type]
            | {"bias": normal(40), "out": normal(3, 40)},
        ),
        "embed": (
            lambda ids, words, scales, out: lib.embed(lib.Format.int8, 40, 64, ids, words, scales, out, 1),
            {"ids": torch.tensor([3, 39]), "words": packed.words, "scales": packed.scales}
            | {"out": normal(2, 64, dtype=bf16)},
        ),
        "stream": (
            lambda x, y, out: lib.stream(x, y, out, 1),
            {"x": normal(3, 16), "y": normal(3, 16, dtype=bf16), "out": normal(3, 16)},
        ),
        "step": (
            lambda before, out_after, out, **given: lib.step(
                lib.Recurrence.delta_rule, *given.values(), 0.3, before, out_after, out, 1
            ),
            step | states | {"out": normal(2, 1, 4, 6)},
        ),
        "matrix": (
            lambda bounds, before, out_after, out, out_kept, **given: lib.matrix(
                lib.Recurrence.delta_rule,
                *given.values(),
                0.3,
                bounds,
                before,
                out_after,
                out,
                out_kept,
                64,
                1,
            ),
            {n: None if t is None else t.transpose(0, 1) for n, t in step.items()}
            | {
                "bounds": torch.tensor([0, 1, 2]),
                "out": normal(1, 2, 4, 6),
                "out_kept": normal(2, 4, 1, 8, 6),
            }
            | states,
        ),
        "conv": (
            lambda x, weight, bias, bounds, before, out_after, out: lib.conv(
                x, weight, bias, True, bounds, before, out_after, out, 1
            ),
            {"x": normal(1, 5, 12), "weight": normal(12, 4), "bias": normal(12), "out": normal(1, 5, 12)}
            | {"bounds": torch.tensor([0, 2, 5]), "before": normal(2, 3, 12), "out_after": normal(2, 3, 12)},
        ),
        "attention": (
            lambda q, keys, values, first, out: lib.attention(q, keys, values, first, 0, 0.3, out, 1),
            {"q": normal(2, 3, 4, 8), "keys": normal(2, 9, 2, 8), "values": normal(2, 9, 2, 6)}
            | {"first": torch.tensor([0, 6]), "out": normal(2, 3, 4, 6)},
        ),
        "attend_rows": (
            lambda q, k, v, keys, values, out_k, out_v, out: lib.attend_rows(
                q, k, v, [lib.Row(keys, 2, values, 2, 5, out_k, 1, out_v, 1, 5), lib.Row()], 0.3, out, 1
            ),
            {"q": q, "k": k, "v": v, "keys": normal(7, 2, 8), "values": normal(7, 2, 6)}
            | {"out_k": normal(7, 2, 8), "out_v": normal(7, 2, 6), "out": normal(2, 1, 4, 6)},
        ),
        "attend": (
            lambda q, k, v, z, q_norm, out, before, after: lib.attend(
                plan, q, k, v, z, q_norm, None, out, before, after, 1
            ),
            {n: normal(1, 1, width, dtype=bf16) for n, width in (("q", 32), ("k", 16), ("v", 12), ("z", 24))}
            | {"q_norm": normal(8), "out": normal(1, 1, 24, dtype=bf16), "before": cache, "after": grown},
        ),
    }


def mixer_calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """The same of whole mixers: a gated delta rule with a convolution of 4 taps, and RWKV-7."""
    made = Plan(
        "delta_rule", 2, 2, 8, 8, 0, 16, 32, 0.3, conv=(0, 48, 4), unit_eps=1e-6, decay="head", gate="silu"
    )
    plan, behind = carried_out(made), carried_out(made.behind_conv)
    mixer = {
        "mixed": normal(3, 1, 48),
        "weight": normal(48, 4),
        "beta": normal(3, 1, 2),
        "step": normal(3, 1, 2),
    }
    mixer |= {"rate": normal(2), "step_bias": normal(2), "norm": normal(8), "z": normal(3, 1, 16)}
    states = {
        "before": (normal(3, 3, 48), normal(3, 2, 8, 8)),
        "after": (normal(3, 3, 48), normal(3, 2, 8, 8)),
    }
    of_rwkv = {name: normal(3, 1, 16) for name in ("r", "k", "v", "decay", "rate", "gate")}
    of_rwkv |= {name: normal(16) for name in ("k_k", "k_a", "r_k", "weight")}
    many = {
        "out_q": normal(3, 1, 2, 8),
        "out_k": normal(3, 1, 2, 8),
        "out_beta": normal(3, 1, 2),
        "out_g": normal(3, 1, 2),
    }
    return {
        "mixer": (
            lambda mixed, weight, beta, step, rate, step_bias, norm, z, out, before, after: lib.mixer(
                *(plan, mixed, weight, None, beta, step, rate, step_bias, None, None, norm, None, z),
                *(None, None, None, out, before, after, 1),
            ),
            mixer | {"out": normal(3, 1, 16)} | states,
        ),
        "mixer_gates": (
            lambda mixed, beta, step, rate, step_bias, out_q, out_k, out_beta, out_g: lib.mixer_gates(
                behind, mixed, beta, step, rate, step_bias, None, None, out_q, out_k, None, out_beta, out_g, 1
            ),
            {n: t for n, t in mixer.items() if n not in ("weight", "norm", "z")} | many,
        ),
        "mixer_finish": (
            lambda mixed, norm, z, out: lib.mixer_finish(behind, mixed, None, norm, None, z, out, 1),
            {n: mixer[n] for n in ("mixed", "norm", "z")} | {"out": fenced(torch.ones(3, 1, 2, 8))},
        ),
        "shift": (
            lambda x, mix, out, before, after: lib.shift(x, mix, out, before, after, 1),
            {"x": normal(3, 1, 16), "mix": normal(2, 16), "out": normal(2, 3, 1, 16)}
            | {"before": (normal(3, 1, 16),), "after": (normal(3, 1, 16),)},
        ),
        "shift_tokens": (
            lambda x, mix, before, out: lib.shift_tokens(x, mix, before, out, 1),
            {
                "x": normal(2, 5, 16),
                "mix": normal(2, 16),
                "before": normal(2, 1, 16),
                "out": normal(2, 2, 5, 16),
            },
        ),
        "rwkv7": (
            lambda r, k, v, decay, rate, gate, k_k, k_a, r_k, weight, out, before, after: lib.rwkv7(
                2,
                1e-5,
                r,
                k,
                v,
                decay,
                rate,
                None,
                None,
                gate,
                k_k,
                k_a,
                r_k,
                weight,
                None,
                out,
                before,
                after,
                1,
            ),
            of_rwkv
            | {"out": normal(3, 1, 16)}
            | {"before": (normal(3, 2, 8, 8),), "after": (normal(3, 2, 8, 8),)},
        ),
    }


CALLS = {
    name: calls for calls in (native_calls, mixer_calls) for name in (calls() if native.available else ())
}


@pytest.mark.parametrize("name", CALLS)
def test_native_calls_check_everything_that_becomes_an_address(name: str) -> None:
    draw, refused = random.Random(name), 0
    for turn in range(120):
        torch.manual_seed(0)
        call, arguments = CALLS[name]()[name]
        given = mutated(draw, arguments) if turn else arguments
        outs = [t for n, t in given.items() if n.startswith("out") and isinstance(t, Tensor) and t.is_cpu]
        around = [_around(t) for t in outs]
        try:
            call(**given)
        except (ArgumentError, TypeError, IndexError):
            assert turn, "arguments that fit were refused"
            refused += 1
        for before, t in zip(around, outs, strict=True):
            assert before is None or torch.equal(before, _around(t)), f"{name} wrote beside its output"  # type: ignore[arg-type]
    assert refused > 60


def _around(t: Tensor) -> Tensor | None:
    """Bits of what lies before and after a tensor that is in the midst of others."""
    if t.layout is not torch.strided or t.is_meta or not t.is_contiguous() or t.storage_offset() < 16:
        return None
    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    if len(whole) < t.storage_offset() + t.numel() + 16:
        return None
    parts = whole[t.storage_offset() - 16 : t.storage_offset()], whole[t.storage_offset() + t.numel() :][:16]
    return torch.cat([part.view(torch.uint8) for part in parts]).clone()


@pytest.mark.parametrize("length", [-1, 10, 5_000, 10**9, -(2**62)])
def test_lengths_outside_the_cache_are_refused(length: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 8)
    cache = KVCache(torch.randn(1, 9, 2, 8), torch.randn(1, 9, 2, 8), torch.tensor([length]))
    for form in ("auto", "step"):
        with pytest.raises(ArgumentError):
            softmax_attention(q, k, v, initial_state=cache, form=form)
    with pytest.raises(ArgumentError, match="places"):  # the kernel by itself, too
        row_attention.step(q, k, v, cache, None, 0.3)
    if length > 0:
        with pytest.raises(ArgumentError, match="places"):
            row_attention.step(q, k, v, cache, 13, 0.3)  # a window longer than the cache
    call, arguments = native_calls()["attend"]
    keys, values, _, position = arguments["before"]
    with pytest.raises(ArgumentError, match="length"):
        call(**arguments | {"before": (keys, values, torch.tensor([length]), position)})


def test_a_norm_reads_its_weight_by_its_strides() -> None:
    x, weights = torch.randn(3, 16), torch.full((32,), 1e38)
    weights[::2] = torch.rand(16)
    found = norm.norm(x, 1, weights[::2], eps=1e-6)
    torch.testing.assert_close(found, F.rms_norm(x, (16,), weights[::2], 1e-6), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format", linear.FORMATS)
@pytest.mark.parametrize("inputs", [64, 50])
def test_a_packed_layer_reads_slices_that_begin_anywhere(format: linear.Format, inputs: int) -> None:
    torch.manual_seed(0)
    packed, wide = linear.pack(torch.randn(40, inputs), format), torch.randn(5, 200).bfloat16()
    for x in (wide[1, 1 : 1 + inputs], wide[:, 1 : 1 + inputs], wide[:, 3 : 3 + 2 * inputs : 2][:, :inputs]):
        if x.shape[-1] == inputs:
            assert torch.equal(linear.linear(x, packed), linear.linear(x.clone(), packed))
