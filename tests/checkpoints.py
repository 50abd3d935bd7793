"""A small checkpoint as its library lays it out, written without that library: by the inverse of the weight table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from linstate.models.checkpoint import own_weights
from linstate.models.families import find
from linstate.models.families._rules import save
from linstate.models.families._settings import Settings
from small_models import tokenizer

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "eos_token_id": 0,
}
TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}{{ '<|system|>' + messages[0]['content'] + '\\n' }}{% endif %}
{%- for message in messages if message['role'] != 'system' %}
    {{- '<|' + message['role'] + '|>' + (message['content'] | trim) + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}"""


def weights(raw: dict[str, Any] = CONFIG, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under their names."""
    settings = Settings(raw, "config.json")
    family = find(raw, "config.json")
    config = family.config(settings)
    generator = torch.Generator().manual_seed(seed)
    ours = {
        name: torch.randn(t.shape, generator=generator) * (2.0 / t.shape[-1] ** 0.5 if t.dim() > 1 else 0.3)
        for name, t in own_weights(config).items()
    }
    return save(family.weights(config, settings, {}), ours)


def write(folder: Path, raw: dict[str, Any] = CONFIG, *, shards: int = 1, seed: int = 0) -> Path:
    """A whole folder: configuration, weights in so many files, tokenizer, chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "tokenizer.json").write_text(tokenizer().to_str())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|end|>"}, "chat_template": TEMPLATE})
    )
    made = {name: t.contiguous() for name, t in weights(raw, seed).items()}
    if shards == 1:
        safetensors.torch.save_file(made, folder / "model.safetensors")
        return folder
    places = {
        name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(made))
    }
    for file in set(places.values()):
        part = {name: t for name, t in made.items() if places[name] == file}
        safetensors.torch.save_file(part, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder
