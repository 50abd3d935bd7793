"""Encoders: found by their files, held against the dense formulas of their papers, and blind to padding."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from laws.laws import BOUND, close, identical
from laws.mixer_cases import randomise
from linstate import mixers
from linstate.errors import ConfigError
from linstate.mixers import encoders
from linstate.mixers.encoders import EncoderMixer
from linstate.mixers.encoders.bidirectional_linear import BidirectionalLinear
from linstate.mixers.encoders.bidirectional_performer import BidirectionalPerformer
from linstate.mixers.encoders.fnet import FNet
from linstate.mixers.encoders.linformer import Linformer

EVERY = pytest.mark.parametrize("name", encoders.names())
D, T, H, K = 32, 23, 2, 16
WIDE = BOUND[torch.float64]


def build(name: str) -> EncoderMixer:
    torch.manual_seed(0)
    options = {"num_heads": H, "head_dim": K, "projected": 5}
    kind = encoders.find(name)
    mixer = kind.build(name, D, 40, {key: x for key, x in options.items() if key in kind.options()})
    return randomise(mixer).double().requires_grad_(False)  # type: ignore[return-value]


def text(rows: int = 2, tokens: int = T) -> Tensor:
    return torch.randn(rows, tokens, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_one_file_for_each_and_none_of_them_is_a_mixer() -> None:
    folder = Path(inspect.getfile(encoders)).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "base"}
    assert {name for name in files if not name.startswith("_")} == set(encoders.names())
    assert {"fnet", "linformer", "bidirectional_linear", "bidirectional_performer"} <= set(encoders.names())
    assert not {"encoders", *encoders.names()} & set(mixers.names()), "they are not causal"
    with pytest.raises(ConfigError, match=r"there is no encoder 'gla'; there are: .*fnet"):
        encoders.find("gla")


@EVERY
def test_it_says_what_it_is_and_checks_its_options(name: str) -> None:
    kind = encoders.find(name)
    documented = inspect.getmodule(kind).__doc__ or ""
    assert "Source:" in documented and "arXiv" in documented and any(c.isdigit() for c in kind.source)
    assert not {"d_model", "max_length"} & set(kind.options())
    with pytest.raises(ConfigError, match=f"encoder '{name}' has no option 'wheels'; it has: "):
        kind.build(name, D, 40, {"wheels": 4})


@EVERY
def test_every_token_sees_every_other(name: str) -> None:
    mixer, x = build(name), text(1)
    whole = mixer(x)
    assert whole.shape == x.shape
    for at in (0, T // 2, T - 1):
        other = x.clone()
        other[:, at] *= 0.5
        assert (mixer(other) != whole).any(-1).all(), f"{name}: token {at} is not seen by all"


@EVERY
def test_padding_changes_nothing(name: str) -> None:
    mixer, x, lengths = build(name), text(4), torch.tensor([T, 7, 1, 7])
    found = mixer(x, lengths)
    spoilt = x.clone()
    for row, length in enumerate(lengths.tolist()):
        close(found[row, :length], mixer(x[row : row + 1, :length])[0], WIDE, f"{name}: row {row} alone")
        spoilt[row, length:] = float("nan")
    again = mixer(spoilt, lengths)
    for row, length in enumerate(lengths.tolist()):
        close(again[row, :length], found[row, :length], WIDE, f"{name}: row {row} before what is no number")
    close(mixer(x, torch.full((4,), T)), mixer(x), WIDE, f"{name}: all count")


@EVERY
def test_dtypes_and_gradients(name: str) -> None:
    x = text()
    for dtype in (torch.float32, torch.bfloat16):
        y = build(name).to(dtype)(x.to(dtype))
        assert y.dtype == dtype and torch.isfinite(y).all()
    mixer = build(name).requires_grad_()
    mixer(x.requires_grad_()).square().sum().backward()
    for key, parameter in (("x", x), *mixer.named_parameters()):
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, f"{name}: {key}"


def test_fnet_is_two_matrices_of_roots_of_unity() -> None:
    """Equations 1 and 3 of the paper: sums over every token and channel, written out."""
    x = text(2, 5)

    def dft(size: int) -> Tensor:
        place = torch.arange(size, dtype=torch.float64)
        return torch.polar(
            torch.ones(size, size, dtype=torch.float64), -2 * math.pi * place[:, None] * place / size
        )

    expected = (dft(5) @ x.to(torch.complex128) @ dft(D)).real
    close(FNet(D, 40)(x), expected, WIDE, "FNet")


@pytest.mark.parametrize("share_kv", [False, True])
def test_linformer_is_its_dense_formula(share_kv: bool) -> None:
    """Equation 7 of the paper, head by head."""
    torch.manual_seed(0)
    mixer = Linformer(D, 40, projected=5, num_heads=H, head_dim=K, share_kv=share_kv).double()
    mixer = randomise(mixer).requires_grad_(False)  # type: ignore[assignment]
    x = text()
    E = mixer.E[:, :T]
    values = E if mixer.F is None else mixer.F[:, :T]
    heads = []
    for h in range(H):
        q, k, v = (
            x @ mixer.in_proj.weight[(part * H + h) * K : (part * H + h + 1) * K].T for part in range(3)
        )
        weights = (q @ torch.einsum("pn,bnk->bkp", E, k) / K**0.5).softmax(-1)
        heads.append(weights @ torch.einsum("pn,bnk->bpk", values, v))
    close(mixer(x), torch.cat(heads, -1) @ mixer.out_proj.weight.T, WIDE, "Linformer")


def test_bidirectional_linear_is_its_quadratic_formula() -> None:
    """Equation 3 of Katharopoulos 2020 over all pairs, similarity ``phi(q) . phi(k)``."""
    mixer, x = build("bidirectional_linear"), text()
    assert isinstance(mixer, BidirectionalLinear)
    q, k, v = (x @ mixer.in_proj.weight.T).unflatten(-1, (3, H, K)).transpose(1, 3).unbind(2)
    similar = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2)
    o = similar / similar.sum(-1, keepdim=True) @ v
    close(mixer(x), o.transpose(1, 2).flatten(-2) @ mixer.out_proj.weight.T, 1e-6, "linear")  # eps is 1e-6


def test_bidirectional_performer_nears_softmax_as_features_grow() -> None:
    """The mean error over draws falls as one over the root of the number of features."""
    x, errors = text() / 2, []
    for count in (64, 1024):
        torch.manual_seed(0)
        mixer = BidirectionalPerformer(D, 40, num_heads=H, head_dim=K, num_features=count).double()
        mixer = randomise(mixer).requires_grad_(False)  # type: ignore[assignment]
        q, k, v = (x @ mixer.in_proj.weight.T).unflatten(-1, (3, H, K)).transpose(1, 3).unbind(2)
        o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        expected = o @ mixer.out_proj.weight.T
        found = []
        for _ in range(24):
            mixer.redraw()
            found.append(((mixer(x) - expected).square().mean() / expected.square().mean()).sqrt())
        errors.append(torch.stack(found).mean().item())
    assert errors[1] < 0.2, errors
    assert 2.5 < errors[0] / errors[1] < 6.0, errors  # sixteen times the features: a quarter


def test_performer_s_features_neither_overflow_nor_vanish() -> None:
    mixer, x = build("bidirectional_performer"), text() * 30
    y = mixer(x)
    assert torch.isfinite(y).all() and y.abs().max() > 0.1
    lengths = torch.tensor([5, T])
    x[0, 5:] *= 1e3  # would have the largest logarithm, but does not count
    close(mixer(x, lengths)[:1, :5], mixer(x[:1, :5]), WIDE, "a huge token that does not count")


def test_redraw_and_weights_are_all_there_is() -> None:
    first, second = build("bidirectional_performer"), build("bidirectional_performer")
    assert isinstance(second, BidirectionalPerformer)
    second.redraw()
    assert not torch.equal(first(text()), second(text()))
    second.load_state_dict(first.state_dict())
    identical(second(text()), first(text()), "features are saved with the weights")
