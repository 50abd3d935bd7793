"""The pocket model's measured table: lookup on unseen and on real files, and bits per byte of Python.

Nothing here knows a model. :func:`evaluate` takes two callables and returns a :class:`PocketTable`:

- ``answer(document, questions) -> answers`` reads the document once and answers each question from
  the state it has then; questions do not see each other;
- ``bits(data) -> float`` gives the bits that the model needs for the bytes.

An answer is right if it equals the value exactly after stripping white space. The value of an entry is
its second column (``7/tcp`` in ``/etc/services``, the number in ``/etc/protocols``), the text after the
separator, or the JSON value without its quotes. Where a key stands several times in a real file
(``echo 7/tcp``, ``echo 7/udp``), any of its values is right.
"""

from __future__ import annotations

import configparser
import json
import lzma
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path

from linstate.engine.asking import parse_answer
from linstate.train.corpus import collect, held_out_python
from linstate.train.lookup import QUESTIONS, STYLES, Lookup, filler_chunks, make_lookup, real_words

__all__ = [
    "Answer",
    "Bits",
    "Outcome",
    "PocketTable",
    "RealFile",
    "Row",
    "evaluate",
    "real_files",
    "unseen_documents",
]

Answer = Callable[[str, list[str]], list[str]]
Bits = Callable[[bytes], float]

UNSEEN_QUESTIONS = ("Tell me the value for {}.", "{} is what?", "Please look up {}", "Do you know {}?")
GRID_FACTS, GRID_BYTES = (4, 16, 32, 64, 128), (1000, 2000, 4000, 8000, 16000)
_ENTRIES = 32
_SERVICES, _PROTOCOLS = Path("/etc/services"), Path("/etc/protocols")


@dataclass(frozen=True)
class Outcome:
    """One question and what came back. ``place`` is where the key first stands: 0 begin, 1 end of the text."""

    style: str
    question: str
    expected: tuple[str, ...]
    got: str
    place: float

    @property
    def right(self) -> bool:
        return self.got in self.expected


