"""``mlstm`` is Hugging Face's layer in xLSTM, weights copied: C, n and m, in pieces, chunks and steps, gates far above 0."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linstate.mixers.mlstm import MLSTM
from linstate.models.families.xlstm import mlstm
from oracles.hf_weights import by_rules
from oracles.oracle import hf_module, hold, pieces, randomise

pytestmark = pytest.mark.oracle

D, H, K, V = 48, 3, 16, 32


@pytest.mark.parametrize("push", [0.0, 12.0])
@torch.no_grad()
def test_xlstm(push: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``push`` the input gates are near exp(12), so the normaliser rules; without, its lower bound does."""
    torch.manual_seed(0)
    modeling = hf_module("xlstm", monkeypatch)
    config = modeling.xLSTMConfig(
        hidden_size=D, num_heads=H, qk_dim_factor=1.0, v_dim_factor=2.0, chunk_size=16, num_hidden_layers=1
    )
    theirs = modeling.xLSTMLayer(config).eval()
    randomise(theirs)
    theirs.fgate_preact.bias += 2
    theirs.igate_preact.bias += push
    ours = MLSTM(D, num_heads=H, head_dim=K, v_head_dim=V)
    ours.load_state_dict(by_rules(theirs, mlstm({"num_heads": H, "head_dim": K, "v_head_dim": V})))
    inputs, expected, state = pieces(D), [], None
    for x in inputs:
        y, state = theirs(x, state)
        c, n, m = (t.clone() for t in state)
        kept: dict[str, Tensor] = {"S": torch.cat([c, n[..., None]], dim=-1), "m": m.squeeze(-1)}
        expected.append((y, kept))
    hold(ours, expected, inputs)
