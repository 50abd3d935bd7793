"""The laws as functions: each takes an implementation, asserts, and says what was broken and by how much.

The tests of this folder hand them every op, kernel, mixer and model that discovery finds;
``test_laws_bite.py`` hands them broken ones. What a law cannot ask of somebody stands in :data:`EXEMPT`,
with the reason, and nowhere else.

A :class:`Subject` is anything that reads a sequence from a state to a state: an op in one form on one
backend, a mixer, a whole decoder. Inputs have batch first and time second; a state is a tensor, a named
tuple of tensors or a mapping of named tensors, batch first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

Inputs = dict[str, Tensor]
State = Any
Op = Callable[..., tuple[Tensor, State]]

BOUND = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest deviation allowed, relative to the largest entry of what is expected."""

EXEMPT: dict[str, dict[str, str]] = {
    "softmax_attention": {
        "state_dtype": "a cache keeps keys and values in their own dtype: it is most of the memory",
        "composition": "softmax is not affine in a state",
        "long_drift": "nothing is accumulated: every token looks at the keys themselves",
    },
    "causal_conv1d": {
        "composition": "its state is a window of inputs, no matrix",
        "long_drift": "nothing older than the window has an effect",
    },
    "state_space": {
        "composition": "its transition does not depend on the tokens: the map of n tokens is its n-th power",
        "long_drift": "it has no gates; tests/ops/test_state_space.py holds it over a long text",
    },
    "test_time_training": {
        "composition": "the inner model's answer is not affine in its weights",
        "long_drift": "it has no gate to be extreme; nor is it affine, so that no input-free bound on its drift exists",
    },
    "attention": {
        "constant_memory": "keys and values of every token are kept; they must grow by exactly their bytes"
    },
    "mla": {
        "constant_memory": "a latent of every token is kept, instead of keys and values; they must grow by its bytes"
    },
}
"""Op or mixer -> law -> why it does not hold for it."""


def exempt(name: str, law: str) -> bool:
    return law in EXEMPT.get(name, {})


