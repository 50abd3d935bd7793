"""The ops are FLA's naive references: outputs and states, from a state, in the definition and in chunks.

Traps of the references, all undone here: some are head-first and take the other layout without a word; the
scalar-gated delta rule takes ``(beta, g)`` and its chunked form ``(g, beta)``; most multiply q by K^-1/2.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linstate.ops import delta_rule, dplr, linear_attention
from oracles.oracle import BOUND, CUT, TOKENS, agree, deviation, fla_naive

pytestmark = pytest.mark.oracle

B, H, K, V = 2, 3, 16, 24
Read = Callable[[Tensor | None, slice], tuple[Tensor, Tensor]]


def keys(heads: int = H) -> Tensor:
    return F.normalize(torch.randn(B, TOKENS, heads, K), dim=-1)


def log_gates(*shape: int) -> Tensor:
    return F.logsigmoid(torch.randn(*shape) + 3)


def head_first(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


def case_linear_attention(form: str) -> tuple[Read, Read]:
    theirs = fla_naive("linear_attn/naive").naive_recurrent_linear_attn
    q, k, v = torch.randn(B, TOKENS, H, K), keys(), torch.randn(B, TOKENS, H, V)
    return (
        lambda s, t: theirs(q[:, t], k[:, t], v[:, t], initial_state=s, output_final_state=True),
        lambda s, t: linear_attention(q[:, t], k[:, t], v[:, t], initial_state=s, form=form),
    )


def case_gla(form: str) -> tuple[Read, Read]:
    theirs = fla_naive("gla/naive").naive_recurrent_gla
    q, k, v, g = (
        torch.randn(B, TOKENS, H, K),
        keys(),
        torch.randn(B, TOKENS, H, V),
        log_gates(B, TOKENS, H, K),
    )
    return (
        lambda s, t: theirs(q[:, t], k[:, t], v[:, t], g[:, t], initial_state=s, output_final_state=True),
        lambda s, t: linear_attention(q[:, t], k[:, t], v[:, t], g[:, t], initial_state=s, form=form),
    )


def case_simple_gla(form: str) -> tuple[Read, Read]:
    theirs = fla_naive("simple_gla/naive").naive_recurrent_simple_gla
    q, k, v, g = torch.randn(B, TOKENS, H, K), keys(), torch.randn(B, TOKENS, H, V), log_gates(B, TOKENS, H)
    return (
        lambda s, t: theirs(q[:, t], k[:, t], v[:, t], g[:, t], initial_state=s),
        lambda s, t: linear_attention(q[:, t], k[:, t], v[:, t], g[:, t], initial_state=s, form=form),
    )


def case_mamba2_ssd(form: str) -> tuple[Read, Read]:
    """The chunked reference of the scalar gate with grouped q and k: Mamba-2's C, B, dt x and -A dt."""
    theirs = fla_naive("simple_gla/naive").naive_chunk_simple_gla
    C, Bs = torch.randn(B, TOKENS, 1, K), torch.randn(B, TOKENS, 1, K)
    x, dt = torch.randn(B, TOKENS, H, V), F.softplus(torch.randn(B, TOKENS, H) - 2)
    v, g = x * dt[..., None], -torch.rand(H) * dt
    wide = [t.expand(B, TOKENS, H, K) for t in (C, Bs)]
    return (
        lambda s, t: theirs(
            wide[0][:, t],
            wide[1][:, t],
            v[:, t],
            g[:, t],
            scale=1.0,
            initial_state=s,
            output_final_state=True,
        ),
        lambda s, t: linear_attention(
            C[:, t], Bs[:, t], v[:, t], g[:, t], scale=1.0, initial_state=s, form=form
        ),
    )


def case_delta_rule(form: str) -> tuple[Read, Read]:
    theirs = fla_naive("delta_rule/naive").delta_rule_recurrence
    q, k, v, beta = (
        torch.randn(B, TOKENS, H, K),
        keys(),
        torch.randn(B, TOKENS, H, V),
        2 * torch.rand(B, TOKENS, H),
    )

    def read(s: Tensor | None, t: slice) -> tuple[Tensor, Tensor]:
        o, state = theirs(*head_first(q[:, t], k[:, t], v[:, t], beta[:, t]), initial_state=s)
        return o.transpose(1, 2), state

    return read, lambda s, t: delta_rule(q[:, t], k[:, t], v[:, t], beta[:, t], initial_state=s, form=form)


