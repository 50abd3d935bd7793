"""Writes ``src/linstate/models/families/seen.json``: what the libraries' configuration classes and models can look at.

A setting outside of it cannot change what their model computes, so ours may leave it out; one inside that we do not ask
for might. Found in the libraries' own source: the fields of a configuration class and its ancestors, its ``attribute_map``,
names taken from ``**kwargs``, and every attribute of a configuration that the model's files read.

    python tools/seen_settings.py            # from the installed transformers (and fla)
    python tools/seen_settings.py --check    # exits with 1 where the file is not what these versions say
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parent.parent / "src" / "linstate" / "models" / "families" / "seen.json"
_ASKED = ("pop", "get", "setdefault")


def names_in(source: str) -> set[str]:
    """Names that a file reads of a configuration, or takes from keyword arguments."""
    return set(_names(ast.parse(source)))


def _names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_config(node.value):
            yield node.attr
        elif isinstance(node, ast.Subscript) and _is_mapping(node.value):
            yield from _text(node.slice)
        elif isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in ("getattr", "hasattr") and len(node.args) > 1:
                yield from _text(node.args[1])
            elif (
                isinstance(called, ast.Attribute)
                and called.attr in _ASKED
                and _is_mapping(called.value)
                and node.args
            ):
                yield from _text(node.args[0])
        elif isinstance(node, ast.Compare) and any(_is_mapping(c) for c in node.comparators):
            yield from _text(node.left)


def _text(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


def _is_config(node: ast.AST) -> bool:
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name == "cfg" or name.endswith("config")


def _is_mapping(node: ast.AST) -> bool:
    return _is_config(node) or (
        isinstance(node, ast.Name) and node.id in ("kwargs", "rope_parameters", "rope_scaling", "loaded")
    )


def of_class(config: type) -> set[str]:
    """What a configuration class of transformers can see, with those of the configurations inside it."""
    found = {field.name for field in dataclasses.fields(config)}
    found |= set(getattr(config, "attribute_map", {}))
    for ancestor in config.__mro__[:-1]:
        if ancestor.__module__.startswith("transformers."):
            for name, kind in inspect.get_annotations(ancestor).items():
                if "ClassVar" not in str(kind):
                    found.add(name)
    folders = {Path(inspect.getfile(config)).parent}
    for file in (path for folder in folders for path in folder.glob("*.py")):
        if file.name.startswith(("configuration_", "modeling_")):
            found |= names_in(file.read_text("utf-8"))
    for name, inner in getattr(config, "sub_configs", {}).items():
        found.add(name)
        if (
            dataclasses.is_dataclass(inner)
            and inner is not config
            and Path(inspect.getfile(inner)).parent in folders
        ):
            found |= {field.name for field in dataclasses.fields(inner)}
    return {name for name in found if not name.startswith("__")}


def of_fla(model_type: str) -> set[str] | None:
    """The same of FLA, from its source alone: nothing of it is imported."""
    spec = importlib.util.find_spec("fla")
    if spec is None or spec.origin is None:
        return None
    for file in Path(spec.origin).parent.glob("models/*/configuration_*.py"):
        text = file.read_text("utf-8")
        if f"model_type = '{model_type}'" in text or f'model_type = "{model_type}"' in text:
            found = names_in(text)
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                    found |= {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)} - {
                        "self"
                    }
            for model in file.parent.glob("modeling_*.py"):
                found |= names_in(model.read_text("utf-8"))
            return found
    return None


def collect() -> dict[str, Any]:
    """The data: versions, and names by library and model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from linstate.models.families import all_families, encoder_families

    seen: dict[str, dict[str, list[str]]] = {"transformers": {}, "fla": {}}
    for family in (*all_families(), *encoder_families()):
        for model_type in family.model_types:
            if family.library == "transformers":
                seen["transformers"][model_type] = sorted(of_class(CONFIG_MAPPING[model_type]))
            elif family.library == "fla" and (found := of_fla(model_type)) is not None:
                seen["fla"][model_type] = sorted(found)
    rope = Path(inspect.getfile(importlib.import_module("transformers.modeling_rope_utils")))
    found = names_in(rope.read_text("utf-8"))
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "flash-linear-attention")}
    return {"versions": versions, "rope": sorted(found), **seen}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    made = json.dumps(collect(), indent=1) + "\n"
    if check:
        return int(made != TARGET.read_text("utf-8"))
    TARGET.write_text(made, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