@dataclass(frozen=True)
class Row:
    """One line of the table. ``unit`` is ``exact match`` (``score`` in [0, 1]) or ``bits per byte``.

    ``goal`` is what the project wants (at least, for exact match; below, for bits per byte), None where
    the row only informs. ``skipped`` says why a row has no score.
    """

    group: str
    name: str
    score: float | None
    asked: int = 0
    goal: float | None = None
    unit: str = "exact match"
    skipped: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached; None without a goal or a score."""
        if self.goal is None or self.score is None:
            return None
        return self.score >= self.goal if self.unit == "exact match" else self.score < self.goal


@dataclass(frozen=True)
class PocketTable:
    """All rows, and the first wrong answers to look at."""

    rows: tuple[Row, ...]
    wrong: tuple[Outcome, ...] = ()
    settings: dict[str, int] = field(default_factory=dict)

    def row(self, group: str, name: str) -> Row:
        """The row of that group and name; KeyError if there is none."""
        for row in self.rows:
            if (row.group, row.name) == (group, name):
                return row
        raise KeyError(
            f"no row {name!r} in group {group!r}; groups: {sorted({row.group for row in self.rows})}"
        )

    def cells(self) -> list[tuple[str, str, str, str, str]]:
        """Group, name, score, questions and goal as text, one tuple a row, for whoever prints a table."""
        out = []
        for row in self.rows:
            percent = row.unit == "exact match"
            score = row.skipped or (f"{row.score:.1%}" if percent else f"{row.score:.3f}")
            goal = "" if row.goal is None else f">= {row.goal:.0%}" if percent else f"< {row.goal:.3f}"
            out.append((row.group, row.name, score, str(row.asked or ""), goal))
        return out

    def to_json(self) -> str:
        """The whole table as one JSON object."""
        rows = [{**asdict(row), "reached": row.reached} for row in self.rows]
        wrong = [asdict(outcome) for outcome in self.wrong]
        return json.dumps({"rows": rows, "wrong": wrong, "settings": self.settings}, ensure_ascii=False)


@dataclass(frozen=True)
class RealFile:
    """A file in a format people have: its text up to the last asked entry, and what is asked.

    ``entries``: key and every value that counts for it. ``skipped`` says why the file is not there.
    """

    name: str
    text: str
    entries: tuple[tuple[str, tuple[str, ...]], ...]
    skipped: str = ""


def evaluate(
    answer: Answer,
    bits: Bits | None = None,
    *,
    documents: int = 34,
    grid_documents: int = 4,
    python_bytes: int = 1_000_000,
    seed: int = 77,
    stdlib: Path | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> PocketTable:
    """Measures everything.

    Args:
        answer: reads a document, answers questions from its state.
        bits: bits the model needs for some bytes; None leaves the compression rows out.
        documents: documents of each standard test, dealt over all styles.
        grid_documents: documents of each cell of the grid of facts and bytes; 0 leaves the grid out.
        python_bytes: size of the held-out Python sources.
        seed: of the test documents. Their keys and values are unseen by construction, whatever the seed.
        stdlib: root of the standard library; this Python's own by default.
        on_row: called with each row as it is ready.
    """
    rows: list[Row] = []
    wrong: list[Outcome] = []

    def add(row: Row) -> None:
        rows.append(row)
        if on_row:
            on_row(row)

    draw = _Draw(seed, stdlib)
    standard: list[Outcome] = []
    for facts, size, goal in ((16, 2000, 0.99), (64, 8000, 0.90)):
        outcomes = _ask_all(answer, draw.documents(facts, size, documents), most=16)
        add(_row("unseen lookup", f"{facts} facts in {size} bytes", outcomes, goal))
        standard += outcomes
        _add_parts(add, f"{facts} facts, where in the text", outcomes, _place_name)
    wrong += [o for o in standard if not o.right]
    _add_parts(add, "style", standard, lambda o: o.style)
    _add_parts(add, "length of the value", standard, _length_name)
    for name, wordings in (("wordings of the training", QUESTIONS), ("other wordings", UNSEEN_QUESTIONS)):
        outcomes = _ask_all(
            answer, draw.documents(16, 2000, max(1, documents // 2)), most=16, wordings=wordings
        )
        add(_row("paraphrase, 16 facts in 2000 bytes", name, outcomes))
    for file in real_files():
        add(_real_row(answer, file, wrong))
    if grid_documents:
        for facts in GRID_FACTS:
            for size in GRID_BYTES:
                if size >= 60 * facts:
                    outcomes = _ask_all(answer, draw.documents(facts, size, grid_documents), most=8)
                    add(_row("grid", f"{facts} facts in {size} bytes", outcomes))
    if bits is not None:
        for row in _compression(bits, python_bytes, stdlib):
            add(row)
    settings = {"documents": documents, "grid_documents": grid_documents, "seed": seed}
    return PocketTable(tuple(rows), tuple(wrong[:60]), settings)


def unseen_documents(
    facts: int, size: int, count: int, *, seed: int = 77, stdlib: Path | None = None
) -> list[Lookup]:
    """``count`` test documents of ``size`` bytes or a little less or more, dealt over all styles.

    Keys and values of four characters or more stand in no training document, nor does any equal a word
    of the training sources of the library; filler comes from held-out sources or is made up.
    """
    return _Draw(seed, stdlib).documents(facts, size, count)


class _Draw:
    """Draws test documents; reads the library once."""

    def __init__(self, seed: int, stdlib: Path | None = None) -> None:
        self.seed = seed
        self.filler = filler_chunks(document.text for document in collect("held_out", stdlib=stdlib))
        training = collect("train", stdlib=stdlib, doc_roots=())
        self.seen = frozenset(real_words(document.text for document in training if document.kind == "python"))

    def documents(self, facts: int, size: int, count: int) -> list[Lookup]:
        drawn = []
        for number in range(count):
            rng = random.Random(f"test {self.seed}: {facts} {size} {number}")
            style = STYLES[number % len(STYLES)]
            drawn.append(
                make_lookup(
                    rng,
                    facts=facts,
                    length=size,
                    style=style,
                    filler=self.filler,
                    unseen=True,
                    seen=self.seen,
                )
            )
        return drawn


def _ask_all(
    answer: Answer, documents: Iterable[Lookup], *, most: int, wordings: Sequence[str] = ("{}",)
) -> list[Outcome]:
    """Asks ``most`` facts of each document, evenly spread over it."""
    outcomes = []
    for number, document in enumerate(documents):
        step = max(1.0, len(document.facts) / most)
        chosen = [document.facts[int(at * step)] for at in range(min(most, len(document.facts)))]
        questions = [wordings[(number + at) % len(wordings)].format(k) for at, (k, _) in enumerate(chosen)]
        got = _answers(answer, document.text, questions)
        for (key, value), question, reply in zip(chosen, questions, got, strict=True):
            place = max(0, document.text.find(key)) / len(document.text)
            outcomes.append(Outcome(document.style, question, (value,), reply, place))
    return outcomes


def _answers(answer: Answer, text: str, questions: list[str]) -> list[str]:
    got = answer(text, questions)
    if len(got) != len(questions):
        raise ValueError(f"answer: expected {len(questions)} answers, one a question; got {len(got)}")
    return [parse_answer(reply) for reply in got]


def _row(group: str, name: str, outcomes: Sequence[Outcome], goal: float | None = None) -> Row:
    score = sum(o.right for o in outcomes) / len(outcomes) if outcomes else None
    return Row(group, name, score, len(outcomes), goal, skipped="" if outcomes else "nothing asked")


def _add_parts(
    add: Callable[[Row], None], group: str, outcomes: Sequence[Outcome], key: Callable[[Outcome], str]
) -> None:
    for name in sorted({key(o) for o in outcomes}):
        add(_row(group, name, [o for o in outcomes if key(o) == name]))


def _place_name(outcome: Outcome) -> str:
    return ("1st", "2nd", "3rd", "4th")[min(3, int(outcome.place * 4))] + " quarter"


def _length_name(outcome: Outcome) -> str:
    length = len(outcome.expected[0])
    return " 1-2" if length < 3 else " 3-4" if length < 5 else " 5-8" if length < 9 else " 9-12"


def _real_row(answer: Answer, file: RealFile, wrong: list[Outcome]) -> Row:
    if file.skipped:
        return Row("real file", file.name, None, 0, 0.9, skipped=file.skipped)
    got = _answers(answer, file.text, [key for key, _ in file.entries])
    outcomes = [
        Outcome(file.name, key, values, reply, max(0, file.text.find(key)) / len(file.text))
        for (key, values), reply in zip(file.entries, got, strict=True)
    ]
    wrong += [o for o in outcomes if not o.right]
    return _row("real file", file.name, outcomes, 0.9 if "whole" not in file.name else None)


def real_files() -> list[RealFile]:
    """The real files, first 32 entries of each; system tables whole too, where they are longer."""
    files = []
    for path in (_SERVICES, _PROTOCOLS):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            files.append(RealFile(str(path), "", (), skipped=f"{path} is not on this machine"))
            continue
        files += _system_table(str(path), text)
    folder = resources.files("linstate.evals") / "data"
    for name, read in (("countries.csv", _csv), ("workshop.ini", _ini), ("camera.json", _json)):
        text = (folder / name).read_text(encoding="utf-8")
        entries = read(text)[:_ENTRIES]
        files.append(RealFile(name, text, tuple((key, (value,)) for key, value in entries)))
    return files


def _system_table(name: str, text: str) -> list[RealFile]:
    """``name  value  aliases  # comment``: the text up to the 32nd distinct name, and the whole."""
    lines = text.splitlines(keepends=True)
    known: set[str] = set()
    end = len(lines)
    for number, line in enumerate(lines):
        known.update(_name_and_value(line)[:1])
        if len(known) > _ENTRIES:
            end = number
            break
    head, whole = _values(lines[:end]), _values(lines)
    files = [RealFile(name, "".join(lines[:end]), tuple(head.items()))]
    if end < len(lines):
        files.append(RealFile(f"{name}, whole", text, tuple((key, whole[key]) for key in head)))
    return files


