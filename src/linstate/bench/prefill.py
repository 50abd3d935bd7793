"""How many requests a second a service can take whose long prompts are read elsewhere and shipped as states.

The throughput model of *Prefill-as-a-Service* (Qin et al. 2026, arXiv 2604.15039). A request with more than ``t`` tokens that are
not cached goes to a remote prefill pool and comes back as a state over a link; the others are read at home; all are decoded at
home. With ``p`` the share of requests above ``t``, and each class taken at its mean length::

    remote = min(R / T(l_long), B / S(l_long))        R remote instances, B bandwidth, T seconds, S bytes of a state
    local  = n / T_home(l_short)                      n of the N instances at home read, the others decode
    rate   = max over t, n of min(remote / p, local / (1 - p), (N - n) D)

What goes in, and from where:

=====================  =========================================================================================
``PUBLISHED``          seconds and MiB at 1K, 8K, 32K, 128K tokens (the paper's profile of its 1T hybrid on 8 H200)
32 H200, 64 H20, 96    the paper's fleets: R = 4 and N = 8 instances of 8 GPUs; 12 of H20 where nothing is remote; 100 Gbps
lengths                log-normal, median e^9.90 = 19.9K, sigma 1, cut to 128 ... 128K: half above 19.4K, as published
``T``, ``S``           ``a + b l + c l^2`` and ``base + each l`` through the profile (least squares, within 1.6% and 1%)
``T_home``             **calibrated**: ``a + f (b l + c l^2)`` with f from the paper's 2.11 requests/s of 96 H20 alone. The part
                       that grows with the text is bound by compute, of which an H20 has less; the constant one is not
``D`` = 0.75           requests/s that an instance decodes, **assumed**: not published where we could read it. From 0.71 to 0.82
                       every figure is the same, as decoding is then never what limits, and no instance is left over
=====================  =========================================================================================

So 2.11 is an input, and 2.45, 3.24, 19.4K and 13 Gbps are what the model has to find by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from linstate.errors import ArgumentError

Array = NDArray[np.float64]
MIB = 2**20
K = 1000
PUBLISHED = {1 * K: (0.44, 190.8), 8 * K: (0.72, 308.9), 32 * K: (1.84, 701.3), 128 * K: (7.40, 2316.3)}
"""Tokens: seconds of prefill, MiB of state and cache (arXiv 2604.15039, its 1T-parameter hybrid on 8 H200)."""
PAPER = {"homogeneous": 2.11, "naive": 2.45, "offloading": 3.24, "threshold": 19_400.0, "gbps": 13.0}
"""The paper's table: requests/s of each deployment; the best threshold in tokens; what the link carries then."""


@dataclass(frozen=True)
class Profile:
    """What a model costs: seconds to read ``l`` tokens (``a + b l + c l^2``), bytes to ship after them (``base + each l``)."""

    name: str
    time: tuple[float, float, float]
    base: float
    each: float

    def seconds(self, length: Array, slower: float = 1.0) -> Array:
        """Seconds of prefill; ``slower`` times the part that grows with the text."""
        a, b, c = self.time
        return a + slower * (b * length + c * length**2)

    def bytes(self, length: Array) -> Array:
        """Bytes of the state and cache."""
        return self.base + self.each * length


def published() -> Profile:
    """The paper's hybrid, from :data:`PUBLISHED`."""
    length = np.array(list(PUBLISHED), dtype=float)
    seconds, size = np.array(list(PUBLISHED.values())).T
    columns = np.stack([np.ones_like(length), length, length**2], 1) / seconds[:, None]
    a, b, c = np.linalg.lstsq(columns, np.ones_like(length), rcond=None)[0]
    each, base = np.polyfit(length, size * MIB, 1, w=1 / size)
    return Profile("hybrid", (float(a), float(b), float(c)), float(base), float(each))


def profiles() -> dict[str, Profile]:
    """The hybrid and what it would ship otherwise, all with its time.

    ``recurrent`` keeps only its recurrent states, of constant size; ``recurrent int8`` a quarter of these; ``dense`` has a cache
    in every layer instead: four times the hybrid's, if one layer in four has one (as in Kimi Linear, arXiv 2510.26692).
    """
    hybrid = published()
    return {
        "hybrid": hybrid,
        "recurrent": replace(hybrid, name="recurrent", each=0.0),
        "recurrent int8": replace(hybrid, name="recurrent int8", each=0.0, base=hybrid.base / 4),
        "dense": replace(hybrid, name="dense", base=0.0, each=4 * hybrid.each),
    }


