"""The house keeps its shape: imports go down, files stay small, nothing is pickled, no machine's path.

The rules work on source text, so that they hold on modules that cannot be imported here (no transformers, no
triton), on imports inside functions, and on broken examples, which the last tests give them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "linstate"

# The rooms of the house, top to bottom (docs/structure.md). A room may import the rooms below its line; of
# rooms on one line, one may import the other, but not each other.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"serve"},
    {"train", "evals", "bench"},
    {"memory"},
    {"engine", "patch"},
    {"state"},
    {"models"},
    {"mixers"},
    {"ops"},
    {"types", "errors", "files", "pocket", "_native"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

MAX_LINES = 600
SERIALISERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}

# Written in parts, so that this file does not break its own rule. A letter, digit or dot before the slash
# means that it is part of an address or a relative path.
MACHINE_PATH = re.compile(
    r"(?<![\w.~$}-])/" + "(?:root|work|home|Users)" + r"/\w" + "|" + r"\b[A-Z]:\\" + r"Users\\", re.ASCII
)
NOT_OURS = {".git", ".venv", "venv", "build", "dist", "node_modules", "wheelhouse"}


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in the source, wherever it stands.

    `from a import b` yields `a.b`: only so is `from linstate import ops` seen to be an import of ops.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = module.split(".")
                up = up[: len(up) - node.level + is_package]
                base = ".".join([*up, base] if base else up)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}" if base else alias.name


def upward_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module, a sentence each."""
    room = module.split(".")[1] if "." in module else ""
    if room and room not in LEVEL:
        return [
            f"{module}: the room {room!r} is not in LAYERS: give it a place there and in docs/structure.md"
        ]
    if not room:  # linstate/__init__.py, the front door, shows people any room
        return []
    wrong = []
    for line, name in imports(source, module, is_package):
        parts = name.split(".")
        if parts[0] != "linstate" or name == "linstate.__version__":
            continue
        target = parts[1] if len(parts) > 1 else ""
        if target not in LEVEL:
            wrong.append(f"{module}:{line}: imports {name}: import from the room where it is defined")
        elif LEVEL[target] < LEVEL[room]:
            wrong.append(f"{module}:{line}: imports {name}, but {target!r} is above {room!r}")
    return wrong


def sibling_imports(source: str, module: str, is_package: bool = False) -> set[tuple[str, str]]:
    """(importer, imported) where both rooms are on one line of LAYERS."""
    room = module.split(".")[1] if "." in module else ""
    targets = {n.split(".")[1] for _, n in imports(source, module, is_package) if n.startswith("linstate.")}
    return {(room, t) for t in targets if room in LEVEL and t != room and LEVEL.get(t) == LEVEL[room]}


