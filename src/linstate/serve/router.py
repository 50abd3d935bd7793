"""Which readings go to a prefill worker, and what happens when one fails: never a lost request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linstate.state.state import State

if TYPE_CHECKING:
    from linstate.serve.service import Service


class Router:
    """Sends long readings away."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def sends_away(self, uncached: int) -> bool:
        """Whether a reading of so many tokens that no state holds yet goes to a worker."""
        return False

    async def read(self, state: State, ids: tuple[int, ...], tenant: str) -> tuple[State, tuple[int, ...]]:
        """Have a worker read what fills the grid."""
        return state, ids

    async def close(self) -> None:
        """Close connections."""
