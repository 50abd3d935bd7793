"""Folders of checkpoints: whole ones load, in one file or several, and what is wrong with others is said by name."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import checkpoints
from linstate import LanguageModel
from linstate.errors import CheckpointError, ConfigError, LinstateError
from linstate.models.checkpoint import read_config
from linstate.models.families._rules import Concat, Each, Groups, Stack, Transpose, interleaved, rule

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoints.write(tmp_path / "m")


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def test_shards_are_the_same_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And transformers is not needed."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    whole = LanguageModel.from_pretrained(folder)
    parts = LanguageModel.from_pretrained(checkpoints.write(tmp_path / "parts", shards=3))
    assert whole.fingerprint == parts.fingerprint
    assert whole.decoder.config == read_config(folder)
    assert whole.ends == (0,)


def test_weights_in_bfloat16(folder: Path) -> None:
    model = LanguageModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.decoder.parameters()} == {torch.bfloat16}
    assert model.generate("entry 7", max_tokens=5).ids
    saved = {name: t.bfloat16() for name, t in checkpoints.weights().items()}
    safetensors.torch.save_file(saved, folder / "model.safetensors")
    again = LanguageModel.from_pretrained(folder)
    assert {p.dtype for p in again.decoder.parameters()} == {torch.float32}, "the default on a CPU"
    assert LanguageModel.from_pretrained(folder, dtype=torch.bfloat16).fingerprint == model.fingerprint


def test_end_tokens(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    model = LanguageModel.from_pretrained(folder)
    assert model.ends == (5, 7), "generation_config.json says more than config.json"
    state = model.read("entry 7")
    first = model.generate("", state, max_tokens=1).ids[0]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, first]}))
    assert LanguageModel.from_pretrained(folder).generate("", state).ids == ()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": "end"}))
    with pytest.raises(CheckpointError, match="must be a number or a list of numbers, found 'end'"):
        LanguageModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"model_type": "llama"}, "'llama' cannot be read; Linstate reads: .*qwen3_5_text"),
        ({"model_type": None}, "model_type None cannot be read"),
        ({"hidden_size": None}, r"config\.json has no hidden_size"),
        ({"hidden_size": "32"}, "hidden_size must be a whole number, found '32'"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number, found True"),
        ({"layer_types": ["linear_attention", "moon"]}, "layer_types has 'moon', which Linstate does not do"),
        ({"layer_types": ["linear_attention"]}, "layer_types must be a list of 2 names"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', which Linstate does not do; it does 'silu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling: rope_type is 'yarn'"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"quantised \(awq\)"),
    ],
)
def test_what_a_configuration_says_and_we_do_not_do(folder: Path, changed: dict[str, Any], says: str) -> None:
    edit(folder / "config.json", lambda raw: raw.update(changed))
    (folder / "model.safetensors").write_bytes(b"never looked at")
    with pytest.raises(LinstateError, match=says):
        read_config(folder)
    if "quantization_config" not in changed:
        with pytest.raises(LinstateError, match=says):
            LanguageModel.from_pretrained(folder)


def test_tensors_that_do_not_fit_are_all_named(folder: Path) -> None:
    found = checkpoints.weights()
    del found["model.layers.0.mlp.down_proj.weight"]
    found["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(8, 32)
    found["extra.weight"] = torch.zeros(3)
    found["mtp.fc.weight"] = torch.zeros(3)  # is known, and not needed
    found["model.norm.weight"] = torch.zeros(32, dtype=torch.int8)
    safetensors.torch.save_file(found, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as raised:
        LanguageModel.from_pretrained(folder)
    said = str(raised.value)
    for part in (
        "missing model.layers.0.mlp.down_proj.weight",
        "unknown extra.weight",
        "model.layers.1.self_attn.k_proj.weight is [8, 32], expected [32, 32]",
        "model.norm.weight is stored as I8, which is quantised",
    ):
        assert part in said
    assert "mtp" not in said


def test_a_head_that_should_be_tied_is_not_ignored(folder: Path) -> None:
    raw = {**checkpoints.CONFIG, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(raw))
    found = checkpoints.weights(raw)
    assert "lm_head.weight" not in found
    found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(found, folder / "model.safetensors")
    LanguageModel.from_pretrained(folder)
    found["lm_head.weight"] += 1
    safetensors.torch.save_file(found, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not what the configuration says"):
        LanguageModel.from_pretrained(folder)


def test_broken_files(folder: Path, tmp_path: Path) -> None:
    parts = checkpoints.write(tmp_path / "parts", shards=3)
    content = (parts / SHARD).read_bytes()
    for broken in (content[:-8], content[:5], b""):
        (parts / SHARD).write_bytes(broken)
        with pytest.raises(CheckpointError, match=f"{SHARD} cannot be read"):
            LanguageModel.from_pretrained(parts)
    (parts / SHARD).unlink()
    with pytest.raises(CheckpointError, match=f"{SHARD} cannot be read"):
        LanguageModel.from_pretrained(parts)
    (parts / SHARD).write_bytes((parts / "model-00001-of-00003.safetensors").read_bytes())
    with pytest.raises(
        CheckpointError, match=rf"{SHARD} holds .*, which model-00001-of-00003\.safetensors holds too"
    ):
        LanguageModel.from_pretrained(parts)
    (parts / SHARD).write_bytes(content)
    (parts / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        LanguageModel.from_pretrained(parts)
    for name in (3, "../model.safetensors", "model.bin"):
        (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match="is no name of a safetensors file in this folder"):
            LanguageModel.from_pretrained(parts)

    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json; transformers writes one"):
        LanguageModel.from_pretrained(folder)
    checkpoints.write(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"has no model\.safetensors; pytorch_model\.bin may be pickled"
    ):
        LanguageModel.from_pretrained(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config\.json is no JSON object: found list"):
        LanguageModel.from_pretrained(folder)


def test_the_hub_when_it_cannot_be_reached(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network what is in the cache is used; what is not gives a clear error, and so does what is no name."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        CheckpointError, match="no model folder some/model, and the Hugging Face Hub cannot be reached"
    ):
        LanguageModel.from_pretrained("some/model")
    kept, revision = tmp_path / "cache" / "models--some--model", "0" * 40
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(revision)
    checkpoints.write(kept / "snapshots" / revision)
    model = LanguageModel.from_pretrained("some/model")
    assert model.name == "model" and model.fingerprint == LanguageModel.from_pretrained(folder).fingerprint
    with pytest.raises(CheckpointError, match="there is no model folder /some/model; give a folder"):
        LanguageModel.from_pretrained("/some/model")


def test_a_loaded_checkpoint_saved_as_ours_is_the_same(folder: Path, tmp_path: Path) -> None:
    model = LanguageModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "ours")
    again = LanguageModel.from_pretrained(tmp_path / "ours")
    assert again.fingerprint == model.fingerprint and again.ends == model.ends
    messages = [{"role": "user", "content": "entry 7?"}]
    assert again.chat_prompt(messages) == model.chat_prompt(messages)


def test_steps_are_undone() -> None:
    """Each step on tensors without symmetry; `interleaved` also against indices written out."""
    a, b = torch.randn(6, 4), torch.randn(2, 4)
    r = rule(("a", "b"), "c", Each(interleaved([1, 2], 2), None), Concat(6, 2), Transpose())
    (made,) = r.load({"a": a, "b": b}.__getitem__).values()
    assert torch.equal(made.T, torch.cat([a[[0, 3, 1, 2, 4, 5]], b]))
    back = r.save({"c": made}.__getitem__)
    assert torch.equal(back["a"], a) and torch.equal(back["b"], b)
    experts = {name: torch.randn(2, 3) for name in ("g0", "u0", "g1", "u1")}
    r = rule(list(experts), "up", Groups(2, Concat(2, 2)), Stack())
    made = r.load(experts.__getitem__)["up"]
    assert made.shape == (2, 4, 3) and torch.equal(made[1, 2:], experts["u1"])
    assert all(torch.equal(t, experts[name]) for name, t in r.save({"up": made}.__getitem__).items())


def test_config_errors_are_config_errors(folder: Path) -> None:
    edit(folder / "config.json", lambda raw: raw.update(hidden_act="gelu"))
    with pytest.raises(ConfigError):
        read_config(folder)
