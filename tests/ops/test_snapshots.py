"""``snapshots``: the states on the way are those of reading up to there, in every form and backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linstate import ops
from linstate.errors import ArgumentError
from linstate.ops import native
from linstate.ops.dispatch import TABLE

Call = dict[str, Any]
OPS = ("linear_attention", "delta_rule", "dplr", "selective_scan")
SEQUENCES = ("q", "k", "v", "g", "beta", "a", "b")


def arguments(name: str, tokens: int, *, batch: int = 2, states: int = 2) -> Call:
    draw = torch.Generator().manual_seed(1)
    q, k = (F.normalize(torch.randn(batch, tokens, 2, 16, generator=draw), dim=-1) for _ in range(2))
    v = torch.randn(batch, tokens, 4, 24, generator=draw)
    given: Call = {"q": q, "k": k, "v": v, "initial_state": torch.randn(states, 4, 16, 24, generator=draw)}
    given["g"] = -torch.rand(batch, tokens, 4, 16, generator=draw)
    if name == "selective_scan":
        given |= {"g": torch.rand(v.shape, generator=draw), "A": -torch.rand(4, 16, 24, generator=draw)}
    if name == "delta_rule":
        given["beta"] = torch.rand(batch, tokens, 4, generator=draw)
    if name == "dplr":
        given |= {"a": -k * 0.5, "b": k.clone()}
    return given


def cut(given: Call, begin: int, end: int, row: int | None = None) -> Call:
    part = {n: t[:, begin:end] if n in SEQUENCES else t for n, t in given.items()}
    if row is not None:
        part["initial_state"] = given["initial_state"][row : row + 1]
    return part


@pytest.fixture(params=[*native.isas(), "torch"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "torch":
        yield "torch"
    else:
        with native.using(request.param):
            yield "native"


@pytest.mark.parametrize("name", OPS)
def test_snapshots_are_the_states_of_reading_up_to_there(name: str, backend: str) -> None:
    op = getattr(ops, name)
    for tokens in (0, 50, 256, 300):
        given = arguments(name, tokens)
        expected_o, final = op(**given, backend=backend, form="chunked")
        o, states = op(**given, backend=backend, snapshots=128)
        ends = [min(end, tokens) for end in range(128, tokens + 128, 128)] or [0]
        assert states.shape == (2, len(ends), 4, 16, 24)
        for number, end in enumerate(ends):
            _, there = op(**cut(given, 0, end), backend=backend, form="chunked")
            torch.testing.assert_close(
                states[:, number], there, rtol=0, atol=0 if backend == "native" else 1e-5
            )
        torch.testing.assert_close((o, states[:, -1]), (expected_o, final), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_of_packed_sequences_the_shorter_are_filled_with_their_final_state(name: str, backend: str) -> None:
    op, bounds = getattr(ops, name), [0, 0, 70, 330, 394]
    given = arguments(name, 394, batch=1, states=4)
    o, states = op(**given, backend=backend, snapshots=64, cu_seqlens=torch.tensor(bounds))
    assert states.shape == (4, 5, 4, 16, 24)  # ceil(260 / 64)
    for row, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        for number in range(5):
            stop = min(begin + 64 * (number + 1), end)
            alone, there = op(**cut(given, begin, stop, row), backend=backend, form="chunked")
            torch.testing.assert_close(states[row : row + 1, number], there, rtol=0, atol=1e-5)
        torch.testing.assert_close(o[:, begin:end], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_gradients_reach_through_every_snapshot(name: str) -> None:
    op = getattr(ops, name)
    found = []
    for how in ({"form": "recurrent", "backend": "torch"}, {}):  # by itself: native, where it is
        given = arguments(name, 150)
        wide = {n: t.double() for n, t in given.items()} if how else given
        leaves = {n: t.clone().requires_grad_() for n, t in wide.items()}
        o, states = op(**leaves, snapshots=64, **how)
        loss = (
            o.square().sum() + (states * torch.tensor([1.0, -2.0, 3.0])[:, None, None, None]).square().sum()
        )
        found.append(torch.autograd.grad(loss, list(leaves.values())))
    for a, b in zip(*found, strict=True):
        assert float((a - b).abs().max()) <= 2e-5 * float(a.abs().max())


@pytest.mark.skipif(not native.available, reason=f"no native kernels: {native.reason}")
@pytest.mark.parametrize("name", OPS)
def test_the_native_kernels_write_them_on_their_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of the kernel, not one for each piece."""
    calls: list[int] = []
    kernel = TABLE[name, "chunked", "native"]

    def counted(**given: Any) -> tuple[Tensor, Any]:
        calls.append(given["v"].shape[1])
        return kernel.run(**given)

    monkeypatch.setitem(TABLE, (name, "chunked", "native"), type(kernel)(**{**vars(kernel), "run": counted}))
    getattr(ops, name)(**arguments(name, 300), snapshots=64)
    assert calls == [300]


@pytest.mark.parametrize("name", OPS)
def test_what_is_no_place_of_a_snapshot_is_refused(name: str) -> None:
    given = arguments(name, 1)
    for wrong in (0, -64, 100, 64.0, True):
        with pytest.raises(ArgumentError, match=rf"{name}: snapshots must be .* multiple of 64 tokens.*got"):
            getattr(ops, name)(**given, snapshots=wrong)
    with pytest.raises(ArgumentError, match=f"{name}: form 'step' takes one token and has no snapshots"):
        getattr(ops, name)(**given, snapshots=64, form="step")
    o, states = getattr(ops, name)(**given, snapshots=64)
    assert o.shape[1] == 1 and states.shape[1] == 1
