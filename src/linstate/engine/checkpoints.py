"""Checkpoints of a long text while it is read, so that another text with the same beginning need not begin at nothing."""

from __future__ import annotations

from linstate.engine.reader import Reader
from linstate.state.store import Checkpoints, Handle, StateStore

WEEK = 7 * 24 * 3600.0


class Checkpointer:
    """What ``Reader(..., on_block=...)`` calls: keeps the blocks that the policy names.

    Args:
        policy: which grid positions are worth keeping. ttl: seconds that a checkpoint lives.
    """

    def __init__(
        self,
        store: StateStore,
        *,
        tenant: str = "default",
        policy: Checkpoints | None = None,
        ttl: float | None = WEEK,
    ) -> None:
        self.store, self.tenant, self.ttl = store, tenant, ttl
        self.policy = policy or Checkpoints()
        self.kept: list[Handle] = []

    def __call__(self, reader: Reader) -> None:
        if self.policy.due(reader.grid_position, reader.grid):
            self.mark(reader)

    def mark(self, reader: Reader) -> Handle:
        """Keep where the reader stands on its grid, whatever the policy says."""
        handle = self.store.checkpoint(reader.on_grid(), tenant=self.tenant, ttl=self.ttl)
        self.kept.append(handle)
        return handle