def circles(imported: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules of which each can be reached from each other by imports (Tarjan's algorithm)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    pending: list[str] = []
    found = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        pending.append(module)
        for target in sorted(imported[module]):
            if target not in number:
                visit(target)
            if target in pending:
                lowest[module] = min(lowest[module], lowest[target])
        if lowest[module] == number[module]:
            group = pending[pending.index(module) :]
            del pending[pending.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in sorted(imported):
        if module not in number:
            visit(module)
    return found


def unsafe_loading(source: str, where: str) -> list[str]:
    """Imports of modules that run code from a file, and torch calls that would use them."""
    wrong = [
        f"{where}:{line}: imports {name}: it runs code that a file brings along; use safetensors or JSON"
        for line, name in imports(source, "linstate", True)
        if name.split(".")[0] in SERIALISERS
    ]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if call == "torch.save":
            wrong.append(f"{where}:{node.lineno}: torch.save writes a pickle; use safetensors")
        if call == "torch.load" and given.get("weights_only") != "True":
            wrong.append(f"{where}:{node.lineno}: torch.load without weights_only=True unpickles")
        if given.get("allow_pickle", "False") != "False":
            wrong.append(f"{where}:{node.lineno}: allow_pickle")
    return wrong


def project_files() -> Iterator[Path]:
    """Every file that is the project's own, in a clone as in an unpacked archive."""
    pending = [ROOT]
    while pending:
        for path in sorted(pending.pop().iterdir()):
            if path.is_dir():
                hidden = path.name.startswith(".") and path.name not in {".ci", ".github"}
                if not (hidden or path.name in NOT_OURS or path.name == "__pycache__" or path.is_symlink()):
                    pending.append(path)
            elif path.is_file() and path.name not in NOT_OURS:  # .git is a file in a second working tree
                yield path


def test_imports_go_down() -> None:
    wrong = [
        sentence
        for path in python_files()
        for sentence in upward_imports(path.read_text("utf-8"), module_name(path), path.name == "__init__.py")
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_rooms_on_one_line_do_not_import_each_other() -> None:
    edges = set[tuple[str, str]]()
    for path in python_files():
        edges |= sibling_imports(path.read_text("utf-8"), module_name(path), path.name == "__init__.py")
    cycles = sorted({tuple(sorted(edge)) for edge in edges if edge[::-1] in edges})
    assert not cycles, f"these import each other: {cycles}"


def test_files_do_not_import_each_other_in_a_circle() -> None:
    """Imports for types and within functions count: who reads a file should not have to know the one that reads it."""
    modules = {module_name(path): path for path in python_files()}
    imported: dict[str, set[str]] = {}
    for module, path in modules.items():
        targets = set[str]()
        for _, name in imports(path.read_text("utf-8"), module, path.name == "__init__.py"):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            if name and not f"{module}.".startswith(f"{name}."):  # a room's own front door is above it
                targets.add(name)
        imported[module] = targets
    assert circles(imported) == []


def test_files_hold_one_thing() -> None:
    sources = [*python_files(), *(ROOT / "csrc").rglob("*.[ch]pp"), *(ROOT / "csrc").rglob("*.h")]
    assert sources
    long = {
        str(p.relative_to(ROOT)): n
        for p in sources
        if (n := len(p.read_text("utf-8").splitlines())) > MAX_LINES
    }
    assert not long, f"more than {MAX_LINES} lines, so two things in one file: {long}"


def test_nothing_is_pickled() -> None:
    wrong = [
        sentence
        for path in python_files()
        for sentence in unsafe_loading(path.read_text("utf-8"), str(path.relative_to(ROOT)))
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_no_path_of_a_machine() -> None:
    wrong = []
    for path in project_files():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:  # weights, pictures
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if found := MACHINE_PATH.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {found.group()}")
    assert not wrong, "\n" + "\n".join(wrong)


def test_the_package_says_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


# The rules see what they are meant to see.


@pytest.mark.parametrize(
    ("source", "module", "is_package"),
    [
        ("import linstate.cli.main", "linstate.ops.gates", False),
        ("from linstate.state import store", "linstate.mixers.gla", False),
        ("from linstate import models", "linstate.ops.gates", False),
        ("from ..models import config", "linstate.mixers.gla", False),
        ("from ..models import config", "linstate.mixers", True),
        ("from .. import engine", "linstate.models.config", False),
        ("def f():\n    from linstate.engine import reading", "linstate.state.file", False),
        ("if TYPE_CHECKING:\n    from linstate.models import Decoder", "linstate.ops.gates", False),
        ("import linstate", "linstate.state.file", False),
        ("from linstate import State", "linstate.models.config", False),
        ("", "linstate.attic.old", False),
    ],
)
def test_an_upward_import_is_seen(source: str, module: str, is_package: bool) -> None:
    assert len(upward_imports(source, module, is_package)) == 1


@pytest.mark.parametrize(
    ("source", "module", "is_package"),
    [
        ("from linstate.ops import delta_rule", "linstate.mixers.deltanet", False),
        ("from . import parts\nfrom .base import Mixer", "linstate.mixers.deltanet", False),
        ("from .base import Mixer", "linstate.mixers", True),
        ("from ..errors import LinstateError", "linstate.state.file", False),
        ("from linstate import ops, __version__", "linstate.state.file", False),
        ("import torch\nimport linstate_extra", "linstate.ops.gates", False),
        ("from linstate.state import State\nfrom .ops import delta_rule", "linstate", True),
    ],
)
def test_a_downward_import_is_let_through(source: str, module: str, is_package: bool) -> None:
    assert upward_imports(source, module, is_package) == []


def test_siblings_are_seen() -> None:
    assert sibling_imports("from linstate.evals import pocket", "linstate.train.loop") == {("train", "evals")}
    assert sibling_imports("from linstate.ops import gates", "linstate.train.loop") == set()


def test_circles_are_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import dill as d",
        "torch.save(state, path)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_unsafe_loading_is_seen(source: str) -> None:
    assert len(unsafe_loading(source, "example.py")) == 1


def test_safe_loading_is_let_through() -> None:
    assert unsafe_loading("import json\ntorch.load(path, weights_only=True)", "example.py") == []


@pytest.mark.parametrize("start", ["", '"', "see ", "x=", "("])
@pytest.mark.parametrize(
    "folder", ["/" + "root/x", "/" + "home/ann", "/" + "Users/ann", "C:\\" + "Users\\ann"]
)
def test_a_machine_path_is_seen(start: str, folder: str) -> None:
    assert MACHINE_PATH.search(start + folder)


@pytest.mark.parametrize("text", ["https://example.org/" + "home/page", "docs/" + "work/x", "/etc/services"])
def test_other_paths_are_let_through(text: str) -> None:
    assert not MACHINE_PATH.search(text)
