"""What a setting that Linstate does not ask for means: nothing where its library cannot see it, and an error where it can."""

from __future__ import annotations

import json
import runpy
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import checkpoints
from linstate import LanguageModel
from linstate.errors import CheckpointError, ConfigError
from linstate.models.checkpoint import read_config
from linstate.models.families import find
from linstate.models.families._settings import HEEDED_ELSEWHERE, NO_EFFECT, Settings, seen_settings

TOOL = Path(__file__).resolve().parents[2] / "tools" / "seen_settings.py"
# What stands in configurations that people have, beside what their class asks for.
HARMLESS: dict[str, Any] = {
    "language_model_only": False,
    "unsloth_version": "2026.11.1",
    "unsloth_fixed": True,
    "model_name": "unsloth/some-model",
    "use_cache": True,
    "_name_or_path": "some/where",
    "top_k": 20,
    "top_p": 0.95,
    "temperature": 0.6,
    "do_sample": True,
    "generation_config": {"top_k": 20},
    "mtp_loss_weight": 0.1,
}
CODESTRAL = {"intermediate_size": 8192, "time_step_init_scheme": "random", "time_step_scale": 1.0}
MAMBA2 = {
    "model_type": "mamba2",
    "vocab_size": 32768,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 16,
    "n_groups": 2,
    "state_size": 16,
}


def configured(raw: dict[str, Any]) -> Any:
    family = find(raw, "config.json")
    settings = Settings(raw, "config.json", family.library)
    config = family.config(settings)
    settings.finish()
    return config


@pytest.mark.parametrize("raw", [checkpoints.CONFIG, {**MAMBA2}], ids=["qwen3_5_text", "mamba2"])
def test_what_their_class_cannot_see_changes_nothing_and_is_named_once(raw: dict[str, Any]) -> None:
    more = HARMLESS | (CODESTRAL if raw["model_type"] == "mamba2" else {})
    with pytest.warns(UserWarning, match="does not look at these settings") as said:
        config = configured({**raw, **more})
    assert len(said) == 1
    assert all(name in str(said[0].message) for name in more if name not in NO_EFFECT)
    assert config == configured(raw)


def test_a_whole_model_with_them_is_read(tmp_path: Path) -> None:
    plain = LanguageModel.from_pretrained(checkpoints.write(tmp_path / "plain"))
    folder = checkpoints.write(tmp_path / "tuned")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **HARMLESS}))
    with pytest.warns(UserWarning, match="unsloth_version"):
        tuned = LanguageModel.from_pretrained(folder)
    assert tuned.fingerprint == plain.fingerprint


def test_text_inside_of_a_model_with_eyes(tmp_path: Path) -> None:
    text = {key: value for key, value in checkpoints.CONFIG.items() if key != "eos_token_id"}
    raw = {
        "model_type": "qwen3_5",
        "text_config": {**text, "unsloth_version": "1"},
        "language_model_only": False,
    }
    with pytest.warns(UserWarning, match=r"language_model_only, text_config\.unsloth_version"):
        configured(raw)
    raw["text_config"]["pad_token_type"] = None
    raw["text_config"]["head_dim"] = "16"
    with pytest.raises(ConfigError, match="head_dim"):
        configured(raw)


@pytest.mark.parametrize("name", sorted(HEEDED_ELSEWHERE))
def test_what_other_engines_heed_is_refused(name: str) -> None:
    if name in ("output_gate_type", "sliding_window"):
        raw = {**MAMBA2, name: 7}
    else:
        raw = {**checkpoints.CONFIG, name: True}
    with pytest.raises(ConfigError, match=f"{name} is .* vLLM"):
        configured(raw)


@pytest.mark.parametrize("raw", [checkpoints.CONFIG, MAMBA2], ids=["qwen3_5_text", "mamba2"])
def test_nothing_that_their_class_sees_is_left_out_in_silence(raw: dict[str, Any]) -> None:
    seen, silent = seen_settings()["transformers"][raw["model_type"]], []
    assert len(seen) > 30
    for name in seen:
        odd = {**raw, name: {"odd": "value"}}
        try:
            family = find(odd, "config.json")
            settings = Settings(odd, "config.json", family.library)
            family.config(settings)
            settings.finish()
        except (ConfigError, CheckpointError, AttributeError, TypeError, ValueError, UserWarning):
            continue
        if name not in NO_EFFECT | settings.all_ignored():
            silent.append(name)
    assert not silent


def test_scaled_positions_stay_refused() -> None:
    raw = {
        **checkpoints.CONFIG,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "factor": 4.0},
    }
    with pytest.raises(ConfigError, match=r"factor = 4\.0"):
        configured(raw)


@pytest.mark.parametrize(
    ("said", "read"),
    [
        (
            {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"num_bits": 8}},
            True,
        ),
        ({"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"}, True),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}, "kv_cache_scheme": {}},
            False,
        ),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, False),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, False),
    ],
)
def test_a_quantised_cache_is_no_quantised_model(said: dict[str, Any], read: bool) -> None:
    raw = {**checkpoints.CONFIG, "quantization_config": said}
    if read:
        assert configured(raw) == configured(checkpoints.CONFIG)
    else:
        with pytest.raises(ConfigError, match="quantised"):
            configured(raw)


@pytest.mark.parametrize(
    "changed",
    [{"num_hidden_layers": 100_000}, {"vocab_size": 2**40}, {"num_hidden_layers": 9000, "layer_types": None}],
)
def test_sizes_that_no_model_has_are_refused_before_anything_is_made(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    folder = checkpoints.write(tmp_path / "m")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changed}))
    with pytest.raises((ConfigError, CheckpointError), match=r"more than|layers"):
        LanguageModel.from_pretrained(folder)
    if "layer_types" not in changed:
        with pytest.raises(ConfigError, match="more than the"):
            read_config(folder)


def test_the_list_is_what_the_installed_libraries_say() -> None:
    pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    versions = seen_settings()["versions"]
    for name, version in versions.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "none"
        if found != version:
            pytest.skip(f"{name} is {found}; the list is of {version}: python tools/seen_settings.py")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = runpy.run_path(str(TOOL))["collect"]()
    assert made == seen_settings()
