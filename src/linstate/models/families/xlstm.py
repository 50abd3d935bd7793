"""xLSTM: layers of mLSTM, with soft caps on gates and logits.

Source: transformers ``models/xlstm``; xLSTM 7B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from linstate.mixers.base import divide
from linstate.models.config import ModelConfig
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Concat, Rule, Table, rule, under
from linstate.models.families._settings import Settings
from linstate.models.families.base import Family, Header


class XLSTM(Family):
    """See the module."""

    model_types = ("xlstm",)
    mixers = ("mlstm",)
    checked = "widths of keys, values and feed-forward, caps of gates and logits"

    def config(self, settings: Settings) -> ModelConfig:
        width = settings.integer("hidden_size", settings.take("embedding_dim", 4096))
        settings.only("embedding_dim", width, default=width)
        layers = settings.integer("num_hidden_layers", settings.take("num_blocks", 32))
        settings.only("num_blocks", layers, default=layers)
        settings.only("use_bias", False, default=False)
        settings.only("add_out_norm", True, default=True)
        settings.only(
            "tie_word_embeddings", False, default=False
        )  # theirs leaves the head alone all the same
        settings.only("weight_mode", "single", default="single")  # theirs cannot begin a "fused" model
        # how theirs computes it: kernels, chunks, and how wide it rounds on the way
        settings.ignore("chunkwise_kernel", "sequence_kernel", "step_kernel", "mode", "chunk_size")
        settings.ignore("max_inference_chunksize", "return_last_states", "norm_reduction_force_float32")
        settings.ignore("autocast_kernel_dtype", "inference_state_dtype")
        # of the first configuration of the 7B model; theirs does not look at them
        settings.ignore("forward_backend_name", "step_backend_name", "add_forward_backend_padding")
        settings.ignore("add_embedding_dropout", "igate_bias_init_range", "force_bos_token_insert")
        settings.only("add_post_blocks_norm", True, default=True)
        settings.only("add_post_norm", False, default=False)
        settings.only("add_qk_norm", False, default=False)
        heads = settings.integer("num_heads", 8)
        keys = int(width * settings.number("qk_dim_factor", 0.5))
        values = int(width * settings.number("v_dim_factor", 1.0))
        step = settings.integer("ffn_round_up_to_multiple_of", 64)
        eps = settings.number("norm_eps", 1e-6)
        return ModelConfig(
            settings.integer("vocab_size", 50304),
            width,
            ("mlstm",) * layers,
            options={
                "mlstm": {
                    "num_heads": heads,
                    "head_dim": divide(keys, heads, "keys into num_heads"),
                    "v_head_dim": divide(values, heads, "values into num_heads"),
                    "gate_cap": settings.number("gate_soft_cap", 15.0),
                    "norm_eps": eps,
                    "eps": settings.number("eps", 1e-6),
                }
            },
            feed_forward="swiglu",
            d_ff=math.floor((width * settings.number("ffn_proj_factor", 2.667) + step - 1) / step) * step,
            tie_embeddings=False,
            norm_eps=eps,
            logit_softcap=settings.number("output_logit_soft_cap", 30.0),
        )

    def weights(self, config: ModelConfig, settings: Settings, found: Mapping[str, Header]) -> Table:
        options, d_ff = config.options["mlstm"], config.d_ff or 0
        table = [*parts.ends(False, "backbone.embeddings", "backbone.out_norm")]
        for i in range(config.num_layers):
            theirs, ours = f"backbone.blocks.{i}.", f"layers.{i}."
            table += under(theirs, ours, parts.normed("norm_mlstm", "mixer_norm"))
            table += under(theirs, ours, parts.normed("norm_ffn", "ff_norm"))
            table += under(f"{theirs}mlstm_layer.", f"{ours}mixer.", mlstm(options))
            table += under(
                f"{theirs}ffn.", f"{ours}ff.", parts.swiglu(d_ff, "proj_up_gate", "proj_up", "proj_down")
            )
        return table


def mlstm(options: Mapping[str, int]) -> list[Rule]:
    """A layer's mixer."""
    h = options["num_heads"]
    keys, values = h * options["head_dim"], h * options["v_head_dim"]
    names = ("q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact")
    return [
        rule(
            [f"{name}.weight" for name in names], "in_proj.weight", Concat(keys, keys, values, values, h, h)
        ),
        rule(("igate_preact.bias", "fgate_preact.bias"), "gate_bias", Concat(h, h)),
        *parts.normed("multihead_norm", "norm"),
        rule("out_proj.weight", "out_proj.weight"),
    ]
