"""Reading, generating and asking: what a person does with a model and a state."""

from linstate.engine.checkpoints import Checkpointer
from linstate.engine.conversation import Conversation
from linstate.engine.generation import Sampling
from linstate.engine.language_model import Generation, LanguageModel, Progress

__all__ = ["Checkpointer", "Conversation", "Generation", "LanguageModel", "Progress", "Sampling"]
