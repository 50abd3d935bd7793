"""The native recurrences on a matrix state, beyond the laws: threads, forks, gradients, compile, strides, snapshots, fuzz."""

from __future__ import annotations

import hashlib
import multiprocessing
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from linstate import ops
from linstate.errors import BackendError
from linstate.ops import native
from linstate.ops.native import matrix as native_matrix

pytestmark = pytest.mark.skipif(not native.available, reason=f"no native kernels: {native.reason}")

Call = dict[str, Any]
ISAS = native.isas()
each_isa = pytest.mark.parametrize("isa", ISAS)
each_kind = pytest.mark.parametrize("kind", native_matrix.KINDS)


def call(
    kind: str,
    *,
    B: int = 1,
    T: int = 150,
    Hk: int = 2,
    Hv: int = 4,
    K: int = 40,
    V: int = 72,
    gate: int = 2,
    seed: int = 0,
) -> Call:
    """Arguments of one op; gate: 0 none, 1 per head, 2 per channel."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    q, k = (F.normalize(normal(B, T, Hk, K), dim=-1) for _ in range(2))
    share = torch.rand(B, T, Hk, 1, generator=generator)
    given: Call = {"q": q, "k": k, "v": normal(B, T, Hv, V), "initial_state": normal(B, Hv, K, V)}
    if gate:
        given["g"] = -torch.rand((B, T, Hv, K)[: 2 + gate], generator=generator)
    if kind == "delta_rule":
        given["beta"] = torch.rand(B, T, Hv, generator=generator)
    if kind == "dplr":
        given |= {"a": -k * share, "b": k}
    return given


def run(kind: str, given: Call, **how: Any) -> tuple[Tensor, Tensor]:
    how = {"backend": "native", "form": "chunked"} | how
    result: tuple[Tensor, Tensor] = getattr(ops, kind)(**given, **how)
    return result


def wide(given: Call) -> Call:
    return {
        name: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
        for name, t in given.items()
    }


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], bound: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.isfinite(a).all()
        size = float(b.abs().max()) if b.numel() else 1.0
        assert float((a.double() - b).abs().max() if b.numel() else 0.0) <= bound * max(size, 1e-6)


@each_isa
@each_kind
def test_the_number_of_threads_changes_no_bit(kind: str, isa: str) -> None:
    with native.using(isa):
        for shape in ({"Hk": 1, "Hv": 1, "K": 128, "V": 200}, {"B": 2}, {"Hk": 1, "Hv": 3, "T": 700}):
            given, before, found = call(kind, **shape), torch.get_num_threads(), []
            try:
                for threads in (1, 2, 5):
                    torch.set_num_threads(threads)
                    found.append(run(kind, given))
            finally:
                torch.set_num_threads(before)
            assert same(found[0], found[1]) and same(found[0], found[2])


@each_isa
@each_kind
@pytest.mark.parametrize("gate", [0, 1, 2])
def test_a_cut_on_the_grid_changes_no_bit(kind: str, isa: str, gate: int) -> None:
    given = call(kind, T=300, gate=gate)
    with native.using(isa):
        whole = run(kind, given)
        for cut in (64, 192, 256):
            first = {n: t[:, :cut] if n != "initial_state" else t for n, t in given.items()}
            o1, state = run(kind, first)
            second = {n: t[:, cut:] for n, t in given.items() if n != "initial_state"}
            o2, state = run(kind, {**second, "initial_state": state})
            assert same((torch.cat([o1, o2], 1), state), whole)


@each_kind
def test_packed_sequences_are_the_bits_of_each_alone(kind: str) -> None:
    given = call(kind, T=200)
    bounds = [0, 0, 70, 71, 200]
    states = torch.randn(4, *given["initial_state"].shape[1:])
    o, after = run(kind, {**given, "initial_state": states}, cu_seqlens=torch.tensor(bounds))
    for row, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        alone = {n: t[:, begin:end] for n, t in given.items() if n != "initial_state"}
        assert same(
            run(kind, {**alone, "initial_state": states[row : row + 1]}),
            (o[:, begin:end], after[row : row + 1]),
        )


@each_isa
@each_kind
@pytest.mark.parametrize("strength", [0.0, 1e-40, 30.0, 1e4, float("inf")])
def test_gates_of_any_size(kind: str, isa: str, strength: float) -> None:
    """A log gate of -1e4, or minus infinity, is an exact zero of the decay; nothing becomes NaN."""
    for gate in (1, 2):
        given = call(kind, T=90, gate=gate)
        chosen = torch.rand(given["g"].shape, generator=torch.Generator().manual_seed(5)) < 0.3
        given["g"] = torch.where(chosen, torch.tensor(-strength), given["g"])
        with native.using(isa):
            found = run(kind, given)
        finite = wide({**given, "g": given["g"].clamp(min=-1e5)})
        close(found, run(kind, finite, backend="torch", form="recurrent"), 1e-5)


@each_isa
def test_full_forgetting_is_exact(isa: str) -> None:
    """Behind a token whose gates are -1e4 the state holds that token and nothing else."""
    given = call("linear_attention", T=37, gate=2)
    given["g"][:, 20] = -1e4
    with native.using(isa):
        _, state = run(
            "linear_attention", {n: t[:, :21] if n != "initial_state" else t for n, t in given.items()}
        )
    k = given["k"][:, 20].repeat_interleave(2, dim=1)
    assert torch.equal(state, k[..., None] * given["v"][:, 20][..., None, :])


@each_kind
@pytest.mark.parametrize("gate", [0, 1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_the_definition(
    kind: str, gate: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_matrix, "SEGMENT", 128)  # several segments in 300 tokens
    given = call(kind, B=1 if packed else 2, T=300, gate=gate, K=24, V=16)
    how: Call = {}
    if packed:
        how["cu_seqlens"] = torch.tensor([0, 170, 170, 300])
        given["initial_state"] = torch.randn(3, 4, 24, 16)
    if kind == "linear_attention":
        given["bonus"] = torch.randn(4, 24)
    found = []
    for tensors, backend in ((given, "native"), (wide(given), "torch")):
        leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
        o, state = run(kind, leaves, backend=backend, **how)
        loss = (
            o.double() * torch.linspace(-1, 1, o.numel()).view(o.shape)
        ).sum() + state.double().square().sum()
        found.append(torch.autograd.grad(loss, list(leaves.values())))
    close(found[0], found[1], 1e-5)


def test_backward_keeps_memory_linear() -> None:
    """Between forward and backward nothing of size T x K x V is alive: the states of whole segments only."""
    given = {n: t.requires_grad_() for n, t in call("delta_rule", T=2500, Hk=1, Hv=1, K=16, V=16).items()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        run("delta_rule", given)
    inputs = {t.data_ptr() for t in given.values()}
    extra = sum(t.numel() for t in kept if t.data_ptr() not in inputs)
    assert 0 < extra == 2500 // native_matrix.SEGMENT * 16 * 16


@each_kind
def test_torch_compile_and_fake_tensors_pass_through(kind: str) -> None:
    given = call(kind, T=70)
    function: Callable[..., Any] = torch.compile(
        lambda **g: run(kind, g), backend="aot_eager", fullgraph=False
    )
    assert same(function(**given), run(kind, given))
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        o, state = run(kind, {n: mode.from_tensor(t) for n, t in given.items()})
    real = run(kind, given)
    assert (o.shape, o.dtype, state.shape, state.dtype) == (
        real[0].shape,
        real[0].dtype,
        real[1].shape,
        real[1].dtype,
    )


def test_the_registered_op_is_consistent() -> None:
    g = call("delta_rule", T=70)
    tensors = (g["q"], g["k"], g["v"], None, None, g["beta"], g["g"], None, g["initial_state"])
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = ("native", "delta_rule", *tensors, 0.5, None, 64)
    torch.library.opcheck(torch.ops.linstate.matrix.default, arguments, test_utils=checks)


def strange(t: Tensor, how: int) -> Tensor:
    """t in other strides: a slice of a projection, transposed heads, a step of two, a last axis that is not dense."""
    if how == 0:
        return torch.cat([torch.full_like(t, torch.nan), t], dim=-1)[..., t.shape[-1] :]
    if how == 1:
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if how == 2:
        return torch.stack([t, t * torch.nan], dim=2).flatten(1, 2)[:, ::2]
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


@each_kind
def test_any_strides(kind: str) -> None:
    """Slices of one projection, transposed heads, a step of two, an expanded axis, a last axis that is not dense."""
    given = call(kind, T=130)
    expected = run(kind, given)

    for how in range(4):
        assert same(
            run(kind, {n: strange(t, how) if n != "initial_state" else t for n, t in given.items()}), expected
        )
    fixed = -torch.rand(4)
    assert same(
        run(kind, {**given, "g": fixed}), run(kind, {**given, "g": fixed.expand(1, 130, 4).contiguous()})
    )


def test_refusals_name_their_reason() -> None:
    given = call("delta_rule")
    for change, reason in (
        ({"v": given["v"].double(), "initial_state": given["initial_state"].double()}, "v is torch.float64"),
        ({"q": given["q"].half()}, "q is torch.float16"),
        (call("delta_rule", K=300), "K and V go up to 256"),
    ):
        with pytest.raises(BackendError, match=reason):
            run("delta_rule", {**given, **change})
        ops.delta_rule(**{**given, **change})  # torch takes it
    with (
        pytest.raises(
            BackendError, match=r"instruction set 'sse9' is not on this machine; there is: .*portable"
        ),
        native.using("sse9"),
    ):
        pass


def test_threads_of_our_own_change_no_bit() -> None:
    """Where torch has no threads that we could join, ours do the work."""
    import linstate._native as _native

    given, before = call("delta_rule", B=2, T=70), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        expected = run("delta_rule", given)
        _native.join_team(0, 0, 0)
        for _ in range(20):
            assert same(run("delta_rule", given), expected)
    finally:
        native._join_team()
        torch.set_num_threads(before)


def test_many_python_threads_at_once() -> None:
    calls = [call("delta_rule", T=200 + i, seed=i) for i in range(8)]
    expected = [run("delta_rule", c) for c in calls]
    found: list[Any] = [None] * len(calls)

    def work(i: int) -> None:
        for _ in range(5):
            found[i] = run("delta_rule", calls[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def _digest(given: Call) -> str:
    # No torch operation that would use torch's own threads: those do not survive a fork.
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in run("delta_rule", given))).hexdigest()


def _in_child(given: Call, queue: Any) -> None:
    queue.put(_digest(given))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_works_after_a_fork() -> None:
    """Several threads before the fork and after it: nothing of ours is left that the child would wait for."""
    before = torch.get_num_threads()
    given = call("delta_rule", T=600)
    context = multiprocessing.get_context("fork")
    torch.set_num_threads(2)
    try:
        expected = _digest(given)
        queue = context.Queue()
        child = context.Process(target=_in_child, args=(given, queue), daemon=True)
        child.start()
        try:
            assert queue.get(timeout=60) == expected
            child.join(60)
            assert child.exitcode == 0
        finally:
            child.kill()
    finally:
        torch.set_num_threads(before)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=st.sampled_from(native_matrix.KINDS),
    isa=st.sampled_from(ISAS or ("none",)),
    B=st.integers(1, 3),
    T=st.sampled_from([0, 1, 2, 15, 16, 17, 31, 48, 63, 64, 65, 128, 131]),
    Hk=st.integers(1, 2),
    group=st.integers(1, 3),
    K=st.integers(1, 70),
    V=st.integers(1, 70),
    gate=st.integers(0, 2),
    narrow=st.sets(st.sampled_from(["q", "k", "v", "beta", "g", "a", "b"])),
    strides=st.integers(0, 4),
    strength=st.sampled_from([0.0, 1e-40, 1.0, 30.0, 1e4, float("inf")]),
    cuts=st.none() | st.lists(st.integers(0, 131), max_size=4),
    seed=st.integers(0, 99),
)
def test_fuzz(
    kind: str,
    isa: str,
    B: int,
    T: int,
    Hk: int,
    group: int,
    K: int,
    V: int,
    gate: int,
    narrow: set[str],
    strides: int,
    strength: float,
    cuts: list[int] | None,
    seed: int,
) -> None:
    """Any shape, strides, gates, packing, any mixture of dtypes: within rounding of the float64 definition."""
    given = call(
        kind, B=1 if cuts is not None else B, T=T, Hk=Hk, Hv=Hk * group, K=K, V=V, gate=gate, seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    if gate:
        strong = torch.rand(given["g"].shape, generator=generator) < 0.2
        given["g"] = torch.where(strong, torch.tensor(-strength), given["g"])
    given = {n: t.bfloat16() if n in narrow else t for n, t in given.items()}
    if strides < 4:
        given = {n: t if n == "initial_state" else strange(t, strides) for n, t in given.items()}
    if cuts is not None:  # sequences of no tokens, too
        bounds = [0, *sorted(min(cut, T) for cut in cuts), T]
        given["cu_seqlens"] = torch.tensor(bounds)
        given["initial_state"] = torch.randn(len(bounds) - 1, Hk * group, K, V, generator=generator)
    with native.using(isa):
        found = run(kind, given)
    assert found[0].dtype == given["v"].dtype and found[1].dtype == torch.float32
    bf16 = (
        given["v"].dtype == torch.bfloat16
    )  # then the output is rounded, and a bf16 unit may have multiplied
    exact = wide(given)
    if gate:
        exact["g"] = exact["g"].clamp(min=-1e5)  # 0 times infinity is the definition's own
    close(found, run(kind, exact, backend="torch", form="recurrent"), 2e-2 if bf16 else 1e-5)
