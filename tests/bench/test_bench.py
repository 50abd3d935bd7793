"""What the measurements measure: the same work for everybody, and what is kept of a text. No test here looks at a clock."""

from __future__ import annotations

import pytest
import torch

from linstate.bench.ops import Shape, as_json, cases, measure
from linstate.bench.reading import kv_cache_bytes, read_curve, resident_bytes, softmax_twin
from linstate.errors import ArgumentError
from linstate.models import Decoder, ModelConfig

SHAPE = Shape(tokens=70, heads=2, size=16)


def test_ours_and_theirs_do_the_same_work():
    compared = 0
    for case, runs in cases(SHAPE).items():
        results = {}
        for who, run in runs.items():
            o = run()
            o = o if isinstance(o, torch.Tensor) else o[0]
            results[who] = o.transpose(1, 2) if who == "torch sdpa" else o
        for who, o in results.items():
            torch.testing.assert_close(o, results["linstate"], rtol=1e-3, atol=1e-4, msg=f"{case}: {who}")
            compared += who != "linstate"
    assert compared >= 1


def test_rows_and_json():
    rows = [row for case in measure(SHAPE, rounds=1, only="g per head") for row in case]
    assert {row.case for row in rows} == {"delta_rule, g per head", "linear_attention, g per head"}
    assert all(row.ms > 0 and (row.ratio == 1) == (row.who == "linstate") for row in rows)
    made = as_json(rows)
    assert made["machine"]["torch"] == torch.__version__ and len(made["rows"]) == len(rows)
    with pytest.raises(ArgumentError, match="no case has 'nothing'"):
        next(measure(SHAPE, only="nothing"))


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
