"""What a model is made of: a frozen, checked, JSON-able description."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from linstate import mixers
from linstate.errors import ConfigError

FORMAT = 1
NORMS = ("rmsnorm", "zero_centred_rmsnorm", "srmsnorm", "layernorm")
NORM_PLACES = ("before", "after", "both")
LATER: Mapping[str, Any] = {
    "repeats": 1,
    "in_place_ttt": None,
    "norm_place": {},
    "residual_scales": {},
    "embedding_scale": 1.0,
    "logit_scale": 1.0,
    "logit_softcap": None,
    "residual_in_fp32": False,
    "shared_blocks": None,
}
"""Fields that came after the format, with what they are where they are not written: left out then, so that the
fingerprint of an older model stays."""

NONE = "none"
"""A layer without a mixer (in ``pattern``) or without a feed-forward (in ``feed_forward``)."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder: embedding, layers that each mix tokens and then feed forward, norm, head.

    Attributes:
        vocab_size: entries of the vocabulary.
        d_model: width D.
        pattern: the mixer of each layer, in order, by name (``("kimi_delta",) * 3 + ("attention",)`` is a hybrid);
            repeated until ``num_layers`` are filled. ``"mamba2+attention"`` is one layer with both side by side, ``"none"``
            one that only feeds forward.
        num_layers: number of layers, default the pattern's length.
        options: options per name of a mixer or feed-forward, for example ``{"gated_deltanet": {"num_heads": 4}}``.
        feed_forward: name in ``models/feed_forward.py``, or one for each layer, of which the last is that of all layers
            that follow (``("swiglu", "experts")``: the first dense); ``"none"`` where a layer only mixes; default what the
            mixer's paper uses.
        d_ff: inner width of the feed-forward where its options do not say another; default its own rule.
        tie_embeddings: the head is the embedding's transpose.
        norm: "rmsnorm", "zero_centred_rmsnorm" (its weight kept as its distance from one), "srmsnorm" (without a weight)
            or "layernorm", with ``norm_eps``.
        embedding_norm: a norm behind the embedding (RWKV).
        repeats: how many times each layer is applied, one application after the other, with the same weights and a
            state for each (recurrent depth: Universal Transformers, Dehghani 2018, arXiv 1807.03819).
        in_place_ttt: feed-forwards whose down projection learns while reading (``models/in_place_ttt.py``): its options,
            and ``layers``, the numbers of the layers it is for (all, where it is not given); None for none.
        norm_place: where the norms of the layers with a mixer stand, by the mixer's name: "before" a branch,
            ``x + f(norm(x))``, what is not named; "after", ``x + norm(f(x))`` (OLMo 2, arXiv 2501.00656); "both" in the
            branch and in the residual stream, ``y + f(y)`` with ``y = norm(x)`` (MiniMax-01).
        residual_scales: a and b of a layer's sums ``a x + b f(x)``, by the name of the mixer or feed-forward that is f.
        embedding_scale: factor on the embeddings. logit_scale: factor on the logits. logit_softcap: c of the logits
            ``c tanh(logits / c)`` (Gemma 2, arXiv 2408.00118, section 2; xLSTM 7B); None for the logits themselves.
        residual_in_fp32: the residual stream is float32 where the weights are narrower; each norm reads it rounded.
        shared_blocks: transformer blocks that several layers share (``models/shared_blocks.py``, Zamba2); None for none.

    Raises:
        ConfigError: naming the field, what was expected and what came.
    """

    vocab_size: int
    d_model: int
    pattern: tuple[str, ...]
    num_layers: int = 0
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    feed_forward: str | tuple[str, ...] | None = None
    d_ff: int | None = None
    tie_embeddings: bool = True
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    embedding_norm: bool = False
    repeats: int = 1
    in_place_ttt: Mapping[str, Any] | None = None
    norm_place: Mapping[str, str] = field(default_factory=dict)
    residual_scales: Mapping[str, Sequence[float]] = field(default_factory=dict)
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    residual_in_fp32: bool = False
    shared_blocks: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.pattern, str):
            raise ConfigError(f"pattern must be a list of mixer names, got the string {self.pattern!r}")
        object.__setattr__(self, "pattern", tuple(self.pattern))
        if not self.pattern:
            raise ConfigError("pattern must name at least one mixer")
        object.__setattr__(self, "num_layers", self.num_layers or len(self.pattern))
        for name in ("vocab_size", "d_model", "num_layers", "repeats"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        for name in self.pattern:
            if name != NONE:
                mixers.find(name)
        if not isinstance(self.feed_forward, str | None):
            object.__setattr__(self, "feed_forward", tuple(self.feed_forward))
            if not 1 <= len(self.feed_forward) <= self.num_layers:
                raise ConfigError(
                    f"feed_forward must name one or up to {self.num_layers}, one for each layer, got {len(self.feed_forward)}"
                )
        for layer, both in enumerate(zip(self.layers, self.feed_forwards, strict=True)):
            if both == (NONE, NONE):
                raise ConfigError(f"layer {layer} has neither a mixer nor a feed-forward")
        for name in self.options:
            if name not in self.pattern and name not in self.feed_forwards:
                raise ConfigError(
                    f"options are given for {name!r}, which is not in the pattern {list(self.pattern)}"
                    f" and no feed-forward of it: {sorted(set(self.feed_forwards))}"
                )
        if self.norm not in NORMS:
            raise ConfigError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        for name, where in self.norm_place.items():
            if name not in self.pattern or where not in NORM_PLACES:
                raise ConfigError(
                    f"norm_place must map mixers of the pattern {list(self.pattern)} to one of {', '.join(NORM_PLACES)},"
                    f" got {name!r}: {where!r}"
                )
        for name, scales in self.residual_scales.items():
            if (name not in self.pattern and name not in self.feed_forwards) or len(scales) != 2:
                raise ConfigError(
                    f"residual_scales must map mixers or feed-forwards of the model to two numbers, got {name!r}: {scales!r}"
                )
        for layer in (self.in_place_ttt or {}).get("layers", ()):
            if layer not in range(self.num_layers):
                raise ConfigError(f"in_place_ttt: layers must lie in [0, {self.num_layers}), got {layer!r}")
            if self.feed_forwards[layer] == NONE:
                raise ConfigError(f"in_place_ttt: layer {layer} has no feed-forward")
        for layer in (self.shared_blocks or {}).get("layers", ()):
            if layer not in range(self.num_layers) or self.layers[layer] == NONE:
                raise ConfigError(
                    f"shared_blocks: layers must be numbers of layers with a mixer, got {layer!r}"
                )
        if self.shared_blocks is not None and self.repeats > 1:
            raise ConfigError(f"shared_blocks cannot stand beside repeats, got repeats={self.repeats}")

    @property
    def layers(self) -> tuple[str, ...]:
        """The mixer name of every layer."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))

    @property
    def applied(self) -> tuple[str, ...]:
        """The mixer name of every application of a layer, in order: what the state has layers for.

        A layer that a shared block feeds has that block's attention, too.
        """
        shared = (self.shared_blocks or {}).get("layers", ())
        names = (
            f"{name}{mixers.JOIN}attention" if i in shared else name for i, name in enumerate(self.layers)
        )
        return tuple(name for name in names for _ in range(self.repeats))

    @property
    def feed_forwards(self) -> tuple[str, ...]:
        """The feed-forward name of every layer."""
        if self.feed_forward is None:
            return tuple("swiglu" if n == NONE else mixers.find(n).feed_forward for n in self.layers)
        given = (self.feed_forward,) if isinstance(self.feed_forward, str) else self.feed_forward
        return given + given[-1:] * (self.num_layers - len(given))

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary that :meth:`from_dict` reads.

        Fields that came after the format are left out where they say nothing, so that older models, and states that
        name them by a digest of this, stay what they are.
        """
        plain: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **asdict(self)}))
        return {name: value for name, value in plain.items() if name not in LATER or LATER[name] != value}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """The inverse of :meth:`to_dict`. Raises ConfigError for fields that do not exist or are missing."""
        values = dict(raw)
        version = values.pop("format", FORMAT)
        if version != FORMAT:
            raise ConfigError(
                f"this configuration has format {version}, this Linstate reads format {FORMAT}; update Linstate"
            )
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"unknown fields in the configuration: {', '.join(unknown)}; known are: {', '.join(sorted(known))}"
            )
        missing = sorted({"vocab_size", "d_model", "pattern"} - set(values))
        if missing:
            raise ConfigError(f"fields missing in the configuration: {', '.join(missing)}")
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> ModelConfig:
        """Read a JSON file written from :meth:`to_dict`. Raises ConfigError."""
        try:
            raw = json.loads(Path(path).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the configuration {path}: {error}") from error
        if not isinstance(raw, dict):
            raise ConfigError(f"the configuration {path} must be a JSON object, found {type(raw).__name__}")
        return cls.from_dict(raw)
