"""``linstate info``: what there is to say about a state or a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linstate.cli import common
from linstate.errors import LinstateError

if TYPE_CHECKING:
    from linstate.models import ModelConfig
    from linstate.state.state import State

EXAMPLES = ("linstate info", "linstate info notes.state", "linstate info notes.state --json")

KV_FORMULA = "2 (keys, values) x layers x width x tokens x 4 bytes (float32, as the state)"


def info(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="STATE|MODEL",
            help="State file, model folder or name on the Hub; default the pocket model.",
        ),
    ] = None,
    model: common.Model = common.POCKET,
    json: common.Json = False,
) -> None:
    """Show what a state has read, or what a model is made of.

    A state file is checked from the first to the last byte; its size stands beside that of the KV cache that a softmax
    model of the same depth and width would hold at that position (--model names the state's model).
    """
    from linstate.models.hub import is_hub_id

    on_hub = path is not None and is_hub_id(path) and not path.endswith(".state") and not Path(path).exists()
    if path is None or path == common.POCKET or Path(path).is_dir() or on_hub:
        found = common.load_model(path or model).info()
        rows = _model_rows(found)
    else:
        found = _state(Path(path), model)
        rows = _state_rows(found)
    if json:
        common.print_json(found)
    else:
        common.facts(rows)


def _state(path: Path, model: str) -> dict[str, Any]:
    from linstate.bench.reading import kv_cache_bytes
    from linstate.cli.reading import Ledger
    from linstate.state import State, artifact

    found = artifact.read(path)
    state = State.from_artifact(found, str(path))
    read = Ledger.of(state.notes)
    config = _config(state, model)
    cache = None if config is None else kv_cache_bytes(config, state.position)
    return {
        "file": str(path),
        "file_bytes": path.stat().st_size,
        **state.info(),
        "signed": "signature" in found.metadata,
        "kv_cache_bytes": cache,
        "kv_cache_formula": KV_FORMULA,
        "read": {"sources": read.count, "bytes": read.bytes},
        "interrupted": read.partial,
    }


def _config(state: State, model: str) -> ModelConfig | None:
    """The configuration of the state's model, if ``model`` is that one."""
    import hashlib
    import json
    from importlib import resources

    from linstate.models.checkpoint import read_config
    from linstate.models.hub import model_folder

    pocket = resources.files("linstate") / "pocket"
    try:
        config = read_config(Path(str(pocket)) if model == common.POCKET else model_folder(model))
    except LinstateError:
        return None
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()
    return config if digest == state.model.config else None


def _layers(layers: list[str]) -> str:
    return ", ".join(f"{layers.count(name)} x {name}" for name in dict.fromkeys(layers))


def _model_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("model", found["name"]),
        ("weights", f"{found['parameters']:,}"),
        ("layers", f"{_layers(found['layers'])}, width {found['d_model']}"),
        ("vocabulary", f"{found['vocab_size']:,} tokens"),
        ("state", common.size(found["state_bytes"])),
        ("work", f"{found['flops_per_token'] / 1e6:,.1f} MFLOP a token"),
        *((f"{part} sha256", digest) for part, digest in found["fingerprint"].items()),
    ]


def _state_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    notes = found["notes"]
    if found["kv_cache_bytes"] is None:
        cache = "not known: name the state's model with --model"
    else:
        times = found["kv_cache_bytes"] / found["state_bytes"]
        cache = f"{common.size(found['kv_cache_bytes'])}, {times:,.{0 if times >= 10 else 1}f} times the state: {KV_FORMULA}"
    rows = [
        (
            "file",
            f"{found['file']}, {common.size(found['file_bytes'])}, {'signed' if found['signed'] else 'not signed'}",
        ),
        ("id", found["id"]),
        *([("title", notes["title"])] if "title" in notes else []),
        ("model", f"{found['model']} ({_layers(found['layers'])})"),
        ("position", f"{found['position']:,} tokens"),
        ("read", f"{found['read']['sources']} sources, {common.size(found['read']['bytes'])}"),
        ("state", common.size(found["state_bytes"])),
        ("KV cache", cache),
        ("precision", _precision(found)),
        ("created", found["created"]),
        ("lineage", " > ".join(found["lineage"]) or "none: read from nothing"),
    ]
    if found["composition"]:
        rows.append(("composed", found["composition"]))
    if part := found["interrupted"]:
        rows.append(
            ("interrupted", f"in {part['name']}, byte {part['at']:,}; 'linstate read' with --state goes on")
        )
    return rows


def _precision(found: dict[str, Any]) -> str:
    if found["precision"] == "exact":
        return "exact"
    return f"{found['precision']}, relative error {found['precision_error']:.1e}"