@dataclass(frozen=True)
class Subject:
    """``read(inputs, state, cu_seqlens) -> (o, state)``, what it is given, and a state to start from."""

    name: str
    read: Callable[[Inputs, State | None, Tensor | None], tuple[Tensor, State]]
    inputs: Inputs
    initial: State | None = None

    @property
    def tokens(self) -> int:
        return next(iter(self.inputs.values())).shape[1]

    @property
    def rows(self) -> int:
        return next(iter(self.inputs.values())).shape[0]

    def __call__(
        self, inputs: Inputs, state: State | None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        return self.read(inputs, state, cu_seqlens)


# ---------------------------------------------------------------------------------------------- comparing


def close(found: Tensor, expected: Tensor, bound: float, what: str, *, size: float = 1e-6) -> None:
    """``|found - expected| <= bound * max |expected|`` in every entry; no NaN, no Inf.

    ``size`` stands for ``max |expected|`` where nothing (but rounding errors of that size) is expected.
    """
    assert found.shape == expected.shape, (
        f"{what}: shape {list(found.shape)}, expected {list(expected.shape)}"
    )
    if expected.numel() == 0:
        return
    assert torch.isfinite(found).all(), f"{what}: not finite"
    scale = float(expected.detach().abs().max())
    scale = scale if scale > 1e-9 * size else size
    worst = float((found.detach().double() - expected.detach().double()).abs().max()) / scale
    assert worst <= bound, f"{what}: off by {worst:.2e} of the largest entry, allowed {bound:.0e}"


def identical(found: Tensor, expected: Tensor, what: str) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype, (
        f"{what}: {found.dtype} {list(found.shape)}, expected {expected.dtype} {list(expected.shape)}"
    )
    assert torch.equal(found, expected), f"{what}: not the same bits"


def leaves(state: State) -> dict[str, Tensor]:
    """The tensors of a state by name."""
    if isinstance(state, Tensor):
        return {"state": state}
    return dict(state._asdict() if isinstance(state, tuple) else state)


def rebuild(state: State, change: Callable[[Tensor], Tensor]) -> State:
    """A state of the same kind with ``change`` applied to each tensor."""
    if state is None or isinstance(state, Tensor):
        return None if state is None else change(state)
    if isinstance(state, tuple):
        return type(state)(*(change(t) for t in state))  # type: ignore[call-arg]
    return {name: change(t) for name, t in state.items()}


def take(state: State, rows: slice) -> State:
    return rebuild(state, lambda t: t[rows])


def entries(state: State) -> dict[str, Tensor]:
    """The tensors of a state; of a cache with a ``length``, row by row, only the places that count."""
    found = leaves(state)
    lengths = {name[: -len("length")]: t for name, t in found.items() if name.split(".")[-1] == "length"}
    result = {}
    for name, tensor in found.items():
        prefix = name[: len(name) - len(name.split(".")[-1])]
        if prefix not in lengths or tensor.dim() < 2:
            result[name] = tensor
            continue
        for row, length in enumerate(lengths[prefix].tolist()):
            result[f"{name}[{row}]"] = tensor[row, tensor.shape[1] - length :]
    return result


def same_state(found: State, expected: State, bound: float, what: str) -> None:
    ours, theirs = entries(found), entries(expected)
    assert sorted(ours) == sorted(theirs), f"{what}: state has {sorted(ours)}, expected {sorted(theirs)}"
    for name, tensor in theirs.items():
        close(ours[name], tensor, bound, f"{what}, state {name}")


def identical_state(found: State, expected: State, what: str) -> None:
    ours, theirs = entries(found), entries(expected)
    assert sorted(ours) == sorted(theirs), f"{what}: state has {sorted(ours)}, expected {sorted(theirs)}"
    for name, tensor in theirs.items():
        identical(ours[name], tensor, f"{what}, state {name}")


def cut(inputs: Inputs, start: int, end: int) -> Inputs:
    return {name: t[:, start:end] for name, t in inputs.items()}


def spoil(tensor: Tensor) -> Tensor:
    """Something else entirely: NaN, or other token ids."""
    if tensor.is_floating_point():
        return torch.full_like(tensor, float("nan"))
    return (tensor - 1).clamp(min=0) if tensor.dim() > 1 else tensor


def spoil_rows(state: State, keep: int) -> State:
    """Every row but ``keep`` spoilt."""

    def change(tensor: Tensor) -> Tensor:
        spoilt = spoil(tensor).clone()
        spoilt[keep] = tensor[keep]
        return spoilt

    return rebuild(state, change)


# -------------------------------------------------------------------------------------------------- law 1


def loss_of(o: Tensor, state: State) -> Tensor:
    """A fixed random linear functional of output and final state (weights that bfloat16 can hold)."""
    draw = torch.Generator().manual_seed(7)
    total = torch.zeros((), dtype=torch.float64)
    for tensor in (o, *entries(state).values()):
        if tensor.is_floating_point():
            weight = torch.randn(tensor.shape, generator=draw, dtype=torch.float32).bfloat16().double()
            total = total + (tensor.double() * weight).sum()
    return total


def answer(op: Op, case: Any, *, gradients: bool) -> dict[str, Tensor]:
    """Output, final state and (with ``gradients``) the gradient of :func:`loss_of` by every tensor given."""
    given = {name: t.detach().clone().requires_grad_(gradients) for name, t in case.tensors().items()}
    o, state = case.replaced(given).run(op)
    found = {"output": o, **{f"state {name}": t for name, t in entries(state).items()}}
    if gradients:
        by = torch.autograd.grad(loss_of(o, state), list(given.values()), allow_unused=True)
        for (name, tensor), gradient in zip(given.items(), by, strict=True):
            found[f"gradient {name}"] = torch.zeros_like(tensor) if gradient is None else gradient
    return {name: t.detach() for name, t in found.items()}


def check_one_answer(
    op: Op, case: Any, expected: Mapping[str, Tensor], bound: float, *, gradients: bool = True
) -> None:
    """Law 1: output, state and gradients are those of the definition in float64 (``expected``, by :func:`answer`)."""
    found = answer(op, case, gradients=gradients)
    assert found["output"].dtype == case.output_dtype, f"{case}: output is {found['output'].dtype}"
    steepest = max(
        (float(t.abs().max()) for name, t in expected.items() if "gradient" in name and t.numel()),
        default=0.0,
    )
    for name, tensor in found.items():
        size = max(steepest, 1e-6) if "gradient" in name else 1e-6
        close(tensor, expected[name], bound, f"{case}: {name}", size=size)


def check_gradients(op: Op, case: Any, *, fast: bool) -> None:
    """Law 1: the gradients are those of the function itself, by finite differences in float64."""
    given = {name: t.detach().clone().requires_grad_() for name, t in case.tensors().items()}

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        o, state = case.replaced(dict(zip(given, tensors, strict=True))).run(op)
        return (o, *(t for t in entries(state).values() if t.is_floating_point() and t.requires_grad))

    try:
        torch.autograd.gradcheck(run, tuple(given.values()), fast_mode=fast, atol=1e-6, rtol=1e-4)
    except GradcheckError as error:
        raise AssertionError(f"{case}: gradcheck: {error}") from error


# -------------------------------------------------------------------------------------------------- law 2


def check_split_and_carry(
    subject: Subject, cuts: Iterable[int], bound: float, later: Subject | None = None
) -> None:
    """Law 2: reading ``a + b`` equals reading b from the state after a; ``later`` may be who reads b."""
    whole, after = subject(subject.inputs, subject.initial)
    for at in cuts:
        first, state = subject(cut(subject.inputs, 0, at), subject.initial)
        second, end = (later or subject)(cut(subject.inputs, at, subject.tokens), state)
        what = f"{subject.name}, cut at {at} of {subject.tokens}" + (f", then {later.name}" if later else "")
        close(torch.cat([first, second.to(first.dtype)], 1), whole, bound, f"{what}: output")
        same_state(end, after, bound, what)


def check_token_by_token(subject: Subject, bound: float, later: Subject | None = None) -> None:
    """Law 2: token by token is the same as all at once."""
    whole, after = subject(subject.inputs, subject.initial)
    state, outputs = subject.initial, []
    for t in range(subject.tokens):
        o, state = (later or subject)(cut(subject.inputs, t, t + 1), state)
        outputs.append(o)
    close(torch.cat(outputs, 1), whole, bound, f"{subject.name}, token by token: output")
    same_state(state, after, bound, f"{subject.name}, token by token")


def check_state_matters(subject: Subject) -> None:
    """Not a law, but what keeps law 2 from being empty: another state gives another output."""
    with_state, _ = subject(subject.inputs, subject.initial)
    without, _ = subject(subject.inputs, None)
    moved = float((with_state - without).abs().max() / with_state.abs().max())
    assert moved > 1e-2, f"{subject.name}: the initial state moves the output by {moved:.1e} only"


# ------------------------------------------------------------------------------------- states: purity, dtype


def check_purity(subject: Subject) -> None:
    """Nothing that was given is written to, a returned state neither when it is read from, and twice is once."""
    given = {**subject.inputs, **({} if subject.initial is None else leaves(subject.initial))}
    before = {name: t.clone() for name, t in given.items()}
    o, state = subject(subject.inputs, subject.initial)
    kept = rebuild(state, torch.clone)
    for start, end in ((0, 1), (0, subject.tokens)):
        subject(cut(subject.inputs, start, end), state)
    for name, tensor in given.items():
        identical(tensor, before[name], f"{subject.name}: {name} was written to")
    identical_state(state, kept, f"{subject.name}: the returned state was written to")
    again, state = subject(subject.inputs, subject.initial)
    identical(again, o, f"{subject.name}: a second time")
    identical_state(state, kept, f"{subject.name}: a second time")


def check_state_dtype(state: State, expected: torch.dtype, what: str) -> None:
    """Every floating point tensor of a state is float32 (float64 for float64)."""
    for name, tensor in leaves(state).items():
        if tensor.is_floating_point():
            assert tensor.dtype == expected, f"{what}: state {name} is {tensor.dtype}, expected {expected}"


def check_no_tokens(subject: Subject) -> None:
    """Reading nothing gives nothing and leaves the state as it is."""
    o, state = subject(cut(subject.inputs, 0, 0), subject.initial)
    assert o.shape[1] == 0, f"{subject.name}: no tokens in, {o.shape[1]} out"
    identical_state(state, subject.initial, f"{subject.name}: no tokens")


# -------------------------------------------------------------------------------------------------- law 4


def held_bytes(state: State) -> int:
    """Bytes of memory that a state keeps alive: whole storages, so that a view of something large counts in full."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in leaves(state).values()}
    return sum(storages.values())


def own_bytes(state: State) -> int:
    return sum(t.numel() * t.element_size() for t in leaves(state).values())


def check_constant_memory(
    state_bytes: Callable[[int], int], subject: Subject, *, grows: bool = False
) -> None:
    """Law 4: the state has as many bytes after any number of tokens, as many as promised, and keeps no others alive.

    With ``grows`` (a full cache) it grows by exactly the bytes of one token's keys and values.
    """
    few, many = subject.tokens // 10, subject.tokens
    after_few = subject(cut(subject.inputs, 0, few), None)[1]
    after_many = subject(subject.inputs, None)[1]
    for tokens, state in ((few, after_few), (many, after_many)):
        found = own_bytes(take(state, slice(0, 1)))
        assert found == state_bytes(tokens), (
            f"{subject.name}: {found} bytes after {tokens} tokens, state_bytes says {state_bytes(tokens)}"
        )
        assert held_bytes(state) <= own_bytes(state), (
            f"{subject.name}: the state of {own_bytes(state)} bytes keeps {held_bytes(state)} alive after {tokens} tokens"
        )
    growth = state_bytes(1_000_000) - state_bytes(1_000)
    if not grows:
        assert own_bytes(after_many) == own_bytes(after_few), (
            f"{subject.name}: {own_bytes(after_few)} bytes after {few} tokens, {own_bytes(after_many)} after {many}"
        )
        assert growth == 0, f"{subject.name}: state_bytes(1,000,000) is {growth} more than state_bytes(1,000)"
        return
    cache = leaves(after_many)
    per_token = sum(
        t[:1, :1].numel() * t.element_size() for t in cache.values() if t.dim() > 1 and t.shape[1] == many
    )
    assert per_token > 0, f"{subject.name}: no tensor of the state has one place for each token"
    assert growth == 999_000 * per_token, (
        f"{subject.name}: grows by {growth} bytes, expected {999_000 * per_token}"
    )


# -------------------------------------------------------------------------------------------------- law 5


def check_rows(subject: Subject, bound: float) -> None:
    """Law 5: a row alone gives the same, and what its neighbours hold (NaN here) does not move a bit of it."""
    whole, after = subject(subject.inputs, subject.initial)
    for row in range(subject.rows):
        this = slice(row, row + 1)
        alone, state = subject(
            {name: t[this] for name, t in subject.inputs.items()}, take(subject.initial, this)
        )
        close(alone, whole[this], bound, f"{subject.name}: row {row} alone: output")
        same_state(state, take(after, this), bound, f"{subject.name}: row {row} alone")
        spoilt, state = subject(spoil_rows(subject.inputs, row), spoil_rows(subject.initial, row))
        identical(spoilt[this], whole[this], f"{subject.name}: row {row} beside other neighbours: output")
        identical_state(
            take(state, this), take(after, this), f"{subject.name}: row {row} beside other neighbours"
        )


def check_packing(subject: Subject, lengths: Sequence[int], bound: float) -> None:
    """Law 5: packed sequences (row i cut to ``lengths[i]``) give what separate calls give, whatever the others hold."""
    assert len(lengths) == subject.rows
    bounds = torch.tensor([0, *lengths]).cumsum(0)

    def pack(inputs: Inputs) -> Inputs:
        return {
            name: torch.cat([t[i : i + 1, :n] for i, n in enumerate(lengths)], dim=1)
            for name, t in inputs.items()
        }

    for initial in (None, subject.initial):
        whole, after = subject(pack(subject.inputs), initial, bounds)
        assert leaves(after) and all(t.shape[0] == len(lengths) for t in leaves(after).values()), (
            f"{subject.name}: packed: a state of {len(lengths)} rows was expected"
        )
        for row, length in enumerate(lengths):
            this, place = slice(row, row + 1), slice(int(bounds[row]), int(bounds[row + 1]))
            what = f"{subject.name}: packed {list(lengths)}, sequence {row}" + (
                "" if initial is None else " from its state"
            )
            alone, state = subject(
                cut({name: t[this] for name, t in subject.inputs.items()}, 0, length), take(initial, this)
            )
            close(whole[:, place], alone, bound, f"{what}: output")
            same_state(take(after, this), state, bound, what)
            spoilt, state = subject(pack(spoil_rows(subject.inputs, row)), spoil_rows(initial, row), bounds)
            identical(spoilt[:, place], whole[:, place], f"{what}, beside other neighbours: output")
            identical_state(take(state, this), take(after, this), f"{what}, beside other neighbours")


def check_padding(
    model: Callable[..., tuple[Tensor, State]], rows: Sequence[Tensor], side: str, bound: float
) -> None:
    """Law 5: rows of different lengths, padded on one side under a mask, give what each gives alone.

    Read in two halves, so that states are carried over the padding, too.
    """
    width = max(len(row) for row in rows)
    tokens, mask = (
        torch.zeros(len(rows), width, dtype=torch.int64),
        torch.zeros(len(rows), width, dtype=torch.int64),
    )
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[i, place], mask[i, place] = row, 1
    half = width // 2
    first, state = model(tokens[:, :half], mask=mask[:, :half])
    second, after = model(tokens[:, half:], state, mask=mask[:, half:])
    found = torch.cat([first, second], 1)
    for i, row in enumerate(rows):
        what = f"row {i} of {len(row)} tokens, padded {side} to {width}"
        alone, state = model(row[None])
        close(found[i : i + 1, mask[i].bool()], alone, bound, f"{what}: logits")
        same_state(take(after, slice(i, i + 1)), state, bound, what)


# -------------------------------------------------------------------------------------------------- law 6


def check_causality(subject: Subject, places: Iterable[int]) -> None:
    """Law 6: other inputs at t change no bit before t, and something from t on."""
    whole, after = subject(subject.inputs, subject.initial)
    for t in places:
        other = {name: x.clone() for name, x in subject.inputs.items()}
        for x in other.values():
            x[:, t] = x[:, t] * 0.5 if x.is_floating_point() else (x[:, t] - 1).clamp(min=0)
        o, state = subject(other, subject.initial)
        identical(o[:, :t], whole[:, :t], f"{subject.name}: output before token {t}, which changed")
        assert not torch.equal(o[:, t], whole[:, t]), (
            f"{subject.name}: token {t} has no effect on its own output"
        )
        if not sum(x.numel() for x in leaves(after).values() if x.is_floating_point()):
            continue  # a window of one token: nothing is carried to the next
        if t + 1 < subject.tokens:
            assert not torch.equal(o[:, t + 1], whole[:, t + 1]), (
                f"{subject.name}: token {t} has no effect on the next"
            )
        else:
            moved = [name for name, x in entries(after).items() if not torch.equal(x, entries(state)[name])]
            assert moved, f"{subject.name}: the last token has no effect on the state"


# -------------------------------------------------------------------------------------------------- law 7


def check_composition(
    summarise: Callable[..., Any], op: Op, case: Any, cuts: tuple[int, int], bound: float
) -> None:
    """Law 7: the summaries of three pieces compose to the whole's in either order, and act as reading does."""
    ends = (0, *cuts, case.tokens)
    first, second, third = (
        case.piece(a, b).summary(summarise, op) for a, b in zip(ends, ends[1:], strict=False)
    )
    whole = case.summary(summarise, op)
    for name, composed in (
        ("(1 2) 3", first.then(second).then(third)),
        ("1 (2 3)", first.then(second.then(third))),
    ):
        close(composed.increment, whole.increment, bound, f"{case}: {name}: increment H")
        shape = whole.transition.shape
        # P grows out of the identity and has shrunk to 1e-4 ... 1e-20 here: in float32 a chunk holds it to a rounding of what
        # it began as (the torch form is off by up to 4e-4 of what is left, a loop over tokens by 4e-6).
        one = 1.0 if whole.transition.dtype == torch.float32 else 0.0
        close(
            composed.transition.expand(shape) + one,
            whole.transition + one,
            bound,
            f"{case}: {name}: transition P",
        )
    _, after = case.run(op)
    close(whole.apply(case.initial), after, bound, f"{case}: the whole applied to a state")
    moved = third.apply(second.apply(first.apply(case.initial)))
    close(moved, after, bound, f"{case}: the pieces applied to a state")


# -------------------------------------------------------------------------------------------------- law 8


def check_drift(
    found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], bound: float, what: str
) -> None:
    """Law 8: output ``[1, T, H, V]``, its last hundredth and the state ``[1, H, K, V]``, head by head, stay within bound."""
    (o, state), (true_o, true_state) = found, expected
    late = -(-o.shape[1] // 100)
    for head in range(o.shape[2]):
        name = f"{what}, head {head}"
        close(o[:, :, head], true_o[:, :, head], bound, f"{name}: output")
        close(o[:, -late:, head], true_o[:, -late:, head], bound, f"{name}: the last outputs")
        close(state[:, head], true_state[:, head], bound, f"{name}: state")


def check_extremes(
    op: Op, case: Any, expected: Mapping[str, Tensor], bound: float, *, gradients: bool = True
) -> None:
    """Law 8: with extreme gates nothing is NaN or Inf, and everything is right."""
    check_one_answer(
        op, replace(case, variant=f"extreme: {case.variant}"), expected, bound, gradients=gradients
    )
