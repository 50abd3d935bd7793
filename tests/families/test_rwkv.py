"""RWKV-4: what its configurations can say."""

from __future__ import annotations

from typing import Any

from families.cases import hf

TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 5, "rescale_every": 2}
RATES = {f"time_mix_{name}": lambda u: u for name in ("key", "value", "receptance")}
VALUES = {"time_decay": lambda u: 4 * u - 4, **RATES}


CASES = [
    hf("rwkv", "rwkv", values=VALUES, rounds=True, **TINY),
    hf(
        "rwkv-wide-tied",
        "rwkv",
        seed=1,
        values=VALUES,
        embedding=0.2,
        rounds=True,
        **{**TINY, "num_hidden_layers": 3, "intermediate_size": 72, "tie_word_embeddings": True},
    ),
]
