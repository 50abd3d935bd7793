"""``rwkv4`` and its channel mix are Hugging Face's RWKV layers, weights copied.

Theirs goes on from its state in pieces of any size; the state's tensors have the layer as last axis.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from linstate.mixers.base import Place
from linstate.mixers.rwkv4 import RWKV4
from linstate.models.families.rwkv import channel_mix, time_mix
from linstate.models.feed_forward import RWKV4ChannelMix
from oracles.hf_weights import by_rules
from oracles.oracle import agree, hf_module, hold, pieces, randomise

pytestmark = pytest.mark.oracle

D, INDEX, PLACES = 48, 1, 3
PLACE = Place(INDEX, PLACES, first=False)


def empty_state(batch: int) -> list[Tensor]:
    """Shifts of channel and time mix, numerator, denominator and maximum."""
    zeros = [torch.zeros(batch, D, PLACES) for _ in range(5)]
    return [*zeros[:4], zeros[4] - 1e30]


def config_of(modeling: Any) -> Any:
    return modeling.RwkvConfig(hidden_size=D, num_hidden_layers=PLACES, vocab_size=10)


@pytest.mark.parametrize("loud", [1, 60], ids=["keys around one", "keys whose exponentials overflow"])
@torch.no_grad()
def test_time_mix(loud: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    modeling = hf_module("rwkv", monkeypatch)
    model = modeling.RwkvModel(config_of(modeling))
    theirs, ours = model.blocks[INDEX].attention.eval(), RWKV4(D, place=PLACE)
    initial = [getattr(theirs, f"time_mix_{name}").flatten() for name in ("key", "value", "receptance")]
    torch.testing.assert_close(ours.mix, 1 - torch.stack(initial), msg="initial mix")
    torch.testing.assert_close(ours.decay, theirs.time_decay, msg="initial decay")

    randomise(
        theirs,
        time_decay=lambda u: 4 * u - 4,
        **{f"time_mix_{name}": lambda u: u for name in ("key", "value", "receptance")},
    )
    theirs.key.weight.mul_(loud)
    ours.load_state_dict(by_rules(theirs, time_mix(D)))
    inputs, expected, state = pieces(D), [], empty_state(2)
    for x in inputs:
        # theirs takes one token with a state as [B, D], and then gives every row the first row's shift
        y = []
        for row in range(2):
            own = [t[row : row + 1].clone() for t in state]
            out, own = theirs(x[row : row + 1], state=own, use_cache=True)
            y.append(out)
            for whole, part in zip(state, own, strict=True):
                whole[row : row + 1] = part
        shift, num, den, top = (t[:, :, INDEX].clone()[:, None] for t in state[1:])
        expected.append((torch.cat(y), {"S": torch.stack([num, den], dim=1), "max": top, "shift": shift}))
    hold(ours, expected, inputs)
    if loud > 1:
        assert expected[0][1]["max"].max() > 89, "float32 holds these exponentials: nothing is tried"


@torch.no_grad()
def test_channel_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    modeling = hf_module("rwkv", monkeypatch)
    model = modeling.RwkvModel(config_of(modeling))
    theirs, ours = model.blocks[INDEX].feed_forward.eval(), RWKV4ChannelMix(D, place=PLACE)
    agree("initial mix", ours.mix[0], 1 - theirs.time_mix_key.flatten())
    randomise(theirs, time_mix_key=lambda u: u, time_mix_receptance=lambda u: u)
    ours.load_state_dict(by_rules(theirs, channel_mix(D)))
    inputs, expected, state = pieces(D, batch=1), [], empty_state(1)
    for x in inputs:
        y, state = theirs(x, state=state)
        expected.append((y, {"shift": state[0][:, :, INDEX].clone()[:, None]}))
    hold(ours, expected, inputs)
