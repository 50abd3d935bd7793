"""Encoders as models: heads, masks, configuration, saving and loading, training."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from laws.laws import BOUND, close, identical
from laws.mixer_cases import VOCABULARY, random_tokens, randomise
from linstate.errors import ArgumentError, CheckpointError, ConfigError
from linstate.mixers import encoders
from linstate.models import Encoder, EncoderConfig

EVERY = pytest.mark.parametrize("name", encoders.names())
SMALL = {"num_heads": 2, "head_dim": 8, "projected": 6}


def config(*pattern: str, **fields: Any) -> EncoderConfig:
    options = {n: {k: x for k, x in SMALL.items() if k in encoders.find(n).options()} for n in pattern}
    given = {"options": options, "d_ff": 24, "max_length": 30, **fields}
    return EncoderConfig(VOCABULARY, 16, pattern, **given)


def build(*pattern: str, dtype: torch.dtype = torch.float64, **fields: Any) -> Encoder:
    torch.manual_seed(0)
    model = Encoder(config(*pattern, **fields))
    return randomise(model).to(dtype).eval().requires_grad_(False)  # type: ignore[return-value]


@pytest.mark.parametrize("head", [None, "masked_lm", "classification"])
@EVERY
def test_padding_changes_nothing_wherever_it_stands(name: str, head: str | None) -> None:
    model = build(name, name, head=head, num_labels=3 if head == "classification" else 0, token_types=2)
    rows = [random_tokens(1, n, seed=n) for n in (20, 7, 1)]
    tokens, mask = torch.zeros(3, 24, dtype=torch.int64), torch.zeros(3, 24, dtype=torch.int64)
    places = [torch.arange(2, 22), torch.tensor([0, 3, 4, 9, 10, 11, 23]), torch.tensor([5])]
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        tokens[i, place], mask[i, place] = row[0], 1
    types = torch.ones_like(tokens)
    found = model(tokens, mask=mask, types=types)
    other = model(torch.where(mask.bool(), tokens, 9), mask=mask.bool(), types=types * mask)
    identical(other, found, "what stands where nothing counts")
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        alone = model(row, types=torch.ones_like(row))
        if head == "classification":
            assert found.shape == (3, 3)
            close(found[i : i + 1], alone, BOUND[torch.float64], f"{name}: row {i}")
            continue
        assert found.shape == (3, 24, VOCABULARY if head else 16)
        close(found[i, place], alone[0], BOUND[torch.float64], f"{name}: row {i}")
        assert not found[i][mask[i] == 0].any(), "zeros where nothing counts"
    identical(model(tokens, mask=torch.ones_like(mask)), model(tokens), "a mask of ones")


def test_types_and_positions_count() -> None:
    model, tokens = build("bidirectional_linear", token_types=2), random_tokens(1, 9)
    identical(model(tokens, types=torch.zeros_like(tokens)), model(tokens), "type 0 is the default")
    assert not torch.equal(model(tokens, types=torch.ones_like(tokens)), model(tokens))
    assert not torch.allclose(model(tokens.flip(1)).flip(1), model(tokens)), "the order counts"


@pytest.mark.parametrize("head", [None, "masked_lm", "classification"])
@torch.no_grad()
def test_saved_and_loaded(tmp_path: Path, head: str | None) -> None:
    fields = {"head": head, "num_labels": 4 if head == "classification" else 0, "token_types": 3}
    model = build(*encoders.names(), dtype=torch.float32, **fields)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    loaded = Encoder.from_pretrained(tmp_path)
    assert loaded.config == model.config and not loaded.training
    for key, tensor in model.state_dict().items():
        identical(loaded.state_dict()[key], tensor, key)
    # where in memory a weight lies may choose another sum in a matmul of a slice
    close(loaded(random_tokens(2, 9)), model(random_tokens(2, 9)), BOUND[torch.float32], "the loaded model")
    build(*encoders.names(), dtype=torch.bfloat16, **fields).save_pretrained(tmp_path)
    assert Encoder.from_pretrained(tmp_path).embedding.weight.dtype == torch.bfloat16


def test_what_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        Encoder.from_pretrained(tmp_path)
    build("fnet").save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "model_type": "linstate"}))
    with pytest.raises(
        CheckpointError, match="model_type 'linstate' cannot be read; Linstate reads: fnet, linstate_encoder"
    ):
        Encoder.from_pretrained(tmp_path)
    raw["architecture"]["head"] = "masked_lm"
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"do not fit the configuration: missing head_bias"):
        Encoder.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        Encoder.from_pretrained(tmp_path)


def test_the_configuration_is_checked_and_comes_back() -> None:
    full = config("fnet", "linformer", num_layers=5, head="classification", num_labels=2, token_types=2)
    assert EncoderConfig.from_dict(json.loads(json.dumps(full.to_dict()))) == full
    assert full.layers == ("fnet", "linformer", "fnet", "linformer", "fnet")
    assert EncoderConfig(5, 8, ("fnet",)).d_ff == 32
    for fields, said in (
        ({"pattern": "fnet"}, "pattern must be a list of encoder names, got 'fnet'"),
        ({"pattern": ("gla",)}, "there is no encoder 'gla'"),
        ({"max_length": 0}, "max_length must be an integer of at least 1, got 0"),
        ({"head": "tail"}, "head must be None, 'masked_lm' or 'classification', got 'tail'"),
        ({"head": "classification"}, "num_labels must be an integer of at least 1, got 0"),
        ({"options": {"linformer": {}}}, r"options are given for 'linformer', which is not in .*\['fnet'\]"),
    ):
        with pytest.raises(ConfigError, match=said):
            EncoderConfig(**{"vocab_size": 5, "d_model": 8, "pattern": ("fnet",), **fields})
    with pytest.raises(ConfigError, match=r"unknown \['colour'\], missing \['d_model'\]"):
        EncoderConfig.from_dict({"vocab_size": 5, "pattern": ["fnet"], "colour": "red"})
    with pytest.raises(ConfigError, match="has format 2, this Linstate reads format 1"):
        EncoderConfig.from_dict({**full.to_dict(), "format": 2})
    with pytest.raises(ConfigError, match="encoder 'fnet' has no option 'wheels'; it has: none"):
        Encoder(config("fnet", options={"fnet": {"wheels": 1}}))


def test_texts_that_do_not_fit() -> None:
    model = build("fnet", token_types=2)
    good = random_tokens(2, 4)
    for call, said in (
        ((torch.zeros(2, 4), {}), "tokens must be int64 [B, T], got torch.float32 [2, 4]"),
        ((random_tokens(1, 31), {}), "a text must have 1 to max_length=30 tokens, got 31"),
        ((good[:, :0], {}), "a text must have 1 to max_length=30 tokens, got 0"),
        ((good + VOCABULARY, {}), f"tokens must lie in [0, {VOCABULARY})"),
        ((good, {"types": good[:1]}), "types must have the shape of tokens [2, 4], got [1, 4]"),
        ((good, {"types": good * 0 + 2}), "types must lie in [0, 2), got 2 to 2"),
        ((good, {"mask": good[:, :3]}), "mask must have the shape of tokens [2, 4], got [2, 3]"),
        (
            (good, {"mask": torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0]])}),
            "at least one token count in every row",
        ),
    ):
        with pytest.raises(ArgumentError, match=re.escape(said)):
            model(call[0], **call[1])


def bytes_of_a_real_text() -> torch.Tensor:
    source = Path(inspect.getfile(argparse)).read_bytes()
    return torch.frombuffer(bytearray(source), dtype=torch.uint8).long()


@pytest.mark.slow
@EVERY
def test_training_lowers_the_loss(name: str) -> None:
    """Masked bytes of a real text: better than knowing how often each byte stands in it."""
    torch.manual_seed(0)
    data, hole, length = bytes_of_a_real_text(), 256, 8
    options = {
        k: x for k, x in {"num_heads": 4, "head_dim": 16}.items() if k in encoders.find(name).options()
    }
    model = Encoder(
        EncoderConfig(
            257, 64, (name, name), options={name: options}, d_ff=128, max_length=length, head="masked_lm"
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    draw, losses = torch.Generator().manual_seed(1), []
    for step in range(200):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 30)
        starts = torch.randint(len(data) - length, (64,), generator=draw)
        text = torch.stack([data[start : start + length] for start in starts.tolist()])
        hidden = torch.rand(text.shape, generator=draw) < 0.15
        loss = F.cross_entropy(model(text.masked_fill(hidden, hole))[hidden], text[hidden])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        losses.append(loss.item())
    first, last = sum(losses[:5]) / 5, sum(losses[-30:]) / 30
    counts = torch.bincount(data).double()
    entropy = float(torch.distributions.Categorical(counts).entropy())
    assert first > 4.5 and last < entropy - 0.08, (
        f"{name}: {first:.2f}, then {last:.2f}; single bytes {entropy:.2f}"
    )


@EVERY
def test_classification_is_learned(name: str) -> None:
    """Whether token 1 or token 2 stands somewhere in a text: no single place tells."""
    torch.manual_seed(0)
    model = Encoder(config(name, d_ff=32, head="classification", num_labels=2))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    draw, right = torch.Generator().manual_seed(0), []
    for _ in range(150):
        tokens = torch.randint(3, VOCABULARY, (32, 12), generator=draw)
        label = torch.randint(2, (32,), generator=draw)
        tokens[torch.arange(32), torch.randint(12, (32,), generator=draw)] = label + 1
        logits = model(tokens)
        loss = F.cross_entropy(logits, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right.append((logits.argmax(-1) == label).double().mean().item())
    assert sum(right[-20:]) / 20 > 0.9, f"{name}: {sum(right[-20:]) / 20:.2f} right"
