"""How often the right text is found, by words, by vectors, by both: the standard library's modules by their own summaries.

Each module's source is a text of the library, without its docstring; the question is the docstring's first sentence, which the
index has therefore never seen.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from linstate.engine import LanguageModel
from linstate.engine.tokens import encode
from linstate.memory import Index, cut, hidden_states
from linstate.memory.index import How


@dataclass(frozen=True)
class Finding:
    """How many of ``asked`` questions had the right text first, and among the first five."""

    how: str
    first: int
    among_five: int
    asked: int


def modules(count: int, size: int) -> Iterator[tuple[str, str]]:
    """Summary and the first ``size`` characters of source, docstring taken out, of ``count`` modules."""
    found = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = path.read_text("utf-8", errors="replace")
        summary = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0].split(". ")[0]
        summary = " ".join(summary.split())
        if path.stem.startswith("_") or len(summary) < 25:
            continue
        if source.count('"""') >= 2:  # the module's own stands first
            source = source[source.index('"""', source.index('"""') + 3) + 3 :]
        yield summary, source[:size]
        found += 1
        if found == count:
            return


def measure(folder: Path, model: LanguageModel, *, count: int = 60, size: int = 4000) -> list[Finding]:
    """Index the modules in ``folder`` and ask for each."""
    pairs, embed = list(modules(count, size)), hidden_states(model)
    index = Index(folder, name="finding", dimension=embed(["dimension"]).shape[1])
    for number, (_, text) in enumerate(pairs):
        passages = cut(encode(model.tokenizer, text), model.tokenizer)
        index.add("default", str(number), passages, embed([passage.text for passage in passages]))
    questions = embed([summary for summary, _ in pairs])
    rows = []
    for how in get_args(How):
        places = []
        for number, (summary, _) in enumerate(pairs):
            hits = index.search("default", summary, questions[number], limit=40, how=how)
            order = list(dict.fromkeys(hit.content for hit in hits))
            places.append(order.index(str(number)) if str(number) in order else len(pairs))
        rows.append(Finding(how, sum(p == 0 for p in places), sum(p < 5 for p in places), len(pairs)))
    return rows
