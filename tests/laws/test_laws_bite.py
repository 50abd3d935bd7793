"""Law 10: every law is seen to fail on an implementation that breaks it, in the way such code usually breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from laws import laws
from laws.laws import BOUND, Op, Subject, answer, rebuild
from laws.mixer_cases import build, decoder, mixer_subject, random_tokens
from laws.op_cases import Case, Sizes, cases, definition, op_of
from linstate.ops import Segment, causal_conv1d, delta_rule, linear_attention, summarise
from linstate.ops.softmax_attention import KVCache
from linstate.types import LayerState

WIDE = BOUND[torch.float64]


@contextmanager
def bites(law: str, match: str) -> Iterator[None]:
    """``laws.check_<law>`` must fail inside, saying ``match``; a pass or another error is a failure."""
    assert hasattr(laws, f"check_{law}")
    with pytest.raises(AssertionError, match=match):
        yield


def case_of(recurrence: str, variant: str, sizes: Sizes | None = None) -> Case:
    return next(c for c in cases(recurrence, sizes or Sizes(T=20)) if c.variant == variant)


def one_answer(op: Op, case: Case, dtype: torch.dtype = torch.float64) -> None:
    case = case.to(dtype)
    expected = answer(definition(case.recurrence), case.to(torch.float64), gradients=True)
    laws.check_one_answer(op, case, expected, BOUND[dtype])


# ---- what is broken: each takes the call of an op, spoils one thing, and hands it on


def changed(op: Op, change: Callable[..., dict[str, Any]]) -> Op:
    """``op`` with arguments changed on the way in."""

    def run(**call: Any) -> tuple[Tensor, Any]:
        return op(**{**call, **change(**call)})

    return run


def finished(op: Op, change: Callable[[Tensor, Any, dict[str, Any]], tuple[Tensor, Any]]) -> Op:
    """``op`` with its results changed on the way out."""

    def run(**call: Any) -> tuple[Tensor, Any]:
        return change(*op(**call), call)

    return run


# ---------------------------------------------------------------------------------------------------- law 1


GATED = ("gate per head", "gate per channel")


@pytest.mark.parametrize("variant", GATED)
def test_one_answer_sees_a_decay_of_the_token_before(variant: str) -> None:
    broken = changed(delta_rule, lambda g, **_: {"g": g.roll(1, dims=1)})
    with bites("one_answer", "output"):
        one_answer(broken, case_of("delta_rule", variant))


def test_one_answer_sees_a_decay_after_the_write() -> None:
    """S = diag(exp g) (S + k v^T) instead of diag(exp g) S + k v^T."""
    broken = changed(linear_attention, lambda k, g, **_: {"k": k * g.exp()})
    with bites("one_answer", "output"):
        one_answer(broken, case_of("linear_attention", "gate per channel"))


def test_one_answer_sees_a_chunk_boundary() -> None:
    """The last token of a chunk is left out of the state that the next one starts from."""

    def run(**call: Any) -> tuple[Tensor, Tensor]:
        names, state, outputs = ("q", "k", "v", "g"), call["initial_state"], []
        for start in range(0, call["v"].shape[1], 16):
            piece = {n: call[n][:, start : start + 16] for n in names}
            o, _ = linear_attention(**piece, initial_state=state)
            outputs.append(o)
            short = {n: t[:, : 15 if t.shape[1] == 16 else None] for n, t in piece.items()}
            state = linear_attention(**short, initial_state=state)[1]
        return torch.cat(outputs, 1), state

    one_answer(run, case_of("linear_attention", "gate per head", Sizes(T=15)))
    with bites("one_answer", "output"):
        one_answer(run, case_of("linear_attention", "gate per head", Sizes(T=17)))


def test_one_answer_sees_a_wrong_state_behind_a_right_output() -> None:
    broken = finished(delta_rule, lambda o, state, _: (o, state.transpose(-1, -2).reshape(state.shape)))
    with bites("one_answer", "state"):
        one_answer(broken, case_of("delta_rule", "no gate"))


def test_one_answer_sees_a_wrong_group_of_heads() -> None:
    """Heads 0 1 0 1 instead of 0 0 1 1."""
    broken = changed(delta_rule, lambda q, k, **_: {"q": q.repeat(1, 1, 2, 1), "k": k.repeat(1, 1, 2, 1)})
    with bites("one_answer", "output"):
        one_answer(broken, case_of("delta_rule", "no gate, grouped heads"))


def test_one_answer_sees_a_wrong_gradient_only() -> None:
    broken = changed(delta_rule, lambda beta, **_: {"beta": beta.detach() + 0 * beta})
    with bites("one_answer", "gradient beta"):
        one_answer(broken, case_of("delta_rule", "gate per head"))


def test_one_answer_sees_a_gradient_that_stops_at_the_state() -> None:
    broken = changed(delta_rule, lambda initial_state, **_: {"initial_state": initial_state.detach()})
    with bites("one_answer", "gradient initial_state"):
        one_answer(broken, case_of("delta_rule", "gate per head"))


def test_one_answer_sees_sums_in_the_wrong_precision() -> None:
    """bfloat16 inside, where float32 was given; the bound of bfloat16 would let it pass."""

    def run(**call: Any) -> tuple[Tensor, Tensor]:
        narrow = {n: t.bfloat16() if n in "qkv" else t for n, t in call.items()}
        o, state = linear_attention(**narrow)
        return o.to(call["v"].dtype), state

    with bites("one_answer", "float32.*output"):
        one_answer(run, case_of("linear_attention", "gate per head"), torch.float32)


def test_one_answer_sees_places_that_do_not_count() -> None:
    """Attention that looks at all places of a cache, whatever the row's length is."""

    def change(initial_state: KVCache, **_: Any) -> dict[str, Any]:
        return {"initial_state": initial_state._replace(length=torch.full_like(initial_state.length, 9))}

    with bites("one_answer", "output"):
        one_answer(changed(op_of("softmax_attention"), change), case_of("softmax_attention", "full"))


