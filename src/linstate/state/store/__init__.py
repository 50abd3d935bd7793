"""The library of states: many states under handles, their bytes stored once, found again by what was read."""

from linstate.state.store.prefix import Checkpoints
from linstate.state.store.records import Handle, Match, model_key
from linstate.state.store.store import StateStore
from linstate.state.store.upkeep import Collected, Verified

__all__ = ["Checkpoints", "Collected", "Handle", "Match", "StateStore", "Verified", "model_key"]
