"""Every mixer learns: a tiny model of it, trained a hundred steps on the bytes of a real text, predicts better and better."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from laws.mixer_cases import D_MODEL, variants
from linstate import mixers
from linstate.models import Decoder, ModelConfig

STEPS, ROWS, TOKENS, RATE = 100, 8, 48, 5e-3


def text() -> torch.Tensor:
    """The bytes of a file of the standard library."""
    source = Path(inspect.getfile(argparse)).read_bytes()
    return torch.frombuffer(bytearray(source), dtype=torch.uint8).long()


def losses_of(name: str) -> list[float]:
    """The loss in nats per byte of every step, on other pieces of the text each."""
    torch.manual_seed(0)
    options = variants(name).get("several heads", {})
    model = Decoder(ModelConfig(256, D_MODEL, (name, name), options={name: options}, d_ff=2 * D_MODEL))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    data, draw, losses = text(), torch.Generator().manual_seed(1), []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 10)
        starts = torch.randint(len(data) - TOKENS - 1, (ROWS,), generator=draw)
        batch = torch.stack([data[start : start + TOKENS + 1] for start in starts.tolist()])
        logits, _ = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        losses.append(loss.item())
    return losses


def entropy_of_bytes() -> float:
    """What knowing how often each byte stands in the text, and nothing before it, comes to."""
    counts = torch.bincount(text()).double()
    return float(torch.distributions.Categorical(counts).entropy())


@pytest.mark.slow
@pytest.mark.parametrize("name", mixers.names())
def test_the_loss_falls(name: str) -> None:
    losses = losses_of(name)
    first, middle, last = (sum(part) / len(part) for part in (losses[:5], losses[40:60], losses[-10:]))
    assert 5 < losses[0] < 5.7, (
        f"{name}: an untrained model knows nothing (5.55), yet its loss is {losses[0]:.2f}"
    )
    assert first > middle > last, f"{name}: {first:.2f}, {middle:.2f}, {last:.2f}"
    assert last < entropy_of_bytes() - 0.3, (
        f"{name}: {last:.2f} nats per byte; single bytes have {entropy_of_bytes():.2f}, so no use of the text before"
    )
