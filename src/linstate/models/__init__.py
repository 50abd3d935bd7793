"""Configuration, decoder, encoder and the bridge to Hugging Face."""

from linstate.models.config import ModelConfig
from linstate.models.decoder import Decoder
from linstate.models.encoder import Encoder
from linstate.models.encoder_config import EncoderConfig

__all__ = ["Decoder", "Encoder", "EncoderConfig", "ModelConfig"]
