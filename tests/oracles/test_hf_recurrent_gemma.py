"""``rglru`` is the recurrent block of Hugging Face's RecurrentGemma, weights copied.

Theirs drops the convolution's inputs when a text goes on by more than one token, so what is expected of a text in
pieces is what theirs makes of it in one piece; single tokens it decodes rightly. Its state lives in the module.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from linstate.mixers.rglru import RGLRU
from linstate.models.families.recurrent_gemma import recurrent
from oracles.hf_weights import by_rules
from oracles.oracle import CUT, deviation, hf_module, hold, pieces, randomise

pytestmark = pytest.mark.oracle

D = 48


@torch.no_grad()
def test_rglru(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    modeling = hf_module("recurrent_gemma", monkeypatch)
    config = modeling.RecurrentGemmaConfig(
        hidden_size=D, lru_width=D, num_attention_heads=3, num_key_value_heads=1, conv1d_width=4
    )
    theirs = modeling.RecurrentGemmaRecurrentBlock(config, layer_idx=0).eval()
    randomise(theirs, recurrent_param=lambda u: 3 * u - 5)
    gate = theirs.rg_lru
    ours = RGLRU(D, num_heads=3)
    ours.load_state_dict(by_rules(theirs, recurrent(D)))

    def read(x: Tensor, start: int) -> tuple[Tensor, dict[str, Any]]:
        places = torch.arange(start, start + x.shape[1]).expand(x.shape[0], -1)
        y, _ = theirs(x, places, attention_mask=torch.ones_like(places))
        return y, {
            "S": gate.recurrent_states[:, None, None].clone(),
            "conv": theirs.conv1d_state.transpose(1, 2).clone(),
            "position": places[:, -1] + 1,
        }

    inputs = pieces(D)
    first = read(inputs[0], 0)
    lost, _ = read(inputs[1], CUT)
    whole, after = read(torch.cat(inputs[:2], dim=1), 0)
    decoded = read(inputs[2], whole.shape[1])
    hold(ours, [first, (whole[:, CUT:], after), decoded], inputs)
    assert deviation(lost, whole[:, CUT:]) > 0.01, (
        "theirs carries its convolution now: hold it in pieces, too"
    )
