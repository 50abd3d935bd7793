"""Collection of what no state needs, and verification of what they do need."""

from __future__ import annotations

import json
from dataclasses import dataclass

from linstate.errors import StateFileError
from linstate.state.store.catalogue import Catalogue, alive
from linstate.state.store.objects import Objects
from linstate.state.store.tiers import Tiers

_BATCH = 64  # objects that a collection deletes before it lets others write


@dataclass(frozen=True)
class Collected:
    """What a collection removed: expired states, objects that no state needs, their bytes, files of killed writes."""

    states: int
    objects: int
    bytes: int
    temporary: int


@dataclass(frozen=True)
class Verified:
    """What a verification looked at, and a sentence for each thing that is wrong."""

    states: int
    objects: int
    bytes: int
    problems: tuple[str, ...]


def collect(catalogue: Catalogue, objects: Objects, tiers: Tiers) -> Collected:
    """Delete expired states, then objects without a handle: looked at and deleted under the catalogue's write lock."""
    with catalogue.writing() as db:
        living, now = alive()
        expired = db.execute(f"DELETE FROM states WHERE NOT {living}", (now,)).rowcount
    found, count, freed = list(objects.list()), 0, 0
    for begin in range(0, len(found), _BATCH):
        with catalogue.writing() as db:
            for name, size in found[begin : begin + _BATCH]:
                if db.execute("SELECT 1 FROM refs WHERE object = ? LIMIT 1", (name,)).fetchone() is None:
                    objects.delete(name)
                    tiers.drop(name)
                    count, freed = count + 1, freed + size
    return Collected(expired, count, freed, objects.sweep())


def verify(catalogue: Catalogue, objects: Objects) -> Verified:
    """Read the catalogue and every object that a state needs; say what is wrong."""
    query = catalogue.db.execute
    problems = [
        f"catalogue: {line}" for (line,) in query("PRAGMA integrity_check").fetchall() if line != "ok"
    ]
    states, count, total = 0, 0, 0
    for (name,) in query("SELECT DISTINCT object FROM refs").fetchall():
        count += 1
        try:
            total += len(objects.read(name))
        except StateFileError as error:
            who = query("SELECT DISTINCT state FROM refs WHERE object = ?", (name,)).fetchall()
            if who:  # else it was deleted and collected since
                problems.append(f"{error} [of {', '.join(state for (state,) in who)}]")
    for row in query("SELECT id, record FROM states").fetchall():
        states += 1
        try:
            json.loads(row["record"])["grid"]
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"state {row['id']}: its record cannot be read ({type(error).__name__}: {error})")
    return Verified(states, count, total, tuple(problems))
