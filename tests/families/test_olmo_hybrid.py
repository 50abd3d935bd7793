"""OLMo Hybrid: eigenvalues, rotation, and the split of the convolutions that its library writes."""

from __future__ import annotations

from torch import nn

from families.cases import hf
from families.test_qwen3_next import LINEAR


def calm(model: nn.Module) -> None:
    """What attention adds is normed behind: its size is that norm's."""
    for layer in model.model.layers:
        if hasattr(layer, "post_feedforward_layernorm"):
            layer.post_attention_layernorm.weight.mul_(0.25)
            layer.post_feedforward_layernorm.weight.mul_(0.25)


TINY = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    **LINEAR,
}
CASES = [
    hf("olmo_hybrid", "olmo_hybrid", adjust=calm, **TINY),
    hf(
        "olmo_hybrid-still-positive",
        "olmo_hybrid",
        seed=1,
        adjust=calm,
        rope_parameters={"rope_type": "default", "rope_theta": None},
        linear_allow_neg_eigval=False,
        attention_bias=True,
        tie_word_embeddings=True,
        layer_types=["linear_attention", "full_attention", "full_attention"],
        **TINY | {"num_hidden_layers": 3, "num_key_value_heads": 4, "linear_value_head_dim": 4},
    ),
]
