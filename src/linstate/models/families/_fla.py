"""What the checkpoints of flash-linear-attention (FLA) share: names of tensors, settings, widths of feed-forwards.

Layers of softmax attention among the others (``attn``) and residuals that attend (``attnres_block_size``) are refused.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from linstate.errors import ConfigError
from linstate.mixers.base import divide
from linstate.models.config import ModelConfig
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Concat, Rule, Squeeze, Table, rule, under
from linstate.models.families._settings import Settings
from linstate.models.families.base import Family, Header


class FLAFamily(Family):
    """A stack of layers, each a mixer and a feed-forward behind a norm.

    Class attributes:
        ff: the name of their feed-forward.
        ratio: the width of the feed-forward in units of the model's, where the configuration does not say it.
        multiple: the feed-forward's width is rounded up to a multiple of this.
        share: the part of ``ratio`` that a feed-forward is wide.
        act: the activation they call ``hidden_act``.
        norm_bias: the norms have biases.
    """

    library = "fla"
    ff: ClassVar[str] = "mlp"
    ratio: ClassVar[float] = 4
    multiple: ClassVar[int] = 256
    share: ClassVar[float] = 2 / 3
    act: ClassVar[str] = "swish"
    norm_bias: ClassVar[bool] = False

    def model(self, settings: Settings, options: Mapping[str, Any], **more: Any) -> ModelConfig:
        """The model of mixers with these options; ``more`` are fields of ModelConfig."""
        settings.only("attn", None)
        settings.only("attnres_block_size", None)
        settings.only("hidden_act", self.act, default=self.act)
        # which kernels run, how the loss is made, and what training begins with
        settings.ignore(
            "attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy"
        )
        settings.ignore("use_l2warp")
        (mixer,) = self.mixers
        width = settings.integer("hidden_size", 2048)
        return ModelConfig(
            settings.integer("vocab_size", 32000),
            width,
            (mixer,) * settings.integer("num_hidden_layers", 24),
            options={mixer: options},
            d_ff=self.feed_forward_width(settings, width),
            tie_embeddings=settings.flag("tie_word_embeddings", False),
            norm_eps=settings.number("norm_eps", 1e-5 if self.norm_bias else 1e-6),
            **more,
        )

    def feed_forward_width(self, settings: Settings, width: int) -> int:
        """Said, or from the ratio."""
        if settings.has("intermediate_size"):
            settings.ignore("hidden_ratio")
            return settings.integer("intermediate_size")
        return (
            -(-int(width * settings.number("hidden_ratio", self.ratio) * self.share) // self.multiple)
            * self.multiple
        )

    def weights(self, config: ModelConfig, settings: Settings, found: Mapping[str, Header]) -> Table:
        tie, bias = config.tie_embeddings, self.norm_bias
        table = [*parts.ends(tie, "model.embeddings", bias=bias)]
        if config.embedding_norm:
            table += parts.normed("model.layers.0.pre_norm", "embedding_norm", bias=bias)
        (mixer,) = self.mixers
        for i in range(config.num_layers):
            theirs, ours = f"model.layers.{i}.", f"layers.{i}."
            table += under(theirs, ours, parts.normed("attn_norm", "mixer_norm", bias=bias))
            table += under(theirs, ours, parts.normed(f"{self.ff}_norm", "ff_norm", bias=bias))
            rules = self.mixer_rules(config.options[mixer], config, settings, i)
            table += under(f"{theirs}attn.", f"{ours}mixer.", rules)
            table += under(f"{theirs}{self.ff}.", f"{ours}ff.", self.ff_rules(config))
        return table

    @abstractmethod
    def mixer_rules(
        self, options: Mapping[str, Any], config: ModelConfig, settings: Settings, layer: int
    ) -> list[Rule]:
        """The mixer of a layer."""

    def ff_rules(self, config: ModelConfig) -> list[Rule]:
        """The feed-forward of a layer."""
        return parts.swiglu(config.d_ff or 0)


def expanded(settings: Settings, heads: int, keys: float, values: float) -> dict[str, int]:
    """Options of heads whose widths are factors of the model's. Raises ConfigError where they do not divide."""
    width = settings.integer("hidden_size", 2048)
    found = {"num_heads": settings.integer("num_heads", heads)}
    for name, option, default in (("expand_k", "head_dim", keys), ("expand_v", "v_head_dim", values)):
        wide = width * settings.number(name, default)
        if wide != int(wide):
            raise ConfigError(f"{settings.where}: hidden_size * {name} must be a whole number, found {wide}")
        found[option] = divide(int(wide), found["num_heads"], f"hidden_size * {name} into num_heads")
    return found


def heads_of(settings: Settings, heads: int, dim: int, values: float) -> dict[str, int]:
    """Options of ``heads`` heads of a width that is said. Raises ConfigError for values that are no whole number of channels."""
    found = settings.integer("head_dim", dim)
    wide = found * settings.number("expand_v", values)
    if wide != int(wide):
        raise ConfigError(f"{settings.where}: head_dim * expand_v must be a whole number, found {wide}")
    return {"num_heads": heads, "head_dim": found, "v_head_dim": int(wide)}


def plain(settings: Settings, heads: int) -> None:
    """Hold GLA and RetNet to the layers that we do: no grouped heads, features or convolutions, and a gate."""
    settings.only("num_kv_heads", heads, default=heads)
    settings.only("feature_map", None)
    settings.only("use_short_conv", False, default=False)
    settings.ignore("conv_size", "share_conv_kernel")  # of a convolution that is not there
    settings.only("use_output_gate", True, default=True)
    settings.only("elementwise_affine", True, default=True)


def gated_norm(settings: Settings) -> str:
    """What GLA and RetNet call the norm of a layer: as it runs."""
    return "g_norm_swish_gate" if settings.flag("fuse_norm", True) else "g_norm"


def inner(options: Mapping[str, Any]) -> tuple[int, int]:
    """Channels of all keys and of all values of a mixer with these options."""
    heads = options["num_heads"]
    return heads * options["head_dim"], (options.get("num_v_heads") or heads) * options["v_head_dim"]


def projections(names: Sequence[str], sizes: Sequence[int]) -> Rule:
    """The projections of a layer."""
    return rule([f"{name}.weight" for name in names], "in_proj.weight", Concat(*sizes))


def convolutions(keys: int, values: int) -> Rule:
    """The short convolutions over q, k and v."""
    names = [f"{name}_conv1d.weight" for name in "qkv"]
    return rule(names, "conv.weight", Concat(keys, keys, values), Squeeze(1))