def test_gradcheck_sees_a_wrong_backward() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 2 * gradient

    broken = changed(delta_rule, lambda v, **_: {"v": Doubled.apply(v)})
    for fast in (False, True):
        with bites("gradients", "gradcheck"):
            laws.check_gradients(
                broken, case_of("delta_rule", "gate per head", Sizes(B=1, T=3, H=1, K=2, V=2)), fast=fast
            )


# ---------------------------------------------------------------------------------------------------- law 2


def test_split_and_carry_sees_a_state_that_is_dropped() -> None:
    case = case_of("delta_rule", "gate per head")
    broken = case.subject(changed(delta_rule, lambda **_: {"initial_state": None}))
    with bites("split_and_carry", "cut at 7"):
        laws.check_split_and_carry(broken, (7,), WIDE)
    with bites("token_by_token", "token by token"):
        laws.check_token_by_token(broken, WIDE)
    with bites("state_matters", "the initial state moves the output by"):
        laws.check_state_matters(broken)


def test_split_and_carry_sees_a_convolution_whose_tail_is_one_short() -> None:
    case = case_of("causal_conv1d", "width 4")
    broken = finished(
        causal_conv1d, lambda o, tail, _: (o, torch.cat([torch.zeros_like(tail[:, :1]), tail[:, 1:]], 1))
    )
    with bites("split_and_carry", "cut at 7.*output"):
        laws.check_split_and_carry(case.subject(broken), (7,), WIDE)


