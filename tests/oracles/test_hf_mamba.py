"""``mamba`` is Hugging Face's Mamba mixer, weights copied.

Theirs forgets the scan's state when a text goes on by more than one token, so what is expected of a text in pieces is
what theirs makes of it in one piece; single tokens it decodes rightly.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from linstate.mixers.mamba import Mamba
from linstate.models.families._mamba import mamba_rules
from oracles.hf_weights import by_rules
from oracles.oracle import CUT, TOKENS, deviation, hf_module, hold, pieces, randomise

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("rank", [3, "auto"])
@torch.no_grad()
def test_mamba(rank: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    modeling = hf_module("mamba", monkeypatch)
    config = modeling.MambaConfig(
        hidden_size=48, state_size=10, conv_kernel=4, expand=2, time_step_rank=rank, num_hidden_layers=1
    )
    theirs = modeling.MambaMixer(config, layer_idx=0).eval()
    randomise(theirs, A_log=lambda u: 2 * u - 2, **{"dt_proj.bias": lambda u: 2 * u - 4})
    ours = Mamba(48, state_size=10, dt_rank=None if rank == "auto" else rank)
    ours.load_state_dict(by_rules(theirs, mamba_rules()))

    def read(x: Tensor, cache: Any) -> tuple[Tensor, dict[str, Tensor]]:
        y = theirs(x, cache_params=cache)
        return y, {
            "S": cache.get_recurrent_state(0).transpose(-1, -2)[:, None].clone(),
            "conv": cache.get_conv_state(0)[..., 1:].transpose(1, 2).clone(),
        }

    inputs = pieces(48)
    begun, cache = modeling.DynamicCache(config=config), modeling.DynamicCache(config=config)
    first = read(inputs[0], begun)
    whole, after = read(torch.cat(inputs[:2], dim=1), cache)
    decoded = read(inputs[2], cache)
    hold(ours, [first, (whole[:, CUT:], after), decoded], inputs)

    lost, _ = read(inputs[1], begun)
    assert deviation(lost, whole[:, CUT:]) > 0.01, "theirs carries its state now: hold it in pieces, too"
    assert whole.shape[1] == TOKENS
