"""A small model of every recurrent family of transformers, and one way to read with each."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 40
_SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1}
_TWO = ["linear_attention", "full_attention"]
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_QWEN = {
    **_ATTENTION,
    **_DELTA,
    "intermediate_size": 48,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "layer_types": _TWO,
}
_MAMBA = {"num_hidden_layers": 2, "state_size": 6}
_MAMBA2 = {
    **_ATTENTION,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "mamba_n_heads": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 6,
    "mamba_d_head": 8,
    "mamba_chunk_size": 8,
}
_LATENT = {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "layer_types": _TWO,
    "mlp_layer_types": ["dense", "sparse"],
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("Qwen3Next", {**_QWEN, **_EXPERTS}),
    "qwen3_5": ("Qwen3_5:Text", _QWEN),
    "qwen3_5_moe": ("Qwen3_5Moe:Text", {**_QWEN, **_EXPERTS}),
    "olmo_hybrid": ("OlmoHybrid", _QWEN | {"num_key_value_heads": 2}),
    "kimi_linear": ("KimiLinear", {**_LATENT, "linear_head_dim": 8, "linear_num_heads": 2}),
    "bailing_hybrid": ("BailingHybrid", {**_LATENT, "head_dim": 8}),
    "mamba": ("Mamba", _MAMBA),
    "falcon_mamba": ("FalconMamba", _MAMBA),
    "jamba": (
        "Jamba",
        {
            **_ATTENTION,
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 6,
        },
    ),
    "zamba": (
        "Zamba",
        {
            **_ATTENTION,
            "num_hidden_layers": 5,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 6,
        },
    ),
    "mamba2": (
        "Mamba2",
        {
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "state_size": 6,
            "chunk_size": 8,
        },
    ),
    "bamba": ("Bamba", {**_MAMBA2, "attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1", {**_MAMBA2, "mamba_d_ssm": 64}),
    "granitemoehybrid": ("GraniteMoeHybrid", {**_MAMBA2, "layer_types": _TWO, "num_local_experts": 2}),
    "nemotron_h": (
        "NemotronH",
        {
            **_ATTENTION,
            "layers_block_type": [*_TWO, "mlp"],
            "head_dim": 16,
            "intermediate_size": 48,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "ssm_state_size": 6,
            "chunk_size": 8,
            "time_step_min": 0.5,  # so high that it is met
        },
    ),
    "zamba2": (
        "Zamba2",
        {
            "num_hidden_layers": 2,
            "layers_block_type": ["linear_attention", "hybrid"],
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "mamba_d_state": 6,
            "mamba_ngroups": 2,
            "n_mamba_heads": 8,
            "chunk_size": 8,
            "adapter_rank": 4,
            "time_step_min": 0.5,
        },
    ),
    "minimax": (
        "MiniMax",
        {
            **_ATTENTION,
            "num_hidden_layers": 2,
            "layer_types": _TWO,
            "intermediate_size": 48,
            "num_local_experts": 2,
            "block_size": 8,
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemma",
        {
            **_ATTENTION,
            "num_hidden_layers": 2,
            "block_types": ["recurrent", "attention"],
            "intermediate_size": 96,
            "attention_window_size": 64,
            "lru_width": 32,
        },
    ),
    "rwkv": ("Rwkv", {"num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 48}),
    "xlstm": ("xLSTM", {"hidden_size": 128, "num_hidden_layers": 2, "num_heads": 2, "chunk_size": 8}),
    "lfm2": (
        "Lfm2",
        {
            **_ATTENTION,
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "layer_types": ["conv", "full_attention"],
        },
    ),
    "lfm3": (
        "Lfm3",
        {
            **_ATTENTION,
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "layer_types": ["conv", "full_attention"],
            "head_dim": 16,
        },
    ),
}
"""Family -> prefix of its classes (``:`` before what configurations and models have in between), and configuration."""

CACHE_NAMES = {
    "mamba": "cache_params",
    "falcon_mamba": "cache_params",
    "mamba2": "cache_params",
    "xlstm": "cache_params",
    "rwkv": "state",
}


def modeling(family: str) -> Any:
    """The modeling file, imported as where FLA is not installed: what is compared with is their torch code."""
    hidden = {name: sys.modules.get(name) for name in ("fla",)}
    sys.modules["fla"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    finally:
        for name, module in hidden.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def build(family: str, seed: int = 0) -> Any:
    """A small random model, in eval mode, with weights at which a lost state shows."""
    name, values = FAMILIES[family]
    module = modeling(family)
    prefix, _, middle = name.partition(":")
    config = getattr(module, f"{prefix}{middle}Config")(**{**_SIZE, **values})
    torch.manual_seed(seed)
    model = getattr(module, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "A_log" in name:
                p.uniform_(-4, -1)  # long memory
            elif p.dim() > 1 and "time_mix" not in name and "norm" not in name:
                p.normal_(std=p.shape[-1] ** -0.5 if p.shape[-1] > 1 else 0.5)
            elif "dt" in name and "bias" in name:
                p.uniform_(-1, 1)  # steps so long that the state counts
    return model


def tokens(rows: int = 2, length: int = 21) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def read(model: Any, ids: Tensor, cache: Any = None, **more: Any) -> tuple[Tensor, Any]:
    """Logits ``[B, T, vocabulary]``, and the cache behind the last token."""
    family = model.config.model_type.removesuffix("_text")
    name = CACHE_NAMES.get(family, "past_key_values")
    if family == "recurrent_gemma" and cache is None:  # it does not hand its cache out
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
    given = {} if cache is None else {name: cache}
    if family not in ("rwkv", "xlstm"):
        more["logits_to_keep"] = 0
    output = model(ids, use_cache=True, **given, **more)
    after = cache if family == "recurrent_gemma" else getattr(output, name)
    return output.logits, after
