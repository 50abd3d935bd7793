"""Configuration, decoder and the bridge to Hugging Face."""

from linstate.models.config import ModelConfig
from linstate.models.decoder import Decoder

__all__ = ["Decoder", "ModelConfig"]
