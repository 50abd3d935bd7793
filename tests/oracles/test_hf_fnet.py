"""The FNet encoder is Hugging Face's, weights copied: vectors, masked-LM logits, classification."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from linstate.models import Encoder, EncoderConfig
from oracles.oracle import BOUND, agree, deviation, hf_module, randomise

pytestmark = pytest.mark.oracle

VOCABULARY, D, LAYERS, TYPES = 61, 24, 3, 2

NAMES = {
    "embeddings.word_embeddings.weight": "embedding.weight",
    "embeddings.position_embeddings.weight": "positions.weight",
    "embeddings.token_type_embeddings.weight": "types.weight",
    "embeddings.LayerNorm": "embedding_norm",
    "embeddings.projection": "embedding_proj",
    "pooler.dense": "head_proj",
    "predictions.transform.dense": "head_proj",
    "predictions.transform.LayerNorm": "head_norm",
    "predictions.bias": "head_bias",
    "classifier": "labels",
    **{f"encoder.layer.{i}.fourier.output.LayerNorm": f"layers.{i}.mixer_norm" for i in range(LAYERS)},
    **{f"encoder.layer.{i}.intermediate.dense": f"layers.{i}.up" for i in range(LAYERS)},
    **{f"encoder.layer.{i}.output.dense": f"layers.{i}.down" for i in range(LAYERS)},
    **{f"encoder.layer.{i}.output.LayerNorm": f"layers.{i}.ff_norm" for i in range(LAYERS)},
}
"""Their name, or how it begins, to ours."""


def copied(theirs: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, tensor in theirs.state_dict().items():
        short = name.removeprefix("fnet.").removeprefix("cls.")
        for start, ours in NAMES.items():
            if short == start or short.startswith(start + "."):
                found[ours + short[len(start) :]] = tensor
    return found


@pytest.mark.parametrize("tokens", [1, 2, 37])
@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("FNetModel", None),
        ("FNetForMaskedLM", "masked_lm"),
        ("FNetForSequenceClassification", "classification"),
    ],
)
@torch.no_grad()
def test_fnet(kind: str, head: str | None, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    modeling = hf_module("fnet", monkeypatch)
    config = modeling.FNetConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        num_hidden_layers=LAYERS,
        intermediate_size=40,
        max_position_embeddings=50,
        type_vocab_size=TYPES,
        num_labels=3,
    )
    theirs = getattr(modeling, kind)(config).eval()
    randomise(theirs)
    labels = 3 if head == "classification" else 0
    fields = {"d_ff": 40, "max_length": 50, "token_types": TYPES, "head": head, "num_labels": labels}
    ours = Encoder(EncoderConfig(VOCABULARY, D, ("fnet",), LAYERS, **fields)).eval()
    weights = copied(theirs)
    if head is None:
        weights = {name: t for name, t in weights.items() if not name.startswith("head_proj")}  # their pooler
    ours.load_state_dict(weights)
    ids = torch.randint(VOCABULARY, (2, tokens))
    types = torch.randint(TYPES, (2, tokens))
    found = ours(ids, types=types)
    expected = theirs(input_ids=ids, token_type_ids=types)
    agree("output", found, expected.last_hidden_state if head is None else expected.logits)
    agree("without types", ours(ids), theirs(input_ids=ids)[0])
    assert deviation(ours(ids.flip(1), types=types), found) > 100 * BOUND or tokens == 1
