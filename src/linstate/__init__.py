"""Linstate: linear-attention models that read a text once and keep what they read in a small state."""

from linstate.engine import LanguageModel, Sampling
from linstate.errors import LinstateError
from linstate.models import Decoder, ModelConfig
from linstate.state import State

__all__ = ["Decoder", "LanguageModel", "LinstateError", "ModelConfig", "Sampling", "State", "__version__"]
__version__ = "0.1.0"