def test_split_and_carry_sees_positions_that_start_anew() -> None:
    """Rotary mixers whose position is not carried."""
    mixer = build("retnet", {"num_heads": 2, "head_dim": 16})
    subject = mixer_subject("retnet", mixer, rows=1, tokens=20)

    def read(
        inputs: dict[str, Tensor], state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        at_start = None if state is None else {**state, "position": torch.zeros_like(state["position"])}
        return subject.read(inputs, at_start, cu_seqlens)

    laws.check_split_and_carry(subject, (7,), WIDE)
    with bites("split_and_carry", "cut at 7.*output"):
        laws.check_split_and_carry(replace(subject, read=read), (7,), WIDE)


def test_split_and_carry_sees_the_one_cut_that_is_wrong() -> None:
    """A piece of nine tokens leaves another state: only one of the cuts shows it."""

    def run(**call: Any) -> tuple[Tensor, Tensor]:
        o, state = delta_rule(**call)
        return o, state if call["v"].shape[1] != 9 else 1.001 * state

    subject = case_of("delta_rule", "no gate").subject(run)
    laws.check_split_and_carry(subject, (8, 10), WIDE)
    with bites("split_and_carry", "cut at 9 of 20"):
        laws.check_split_and_carry(subject, range(21), WIDE)


# ----------------------------------------------------------------------------------------------- the states


def test_purity_sees_an_initial_state_that_is_written_to() -> None:
    def run(**call: Any) -> tuple[Tensor, Tensor]:
        o, state = delta_rule(**call)
        return o, state if call["initial_state"] is None else call["initial_state"].copy_(state)

    with bites("purity", "was written to"):
        laws.check_purity(case_of("delta_rule", "no gate").subject(run))


def test_purity_sees_inputs_that_are_written_to() -> None:
    with bites("purity", "k was written to"):
        case = case_of("delta_rule", "no gate")
        laws.check_purity(case.subject(changed(delta_rule, lambda k, **_: {"k": k.mul_(0.5)})))


def test_purity_sees_a_buffer_that_is_used_again() -> None:
    """The state is returned in a buffer that the next call writes over."""
    buffer: list[Tensor] = []

    def run(**call: Any) -> tuple[Tensor, Tensor]:
        o, state = delta_rule(**call)
        if not buffer:
            buffer.append(state.clone())
        return o, buffer[0].copy_(state)

    with bites("purity", "the returned state was written to"):
        laws.check_purity(case_of("delta_rule", "no gate").subject(run))


def test_purity_sees_a_hidden_state() -> None:
    seen: list[float] = []

    def run(**call: Any) -> tuple[Tensor, Tensor]:
        o, state = delta_rule(**call)
        seen.append(1e-9)
        return o + sum(seen), state

    with bites("purity", "a second time"):
        laws.check_purity(case_of("delta_rule", "no gate").subject(run))


def test_state_dtype_sees_a_narrow_state() -> None:
    with bites("state_dtype", "bfloat16, expected torch.float32"):
        laws.check_state_dtype({"S": torch.zeros(1, dtype=torch.bfloat16)}, torch.float32, "x")


def test_no_tokens_sees_a_decay_without_a_token() -> None:
    broken = finished(delta_rule, lambda o, state, _: (o, 0.5 * state))
    with bites("no_tokens", "not the same bits"):
        laws.check_no_tokens(case_of("delta_rule", "no gate").subject(broken))


# ---------------------------------------------------------------------------------------------------- law 4


def mixer_with(
    change: Callable[[Tensor, LayerState, Tensor], LayerState],
) -> tuple[Callable[[int], int], Subject]:
    """A linear transformer that does something else with its state."""
    mixer = build("linear_transformer", {"num_heads": 1, "head_dim": 8}, torch.float32)
    subject = mixer_subject("broken", mixer, rows=1, tokens=100, before=0)

    def read(
        inputs: dict[str, Tensor], state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        y, after = subject.read(inputs, state, cu_seqlens)
        return y, change(y, after, inputs["x"])

    return mixer.state_bytes, replace(subject, read=read)


def test_constant_memory_sees_a_state_that_keeps_the_text() -> None:
    state_bytes, broken = mixer_with(lambda y, state, x: {**state, "text": x.clone()})
    with bites("constant_memory", "bytes after 10 tokens, state_bytes says"):
        laws.check_constant_memory(state_bytes, broken)
    with bites("constant_memory", "bytes after 10 tokens, .* after 100"):
        own = state_bytes(1)
        laws.check_constant_memory(lambda tokens: own + 256 * tokens, broken)


def test_constant_memory_sees_a_view_of_something_long() -> None:
    state_bytes, broken = mixer_with(lambda y, state, x: {"S": torch.cat([state["S"]] * 5)[:1]})
    with bites("constant_memory", "keeps .* alive"):
        laws.check_constant_memory(state_bytes, broken)


def test_constant_memory_sees_a_promise_that_grows() -> None:
    state_bytes, sound = mixer_with(lambda y, state, x: state)
    laws.check_constant_memory(state_bytes, sound)
    with bites("constant_memory", r"state_bytes\(1,000,000\) is 900 more"):
        laws.check_constant_memory(lambda n: state_bytes(n) + (900 if n == 1_000_000 else 0), sound)


def test_constant_memory_sees_a_cache_that_grows_too_fast() -> None:
    mixer = build("attention", {"num_heads": 2, "head_dim": 16}, torch.float32)
    subject = mixer_subject("attention", mixer, rows=1, tokens=100, before=0)
    laws.check_constant_memory(mixer.state_bytes, subject, grows=True)
    with bites("constant_memory", "expected 255744000"):
        laws.check_constant_memory(lambda n: mixer.state_bytes(n) + 4 * (n > 1_000), subject, grows=True)


# ---------------------------------------------------------------------------------------------------- law 5


def test_rows_see_their_neighbours() -> None:
    case = case_of("delta_rule", "gate per head", Sizes(B=3, T=20))
    with bites("rows", "alone"):  # the mean over the batch leaks in
        laws.check_rows(
            case.subject(changed(delta_rule, lambda v, **_: {"v": v + 0.01 * v.mean(0, keepdim=True)})), WIDE
        )
    with bites("rows", "alone"):  # rows take each other's states
        swapped = changed(delta_rule, lambda initial_state, **_: {"initial_state": initial_state.flip(0)})
        laws.check_rows(case.subject(swapped), WIDE)


def test_rows_see_a_neighbour_that_only_shows_when_it_is_not_finite() -> None:
    """A mask by multiplication: 0 * NaN is NaN."""

    def run(**call: Any) -> tuple[Tensor, Tensor]:
        o, state = delta_rule(**call)
        return o + 0 * o.sum(0, keepdim=True), state

    with bites("rows", "beside other neighbours"):
        laws.check_rows(case_of("delta_rule", "no gate").subject(run), WIDE)


def test_packing_sees_boundaries_that_are_ignored() -> None:
    """The sequences run as one: the state of each is handed on to the next."""

    def run(cu_seqlens: Tensor | None = None, **call: Any) -> tuple[Tensor, Tensor]:
        if cu_seqlens is None:
            return delta_rule(**call)
        first = None if call["initial_state"] is None else call["initial_state"][:1]
        o, _ = delta_rule(**{**call, "initial_state": first})
        ends = [
            delta_rule(
                **{**call, "initial_state": first, **{n: call[n][:, :e] for n in ("q", "k", "v", "beta")}}
            )[1]
            for e in cu_seqlens[1:]
        ]
        return o, torch.cat(ends)

    with bites("packing", r"packed \[3, 5\], sequence"):
        laws.check_packing(case_of("delta_rule", "no gate").subject(run), (3, 5), WIDE)


def test_packing_sees_a_convolution_over_a_boundary() -> None:
    def run(cu_seqlens: Tensor | None = None, **call: Any) -> tuple[Tensor, Tensor]:
        o, state = causal_conv1d(cu_seqlens=cu_seqlens, **call)
        return (
            (o, state) if cu_seqlens is None else (causal_conv1d(**{**call, "initial_state": None})[0], state)
        )

    with bites("packing", "sequence 1: output"):
        laws.check_packing(case_of("causal_conv1d", "width 4").subject(run), (3, 5), WIDE)


def test_packing_sees_states_in_a_wrong_order() -> None:
    def run(cu_seqlens: Tensor | None = None, **call: Any) -> tuple[Tensor, Tensor]:
        o, state = delta_rule(cu_seqlens=cu_seqlens, **call)
        return o, state if cu_seqlens is None else state.flip(0)

    with bites("packing", "sequence 0, state"):
        laws.check_packing(case_of("delta_rule", "no gate").subject(run), (3, 5), WIDE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_sees_a_mask_that_is_ignored(side: str) -> None:
    model = decoder(("gated_deltanet", "attention"))
    rows = [random_tokens(1, 9)[0], random_tokens(1, 4)[0]]

    def blind(
        tokens: Tensor, state: LayerState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        return model(tokens, state)

    with bites("padding", f"padded {side}"):
        laws.check_padding(blind, rows, side, WIDE)


# ---------------------------------------------------------------------------------------------------- law 6


@pytest.mark.parametrize(
    "leak",
    [
        lambda o: o + 1e-9 * o.mean(1, keepdim=True),
        lambda o: o + 1e-9 * o.roll(-1, dims=1),
        lambda o: o / o.std(),
    ],
    ids=["mean over time", "the next token", "scaled by all"],
)
def test_causality_sees_the_future(leak: Callable[[Tensor], Tensor]) -> None:
    broken = finished(delta_rule, lambda o, state, _: (leak(o), state))
    with bites("causality", "output before token"):
        laws.check_causality(case_of("delta_rule", "gate per head").subject(broken), range(20))


def test_causality_sees_a_token_without_effect() -> None:
    case = case_of("linear_attention", "no gate")
    with bites("causality", "no effect on the next"):
        laws.check_causality(
            case.subject(
                changed(linear_attention, lambda k, **_: {"k": 0 * k, "bonus": torch.ones(2, 6).double()})
            ),
            (3,),
        )


# ---------------------------------------------------------------------------------------------------- law 7


class Backwards(Segment):
    def then(self, later: Segment) -> Segment:
        return Backwards(self._move(later.transition), self.apply(later.increment), self.dense)


class Forgetful(Segment):
    """H2 + H1 instead of P2 H1 + H2."""

    def then(self, later: Segment) -> Segment:
        return Forgetful(later._move(self.transition), later.increment + self.increment, self.dense)


@pytest.mark.parametrize("kind", [Backwards, Forgetful])
@pytest.mark.parametrize("recurrence", ["delta_rule", "linear_attention", "dplr", "selective_scan"])
def test_composition_sees_a_wrong_rule(recurrence: str, kind: type[Segment]) -> None:
    case = next(c for c in cases(recurrence, Sizes(T=12)) if "g" in c.tensors())
    laws.check_composition(summarise, op_of(recurrence), case, (4, 9), WIDE)

    def broken(*args: Any, **kwargs: Any) -> Segment:
        sound = summarise(*args, **kwargs)
        return kind(sound.transition, sound.increment, sound.dense)

    with bites("composition", "increment H"):
        laws.check_composition(broken, op_of(recurrence), case, (4, 9), WIDE)


def test_composition_sees_a_wrong_transition() -> None:
    def broken(*args: Any, **kwargs: Any) -> Segment:
        sound = summarise(*args, **kwargs)
        return Segment(sound.transition.transpose(-1, -2), sound.increment, sound.dense)

    with bites("composition", "increment H|transition P|applied to a state"):
        laws.check_composition(broken, delta_rule, case_of("delta_rule", "no gate"), (4, 9), WIDE)


# ---------------------------------------------------------------------------------------------------- law 8


def test_extremes_see_an_exp_of_a_positive_number() -> None:
    """The factored form q exp(G), k exp(-G), which most first attempts at chunks are."""

    def factored(q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
        G = g.cumsum(1)  # [B, T, H, K]
        scores = torch.einsum("bthk,bshk->bhts", q * G.exp(), k * (-G).exp()).tril()
        o = torch.einsum("bhts,bshv->bthv", scores, v) + torch.einsum(
            "bthk,bhkv->bthv", q * G.exp(), initial_state
        )
        state = G[:, -1, :, :, None].exp() * initial_state + torch.einsum(
            "bshk,bshv->bhkv", k * (G[:, -1:] - G).exp(), v
        )
        return o * q.shape[-1] ** -0.5, state

    mild = case_of("linear_attention", "gate per channel")
    one_answer(factored, mild)
    extreme = mild.replaced({"g": torch.full_like(mild.sequences["g"], -1e4)}).to(torch.float32)
    expected = answer(definition("linear_attention"), extreme.to(torch.float64), gradients=True)
    with bites("extremes", "output: not finite"):
        laws.check_extremes(factored, extreme, expected, BOUND[torch.float32])


def test_extremes_see_a_gradient_that_is_not_finite() -> None:
    """``where`` around an exp that overflows: right forward, NaN backward."""

    def guarded(**call: Any) -> tuple[Tensor, Tensor]:
        g = call["g"]
        grown = torch.where(g < -100, torch.zeros_like(g), (-g).exp())
        return linear_attention(**{**call, "g": torch.where(grown == 0, g, -grown.log())})

    mild = case_of("linear_attention", "gate per head")
    one_answer(guarded, mild)
    extreme = mild.replaced({"g": torch.full_like(mild.sequences["g"], -1e4)}).to(torch.float32)
    expected = answer(definition("linear_attention"), extreme.to(torch.float64), gradients=True)
    with bites("extremes", "gradient g: not finite"):
        laws.check_extremes(guarded, extreme, expected, BOUND[torch.float32])


def test_drift_sees_a_state_rounded_to_bfloat16_between_chunks() -> None:
    case = case_of("linear_attention", "no gate", Sizes(B=1, T=6_400))

    def narrow(**call: Any) -> tuple[Tensor, Tensor]:
        state, outputs = call["initial_state"], []
        for start in range(0, call["v"].shape[1], 64):
            piece = {n: call[n][:, start : start + 64] for n in ("q", "k", "v")}
            o, state = linear_attention(**piece, initial_state=state)
            state = state.bfloat16().to(state.dtype)
            outputs.append(o)
        return torch.cat(outputs, 1), state

    expected = case.run(linear_attention)
    laws.check_drift(case.to(torch.float32).run(linear_attention), expected, BOUND[torch.bfloat16], "sound")
    with bites("drift", "head 0"):
        laws.check_drift(case.to(torch.float32).run(narrow), expected, BOUND[torch.bfloat16], "narrow")


def test_drift_sees_one_quiet_head_and_the_end() -> None:
    """An error in a head whose values are small beside the others', and in the last tokens only."""
    draw = torch.Generator().manual_seed(0)
    o, state = (torch.randn(shape, generator=draw) for shape in ((1, 1000, 2, 4), (1, 2, 3, 4)))
    o[:, :, 1] *= 1e-4
    wrong = o.clone()
    wrong[:, :, 1] *= 1.1
    with bites("drift", "head 1: output"):
        laws.check_drift((wrong, state), (o, state), 1e-2, "x")
    o[:, -10:, 0] *= 1e-4
    late = o.clone()
    late[:, -5:, 0] *= 1.1
    with bites("drift", "head 0: the last outputs"):
        laws.check_drift((late, state), (o, state), 1e-2, "x")


# ----------------------------------------------------------------------------------------------- comparing


def test_comparing_sees_shapes_and_what_is_not_finite() -> None:
    one = torch.ones(2, 2)
    for found, match in ((one[0], "shape"), (one / 0, "not finite"), (one * 1.1, "off by 1.00e-01")):
        with pytest.raises(AssertionError, match=match):
            laws.close(found, one, 1e-2, "x")
    with pytest.raises(AssertionError, match=r"state has \['S'\], expected \['S', 'conv'\]"):
        laws.same_state({"S": one}, {"S": one, "conv": one}, 1e-2, "x")


def test_a_cache_is_compared_where_it_counts() -> None:
    draw = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 4, 1, 2, generator=draw) for _ in "kv")
    cache = KVCache(k, v, torch.tensor([2]))
    shorter = rebuild(cache, lambda t: t[:, 2:] if t.dim() > 1 else t)
    laws.same_state(shorter, cache, 1e-9, "x")
    with pytest.raises(AssertionError, match="shape"):
        laws.same_state(cache._replace(length=torch.tensor([3])), cache, 1e-9, "x")
    with pytest.raises(AssertionError, match="off by"):
        laws.same_state(cache._replace(v=v + 1), cache, 1e-9, "x")


def test_every_law_is_seen_to_bite() -> None:
    """A check without a broken implementation above fails here."""
    source = Path(__file__).read_text("utf-8")
    for name in vars(laws):
        if name.startswith("check_"):
            assert f'bites("{name.removeprefix("check_")}"' in source, f"{name} was never seen to fail"
