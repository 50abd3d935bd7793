"""Numbers for Prometheus, in a registry of the app's own. They name no tenant and hold no content."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from linstate.engine.scheduler import Scheduler
from linstate.serve.memory import resident
from linstate.serve.prefix import PrefixCache
from linstate.state.store import StateStore

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The app's registry and what the routes count.

    Args:
        prefix, store: what is asked when somebody asks for the numbers. scheduler: the one there is, once it has begun.
    """

    def __init__(
        self, prefix: PrefixCache, store: StateStore, scheduler: Callable[[], Scheduler | None]
    ) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "linstate_requests", "Answered requests", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "linstate_request_seconds",
            "Time to the end of an answer",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.first = Histogram(
            "linstate_first_token_seconds", "Time to the first token", buckets=_SECONDS, registry=registry
        )
        self.cached = Counter(
            "linstate_cached_tokens", "Context tokens that were not read again", registry=registry
        )
        self.disconnects = Counter(
            "linstate_disconnects", "Clients that left before their answer", registry=registry
        )
        self.shipped = Counter(
            "linstate_shipped_bytes", "Bytes of states from prefill workers", registry=registry
        )
        self.sent_away = Counter(
            "linstate_prefills_sent", "Readings sent to prefill workers", ["outcome"], registry=registry
        )
        self.streams = Gauge("linstate_open_streams", "Streams that are open", registry=registry)
        self.registry.register(_Live(prefix, store, scheduler))

    def text(self) -> bytes:
        """The text format."""
        return generate_latest(self.registry)


class _Live(Collector):
    """What scheduler and store say when they are asked."""

    def __init__(
        self, prefix: PrefixCache, store: StateStore, scheduler: Callable[[], Scheduler | None]
    ) -> None:
        self.prefix, self.store, self.scheduler = prefix, store, scheduler

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        scheduler = self.scheduler()
        if scheduler is not None:
            names = {
                "prompt": "Tokens of prompts that were new",
                "tail": "Tokens behind a state's grid that were run again",
                "generated": "Tokens that were generated",
                "steps": "Decode steps",
                "blocks": "Grid blocks that were read",
                "finished": "Jobs that have ended",
                "cancelled": "Jobs that were cancelled",
            }
            for name, about in names.items():
                suffix = "_tokens" if name in ("prompt", "tail", "generated") else ""
                yield CounterMetricFamily(f"linstate_{name}{suffix}", about, value=scheduler.counts[name])
            for name, value in scheduler.load.items():
                yield GaugeMetricFamily(f"linstate_{name}", f"Now: {name}", value=value)
        if (held := resident()) is not None:
            yield GaugeMetricFamily("linstate_resident_bytes", "Memory of this process", value=held)
        prefix = self.prefix
        yield CounterMetricFamily("linstate_prefix_hits", "Beginnings found in memory", value=prefix.hits)
        yield CounterMetricFamily(
            "linstate_prefix_misses", "Beginnings not found in memory", value=prefix.misses
        )
        yield GaugeMetricFamily("linstate_prefix_bytes", "Bytes of beginnings in memory", value=prefix.bytes)
        stats = self.store.stats()
        for name in ("states", "checkpoints", "tenants"):
            yield GaugeMetricFamily(f"linstate_store_{name}", f"Store: {name}", value=stats[name])
        for name in (
            "puts",
            "objects_written",
            "objects_shared",
            "bytes_written",
            "objects_read",
            "bytes_read",
        ):
            yield CounterMetricFamily(f"linstate_store_{name}", f"Store: {name}", value=stats[name])
        gauges = ("bytes", "limit_bytes", "states", "objects")
        for name in (*gauges, "hits", "misses", "evictions"):
            family = GaugeMetricFamily if name in gauges else CounterMetricFamily
            found = family(f"linstate_store_tier_{name}", f"Store: {name} of a tier", labels=["tier"])
            for tier, numbers in stats["tiers"].items():
                if name in numbers:
                    found.add_metric([tier], numbers[name])
            yield found
