"""The models of ``linstate bench model``: random weights in the shapes of real ones, as the folder that every library reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from linstate.models import Decoder, ModelConfig
from linstate.models.families import find
from linstate.models.families._rules import save
from linstate.models.families._settings import Settings


@dataclass(frozen=True)
class Case:
    """A model to measure.

    Attributes:
        raw: its ``config.json``, from which ours is read as from any checkpoint's.
        recurrent: its state does not grow, so it is measured at more than 8,192 tokens too.
        transformers: whether that library has it.
    """

    name: str
    raw: dict[str, Any]
    recurrent: bool
    transformers: bool = True

    @property
    def config(self) -> ModelConfig:
        return find(self.raw, self.name).config(Settings(self.raw, self.name))


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case(
            "mamba2-370m",
            {
                "model_type": "mamba2",
                "architectures": ["Mamba2ForCausalLM"],
                "vocab_size": 50288,
                "hidden_size": 1024,
                "num_hidden_layers": 48,
                "state_size": 128,
                "num_heads": 32,
                "head_dim": 64,
                "n_groups": 1,
                "expand": 2,
                "tie_word_embeddings": True,
            },
            recurrent=True,
        ),
        Case(
            "qwen3.5-0.8b",
            {
                "model_type": "qwen3_5_text",
                "architectures": ["Qwen3_5ForCausalLM"],
                "vocab_size": 248320,
                "hidden_size": 1024,
                "num_hidden_layers": 24,
                "intermediate_size": 3584,
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "head_dim": 256,
                "linear_num_key_heads": 16,
                "linear_num_value_heads": 16,
                "linear_key_head_dim": 128,
                "linear_value_head_dim": 128,
                "linear_conv_kernel_dim": 4,
                "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 6,
                "max_position_embeddings": 262144,
                "rms_norm_eps": 1e-6,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e7,
                    "partial_rotary_factor": 0.25,
                    "mrope_section": [11, 11, 10],
                },
                "tie_word_embeddings": True,
            },
            recurrent=False,
        ),
        Case(
            "rwkv7-0.4b",
            {
                "model_type": "rwkv7",
                "architectures": ["RWKV7ForCausalLM"],
                "vocab_size": 65536,
                "hidden_size": 1024,
                "num_hidden_layers": 24,
                "head_dim": 64,
                "intermediate_size": 4096,
                "decay_low_rank_dim": 64,
                "a_low_rank_dim": 64,
                "v_low_rank_dim": 32,
                "gate_low_rank_dim": 128,
                "norm_eps": 1e-5,
                "tie_word_embeddings": False,
            },
            recurrent=True,
            transformers=False,
        ),
    )
}


def random_decoder(config: ModelConfig) -> Decoder:
    """A decoder in bf16 with random weights, made without a float32 copy."""
    with torch.device("meta"):
        made = Decoder(config)
    decoder = made.to(torch.bfloat16).to_empty(device="cpu").eval()
    if config.tie_embeddings:
        decoder.head.weight = decoder.embedding.weight
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in decoder.parameters():
            if p.dim() > 1:
                p.normal_(std=0.02, generator=generator)
            else:
                p.uniform_(0, 1, generator=generator)
    return decoder


def write_checkpoint(case: Case, decoder: Decoder, folder: Path) -> None:
    """The decoder as the files that its own library writes, without a tokenizer."""
    settings = Settings(case.raw, case.name)
    family = find(case.raw, case.name)
    table = family.weights(family.config(settings), settings, {})
    weights = {name: t.detach().contiguous() for name, t in save(table, decoder.state_dict()).items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**case.raw, "dtype": "bfloat16"}))
