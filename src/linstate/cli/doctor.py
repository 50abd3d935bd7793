"""``linstate doctor``: what this machine has, and what serves what."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib import resources
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
    "bench": ("transformers", "einops", "fla", "matplotlib"),
    "oracles": ("einops", "fla"),
    "test": ("pytest", "hypothesis"),
}
"""Extras by the modules that they bring."""

SUMS = "SHA256SUMS"
_BOUND = 1e-4


def doctor(json: common.Json = False) -> None:
    """Show what this machine has and which backend serves what.

    Ends with a self-check: each kernel that serves a recurrence's parallel form or its single step, native ones with every
    instruction set of this machine, against the definition, on a tiny input. Exits with 1 if that fails.
    """
    found: dict[str, Any] = {
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        **_torch(),
        "native": _native(),
        "triton": _version("triton"),
        "extras": {name: {"missing": _missing(name)} for name in EXTRAS},
        "pocket": _pocket(),
    }
    began = time.monotonic()
    found["self_check"] = checks = _self_check()
    seconds = time.monotonic() - began
    found["backends"] = _backends(checks)
    sound = not any(map(_wrong, checks))
    if json:
        common.print_json({**found, "sound": sound})
    else:
        common.facts(_rows(found, sound, seconds))
    if not sound:
        raise typer.Exit(1)


def _wrong(check: dict[str, Any]) -> bool:
    """Whether a kernel failed or is off; to refuse is its right."""
    if check["refused"] is not None:
        return False
    return check["error"] is None or not check["error"] <= _BOUND


def _torch() -> dict[str, Any]:
    import torch

    from linstate.bench.machine import cores, processor
    from linstate.ops import native

    return {
        "torch": torch.__version__,
        "threads": {"torch": torch.get_num_threads(), "cores": cores()},
        "cpu": {
            "name": processor(),
            "torch_uses": torch.backends.cpu.get_cpu_capability(),
            "features": native.cpu_features(),
        },
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _native() -> dict[str, Any]:
    from linstate.ops import native

    return {
        "built": native.available,
        "reason": native.reason,
        "isa": native.isa(),
        "isas": list(native.isas()),
        "forced": os.environ.get("LINSTATE_ISA") or None,
    }


def _version(package: str) -> str | None:
    from linstate.bench.machine import version

    return version(package)


def _missing(extra: str) -> list[str]:
    return [module for module in EXTRAS[extra] if find_spec(module) is None]


def _backends(checks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each recurrence and form: the backends with a kernel for it, in the order in which they are tried, and which serves.

    ``serves``: the first that took the call of the self-check, plain float32 on the CPU.
    """
    from linstate.ops.dispatch import BACKENDS, FORMS, TABLE

    found = []
    for recurrence in sorted({key[0] for key in TABLE}):
        for form in FORMS:
            backends = [name for name in BACKENDS if (recurrence, form, name) in TABLE]
            if not backends:
                continue
            took = [
                check["backend"]
                for check in checks
                if (check["recurrence"], check["form"]) == (recurrence, form) and check["refused"] is None
            ]
            # the definition is not checked against itself, and every machine has it
            serves = next((name for name in backends if name in took), "torch")
            found.append({"recurrence": recurrence, "form": form, "backends": backends, "serves": serves})
    return found


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
    """The relative error of each kernel against the definition, in float32; None where it could not be run, or refused."""
    from linstate.errors import BackendError
    from linstate.ops import native
    from linstate.ops.dispatch import BACKENDS, TABLE

    found = []
    for name, call in _cases().items():
        for form, tokens in (("chunked", 70), ("step", 1)):
            for backend in (b for b in BACKENDS if (name, form, b) in TABLE):
                for isa in native.isas() or (None,) if backend == "native" else (None,):
                    error = reason = refused = None
                    try:
                        with native.using(isa) if isa else nullcontext():
                            error = call(form, tokens, backend)
                    except BackendError as failure:
                        refused = str(failure)
                    except Exception as failure:  # the doctor reports whatever is wrong
                        reason = f"{type(failure).__name__}: {failure}"
                    found.append(
                        {
                            "recurrence": name,
                            "form": form,
                            "backend": backend,
                            "isa": isa,
                            "error": error,
                            "reason": reason,
                            "refused": refused,
                        }
                    )
    return found


def _cases() -> dict[str, Callable[[str, int, str], float]]:
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from linstate import ops
    from linstate.ops.fused import Operands, Plan
    from linstate.ops.fused import fused as fused_op

    def case(
        op: Callable[..., Any], make: Callable[[int], dict[str, Tensor]]
    ) -> Callable[[str, int, str], float]:
        def run(form: str, tokens: int, backend: str) -> float:
            inputs = make(tokens)
            true, _ = op(**{name: t.double() for name, t in inputs.items()}, form="recurrent")
            got, _ = op(**inputs, form=form, backend=backend)
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

    def fused(form: str, tokens: int, backend: str) -> float:
        """A mixer between its projections: decay, delta rule, norm and gate."""
        plan = Plan(
            recurrence="delta_rule",
            hk=2,
            hv=2,
            k=16,
            v=16,
            q_at=0,
            k_at=32,
            v_at=64,
            scale=0.25,
            unit_eps=1e-6,
            norm_eps=1e-6,
            decay="head",
            gate="silu",
        )
        mixed, z, rest = normal(1, tokens, 96), normal(1, tokens, 32), normal(2, 1, tokens, 2)
        given = {
            "beta": rest[0],
            "step": rest[1],
            "rate": normal(2),
            "step_bias": normal(2),
            "norm": normal(16),
            "z": z,
        }

        def y(dtype: torch.dtype, form: str, backend: str) -> Tensor:
            operands = Operands(**{name: t.to(dtype) for name, t in given.items()})
            with torch.no_grad():
                found: Tensor = fused_op(plan, mixed.to(dtype), operands, form=form, backend=backend)[
                    0
                ].double()
            return found

        true = y(torch.float64, "recurrent", "torch")
        return float((y(torch.float32, form, backend) - true).norm() / true.norm())

    return {
        "fused": fused,
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
        ("native", _native_row(native)),
        ("triton", found["triton"] or "not installed (it serves NVIDIA GPUs)"),
    ]
    for name, state in found["extras"].items():
        if state["missing"]:
            said = f"missing {', '.join(state['missing'])}: pip install 'linstate[{name}]'"
        else:
            said = "installed"
        rows.append((f"extra {name}", said))
    for recurrence in dict.fromkeys(row["recurrence"] for row in found["backends"]):
        served = [row for row in found["backends"] if row["recurrence"] == recurrence]
        names = {"native": f"native ({native['isa']})"}
        told = (f"{row['form']}: {names.get(row['serves'], row['serves'])}" for row in served)
        rows.append((recurrence, ", ".join(told)))
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
    for check in filter(_wrong, found["self_check"]):
        why = check["reason"] or f"relative error {check['error']:.1e}"
        kernel = " ".join(filter(None, (check["form"], check["backend"], check["isa"])))
        rows.append(("", f"{check['recurrence']} {kernel}: {why}"))
    return rows


def _native_row(native: dict[str, Any]) -> str:
    if not native["built"]:
        return f"no: {native['reason']}"
    others = [isa for isa in native["isas"] if isa != native["isa"]]
    chosen = f"LINSTATE_ISA={native['forced']}" if native["forced"] else "the best there is"
    return f"{native['isa']} in use ({chosen}); this machine also has {', '.join(others) or 'no other'}"
