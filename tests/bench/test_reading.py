"""How time and memory grow with the text: what is kept of it, and what is resident."""

from __future__ import annotations

import torch

from linstate.bench.reading import kv_cache_bytes, read_curve, resident_bytes, softmax_twin
from linstate.models import Decoder, ModelConfig


def test_the_twin_keeps_what_the_formula_says():
    config = ModelConfig(
        vocab_size=64, d_model=64, pattern=("gla", "mamba2"), num_layers=3, options={"gla": {"head_dim": 32}}
    )
    twin = softmax_twin(config)
    assert twin.config.layers == ("attention",) * 3
    points = list(read_curve(twin, 96, block=32))
    positions = 3 * (8 + 8)  # a position and a length, int64, for each layer
    assert [p.state_bytes - positions for p in points] == [kv_cache_bytes(config, n) for n in (32, 64, 96)]
    recurrent = list(read_curve(Decoder(config).eval(), 96, block=32))
    assert len({p.state_bytes for p in recurrent}) == 1
    assert [p.position for p in recurrent] == [0, 32, 64]


def test_resident_memory_sees_a_large_tensor():
    before = resident_bytes()
    held = torch.ones(64 * 2**18)  # 64 MB
    assert resident_bytes() - before > 50 * 2**20
    assert held.sum() > 0
