"""A tiny model trained on a task for some hundred steps: a plain loop, seeded."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from linstate.bench.compare import sizes
from linstate.bench.compare.tasks import IGNORED, Task
from linstate.models import Decoder

TEST_ROWS = 256

INITIAL_STD = 0.05
"""Of the first weights. With 0.02, which suits widths of several hundred, what a model of width 64 has to find is too faint to
be found soon: softmax attention then stays at 17% in recall of 8 pairs for 3,000 steps, with this it is at 99% after 690."""


def train(
    task: Task,
    mixer: str,
    *,
    options: dict[str, Any],
    rate: float,
    steps: int,
    rows: int,
    d_model: int = 64,
    layers: int = 2,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> dict[str, Any]:
    """Train a model of a mixer with AdamW and test it: accuracy at the asked positions, by the name of the test.

    It ends before ``steps`` when the mean loss of 20 steps is below what is ``enough`` for the task.

    Args:
        rate: the highest learning rate; it rises over the first tenth of the steps and falls as a cosine to zero.
        rows: sequences in a batch; every batch is new.
        on_step: gets each step and its loss.
    """
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed + 1)
    model = Decoder(sizes.config(mixer, task.vocab_size, d_model, layers, options))
    model.init_weights(INITIAL_STD)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm, total_iters=warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm)),
        ],
        [warm],
    )
    begin, recent = time.perf_counter(), deque[float](maxlen=20)
    for step in range(1, steps + 1):
        ids, labels = task.train[step % len(task.train)](rows, draw)
        logits, _ = model(ids)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        on_step(step, loss.item())
        if len(recent) == recent.maxlen and sum(recent) < task.enough * len(recent):
            break
    return {
        "accuracy": test(model.eval(), task),
        "loss": sum(recent) / len(recent),
        "steps": step,
        "weights": sizes.weights_of(model),
        "seconds": round(time.perf_counter() - begin, 1),
    }


@torch.no_grad()
def test(model: Decoder, task: Task, seed: int = 1_000_003) -> dict[str, float]:
    """The share of asked positions that are answered right, by the name of the test."""
    found = {}
    for name, drawn in task.test.items():
        ids, labels = drawn(TEST_ROWS, torch.Generator().manual_seed(seed))
        asked = labels != IGNORED
        said = model(ids)[0].argmax(-1)
        found[name] = float((said == labels)[asked].float().mean())
    return found
