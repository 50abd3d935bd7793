"""What a checkpoint family is: a configuration map and a weight table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from linstate.models.config import ModelConfig
from linstate.models.families._rules import Table
from linstate.models.families._settings import Settings

if TYPE_CHECKING:
    from linstate.models.encoder_config import EncoderConfig  # noqa: F401 (named in a string below)

C = TypeVar("C")


@dataclass(frozen=True)
class Header:
    """What a file says of a tensor: where it is, its shape, and its dtype as safetensors writes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Checkpoints(ABC, Generic[C]):
    """The checkpoints of one kind of model: how their ``config.json`` and their tensors are ours.

    A concrete family is a class in its file in ``models/families/``. It is never asked to run anything of the library
    that wrote the checkpoint: a configuration is JSON, a weight table is names.

    Class attributes:
        model_types: the ``model_type`` of the configurations it reads.
        library: what writes such checkpoints, "transformers" or "fla".
        mixers: the mixers that its models are made of.
        checked: the options of its configuration that its tests cover, in a few words, for the list of models.
        ignored: patterns (``re.match``) of tensors that reading text does not need, and what they are.
    """

    model_types: ClassVar[tuple[str, ...]]
    library: ClassVar[str] = "transformers"
    mixers: ClassVar[tuple[str, ...]]
    checked: ClassVar[str]
    ignored: ClassVar[Mapping[str, str]] = {}

    def accepts(self, raw: Mapping[str, Any]) -> bool:
        """Whether this ``config.json`` is of this family."""
        return raw.get("model_type") in self.model_types

    @abstractmethod
    def config(self, settings: Settings) -> C:
        """Our configuration. Raises ConfigError for what we do not do.

        Every setting that can change the result is taken from ``settings``, or held to the values that we do;
        what nobody asked for is an error afterwards.
        """

    @abstractmethod
    def weights(self, config: C, settings: Settings, found: Mapping[str, Header]) -> Table:
        """The weight table: rules that together make all our weights, each once, and use all of theirs.

        Args:
            found: the tensors of the checkpoint, for families that are written in more than one layout; empty when
                a checkpoint is to be written.
        """


class Family(Checkpoints[ModelConfig]):
    """The checkpoints of a model that reads and writes text, a :class:`linstate.models.decoder.Decoder`."""


class EncoderFamily(Checkpoints["EncoderConfig"]):
    """The checkpoints of a model that reads a whole text at once, a :class:`linstate.models.encoder.Encoder`."""
