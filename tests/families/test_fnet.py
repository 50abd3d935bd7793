"""FNet: checkpoints of transformers, bare and with its heads, read as encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from linstate import LanguageModel
from linstate.errors import CheckpointError, ConfigError
from linstate.models import Encoder
from linstate.models.checkpoint import Weights, read_json
from linstate.models.families import encoder_families, find_encoder
from linstate.models.families._rules import save
from linstate.models.families._settings import NO_EFFECT, Settings
from oracles.oracle import BOUND, agree, deviation, hf_module, randomise
from small_models import tokenizer

pytestmark = pytest.mark.oracle

VOCABULARY, D, TYPES = 61, 24, 2
KINDS = ["FNetModel", "FNetForMaskedLM", "FNetForPreTraining", "FNetForSequenceClassification"]


@pytest.fixture(params=KINDS)
def theirs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model that is saved in ``tmp_path``."""
    torch.manual_seed(0)
    modeling = hf_module("fnet", monkeypatch)
    config = modeling.FNetConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        num_hidden_layers=3,
        intermediate_size=40,
        max_position_embeddings=50,
        type_vocab_size=TYPES,
        num_labels=3,
    )
    model = getattr(modeling, request.param)(config).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    return model


@torch.no_grad()
def test_outputs_are_theirs(theirs: Any, tmp_path: Path) -> None:
    ours = Encoder.from_pretrained(tmp_path)
    for tokens in (1, 2, 37):
        ids, types = torch.randint(VOCABULARY, (2, tokens)), torch.randint(TYPES, (2, tokens))
        found, expected = ours(ids, types=types), theirs(input_ids=ids, token_type_ids=types)
        agree("output", found, expected[0])
        agree("without types", ours(ids), theirs(input_ids=ids)[0])
        assert deviation(ours(ids.flip(1), types=types), found) > 100 * BOUND or tokens == 1


@torch.no_grad()
def test_bfloat16(theirs: Any, tmp_path: Path) -> None:
    """Theirs has no Fourier transform in bfloat16: it computes in float32, with weights rounded to it."""
    theirs.bfloat16().save_pretrained(tmp_path)
    ours, ids = Encoder.from_pretrained(tmp_path), torch.randint(VOCABULARY, (2, 37))
    assert ours.embedding.weight.dtype == torch.bfloat16
    assert deviation(ours(ids).float(), theirs.float()(input_ids=ids)[0]) <= 2e-2


def test_the_weight_table_is_its_own_inverse(theirs: Any, tmp_path: Path) -> None:
    raw = read_json(tmp_path / "config.json")
    family, settings = find_encoder(raw, "config"), Settings(raw, "config")
    table = family.weights(family.config(settings), settings, {})
    back = save(table, Encoder.from_pretrained(tmp_path).state_dict())
    with Weights(tmp_path) as weights:
        for name, tensor in back.items():
            assert torch.equal(tensor, weights.read(name)), name
        left = weights.headers.keys() - back.keys()
    assert all("pooler" in name or "seq_relationship" in name for name in left), left


def test_every_setting_counts_or_is_refused(theirs: Any, tmp_path: Path) -> None:
    raw = {**read_json(tmp_path / "config.json"), "no_such_setting": 3}
    (family,) = encoder_families()

    def described(settings: Settings) -> Any:
        config = family.config(settings)
        table = family.weights(config, settings, {})
        settings.finish()
        return config, table

    with pytest.raises(ConfigError, match="no_such_setting"):
        described(Settings(raw, "config"))
    del raw["no_such_setting"]
    settings = Settings(raw, "config")
    kept = described(settings)[0]
    for name in set(raw) - NO_EFFECT - settings.all_ignored() - {"id2label", "label2id", "model_type"}:
        value = raw[name]
        other = not value if isinstance(value, bool) else "other" if isinstance(value, str) else 7
        try:
            assert described(Settings({**raw, name: other}, "config"))[0] != kept, name
        except ConfigError as error:
            assert name in str(error)


def test_an_encoder_is_no_language_model(theirs: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer().to_str())
    with pytest.raises(CheckpointError, match="is an encoder"):
        LanguageModel.from_pretrained(tmp_path)
