"""What composing states costs in answers: facts in several texts, asked of one state of them all.

Each text has its own facts (``key: value`` lines between prose). The state of all texts is made by every method of
:mod:`linstate.state.composition`, and by reading one text behind the other; asking the state of the right text alone shows what
there is to lose.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from linstate.engine import LanguageModel
from linstate.engine.tokens import encode
from linstate.engine.transitions import transitions
from linstate.errors import CompositionError
from linstate.state import State
from linstate.state.composition import METHODS, Method, Transitions, compose_all

_PARTS = ("ba", "do", "ki", "lu", "mer", "nas", "pol", "rit", "sov", "ten", "vax", "zu")
_PROSE = (
    "The rain had stopped before noon and the road was dry again.",
    "Nobody in the office could say where the old lists had gone.",
    "Later that week the same question came up once more.",
)


@dataclass(frozen=True)
class Composed:
    """One way to one state of ``texts`` texts: right answers, and the milliseconds that composing took (median)."""

    texts: int
    way: str
    label: str
    right: int
    asked: int
    milliseconds: float


def _word(rng: random.Random) -> str:
    return "".join(rng.choice(_PARTS) for _ in range(3))


def _text(rng: random.Random, facts: int) -> tuple[str, dict[str, str]]:
    known = {_word(rng): str(rng.randrange(1000, 10000)) for _ in range(facts)}
    lines = [f"{key}: {value}" for key, value in known.items()]
    for n in range(facts // 4):
        lines.insert(rng.randrange(len(lines)), _PROSE[n % len(_PROSE)])
    return "\n".join(lines) + "\n", known


def measure(
    model: LanguageModel, *, texts: Sequence[int] = (2, 4), facts: int = 6, rounds: int = 8, seed: int = 0
) -> list[Composed]:
    """Right answers of each way, the same texts and questions for all; two questions a text."""
    rows = []
    for count in texts:
        tally: dict[str, list[Any]] = {}
        for number in range(rounds):
            rng = random.Random(f"{seed} {count} {number}")
            made = [_text(rng, facts) for _ in range(count)]
            questions = [pair for _, known in made for pair in rng.sample(sorted(known.items()), 2)]
            ids = [encode(model.tokenizer, text) for text, _ in made]
            each = [model.settle(model.append(one)) for one in ids]
            alone = [n for n in range(count) for _ in range(2)]
            for way, make in _ways(model, each, ids).items():
                begun = time.perf_counter()
                try:
                    state = make()
                except CompositionError as error:
                    tally[way] = [str(error)]
                    continue
                spent = time.perf_counter() - begun
                right = sum(
                    model.ask(key, state or each[alone[n]], max_tokens=12) == value
                    for n, (key, value) in enumerate(questions)
                )
                label = (state.composition or "exact") if state else "exact"
                tally.setdefault(way, []).append((label, right, len(questions), spent))
        for way, found in tally.items():
            if isinstance(found[0], str):
                rows.append(Composed(count, way, "refused", 0, 0, 0.0))
                continue
            labels, rights, numbers, times = zip(*found, strict=True)
            middle = statistics.median(times) * 1e3
            rows.append(Composed(count, way, labels[0], sum(rights), sum(numbers), middle))
    return rows


def _ways(
    model: LanguageModel, each: Sequence[State], ids: Sequence[Sequence[int]]
) -> dict[str, Callable[[], State | None]]:
    """Ways to one state, by name; None stands for the state of the right text alone."""
    known: list[Transitions] | CompositionError
    try:
        known = [
            transitions(model, one) for one in ids
        ]  # once for a text, like its state: not part of composing
    except CompositionError as error:
        known = error

    def by(method: Method) -> Callable[[], State]:
        def make() -> State:
            if method in ("caso", "picaso") and isinstance(known, CompositionError):
                raise known
            return compose_all(each, method, None if isinstance(known, CompositionError) else known)

        return make

    def reading() -> State:
        return model.append([id for one in ids for id in one])

    return {"the right text alone": lambda: None, "reading all": reading, **{m: by(m) for m in METHODS}}


def as_json(rows: Sequence[Composed]) -> list[dict[str, Any]]:
    """JSON-able."""
    return [asdict(row) for row in rows]
