"""xLSTM: what its configurations can say."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from families.cases import hf

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_heads": 2,
    "chunk_size": 16,
    "ffn_round_up_to_multiple_of": 8,
}


def forgetful(model: nn.Module) -> None:
    """Gates that keep something, and let something in; feed-forwards that write less (``families.cases.hf``: branches)."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("fgate_preact.bias"):
                weight += 2
            elif name.endswith("proj_down.weight"):
                weight *= 0.25


CASES = [
    hf("xlstm", "xlstm", adjust=forgetful, wide=True, **TINY),
    hf(
        "xlstm-wide",
        "xlstm",
        seed=1,
        adjust=forgetful,
        wide=True,
        **{
            **TINY,
            "qk_dim_factor": 1.0,
            "v_dim_factor": 1.5,
            "gate_soft_cap": 4.0,
            "output_logit_soft_cap": 2.0,
            "ffn_proj_factor": 2.0,
        },
    ),
]
