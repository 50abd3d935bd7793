"""``mamba2`` is Hugging Face's Mamba-2 mixer, weights copied."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linstate.mixers.mamba2 import Mamba2
from linstate.models.families._mamba import mamba2_rules
from oracles.hf_weights import by_rules
from oracles.oracle import hf_module, hold, pieces, randomise

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("limit", [None, (0.02, 0.3)])
@torch.no_grad()
def test_mamba2(groups: int, limit: tuple[float, float] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    modeling = hf_module("mamba2", monkeypatch)
    config = modeling.Mamba2Config(
        hidden_size=48,
        num_heads=6,
        head_dim=16,
        state_size=20,
        n_groups=groups,
        conv_kernel=4,
        chunk_size=32,
        num_hidden_layers=1,
        **({} if limit is None else {"time_step_limit": limit}),
    )
    theirs = modeling.Mamba2Mixer(config, layer_idx=0).eval()
    randomise(theirs, A_log=lambda u: 2 * u - 2, dt_bias=lambda u: 2 * u - 4)
    ours = Mamba2(
        48, num_heads=6, head_dim=16, state_size=20, num_groups=groups, conv_width=4, dt_limit=limit
    )
    ours.load_state_dict(by_rules(theirs, mamba2_rules()))

    cache = modeling.DynamicCache(config=config)
    inputs, expected = pieces(48), []
    for x in inputs if limit is None else inputs[:2]:  # their decoding step forgets the limit
        y = theirs(x, cache_params=cache)
        state: dict[str, Tensor] = {
            "S": cache.get_recurrent_state(0).transpose(-1, -2).clone(),
            "conv": cache.get_conv_state(0)[..., 1:].transpose(1, 2).clone(),
        }
        expected.append((y, state))
    hold(ours, expected, inputs[: len(expected)])
