"""The decoder: logits as asked for, hybrids, what it costs, and calls that do not fit."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from laws.laws import BOUND, close, identical, identical_state, leaves, same_state, take
from laws.mixer_cases import VOCABULARY, decoder, patterns, random_tokens
from linstate.errors import ArgumentError
from linstate.models import Decoder, ModelConfig
from linstate.types import state_bytes

HYBRID = ("gated_deltanet", "mamba2", "attention", "rwkv7")
WIDE = BOUND[torch.float64]


@pytest.fixture(scope="module")
def model() -> Decoder:
    return decoder(HYBRID)


def test_layers_follow_the_pattern() -> None:
    built = decoder(HYBRID, num_layers=6)
    assert [type(b.mixer).__name__ for b in built.blocks()] == [
        "GatedDeltaNet", "Mamba2", "Attention", "RWKV7", "GatedDeltaNet", "Mamba2"
    ]  # fmt: skip
    state = built.init_state(2)
    assert {name.split(".")[1] for name in state} == {"0", "1", "2", "3", "4", "5"}
    assert all(t.shape[0] == 2 for t in state.values())
    assert "layers.3.ff.shift" in state, "RWKV-7 brings its own feed-forward, which has a state"
    plain = decoder(HYBRID, feed_forward="swiglu")
    assert not any(".ff." in name for name in plain.init_state())


def test_logits_all_last_and_none(model: Decoder) -> None:
    tokens = random_tokens(2, 9)
    everything, state = model(tokens)
    assert everything.shape == (2, 9, VOCABULARY)
    last, after = model(tokens, logits="last")
    close(last, everything[:, -1:], WIDE, "last")
    identical_state(after, state, "state with logits='last'")
    nothing, after = model(tokens, logits="none")
    assert nothing.numel() == 0
    identical_state(after, state, "state with logits='none'")


def test_last_of_packed_and_of_padded_rows(model: Decoder) -> None:
    first, second = random_tokens(1, 6), random_tokens(1, 3, seed=5)
    alone = [model(row)[0][:, -1:] for row in (first, second)]
    packed, _ = model(torch.cat([first, second], 1), cu_seqlens=torch.tensor([0, 6, 9]), logits="last")
    for i, expected in enumerate(alone):
        close(packed[i : i + 1], expected, WIDE, f"packed, sequence {i}")
    padded = torch.cat([first, torch.cat([torch.zeros_like(first[:, 3:]), second], 1)])
    mask = torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
    for tokens, which in ((padded, mask), (padded.flip(1), mask.flip(1))):
        found, _ = model(tokens, mask=which, logits="last")
        assert found.shape == (2, 1, VOCABULARY)
        if tokens is padded:
            for i, expected in enumerate(alone):
                close(found[i : i + 1], expected, WIDE, f"padded left, row {i}")


def test_a_mask_of_ones_is_no_mask(model: Decoder) -> None:
    tokens = random_tokens(2, 5)
    for mask in (torch.ones(2, 5), torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 5, dtype=torch.int64)):
        identical(model(tokens, mask=mask)[0], model(tokens)[0], "a mask of ones")


def test_a_row_of_padding_only_keeps_its_state(model: Decoder) -> None:
    tokens, more = random_tokens(2, 5), random_tokens(2, 4, seed=7)
    _, state = model(tokens)
    logits, after = model(more, state, mask=torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]))
    same_state(take(after, slice(1, 2)), take(state, slice(1, 2)), WIDE, "the row that read nothing")
    expected, _ = model(more[:1], take(state, slice(0, 1)))
    close(logits[:1], expected, WIDE, "the row that read on")


def test_streaming_is_reading_at_once(model: Decoder) -> None:
    tokens = random_tokens(1, 80)
    whole, end = model(tokens)
    state, parts = None, []
    for piece in tokens.split([1, 30, 1, 40, 8], dim=1):
        logits, state = model(piece, state)
        parts.append(logits)
    close(torch.cat(parts, 1), whole, WIDE, "logits")
    same_state(state, end, WIDE, "state")


def test_nothing_to_read(model: Decoder) -> None:
    _, state = model(random_tokens(2, 5))
    logits, after = model(random_tokens(2, 0), state)
    assert logits.shape == (2, 0, VOCABULARY)
    identical_state(after, state, "no tokens")


def test_what_it_costs() -> None:
    for name, pattern in patterns().items():
        model = decoder(pattern, torch.float32)
        _, state = model(random_tokens(1, 20))
        assert model.state_bytes(20) == state_bytes(state), name
        assert model.flops(10) >= 10 * model.flops(1) > 2 * VOCABULARY * model.config.d_model, name
        assert model.parameter_count() == sum(p.numel() for p in set(model.parameters())), name


def test_tied_and_untied_heads() -> None:
    tied, untied = decoder(("gated_deltanet",)), decoder(("gated_deltanet",), tie_embeddings=False)
    assert tied.head.weight is tied.embedding.weight and untied.head.weight is not untied.embedding.weight
    assert untied.parameter_count() - tied.parameter_count() == VOCABULARY * tied.config.d_model


def test_norms() -> None:
    model = decoder(("gated_deltanet",), norm="layernorm", embedding_norm=True)
    kinds = [
        type(m)
        for m in (model.norm, model.embedding_norm, model.blocks()[0].mixer_norm, model.blocks()[0].ff_norm)
    ]
    assert kinds == [nn.LayerNorm] * 4
    assert type(decoder(("gated_deltanet",)).embedding_norm) is nn.Identity


def test_initial_weights_keep_the_residual_stream_in_size() -> None:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(VOCABULARY, 64, ("gated_deltanet", "attention"), num_layers=8))
    assert abs(float(model.embedding.weight.detach().std()) - 0.02) < 2e-3
    assert abs(float(model.blocks()[0].ff.down.weight.detach().std()) - 0.02 / 4) < 1e-3  # type: ignore[union-attr]
    logits, _ = model(random_tokens(2, 30))
    assert float(logits.detach().abs().max()) < 2, "an untrained model is not sure of anything"


def test_tokens_that_do_not_fit(model: Decoder) -> None:
    for wrong, said in (
        (torch.zeros(3, dtype=torch.int64), "tokens must be int64 [B, T], got torch.int64 [3]"),
        (torch.zeros(1, 3), "tokens must be int64 [B, T], got torch.float32 [1, 3]"),
        (torch.tensor([[1, VOCABULARY]]), f"token ids must lie in [0, {VOCABULARY}), got 1 to {VOCABULARY}"),
        (torch.tensor([[-1, 2]]), f"token ids must lie in [0, {VOCABULARY}), got -1 to 2"),
    ):
        with pytest.raises(ArgumentError, match=re.escape(said)):
            model(wrong)
    assert model(torch.tensor([[1, 2]], dtype=torch.int32))[0].shape == (1, 2, VOCABULARY)


def test_masks_and_boundaries_that_do_not_fit(model: Decoder) -> None:
    tokens = random_tokens(2, 4)
    for mask in (torch.ones(2, 5), torch.zeros(2, 3), torch.ones(4)):
        with pytest.raises(
            ArgumentError,
            match=re.escape(f"mask must have the shape of tokens [2, 4], got {list(mask.shape)}"),
        ):
            model(tokens, mask=mask)
    one = random_tokens(1, 4)
    bounds = torch.tensor([0, 2, 4])
    for mask in (torch.ones(1, 4), torch.tensor([[1, 1, 1, 0]])):
        with pytest.raises(ArgumentError, match="mask or cu_seqlens, not both"):
            model(one, mask=mask, cu_seqlens=bounds)
    with pytest.raises(ArgumentError, match="cu_seqlens must rise from 0 to T=4"):
        model(one, cu_seqlens=torch.tensor([0, 2, 3]))
    with pytest.raises(ArgumentError, match="B must be 1, got B=2"):
        model(tokens, cu_seqlens=torch.tensor([0, 4]))


def test_the_last_of_nothing(model: Decoder) -> None:
    with pytest.raises(ArgumentError, match="at least one token that counts in every row of mask"):
        model(random_tokens(2, 3), mask=torch.tensor([[1, 1, 1], [0, 0, 0]]), logits="last")
    for call in ({"cu_seqlens": torch.tensor([0, 3, 3])}, {"cu_seqlens": torch.tensor([0, 0, 3])}):
        with pytest.raises(ArgumentError, match="logits='last' needs at least one token in every row"):
            model(random_tokens(1, 3), logits="last", **call)
    with pytest.raises(ArgumentError, match="logits='last' needs at least one token in every row"):
        model(random_tokens(1, 0), logits="last")
    with pytest.raises(ArgumentError, match="logits must be 'all', 'last', 'none' or 'hidden', got 'first'"):
        model(random_tokens(1, 3), logits="first")


def test_a_state_of_another_model(model: Decoder) -> None:
    tokens = random_tokens(2, 3)
    _, state = model(tokens)
    lost = {name: t for name, t in state.items() if name != "layers.0.mixer.S"}
    with pytest.raises(
        ArgumentError, match=r"state is not of this model: missing \['layers.0.mixer.S'\], unknown \[\]"
    ):
        model(tokens, lost)
    with pytest.raises(ArgumentError, match=r"missing \[\], unknown \['layers.9.mixer.S'\]"):
        model(tokens, {**state, "layers.9.mixer.S": state["layers.0.mixer.S"]})
    with pytest.raises(ArgumentError, match="state is not of this model: missing"):
        model(tokens, {})
    with pytest.raises(ArgumentError, match="initial_state"):
        model(tokens, take(state, slice(0, 1)))
    wrong: Tensor = state["layers.0.mixer.S"][..., :-1]
    with pytest.raises(ArgumentError, match="initial_state must have the shape"):
        model(tokens, {**state, "layers.0.mixer.S": wrong})
    assert leaves(state)


def test_a_layer_applied_again_is_the_same_layer_twice() -> None:
    """Recurrent depth: the weights once, a state for each application."""
    again = decoder(HYBRID, repeats=2)
    unrolled = decoder(tuple(name for name in HYBRID for _ in range(2)), num_layers=8)
    for i, block in enumerate(unrolled.layers):
        if i < 6:  # the last is RWKV-7, whose second copy would read the first one's values
            block.load_state_dict(again.layers[i // 2].state_dict())
        else:
            unrolled.layers[i] = again.layers[3]
    for part in ("embedding", "norm", "head"):
        unrolled.get_submodule(part).load_state_dict(again.get_submodule(part).state_dict())
    tokens = random_tokens(2, 9)
    (found, state), (expected, after) = again(tokens), unrolled(tokens)
    close(found, expected, WIDE, "logits")
    same_state(state, after, WIDE, "state")
    once = decoder(HYBRID)
    assert again.parameter_count() == once.parameter_count()
    assert {name.split(".")[1] for name in state} == {str(i) for i in range(8)}
    assert again.config.applied == unrolled.config.layers and again.config.layers == HYBRID
    assert again.state_bytes(20) == 2 * once.state_bytes(20)
    head = 2 * 10 * VOCABULARY * again.config.d_model
    assert again.flops(10) - head == 2 * (once.flops(10) - head)
