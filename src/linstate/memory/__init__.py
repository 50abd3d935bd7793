"""A library of states: find the ones that have read about something, activate them, ask them."""

from linstate.memory.embedding import Embed, hidden_states
from linstate.memory.index import Hit, Index
from linstate.memory.library import Added, Answer, Found, Library
from linstate.memory.passages import Passage, cut

__all__ = ["Added", "Answer", "Embed", "Found", "Hit", "Index", "Library", "Passage", "cut", "hidden_states"]
