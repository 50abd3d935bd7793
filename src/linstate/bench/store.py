"""How long it takes to find a state among many: the longest stored beginning, and what was read about something.

The catalogue is filled with conversations: each a text that grows turn by turn, a state at each turn's end, as ``put`` stores
them. Their tensors are one object, since only looking up is measured.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from linstate.engine import LanguageModel
from linstate.memory import Embed, Index, Library, hidden_states
from linstate.state.store import StateStore, model_key
from linstate.state.store.prefix import chains
from linstate.types import LayerState

TURNS = 20
_WORDS = [
    "lamp",
    "harbour",
    "budget",
    "kernel",
    "winter",
    "recipe",
    "violin",
    "engine",
    "river",
    "contract",
    "doctor",
    "garden",
    "script",
    "signal",
    "copper",
    "market",
    "novel",
    "pepper",
    "rocket",
    "saddle",
    "tunnel",
    "velvet",
    "window",
    "yellow",
    "zebra",
    "anchor",
    "bridge",
    "candle",
    "desert",
    "ember",
    "falcon",
    "glacier",
]


@dataclass(frozen=True)
class Times:
    """Milliseconds of one kind of look-up: the middle, the 99th of a hundred, the longest.

    ``p99_processor``: of this thread's processor time, which does not count waiting for a core that others use (0: not measured,
    as other threads work too).
    """

    what: str
    calls: int
    p50: float
    p99: float
    longest: float
    p99_processor: float = 0.0


def measure(
    folder: Path,
    model: LanguageModel,
    *,
    states: int = 100_000,
    calls: int = 500,
    find: bool = True,
    seed: int = 0,
) -> list[Times]:
    """Fill a store in ``folder`` and time look-ups: hits, hits inside an edited text, misses; with ``find``, searches too."""
    store, rng = StateStore(folder), np.random.default_rng(seed)
    texts = _fill(store, model, states, rng)
    grid, tenant = model.grid, "default"

    def look(what: str, make: Callable[[], list[int]], hit: bool) -> Times:
        spent, busy = list[float](), list[float]()
        for _ in range(calls):
            ids = make()
            begun, worked = time.perf_counter(), time.thread_time()
            found = store.longest_prefix(ids, tenant=tenant, model=model.fingerprint, grid=grid)
            busy.append(time.thread_time() - worked)
            spent.append(time.perf_counter() - begun)
            assert (found.handle is not None) == hit, found.reason
        return _times(what, spent, busy)

    def goes_on() -> list[int]:
        text = texts[rng.integers(len(texts))]
        return [*text.tolist(), *rng.integers(0, 2000, 40).tolist()]

    def edited() -> list[int]:
        text = texts[rng.integers(len(texts))].copy()
        text[int(len(text) * 0.9)] += 1
        return list(text.tolist())

    def unknown() -> list[int]:
        return list(rng.integers(0, 2000, len(texts[0])).tolist())

    rows = [
        look(f"longest prefix of {len(texts[0]) + 40:,} tokens: the newest turn", goes_on, True),
        look("longest prefix: edited, an earlier turn", edited, True),
        look("longest prefix: a miss", unknown, False),
    ]
    if find:
        rows += _search(store, model, folder / "index", calls, rng)
    store.close()
    return rows


def _fill(store: StateStore, model: LanguageModel, states: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Conversations of 20 turns and about 4,000 tokens; some share their first turns, as forks and system prompts do."""
    store.catalogue.db.execute("PRAGMA synchronous = OFF")  # filling is not what is measured
    small: LayerState = {"S": torch.zeros(1, 1)}  # one object for all: only looking up is measured
    empty, grid, texts = replace(model.empty_state(), tensors=small), model.grid, list[np.ndarray]()
    turn = 205
    for number in range(-(-states // TURNS)):
        ids = rng.integers(0, 2000, turn * TURNS).astype(np.int64)
        if texts and number % 3 == 0:
            ids[: turn * 2] = texts[number // 3][: turn * 2]
        links = list(chains(ids.tolist(), grid))
        texts.append(ids)
        for n in range(1, TURNS + 1):
            end = n * turn
            block = (end - 1) // grid
            tail = tuple(ids[block * grid : end].tolist())
            state = replace(empty, position=end, tail=tail, chain=links[block])
            store.put(state, tags={"talk": str(number)})
    store.catalogue.db.execute("PRAGMA synchronous = FULL")
    return texts


def _search(
    store: StateStore, model: LanguageModel, where: Path, calls: int, rng: np.random.Generator
) -> list[Times]:
    """A passage for each state, of words drawn at random; questions are three words of one of them."""
    embed: Embed = hidden_states(model)
    dimension = embed(["dimension"]).shape[1]
    index = Index(where, name=model_key(model.fingerprint), dimension=dimension)
    with store.catalogue.writing() as db:  # as if each had kept its token ids
        db.execute("UPDATE states SET ids = id")
    ids = [row["id"] for row in store.catalogue.db.execute("SELECT id FROM states")]
    words, texts = random.Random(1), list[str]()
    for at in range(0, len(ids), 5000):
        part = ids[at : at + 5000]
        made = [" ".join([*words.choices(_WORDS, k=12), f"n{at + n}"]) for n in range(len(part))]
        texts += made
        vectors = rng.standard_normal((len(part), dimension)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        index.add_rows(
            {"tenant": "default", "content": id, "begin": 0, "end": 24, "text": text, "vector": vector}
            for id, text, vector in zip(part, made, vectors, strict=True)
        )
    index.optimize()
    library = Library(store, model, index=index, embed=embed, embed_name="own")
    rows = []
    for how in ("words", "vectors", "hybrid"):
        spent, right = [], 0
        for _ in range(calls):
            n = words.randrange(len(texts))
            question = " ".join([*words.sample(texts[n].split()[:-1], 2), f"n{n}"])
            begun = time.perf_counter()
            found = library.find(question, limit=5, how=how)
            spent.append(time.perf_counter() - begun)
            right += any(one.handle.id == ids[n] for one in found)
        if how == "words":  # the vectors are random
            assert right == calls, f"{right} of {calls} were found"
        rows.append(_times(f"find by {how}, among {len(ids):,} passages", spent))
    return rows


def _times(what: str, seconds: Sequence[float], busy: Sequence[float] = (0.0,)) -> Times:
    spent = torch.tensor(seconds, dtype=torch.float64) * 1e3
    p50, p99 = (float(spent.quantile(q)) for q in (0.5, 0.99))
    worked = torch.tensor(busy, dtype=torch.float64) * 1e3
    return Times(what, len(seconds), p50, p99, float(spent.max()), float(worked.quantile(0.99)))
