"""What an encoder is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from linstate.errors import ConfigError
from linstate.mixers import encoders

FORMAT = 1
MODEL_TYPE = "linstate_encoder"
HEADS = (None, "masked_lm", "classification")


@dataclass(frozen=True)
class EncoderConfig:
    """What an encoder is made of: frozen, checked, JSON-able.

    Attributes:
        vocab_size: entries of the vocabulary. d_model: width D.
        pattern: the mixer of each layer by name (``mixers/encoders/``), repeated until ``num_layers`` are filled.
        num_layers: default the pattern's length. options: per mixer name.
        d_ff: inner width of the feed-forward, default 4 D.
        max_length: the longest text, in tokens. token_types: kinds of tokens (as in pairs of sentences), 0 for none.
        head: None, "masked_lm" or "classification", the last with ``num_labels``.
        norm_eps: of the layer norms.

    Raises:
        ConfigError: naming the field, what was expected and what came.
    """

    vocab_size: int
    d_model: int
    pattern: tuple[str, ...]
    num_layers: int = 0
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    d_ff: int = 0
    max_length: int = 512
    token_types: int = 0
    head: str | None = None
    num_labels: int = 0
    norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        if isinstance(self.pattern, str) or not self.pattern:
            raise ConfigError(f"pattern must be a list of encoder names, got {self.pattern!r}")
        object.__setattr__(self, "pattern", tuple(self.pattern))
        object.__setattr__(self, "num_layers", self.num_layers or len(self.pattern))
        object.__setattr__(self, "d_ff", self.d_ff or 4 * self.d_model)
        least = dict.fromkeys(("vocab_size", "d_model", "num_layers", "d_ff", "max_length"), 1)
        least |= {"token_types": 0, "num_labels": int(self.head == "classification")}
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ConfigError(f"{name} must be an integer of at least {low}, got {value!r}")
        for name in self.pattern:
            encoders.find(name)
        for name in self.options:
            if name not in self.pattern:
                raise ConfigError(
                    f"options are given for {name!r}, which is not in the pattern {list(self.pattern)}"
                )
        if self.head not in HEADS:
            raise ConfigError(f"head must be None, 'masked_lm' or 'classification', got {self.head!r}")

    @property
    def layers(self) -> tuple[str, ...]:
        """The mixer name of every layer."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary that :meth:`from_dict` reads."""
        plain: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **asdict(self)}))
        return plain

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> EncoderConfig:
        """The inverse of :meth:`to_dict`. Raises ConfigError for fields that do not exist or are missing."""
        values = dict(raw)
        version = values.pop("format", FORMAT)
        if version != FORMAT:
            raise ConfigError(
                f"this encoder has format {version}, this Linstate reads format {FORMAT}; update Linstate"
            )
        known = {f.name for f in fields(cls)}
        wrong = sorted(set(values) - known), sorted({"vocab_size", "d_model", "pattern"} - set(values))
        if any(wrong):
            raise ConfigError(
                f"fields of the encoder's configuration: unknown {wrong[0]}, missing {wrong[1]}"
            )
        return cls(**values)
