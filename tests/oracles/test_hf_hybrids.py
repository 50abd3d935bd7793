"""Whole hybrids are Hugging Face's, weights copied: Kimi Linear and Qwen3-Next, logits and states, in pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from linstate.models import Decoder, ModelConfig
from oracles import hf_weights
from oracles.hf_weights import Weights, under
from oracles.oracle import CUT, TOKENS, hf_module, hold, randomise

pytestmark = pytest.mark.oracle

D, VOCABULARY = 48, 60
GATES = {"A_log": lambda u: 2 * u - 2, "dt_bias": lambda u: 2 * u - 4}


def ids() -> list[Tensor]:
    tokens = torch.randint(VOCABULARY, (2, TOKENS + 1))
    return [tokens[:, :CUT], tokens[:, CUT:TOKENS], tokens[:, TOKENS:]]


def linear(cache: Any, layer: int) -> Weights:
    """The recurrent state of a layer, and its convolution's newest inputs."""
    conv = cache.get_conv_state(layer)[..., 1:].transpose(1, 2).clone()
    return under(f"layers.{layer}.mixer", {"S": cache.get_recurrent_state(layer).clone(), "conv": conv})


def keys_and_values(cache: Any, layer: int) -> Weights:
    kept = cache.layers[layer]
    kv = {name: t.transpose(1, 2).clone() for name, t in (("k", kept.keys), ("v", kept.values))}
    return under(f"layers.{layer}.mixer", kv)


def latents(cache: Any, layer: int) -> Weights:
    kept = cache.layers[layer]
    return {f"layers.{layer}.mixer.latent": torch.cat([kept.keys, kept.values], dim=-1)[:, 0].clone()}


def check(theirs: Any, config: ModelConfig, weights: Weights, states: list[Any], cache: Any) -> None:
    ours = Decoder(config).eval()
    ours.load_state_dict(weights)
    inputs, expected = ids(), []
    for tokens in inputs:
        logits = theirs(tokens, past_key_values=cache, use_cache=True).logits
        kept: Weights = {}
        for layer, state in enumerate(states):
            kept |= state(cache, layer)
        expected.append((logits, kept))
    hold(ours, expected, inputs)


def prepared(model: Any, **values: Any) -> Any:
    randomise(model, **GATES, **values)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
    return model.eval()


@torch.no_grad()
def test_kimi_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of KDA to one of MLA without positions, the last layer MLA again, the first feed-forward dense."""
    torch.manual_seed(0)
    modeling = hf_module("kimi_linear", monkeypatch)
    pattern = ("kimi_delta",) * 3 + ("mla",) + ("kimi_delta",) * 2 + ("mla",)
    types = {"kimi_delta": "linear_attention", "mla": "full_attention"}
    theirs_config = modeling.KimiLinearConfig(
        vocab_size=VOCABULARY,
        pad_token_id=0,
        hidden_size=D,
        intermediate_size=40,
        moe_intermediate_size=20,
        num_hidden_layers=len(pattern),
        layer_types=[types[name] for name in pattern],
        num_attention_heads=3,
        num_key_value_heads=3,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=20,
        kv_lora_rank=24,
        linear_head_dim=16,
        linear_num_heads=3,
        num_local_experts=8,
        num_experts_per_tok=3,
        attn_implementation="eager",
    )
    theirs = prepared(modeling.KimiLinearForCausalLM(theirs_config))
    config = ModelConfig(
        VOCABULARY,
        D,
        pattern,
        options={
            "kimi_delta": {"num_heads": 3, "head_dim": 16},
            "mla": {
                "num_heads": 3,
                "head_dim": 16,
                "v_head_dim": 20,
                "kv_rank": 24,
                "rotary_dim": 8,
                "rotary_base": None,
            },
            "experts": {"d_ff": 20, "num_experts": 8, "top_k": 3, "scale": 2.446},
        },
        feed_forward=("swiglu", "experts"),
        d_ff=40,
        tie_embeddings=False,
        norm_eps=1e-5,
    )
    weights = {
        "embedding.weight": theirs.model.embed_tokens.weight,
        "norm.weight": theirs.model.norm.weight,
        "head.weight": theirs.lm_head.weight,
    }
    for i, layer in enumerate(theirs.model.layers):
        mixer = hf_weights.mla if pattern[i] == "mla" else hf_weights.kimi_delta
        weights |= {
            f"layers.{i}.mixer_norm.weight": layer.input_layernorm.weight,
            f"layers.{i}.ff_norm.weight": layer.post_attention_layernorm.weight,
            **under(f"layers.{i}.mixer", mixer(layer.self_attn)),
            **under(f"layers.{i}.ff", (hf_weights.experts if i else hf_weights.swiglu)(layer.mlp)),
        }
    states = [latents if name == "mla" else linear for name in pattern]
    check(theirs, config, weights, states, modeling.DynamicCache(config=theirs_config))


@torch.no_grad()
def test_qwen3_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of Gated DeltaNet to one of gated attention, every feed-forward a mixture; norms kept as distances from one."""
    torch.manual_seed(0)
    modeling = hf_module("qwen3_next", monkeypatch)
    theirs_config = modeling.Qwen3NextConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25},
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=12,
        linear_value_head_dim=20,
        moe_intermediate_size=20,
        shared_expert_intermediate_size=20,
        num_experts=8,
        num_experts_per_tok=3,
        attn_implementation="eager",
    )
    theirs = prepared(modeling.Qwen3NextForCausalLM(theirs_config))
    config = ModelConfig(
        VOCABULARY,
        D,
        ("gated_deltanet",) * 3 + ("attention",),
        options={
            "gated_deltanet": {"num_heads": 2, "head_dim": 12, "num_v_heads": 4, "v_head_dim": 20},
            "attention": {
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 16,
                "rotary_base": 5000.0,
                "rotary_dim": 4,
                "qk_norm": True,
                "output_gate": True,
            },
            "experts": {
                "d_ff": 20,
                "num_experts": 8,
                "top_k": 3,
                "router": "softmax",
                "shared_gate": True,
            },
        },
        feed_forward="experts",
        tie_embeddings=False,
    )
    weights = {
        "embedding.weight": theirs.model.embed_tokens.weight,
        "norm.weight": 1 + theirs.model.norm.weight,
        "head.weight": theirs.lm_head.weight,
    }
    for i, layer in enumerate(theirs.model.layers):
        full = config.layers[i] == "attention"
        mixer = (
            hf_weights.gated_attention(layer.self_attn)
            if full
            else hf_weights.gated_deltanet(layer.linear_attn)
        )
        weights |= {
            f"layers.{i}.mixer_norm.weight": 1 + layer.input_layernorm.weight,
            f"layers.{i}.ff_norm.weight": 1 + layer.post_attention_layernorm.weight,
            **under(f"layers.{i}.mixer", mixer),
            **under(f"layers.{i}.ff", hf_weights.experts(layer.mlp)),
        }
    states = [keys_and_values if name == "attention" else linear for name in config.layers]
    check(theirs, config, weights, states, modeling.DynamicCache(config=theirs_config))
