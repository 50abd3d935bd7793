"""In-Place TTT: the laws hold with it, it is the gradient step it says, and it can be switched on for any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laws.laws import (
    BOUND,
    check_causality,
    check_constant_memory,
    check_no_tokens,
    check_packing,
    check_padding,
    check_purity,
    check_rows,
    check_split_and_carry,
    check_state_matters,
    check_token_by_token,
    close,
    identical,
)
from laws.mixer_cases import decoder, decoder_subject, random_tokens
from linstate.errors import ConfigError
from linstate.models import Decoder, ModelConfig
from linstate.models.feed_forward import FeedForward, SwiGLU
from linstate.models.in_place_ttt import FAST, InPlaceTTT
from linstate.state.compose import compose
from linstate.types import LayerState
from small_models import build as language_model

WIDE = BOUND[torch.float64]
PATTERN = ("gated_deltanet", "rwkv7")  # rwkv7 brings a feed-forward with a state of its own
OPTIONS = {"chunk": 5, "lr": 0.02}


def learning(dtype: torch.dtype = torch.float64, **options: Any) -> Decoder:
    return decoder(PATTERN, dtype, in_place_ttt={**OPTIONS, **options})


def subject(rows: int, tokens: int, **how: Any) -> Any:
    return decoder_subject("in_place_ttt", learning(), rows, tokens, **how)


def test_split_and_carry() -> None:
    """Cuts on the grid of chunks, and between: 11 tokens were read before."""
    check_state_matters(subject(2, 12))
    check_no_tokens(subject(2, 12))
    check_split_and_carry(subject(2, 12), range(1, 12), WIDE)
    check_token_by_token(subject(2, 12), WIDE)
    check_split_and_carry(subject(1, 60, before=0), (1, 4, 5, 6, 30, 59), WIDE)


def test_the_fast_weights_alone_carry_what_they_must() -> None:
    """Dropping only the part of the state that is new here is seen."""
    model, tokens = learning(), random_tokens(2, 30)
    _, state = model(tokens[:, :17])
    whole, _ = model(tokens)
    for part in (FAST, "keys", "inputs"):
        lost = {n: torch.zeros_like(t) if n.endswith(f".ff.{part}") else t for n, t in state.items()}
        found, _ = model(tokens[:, 17:], lost)
        assert (found - whole[:, 17:]).abs().max() > 1e-4 * whole.abs().max(), f"nobody misses {part}"


def test_rows_packing_padding_causality_purity() -> None:
    check_rows(subject(3, 20), WIDE)
    check_packing(subject(4, 20), (3, 20, 0, 1), WIDE)
    for side in ("left", "right"):
        rows = [random_tokens(1, length, seed=length)[0] for length in (20, 7, 1, 13)]
        check_padding(learning(), rows, side, WIDE)
    check_causality(subject(2, 40), (0, 4, 5, 31, 39))
    check_purity(subject(2, 20))


def test_constant_memory() -> None:
    model = learning(torch.float32)
    check_constant_memory(model.state_bytes, decoder_subject("in_place_ttt", model, 2, 300, before=0))


@torch.no_grad()
def test_every_chunk_is_a_gradient_step_on_its_loss() -> None:
    """Token by token with torch's own gradient: ``L = -sum_t V_t . W h_t``, V by the convolution's taps one by one."""
    torch.manual_seed(0)
    D, C, T, lr = 8, 6, 32, 0.05
    ff = InPlaceTTT(SwiGLU(D, 12), chunk=C, lr=lr)
    for weight in ff.parameters():
        weight.copy_(torch.randn_like(weight) / weight.shape[-1] ** 0.5)
    inner = ff.inner
    assert isinstance(inner, SwiGLU)
    x = torch.randn(2, T, D)
    expected = torch.zeros_like(x)
    for b in range(2):
        W = inner.down.weight.clone()
        for start in range(0, T, C):
            part = x[b, start : start + C]
            gate, up = F.linear(part, inner.up.weight).chunk(2, -1)
            h = F.silu(gate) * up
            expected[b, start : start + C] = h @ W.T
            if len(part) < C:
                break
            V = torch.zeros(C, D)
            for t in range(C):
                for tap in range(5):
                    if 0 <= t + tap - 2 < C:
                        V[t] += ff.conv[:, 0, tap] * part[t + tap - 2]
            with torch.enable_grad():
                leaf = W.clone().requires_grad_()
                loss = -((V @ ff.target) * (h @ leaf.T)).sum()
                (gradient,) = torch.autograd.grad(loss, leaf)
            W = W - lr * gradient
        learned = W - inner.down.weight
        close(ff(x[:, : T // C * C])[1][FAST][b], learned, 1e-5, "fast weights")
        assert learned.abs().max() > 0.01
    close(ff(x)[0], expected, 1e-5, "output")


@torch.no_grad()
def test_switched_on_for_a_loaded_model() -> None:
    """The copy answers as before, has its new weights, learns once they are trained, and can be written and read."""
    plain = decoder(PATTERN, torch.float32)
    made = plain.with_in_place_ttt(layers=[1], chunk=4)
    tokens = random_tokens(2, 20)
    identical(made(tokens)[0], plain(tokens)[0], "before training")
    assert plain.config.in_place_ttt is None and not any(FAST in n for n in plain.init_state())
    assert {n for n in made.init_state() if FAST in n} == {f"layers.1.ff.{FAST}"}
    assert made.head.weight is made.embedding.weight and made.head.weight is not plain.head.weight
    blocks = made.blocks()
    assert isinstance(blocks[1].ff, InPlaceTTT) and not isinstance(blocks[0].ff, InPlaceTTT)
    with torch.no_grad():
        blocks[1].ff.conv.normal_()
    moved = made(tokens)[0] - plain(tokens)[0]
    assert not moved[:, :4].any() and moved[:, 4:].any(), "the first chunk is read with the weights before it"
    again = Decoder(ModelConfig.from_dict(made.config.to_dict()))
    again.load_state_dict(made.state_dict())
    identical(again(tokens)[0], made(tokens)[0], "written and read")
    with pytest.raises(ConfigError, match="in_place_ttt is switched on already"):
        made.with_in_place_ttt()


def test_in_a_language_model(tmp_path: Path) -> None:
    """Saved, loaded, and its state restored: the next tokens are the same."""
    model = language_model("delta")
    model.decoder = model.decoder.with_in_place_ttt(chunk=7)
    with torch.no_grad():
        for block in model.decoder.blocks():
            assert isinstance(block.ff, InPlaceTTT)
            block.ff.conv.normal_()
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    loaded.grid = model.grid
    assert loaded.fingerprint == model.fingerprint != language_model("delta").fingerprint
    model.read("a lamp is red, a chair is blue; " * 3).save(tmp_path / "a.state")
    state = loaded.load_state(tmp_path / "a.state")
    fast = [t for n, t in state.tensors.items() if n.endswith(FAST)]
    assert fast and all(t.abs().max() > 0 for t in fast)
    first, second = model.settle(state), model.read("a spoon is grey")
    both = compose(first, second)
    name = next(n for n in both.tensors if n.endswith(FAST))
    close(both.tensors[name], first.tensors[name] + second.tensors[name], 1e-6, "composed fast weights")
    assert both.composition == "approximate"


def test_it_can_be_trained() -> None:
    """Only the new weights, on text that repeats itself: the loss falls below what the model without them has."""
    torch.manual_seed(0)
    plain = Decoder(ModelConfig(50, 32, ("gla",), options={"gla": {"num_heads": 1, "head_dim": 8}}))
    made = plain.with_in_place_ttt(chunk=8, lr=1.0)
    ff = made.blocks()[0].ff
    assert isinstance(ff, InPlaceTTT)
    half = random_tokens(8, 16)
    tokens = torch.cat([half, half], 1)
    optimizer = torch.optim.Adam([ff.conv, ff.target], lr=0.03)
    losses = []
    for _ in range(60):
        logits, _ = made(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.15, losses[::10]


def test_a_feed_forward_without_a_down_projection_is_refused() -> None:
    class Flat(FeedForward):
        def forward(
            self, x: Tensor, state: LayerState | None = None, *, cu_seqlens: Tensor | None = None
        ) -> tuple[Tensor, LayerState]:
            return x, {}

    with pytest.raises(ConfigError, match="needs a feed-forward with a linear layer 'down', Flat has none"):
        InPlaceTTT(Flat(8))
    assert isinstance(InPlaceTTT(SwiGLU(8)).inner.down, nn.Linear)