@dataclass(frozen=True)
class Workload:
    """Uncached prompt lengths: log-normal, cut at both ends."""

    mu: float = 9.90
    sigma: float = 1.0
    shortest: int = 128
    longest: int = 128 * K
    steps: int = field(default=4000, repr=False)

    @cached_property
    def _grid(self) -> tuple[Array, Array]:
        lengths = np.geomspace(self.shortest, self.longest, self.steps)
        density = np.exp(-((np.log(lengths) - self.mu) ** 2) / (2 * self.sigma**2))
        return lengths, density / density.sum()

    @property
    def mean(self) -> float:
        """Mean length."""
        lengths, weights = self._grid
        return float(lengths @ weights)

    def split(self) -> tuple[Array, Array, Array, Array]:
        """At each threshold: it, the share of requests above, their mean length, the mean length of the others."""
        lengths, weights = self._grid
        below, sums = np.cumsum(weights), np.cumsum(weights * lengths)
        inside = slice(1, -1)
        above = 1 - below
        longer = (sums[-1] - sums) / np.maximum(above, 1e-12)
        return lengths[inside], above[inside], longer[inside], (sums / below)[inside]


@dataclass(frozen=True)
class Fleet:
    """Instances: ``remote`` that only read, ``home`` that read or decode. slower: of home; decode: requests/s of one."""

    remote: int = 4
    home: int = 8
    slower: float = 1.0
    decode: float = 0.75
    gbps: float = 100.0


@dataclass(frozen=True)
class Plan:
    """The best way to run a fleet.

    Attributes:
        rate: requests/s. threshold: tokens above which a request is read remotely. offloaded: their share.
        readers: instances at home that read. gbps: what the link carries. limit: "remote", "link", "home" or "decode".
    """

    rate: float
    threshold: float
    offloaded: float
    readers: int
    gbps: float
    limit: str


def at_home(profile: Profile, workload: Workload, fleet: Fleet) -> float:
    """Requests/s of ``fleet.home`` instances alone."""
    n = _readers(profile, workload, fleet)
    return min(_reads(profile, workload, fleet, n), (fleet.home - n) * fleet.decode)


def _reads(profile: Profile, workload: Workload, fleet: Fleet, n: int) -> float:
    return n / float(profile.seconds(np.array(workload.mean), fleet.slower))


def _readers(profile: Profile, workload: Workload, fleet: Fleet) -> int:
    """How many of the instances at home should read if nothing is remote. Raises ArgumentError."""
    if fleet.home < 2:
        raise ArgumentError(
            f"home needs at least 2 instances, one to read and one to decode, got {fleet.home}"
        )
    rates = {
        n: min(_reads(profile, workload, fleet, n), (fleet.home - n) * fleet.decode)
        for n in range(1, fleet.home)
    }
    return max(rates, key=lambda n: rates[n])


def all_remote(profile: Profile, workload: Workload, fleet: Fleet) -> float:
    """Requests/s if every request is read remotely, and home only decodes."""
    mean = np.array(workload.mean)
    link = fleet.gbps * 1e9 / 8 / float(profile.bytes(mean))
    return min(fleet.remote / float(profile.seconds(mean)), link, fleet.home * fleet.decode)


def best(profile: Profile, workload: Workload, fleet: Fleet) -> Plan:
    """The threshold and the split of home that give the most requests a second; without offloading if nothing beats that."""
    at, above, longer, shorter = workload.split()
    reading = fleet.remote / profile.seconds(longer)
    shipping = fleet.gbps * 1e9 / 8 / profile.bytes(longer)
    alone = at_home(profile, workload, fleet)
    top = Plan(alone, float(workload.longest), 0.0, _readers(profile, workload, fleet), 0.0, "home")
    for n in range(1, fleet.home):
        limits = {
            "remote": reading / above,
            "link": shipping / above,
            "home": n / profile.seconds(shorter, fleet.slower) / (1 - above),
            "decode": np.full_like(at, (fleet.home - n) * fleet.decode),
        }
        rates = np.min(list(limits.values()), axis=0)
        i = int(rates.argmax())
        if rates[i] > top.rate * (1 + 1e-9):
            carried = float(rates[i] * above[i] * profile.bytes(longer[i]) * 8 / 1e9)
            limit = min(limits, key=lambda name: limits[name][i])
            top = Plan(float(rates[i]), float(at[i]), float(above[i]), n, carried, limit)
    if top is None:
        raise ArgumentError(
            f"home needs at least 2 instances, one to read and one to decode, got {fleet.home}"
        )
    return top