def _values(lines: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Every name with all its values, in the order of the lines."""
    values: dict[str, tuple[str, ...]] = {}
    for line in lines:
        if pair := _name_and_value(line):
            values[pair[0]] = (*values.get(pair[0], ()), pair[1])
    return values


def _name_and_value(line: str) -> list[str]:
    columns = line.split("#", 1)[0].split()
    return columns[:2] if len(columns) >= 2 else []


def _csv(text: str) -> list[tuple[str, str]]:
    rows = [line.split(",") for line in text.splitlines()[1:]]
    return [(row[0], row[1]) for row in rows]


def _ini(text: str) -> list[tuple[str, str]]:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(text)
    return [(key, value) for section in parser.sections() for key, value in parser.items(section)]


def _json(text: str) -> list[tuple[str, str]]:
    pairs = json.loads(text, parse_int=str, parse_float=str)
    return [(key, str(value).lower() if isinstance(value, bool) else value) for key, value in pairs.items()]


def _compression(bits: Bits, size: int, stdlib: Path | None) -> list[Row]:
    data = held_out_python(size, stdlib=stdlib)
    group, unit = f"held-out Python, {len(data)} bytes", "bits per byte"
    xz = 8.0 * len(lzma.compress(data, preset=9)) / len(data)
    return [
        Row(group, "model", bits(data) / len(data), goal=xz, unit=unit),
        Row(group, "xz -9", xz, unit=unit),
    ]
