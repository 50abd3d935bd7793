"""One token of softmax attention in a call: the numbers of the torch path in fp64, blocks and heads of any number, the cache's law."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import linstate.mixers as mixers
from linstate import Decoder, ModelConfig
from linstate.errors import ArgumentError
from linstate.models.packed import pack
from linstate.ops import native
from linstate.ops.native import attend as native_attend

pytestmark = pytest.mark.skipif(not native.available, reason="no native extension")

OPTIONS = (
    {"num_heads": 8, "num_kv_heads": 2, "head_dim": 32, "rotary_base": 1e4, "rotary_dim": 8, "qk_norm": "zero_centred", "output_gate": True},
    {"num_heads": 3, "head_dim": 20, "qk_norm": True, "scale": 0.3},
    {"num_heads": 7, "num_kv_heads": 1, "head_dim": 16, "rotary_base": 1e6},
)  # fmt: skip


def near(found: Tensor, exact: Tensor, bound: float = 1e-2) -> bool:
    return bool((found.double() - exact).norm() <= bound * exact.norm())


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("places", [0, 5, 700])
@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_a_token_is_that_of_the_definition(options: dict[str, object], places: int, isa: str) -> None:
    torch.manual_seed(0)
    mixer = mixers.find("attention").build("attention", 64, dict(options))
    for p in mixer.parameters():
        p.normal_(std=0.3)
    mixer.to(torch.bfloat16)
    exact = copy.deepcopy(mixer).double()
    x, state = torch.randn(1, 1, 64).bfloat16(), mixer.init_state(1)
    if places:  # of which two do not count
        shape = (1, places, *state["k"].shape[2:])
        k, v = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()
        k[:, :2], v[:, :2] = torch.nan, torch.nan
        length = torch.tensor([places - 2])
        state = {"k": k, "v": v, "length": length, "position": length + 100_000}
    with native.using(isa):
        y, after = mixer(x, state)
    wide = {n: (t.double().nan_to_num() if t.is_floating_point() else t) for n, t in state.items()}
    expected, expected_after = exact(x.double(), wide)
    assert near(y, expected)
    assert torch.equal(after["length"], expected_after["length"])
    assert torch.equal(after["position"], expected_after["position"])
    for name in ("k", "v"):
        assert torch.equal(after[name][:, :places].nan_to_num(), state[name].nan_to_num())
        assert near(after[name][:, places], expected_after[name][:, places])


@torch.no_grad()
def test_threads_change_nothing() -> None:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, 1, 8 * 32).bfloat16(),
        torch.randn(1, 1, 64).bfloat16(),
        torch.randn(1, 1, 64).bfloat16(),
    )
    cache = (
        torch.randn(1, 900, 2, 32).bfloat16(),
        torch.randn(1, 900, 2, 32).bfloat16(),
        torch.tensor([900]),
        torch.tensor([900]),
    )
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(native_attend.step(q, k, v, None, cache, (8, 2), scale=0.2)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def model() -> Decoder:
    torch.manual_seed(0)
    options = {"attention": {"num_heads": 2, "head_dim": 16, "output_gate": True}}
    config = ModelConfig(
        vocab_size=64, d_model=32, pattern=("attention", "gated_deltanet"), options=options, d_ff=64
    )
    made = Decoder(config).eval().to(torch.bfloat16)
    pack(made)
    return made


@torch.no_grad()
def test_a_recorded_cache_grows_where_it_is_and_forks_stay_apart() -> None:
    decoder = model()
    tokens = torch.randint(64, (1, 100), generator=torch.Generator().manual_seed(1))
    _, state = decoder(tokens[:, :3])
    begin = {n: t.clone() for n, t in state.items()}
    states = [state]
    for t in tokens[:, 3:].split(1, dim=1):
        states.append(decoder(t, states[-1])[1])
    assert decoder.step is not None and (step := decoder.step._steps[1]) is not None
    assert len(step.parts) == 1  # attention, too, is in the program
    name = "layers.0.mixer.k"
    assert states[10][name].data_ptr() == states[9][name].data_ptr()  # not copied
    assert len({s[name].data_ptr() for s in states}) == 3  # the reading's, and two memories that it grew into
    kept = {n: t.clone() for n, t in states[10].items()}
    _, fork = decoder(tokens[:, :1], states[10])
    _, again = decoder(tokens[:, 13:14], states[10])
    assert fork[name].data_ptr() != states[11][name].data_ptr()
    assert not torch.equal(fork[name], again[name])
    assert all(torch.equal(again[n], states[11][n]) for n in again)
    assert all(torch.equal(states[10][n], t) for n, t in kept.items())
    assert all(torch.equal(states[0][n], t) for n, t in begin.items())


@torch.no_grad()
def test_a_cache_of_a_wrong_shape_is_refused() -> None:
    decoder = model()
    _, state = decoder(torch.zeros(1, 1, dtype=torch.int64))
    wrong = {**state, "layers.0.mixer.v": state["layers.0.mixer.v"][:, :0]}
    with pytest.raises(ArgumentError, match=r"layers\.0\.mixer\.v must have the shape \[1, 1, 2, 16\]"):
        decoder(torch.zeros(1, 1, dtype=torch.int64), wrong)