def slower_at_home(profile: Profile, workload: Workload, rate: float, instances: int, decode: float) -> float:
    """How much slower an instance at home reads, if so many of them serve ``rate`` requests/s alone (bisection)."""
    low, high = 1.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        fleet = Fleet(home=instances, slower=middle, decode=decode)
        low, high = (middle, high) if at_home(profile, workload, fleet) > rate else (low, middle)
    return high


def paper_fleet(decode: float = 0.75) -> Fleet:
    """The paper's fleet, calibrated to its 2.11 requests/s of 12 instances at home alone."""
    slower = slower_at_home(published(), Workload(), PAPER["homogeneous"], 12, decode)
    return Fleet(slower=slower, decode=decode)


def reproduce(decode: float = 0.75) -> dict[str, float]:
    """The paper's table from the model, under the names of :data:`PAPER`."""
    profile, workload, fleet = published(), Workload(), paper_fleet(decode)
    plan = best(profile, workload, fleet)
    return {
        "homogeneous": at_home(profile, workload, replace(fleet, home=12)),
        "naive": all_remote(profile, workload, fleet),
        "offloading": plan.rate,
        "threshold": plan.threshold,
        "gbps": plan.gbps,
    }


@dataclass(frozen=True)
class Point:
    """One answer to "what would it take": sites that share a hub's uplink, each with a home fleet, and the hub's readers."""

    profile: str
    sites: int
    uplink_gbps: float
    plan: Plan
    gain: float


def sweep(
    names: Sequence[str],
    uplinks: Sequence[float],
    sites: Sequence[int],
    fleet: Fleet,
    workload: Workload | None = None,
) -> list[Point]:
    """Every combination. The hub has ``fleet.remote`` instances for each site; each site gets its share of the uplink.

    ``gain`` is the rate of a site over that of its home instances alone.
    """
    workload, known = workload or Workload(), profiles()
    made = []
    for name in names:
        if name not in known:
            raise ArgumentError(f"profile: expected one of {', '.join(known)}, got {name!r}")
        alone = at_home(known[name], workload, fleet)
        for uplink in uplinks:
            for count in sites:
                plan = best(known[name], workload, replace(fleet, gbps=uplink / count))
                made.append(Point(name, count, uplink, plan, plan.rate / alone))
    return made


def as_json(points: Sequence[Point]) -> list[dict[str, Any]]:
    """JSON-able."""
    return [asdict(point) for point in points]


def draw(fleet: Fleet, out: Path, workload: Workload | None = None) -> None:
    """Two pictures side by side: gain against a site's bandwidth for each profile; sites and uplinks for ``recurrent``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), constrained_layout=True)
    bandwidths = np.geomspace(0.02, 100, 60)
    for name in profiles():
        found = sweep([name], bandwidths.tolist(), [1], fleet, workload)
        left.plot(bandwidths, [point.gain for point in found], label=name)
    left.set(xscale="log", xlabel="bandwidth of a site, Gbit/s", ylabel="requests/s, times home alone")
    left.set_title("what a site gains by having long prompts read elsewhere")
    left.axhline(1, color="grey", linewidth=0.8)
    left.legend()
    uplinks, sites = np.geomspace(0.1, 100, 31), np.unique(np.geomspace(1, 100, 25).round().astype(int))
    points = sweep(["recurrent"], uplinks.tolist(), [int(n) for n in sites], fleet, workload)
    gains = np.array([point.gain for point in points]).reshape(len(uplinks), len(sites)).T
    mesh = right.pcolormesh(uplinks, sites, gains, shading="nearest")
    right.set(xscale="log", yscale="log", xlabel="uplink of the hub, Gbit/s", ylabel="sites that share it")
    right.set_title("recurrent: gain of each site")
    figure.colorbar(mesh, ax=right)
    figure.savefig(out, dpi=110)
    plt.close(figure)
