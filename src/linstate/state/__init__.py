"""The state artifact: a signed, portable, named thing that every answer can be continued from."""

from linstate.state.state import State

__all__ = ["State"]
