"""``linstate doctor``: what this machine has, and what serves what."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata, resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

from linstate.cli import common
from linstate.errors import LinstateError

EXAMPLES = ("linstate doctor", "linstate doctor --json")

EXTRAS = {
    "plot": ("matplotlib",),
    "hf": ("transformers", "accelerate"),
    "train": ("transformers", "accelerate"),
    "oracles": ("einops", "fla"),
    "test": ("pytest", "hypothesis"),
}
"""Extras by the modules that they bring."""

SUMS = "SHA256SUMS"
_BOUND = 1e-4


def doctor(json: common.Json = False) -> None:
    """Show what this machine has and which backend serves what.

    Ends with a self-check: each recurrence's parallel form and its single step against its definition, on a tiny
    input. Exits with 1 if that fails.
    """
    found = {
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        **_torch(),
        "native": _native(),
        "triton": _version("triton"),
        "extras": {name: {"missing": _missing(name)} for name in EXTRAS},
        "backends": _backends(),
        "pocket": _pocket(),
    }
    began = time.monotonic()
    found["self_check"] = checks = _self_check()
    seconds = time.monotonic() - began
    sound = all(check["error"] is not None and check["error"] <= _BOUND for check in checks)
    if json:
        common.print_json({**found, "sound": sound})
    else:
        common.facts(_rows(found, sound, seconds))
    if not sound:
        raise typer.Exit(1)


def _torch() -> dict[str, Any]:
    import torch

    from linstate.ops import native

    return {
        "torch": torch.__version__,
        "threads": {"torch": torch.get_num_threads(), "cores": _cores()},
        "cpu": {
            "name": _cpu_name(),
            "torch_uses": torch.backends.cpu.get_cpu_capability(),
            "features": native.cpu_features(),
        },
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor() or "unknown"


def _native() -> dict[str, Any]:
    from linstate.ops import native

    return {"built": native.available, "reason": native.reason}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _missing(extra: str) -> list[str]:
    return [module for module in EXTRAS[extra] if find_spec(module) is None]


def _backends() -> list[dict[str, Any]]:
    """For each recurrence and form, the backends that have a kernel for it, in the order in which they are tried."""
    from linstate import ops  # noqa: F401  (fills the table)
    from linstate.ops.dispatch import BACKENDS, FORMS, TABLE

    return [
        {
            "recurrence": recurrence,
            "form": form,
            "backends": [b for b in BACKENDS if (recurrence, form, b) in TABLE],
        }
        for recurrence in sorted({key[0] for key in TABLE})
        for form in FORMS
        if any((recurrence, form, backend) in TABLE for backend in BACKENDS)
    ]


def _pocket() -> dict[str, Any]:
    folder = Path(str(resources.files("linstate") / common.POCKET))
    if not folder.is_dir():
        return {
            "present": False,
            "sound": False,
            "reason": "this installation has no pocket model; name one with --model",
        }
    try:
        model = common.load_model(common.POCKET)
    except LinstateError as error:
        return {"present": True, "sound": False, "reason": str(error)}
    wrong = _altered(folder)
    reason = f"altered: {', '.join(wrong)}; install Linstate again" if wrong else None
    return {"present": True, "sound": not wrong, "reason": reason, "fingerprint": vars(model.fingerprint)}


def _altered(folder: Path) -> list[str]:
    """Files of a folder whose digest is not the one in its list of sums; none where it has no list."""
    sums = folder / SUMS
    if not sums.is_file():
        return []
    lines = [line.split() for line in sums.read_text("utf-8").splitlines() if line.strip()]
    return [
        name
        for digest, name in lines
        if not (folder / name).is_file() or hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest
    ]


def _self_check() -> list[dict[str, Any]]:
    """The relative error of each form against the definition, in float32; None where it could not be run."""
    found = []
    for name, call in _cases().items():
        for form, tokens in (("chunked", 70), ("step", 1)):
            try:
                error: float | None = call(form, tokens)
                reason = None
            except Exception as failure:  # the doctor reports whatever is wrong
                error, reason = None, f"{type(failure).__name__}: {failure}"
            found.append({"recurrence": name, "form": form, "error": error, "reason": reason})
    return found


def _cases() -> dict[str, Callable[[str, int], float]]:
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from linstate import ops

    def case(op: Callable[..., Any], make: Callable[[int], dict[str, Tensor]]) -> Callable[[str, int], float]:
        def run(form: str, tokens: int) -> float:
            inputs = make(tokens)
            true, _ = op(**{name: t.double() for name, t in inputs.items()}, form="recurrent")
            got, _ = op(**inputs, form=form)
            return float((got.double() - true).norm() / true.norm())

        return run

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def qkv(t: int) -> dict[str, Tensor]:
        q, k, v = (normal(1, t, 2, 16) for _ in range(3))
        return {"q": q, "k": F.normalize(k, dim=-1), "v": v}

    def decay(*shape: int) -> Tensor:
        return F.logsigmoid(normal(*shape) + 2)

    def dplr(t: int) -> dict[str, Tensor]:
        one = F.normalize(normal(1, t, 2, 16), dim=-1)
        return {**qkv(t), "a": -0.5 * one, "b": one, "g": decay(1, t, 2, 16)}

    def state_space(t: int) -> dict[str, Tensor]:
        A = 0.9 * F.normalize(normal(8, 4, 2), dim=-1)
        return {"u": normal(1, t, 8), "A": A, "B": normal(8, 4, 2), "C": normal(8, 4, 2)}

    def test_time_training(t: int) -> dict[str, Tensor]:
        inner = {"W1": 0.2 * normal(2, 17, 16), "norm_weight": normal(2, 16), "norm_bias": normal(2, 16)}
        rates = {"lr": torch.full((1, t, 2), 0.01), "share": torch.full((5,), 0.5)}
        return {**qkv(t), **inner, **rates}

    return {
        "linear_attention": case(ops.linear_attention, lambda t: {**qkv(t), "g": decay(1, t, 2)}),
        "delta_rule": case(
            ops.delta_rule, lambda t: {**qkv(t), "beta": normal(1, t, 2).sigmoid(), "g": decay(1, t, 2)}
        ),
        "dplr": case(ops.dplr, dplr),
        "selective_scan": case(ops.selective_scan, lambda t: {**qkv(t), "g": decay(1, t, 2, 16)}),
        "softmax_attention": case(ops.softmax_attention, qkv),
        "state_space": case(ops.state_space, state_space),
        "test_time_training": case(ops.test_time_training, test_time_training),
        "causal_conv1d": case(ops.causal_conv1d, lambda t: {"x": normal(1, t, 8), "weight": normal(8, 4)}),
    }


def _rows(found: dict[str, Any], sound: bool, seconds: float) -> list[tuple[str, str]]:
    cpu, native, pocket = found["cpu"], found["native"], found["pocket"]
    features = ", ".join(name for name, there in cpu["features"].items() if there)
    rows = [
        ("Python", found["python"]),
        (
            "torch",
            f"{found['torch']}, {found['threads']['torch']} threads on {found['threads']['cores']} cores",
        ),
        ("CPU", f"{cpu['name']}; torch uses {cpu['torch_uses']}" + (f"; has {features}" if features else "")),
        ("GPU", ", ".join(found["gpu"]) or "none"),
        ("native", "built" if native["built"] else f"no: {native['reason']}"),
        ("triton", found["triton"] or "not installed (it serves NVIDIA GPUs)"),
    ]
    for name, state in found["extras"].items():
        if state["missing"]:
            said = f"missing {', '.join(state['missing'])}: pip install 'linstate[{name}]'"
        else:
            said = "installed"
        rows.append((f"extra {name}", said))
    for row in found["backends"]:
        rows.append((f"{row['recurrence']} {row['form']}", ", else ".join(row["backends"])))
    rows.append(("pocket model", "whole" if pocket["sound"] else pocket["reason"]))
    if pocket.get("fingerprint"):
        rows.append(("", f"weights sha256 {pocket['fingerprint']['weights'][:16]}"))
    worst = max((check["error"] for check in found["self_check"] if check["error"] is not None), default=0.0)
    rows.append(
        (
            "self-check",
            f"{'passed' if sound else 'FAILED'} in {seconds:.1f} s, largest relative error {worst:.1e}",
        )
    )
    for check in found["self_check"]:
        if check["error"] is None or check["error"] > _BOUND:
            why = check["reason"] or f"relative error {check['error']:.1e}"
            rows.append(("", f"{check['recurrence']} {check['form']}: {why}"))
    return rows