def case_gated_delta_rule(form: str) -> tuple[Read, Read]:
    module = fla_naive("gated_delta_rule/naive")
    q, k, v = torch.randn(B, TOKENS, H, K), keys(), torch.randn(B, TOKENS, H, V)
    beta, g = 2 * torch.rand(B, TOKENS, H), log_gates(B, TOKENS, H)

    def read(s: Tensor | None, t: slice) -> tuple[Tensor, Tensor]:
        a, b = (x[:, t] for x in (beta, g))
        theirs = (
            module.naive_recurrent_gated_delta_rule
            if form == "recurrent"
            else module.naive_chunk_gated_delta_rule
        )
        a, b = (a, b) if form == "recurrent" else (b, a)  # the order is not the same in the two
        return theirs(q[:, t], k[:, t], v[:, t], a, b, initial_state=s, output_final_state=True)

    return read, lambda s, t: delta_rule(
        q[:, t], k[:, t], v[:, t], beta[:, t], g[:, t], initial_state=s, form=form
    )


def case_kda(form: str) -> tuple[Read, Read]:
    theirs = fla_naive("kda/naive").naive_recurrent_kda
    q, k, v = torch.randn(B, TOKENS, 1, K), keys(1), torch.randn(B, TOKENS, H, V)
    beta, g = 2 * torch.rand(B, TOKENS, H), log_gates(B, TOKENS, H, K)
    return (
        lambda s, t: theirs(
            q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], initial_state=s, output_final_state=True
        ),
        lambda s, t: delta_rule(q[:, t], k[:, t], v[:, t], beta[:, t], g[:, t], initial_state=s, form=form),
    )


def case_rwkv7(form: str) -> tuple[Read, Read]:
    theirs = fla_naive("generalized_delta_rule/dplr/naive").dplr_recurrence
    r, k, v = torch.randn(B, TOKENS, H, K), torch.randn(B, TOKENS, H, K) / 4, torch.randn(B, TOKENS, H, V)
    kappa, rate, g = keys(), torch.rand(B, TOKENS, H, K), -0.6 * torch.rand(B, TOKENS, H, K)

    def read(s: Tensor | None, t: slice) -> tuple[Tensor, Tensor]:
        found, written = -kappa[:, t], kappa[:, t] * rate[:, t]
        o, state = theirs(
            *head_first(r[:, t] * K**0.5, k[:, t], v[:, t], found, written, g[:, t]), initial_state=s
        )
        return o.transpose(1, 2), state

    return read, lambda s, t: dplr(
        r[:, t],
        k[:, t],
        v[:, t],
        -kappa[:, t] * rate[:, t],
        kappa[:, t],
        g[:, t],
        scale=1.0,
        initial_state=s,
        form=form,
    )


CASES = [value for name, value in sorted(globals().items()) if name.startswith("case_")]


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__.removeprefix("case_"))
def test_naive(case: Callable[[str], tuple[Read, Read]], form: str) -> None:
    torch.manual_seed(0)
    theirs, ours = case(form)
    first, second = slice(0, CUT), slice(CUT, TOKENS)
    o, state = theirs(None, first)
    found, found_state = ours(None, first)
    agree("output of the first piece", found, o)
    agree("state after the first piece", found_state, state)
    o, after = theirs(state.clone(), second)
    found, found_state = ours(found_state, second)
    agree("output of the second piece", found, o)
    agree("state after the second piece", found_state, after)
    found, found_state = ours(None, slice(None))
    agree("output of the whole", found[:, CUT:], o)
    agree("state after the whole", found_state, after)
    lost, _ = ours(None, second)
    assert deviation(lost, o) > 100 * BOUND, "a lost state would not be seen here"
