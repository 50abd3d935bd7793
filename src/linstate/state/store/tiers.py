"""Tensors of states that are at hand: one least-recently-used list for each device, bounded by bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from linstate.types import LayerState, state_bytes


@dataclass
class _Tier:
    limit: int
    held: OrderedDict[str, LayerState] = field(default_factory=OrderedDict)
    bytes: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0


class Tiers:
    """Tensors by object and device. They are shared, never changed, so a hit costs nothing.

    Args:
        memory_bytes: what the CPU tier may hold. device_bytes: what each accelerator's tier may hold.
    """

    def __init__(self, memory_bytes: int, device_bytes: int) -> None:
        self._limits = memory_bytes, device_bytes
        self._tiers: dict[str, _Tier] = {"cpu": _Tier(memory_bytes)}
        self._lock = threading.Lock()

    def _tier(self, device: str) -> _Tier:
        return self._tiers.setdefault(device, _Tier(self._limits[1]))

    def get(self, name: str, device: str) -> LayerState | None:
        """The tensors of an object on a device, if they are at hand."""
        with self._lock:
            tier = self._tier(device)
            found = tier.held.get(name)
            if found is None:
                tier.misses += 1
            else:
                tier.hits += 1
                tier.held.move_to_end(name)
            return found

    def add(self, name: str, device: str, tensors: LayerState) -> None:
        """Hold the tensors of an object; the ones that were not used for longest make room."""
        size = state_bytes(tensors)
        with self._lock:
            tier = self._tier(device)
            if name in tier.held or size > tier.limit:
                return
            tier.held[name] = tensors
            tier.bytes += size
            while tier.bytes > tier.limit:
                _, oldest = tier.held.popitem(last=False)
                tier.bytes -= state_bytes(oldest)
                tier.evictions += 1

    def drop(self, name: str) -> None:
        """Let go of an object everywhere."""
        with self._lock:
            for tier in self._tiers.values():
                if (tensors := tier.held.pop(name, None)) is not None:
                    tier.bytes -= state_bytes(tensors)

    def stats(self) -> dict[str, dict[str, Any]]:
        """States, bytes, limit, hits, misses and evictions of each tier; the CPU's is called ``memory``."""
        with self._lock:
            return {
                "memory" if device == "cpu" else device: {
                    "states": len(tier.held),
                    "bytes": tier.bytes,
                    "limit_bytes": tier.limit,
                    "hits": tier.hits,
                    "misses": tier.misses,
                    "evictions": tier.evictions,
                }
                for device, tier in self._tiers.items()
            }
