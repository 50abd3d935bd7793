"""The compiled part: there or honestly absent, and right about the processor."""

from __future__ import annotations

import ast
import os
import platform
import shlex
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest

from linstate.ops import native

FEATURES = {"amx_bf16", "avx512_bf16", "avx512f", "avx2", "fma", "neon"}
STUB = Path(__file__).resolve().parent.parent / "src" / "linstate" / "_native.pyi"

built = pytest.mark.skipif(not native.available, reason=f"no native extension: {native.reason}")


@pytest.mark.skipif(
    os.environ.get("LINSTATE_NATIVE") != "require", reason="LINSTATE_NATIVE=require asks for the extension"
)
def test_there_where_it_is_required() -> None:
    assert native.available, native.reason


def test_a_reason_exactly_where_it_is_absent() -> None:
    assert native.available == (native.reason is None)
    assert (native.cpu_features() == {}) == (not native.available)


@built
def test_features_have_the_promised_names_and_types() -> None:
    features = native.cpu_features()
    assert set(features) == FEATURES
    assert all(type(v) is bool for v in features.values())


@built
@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in {"x86_64", "AMD64"}, reason="Linux on x86-64 only"
)
def test_features_agree_with_the_kernel() -> None:
    # The kernel takes a flag away where it does not save the registers, so this checks XCR0 as well.
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split(":")[1].split())
    expected = {name: name in flags for name in FEATURES - {"neon"}} | {"neon": False}
    assert native.cpu_features() == expected


@built
@pytest.mark.skipif(platform.machine() not in {"aarch64", "arm64"}, reason="64-bit Arm only")
def test_arm_has_neon_and_nothing_of_x86() -> None:
    assert native.cpu_features() == dict.fromkeys(FEATURES, False) | {"neon": True}


@built
def test_version_is_that_of_the_package() -> None:
    import linstate._native as _native

    assert _native.version() == metadata.version("linstate")


@built
def test_the_stub_is_what_nanobind_writes(tmp_path: Path) -> None:
    """``src/linstate/_native.pyi`` is a copy of what the build writes; formats of nanobind's versions may differ."""
    pytest.importorskip("nanobind")
    fresh = tmp_path / "_native.pyi"
    command = [sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "linstate._native", "-o", str(fresh)]
    subprocess.run(command, check=True, timeout=60)
    known, found = (ast.dump(ast.parse(path.read_text("utf-8"))) for path in (STUB, fresh))
    assert known == found, f"copy it: {shlex.join(command)}"


# Absence, as it looks on machines that this one is not.


def test_not_built_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "linstate._native", None)  # Python's own way to say "not there"
    reason = native._load_error()
    assert reason is not None and "not built" in reason and "pip install" in reason


def test_a_stale_build_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    stale = types.ModuleType("linstate._native")
    stale.version = lambda: "0.0.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "linstate._native", stale)
    monkeypatch.setattr("linstate._native", stale, raising=False)
    monkeypatch.setattr(metadata, "version", lambda _: "0.1.0")
    reason = native._load_error()
    assert reason is not None and "0.0.1" in reason and "0.1.0" in reason


def test_absent_features_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", False)
    assert native.cpu_features() == {}
