"""The throughput model: the paper's table from its inputs, and what must hold for any."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from linstate.bench import prefill
from linstate.errors import ArgumentError


@pytest.mark.parametrize("decode", [0.71, 0.75, 0.82])
def test_the_papers_table_within_five_percent(decode):
    found = prefill.reproduce(decode)
    assert found.keys() == prefill.PAPER.keys()
    for name, value in prefill.PAPER.items():
        assert found[name] == pytest.approx(value, rel=0.05), name


def test_the_profile_goes_through_the_published_points():
    profile = prefill.published()
    for length, (seconds, size) in prefill.PUBLISHED.items():
        assert float(profile.seconds(np.array(length))) == pytest.approx(seconds, rel=0.017)
        assert float(profile.bytes(np.array(length))) == pytest.approx(size * 2**20, rel=0.01)


def test_the_workload_is_the_one_described():
    workload = prefill.Workload()
    assert workload.mean == pytest.approx(27_300, rel=0.01)
    at, above, longer, shorter = workload.split()
    i = int(np.abs(at - 19_400).argmin())
    assert above[i] == pytest.approx(0.5, abs=0.01)
    mean = above * longer + (1 - above) * shorter
    assert np.allclose(mean, workload.mean, rtol=1e-6)


def test_a_plan_is_the_best_by_brute_force():
    profile, workload, fleet = prefill.published(), prefill.Workload(steps=400), prefill.paper_fleet()
    fleet = replace(fleet, gbps=5.0)
    at, above, longer, shorter = workload.split()
    best = 0.0
    for n in range(1, fleet.home):
        for p, long, short in zip(above, longer, shorter, strict=True):
            remote = min(
                fleet.remote / profile.seconds(long) / p, fleet.gbps * 1e9 / 8 / profile.bytes(long) / p
            )
            home = n / profile.seconds(short, fleet.slower) / (1 - p)
            best = max(best, float(min(remote, home, (fleet.home - n) * fleet.decode)))
    plan = prefill.best(profile, workload, fleet)
    assert plan.rate == pytest.approx(best) and plan.gbps <= 5.0 * 1.001
    assert 0 < plan.offloaded < 1 and plan.threshold in at


def test_more_bandwidth_never_hurts_and_no_link_is_home_alone():
    points = prefill.sweep(list(prefill.profiles()), [1e-6, 0.1, 1, 10, 100], [1, 10], prefill.paper_fleet())
    for name in prefill.profiles():
        for sites in (1, 10):
            gains = [p.gain for p in points if p.profile == name and p.sites == sites]
            assert gains[0] == 1.0 and gains == sorted(gains)
    at_one = {p.profile: p.gain for p in points if p.sites == 1 and p.uplink_gbps == 1}
    assert at_one["recurrent int8"] > at_one["recurrent"] > at_one["hybrid"] > at_one["dense"]


def test_what_cannot_be():
    with pytest.raises(ArgumentError, match="at least 2"):
        prefill.best(prefill.published(), prefill.Workload(), prefill.Fleet(home=1))
    with pytest.raises(ArgumentError, match="expected one of hybrid"):
        prefill.sweep(["transformer"], [1], [1], prefill.Fleet())


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    prefill.draw(prefill.paper_fleet(), tmp_path / "x.png", prefill.Workload(steps=60))
    assert (tmp_path / "x.png").stat().st_size > 10_000
