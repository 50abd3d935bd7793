"""The backend table: the fastest that accepts serves, a refusal says why, and what was asked for is not replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from linstate.errors import ArgumentError, BackendError, LinstateError
from linstate.ops import delta_rule, dispatch, linear_attention
from linstate.ops.dispatch import BACKENDS, TABLE, Kernel, register

Enter = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch) -> Enter:
    """Put a kernel into the table for one test: it answers with ones, and keeps what it was called with."""
    for key in [key for key in TABLE if key[2] != "torch"]:
        monkeypatch.delitem(TABLE, key)
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.delenv("LINSTATE_LOG", raising=False)

    def put(
        recurrence: str,
        form: str,
        backend: str,
        refuses: Callable[[dict[str, Any]], str | None] | None = None,
        packs: bool = False,
    ) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def run(**call: Any) -> tuple[Tensor, Tensor]:
            calls.append(call)
            v, k = call["v"], call["k"]
            rows = len(call["bounds"]) - 1 if "bounds" in call else v.shape[0]
            return torch.ones_like(v), torch.ones(rows, v.shape[2], k.shape[3], v.shape[3])

        kernel = Kernel(recurrence, form, backend, run, refuses or (lambda call: None), packs)
        monkeypatch.setitem(TABLE, (recurrence, form, backend), kernel)
        return calls

    return put


def call(tokens: int = 4) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, 2, 3, generator=draw) for _ in "qkv")
    return {"q": q, "k": k, "v": v, "beta": torch.rand(1, tokens, 2, generator=draw)}


def test_what_a_kernel_accepts_it_serves(enter: Enter) -> None:
    calls = enter("delta_rule", "chunked", "native")
    o, state = delta_rule(**call())
    assert torch.equal(o, torch.ones_like(o)) and torch.equal(state, torch.ones_like(state))
    assert len(calls) == 1
    assert calls[0]["scale"] == pytest.approx(3**-0.5) and calls[0]["initial_state"] is None


def test_the_fastest_that_accepts_serves(enter: Enter) -> None:
    slower, faster = enter("delta_rule", "chunked", "native"), enter("delta_rule", "chunked", "triton")
    assert BACKENDS.index("triton") < BACKENDS.index("native") < BACKENDS.index("torch")
    delta_rule(**call())
    assert (len(faster), len(slower)) == (1, 0)
    delta_rule(**call(), backend="native")
    assert (len(faster), len(slower)) == (1, 1)


def test_a_refusal_falls_through_to_torch_and_is_logged_once(
    enter: Enter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = enter("delta_rule", "chunked", "native", lambda call: f"takes no {call['tokens']} tokens")
    o, state = delta_rule(**call())
    assert not calls
    expected, after = delta_rule(**call(), backend="torch")
    assert torch.equal(o, expected) and torch.equal(state, after)
    assert capsys.readouterr().err == "", "nobody asked for the log"
    monkeypatch.setenv("LINSTATE_LOG", "other,ops")
    for _ in range(3):
        delta_rule(**call())
    assert capsys.readouterr().err == (
        "linstate.ops: delta_rule chunked: torch (triton: no such kernel; native: takes no 4 tokens)\n"
    )
    delta_rule(**call(tokens=5))
    assert "takes no 5 tokens" in capsys.readouterr().err, "another reason is another line"


def test_the_backend_that_was_asked_for_is_not_replaced(enter: Enter) -> None:
    enter("delta_rule", "chunked", "native", lambda call: "has a cold")
    with pytest.raises(
        BackendError, match=r"^delta_rule chunked: no backend takes this call \(native: has a cold\)$"
    ):
        delta_rule(**call(), backend="native")
    with pytest.raises(BackendError, match="triton: no such kernel"):
        delta_rule(**call(), backend="triton")
    with pytest.raises(BackendError, match="native: no such kernel"):
        delta_rule(**call(), backend="native", form="recurrent")
    assert issubclass(BackendError, LinstateError) and not issubclass(BackendError, ArgumentError)


def test_where_nobody_accepts_every_reason_is_named(enter: Enter) -> None:
    enter("delta_rule", "chunked", "native", lambda call: "too cold")
    enter("delta_rule", "chunked", "torch", lambda call: "too warm")
    with pytest.raises(BackendError, match=r"\(triton: no such kernel; native: too cold; torch: too warm\)"):
        delta_rule(**call())


def test_a_kernel_sees_the_whole_call_before_it_answers(enter: Enter) -> None:
    seen: list[dict[str, Any]] = []
    enter("linear_attention", "chunked", "native", lambda call: seen.append(call))
    given = {name: t for name, t in call().items() if name != "beta"}
    state = torch.zeros(2, 2, 3, 3)
    linear_attention(**given, scale=0.5, initial_state=state, cu_seqlens=torch.tensor([0, 1, 4]))
    assert seen[0]["q"] is given["q"] and seen[0]["g"] is None and seen[0]["bonus"] is None
    assert seen[0]["scale"] == 0.5 and seen[0]["initial_state"] is state
    assert seen[0]["tokens"] == 4 and seen[0]["bounds"] == [0, 1, 4]


def test_auto_takes_a_step_for_one_token_and_chunks_else(enter: Enter) -> None:
    step, chunked = enter("delta_rule", "step", "native"), enter("delta_rule", "chunked", "native")
    delta_rule(**call(tokens=1))
    assert (len(step), len(chunked)) == (1, 0)
    for tokens in (0, 2, 70):
        delta_rule(**call(tokens=tokens))
    delta_rule(**call(tokens=1), cu_seqlens=torch.tensor([0, 1]))
    assert (len(step), len(chunked)) == (1, 4)


def test_packed_calls_are_handed_over_whole_to_who_packs(enter: Enter) -> None:
    calls = enter("delta_rule", "chunked", "native", packs=True)
    o, state = delta_rule(**call(), cu_seqlens=torch.tensor([0, 1, 4]))
    assert len(calls) == 1 and calls[0]["bounds"] == [0, 1, 4]
    assert o.shape == (1, 4, 2, 3) and state.shape == (2, 2, 3, 3)


def test_packed_calls_are_cut_for_who_does_not(enter: Enter) -> None:
    calls = enter("delta_rule", "chunked", "native")
    initial = torch.arange(2.0)[:, None, None, None].expand(2, 2, 3, 3)
    o, state = delta_rule(**call(), initial_state=initial, cu_seqlens=torch.tensor([0, 1, 4]))
    assert [c["v"].shape[1] for c in calls] == [1, 3]
    assert [float(c["initial_state"].mean()) for c in calls] == [0.0, 1.0]
    assert o.shape == (1, 4, 2, 3) and state.shape == (2, 2, 3, 3)


def test_register_enters_into_the_table(enter: Enter, monkeypatch: pytest.MonkeyPatch) -> None:
    key = ("delta_rule", "recurrent", "native")
    monkeypatch.setitem(
        TABLE, key, TABLE["delta_rule", "recurrent", "torch"]
    )  # so that it is taken out afterwards

    @register(*key, refuses=lambda call: "not today", packs=True)
    def kernel(**call: Any) -> tuple[Tensor, Tensor]:
        raise AssertionError("it refuses")

    assert TABLE[key].run is kernel and TABLE[key].packs and TABLE[key].refuses({}) == "not today"
    assert (TABLE[key].recurrence, TABLE[key].form, TABLE[key].backend) == key


def test_the_table_is_as_it_was() -> None:
    """The tests above leave nothing behind."""
    assert all(kernel.run.__module__.startswith("linstate.ops.") for kernel in TABLE.values())
    assert all(key == (k.recurrence, k.form, k.backend) for key, k in TABLE.items())
