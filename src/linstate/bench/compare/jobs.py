"""What is measured, cut into jobs that are kept one by one, so that a run can be interrupted and go on."""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from linstate import __version__, mixers
from linstate.bench.compare import capacity, cost, learning, sizes, speed
from linstate.bench.compare.tasks import TASKS
from linstate.bench.machine import machine
from linstate.errors import ArgumentError, InputError
from linstate.files import write_atomically

FORMAT = 1
SECTIONS = ("cost", "speed", "capacity", "tasks")

QUICK = {
    "recall": (
        "attention",
        "linear_transformer",
        "gla",
        "mamba2",
        "deltanet",
        "gated_deltanet",
        "rwkv7",
    ),
    "copying": ("attention", "linear_transformer", "mamba2", "gated_deltanet"),
    "parity": ("attention", "mamba2", "deltanet", "deltaproduct", "rwkv7"),
}
"""Mixers that a quick run trains; a full run trains all. `mamba` would take three minutes by itself: its backward is a scan in torch."""

STEPS = {"recall": 1000, "copying": 400, "parity": 500}
"""Training steps, at most."""

RATES = {"recall": ((3e-3,), (3e-3, 1e-2)), "copying": ((5e-3,), (5e-3,)), "parity": ((5e-3,), (5e-3,))}
"""Learning rates of a quick and of a full run."""

ROWS = 32
"""Sequences in a batch."""


@dataclass(frozen=True)
class Settings:
    """What a run measures. ``mixers``: those to be compared, softmax attention first; ``named``: they were asked for by name."""

    full: bool = False
    sections: tuple[str, ...] = SECTIONS
    mixers: tuple[str, ...] = ()
    named: bool = False

    @classmethod
    def of(cls, *, full: bool, only: Sequence[str] = (), mixers_: Sequence[str] = ()) -> Settings:
        """Checked settings; softmax attention is always among the mixers. Raises ArgumentError, ConfigError."""
        for section in only:
            if section not in SECTIONS:
                raise ArgumentError(f"there is no section {section!r}; there are: {', '.join(SECTIONS)}")
        for name in mixers_:
            mixers.find(name)
        chosen = mixers_ or mixers.names()
        ordered = (sizes.BASE, *(name for name in dict.fromkeys(chosen) if name != sizes.BASE))
        return cls(full, tuple(s for s in SECTIONS if not only or s in only), ordered, bool(mixers_))

    def trained(self, task: str) -> list[str]:
        """The mixers that are trained on a task."""
        return [m for m in self.mixers if self.full or self.named or m in QUICK[task]]

    def to_dict(self) -> dict[str, Any]:
        return {
            "full": self.full,
            "sections": list(self.sections),
            "mixers": list(self.mixers),
            "named": self.named,
        }

    def command(self) -> str:
        """The command line that measures this."""
        words = ["linstate compare", "--full" if self.full else "--quick"]
        if self.sections != SECTIONS:
            words.append(f"--only {','.join(self.sections)}")
        if self.named:
            words.append(f"--mixers {','.join(self.mixers)}")
        return " ".join(words)


@dataclass(frozen=True)
class Job:
    """One measurement. ``alone``: nothing else may run beside it, for it looks at the clock."""

    key: str
    what: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False


def jobs(settings: Settings) -> list[Job]:
    """Everything that a run measures, in order."""
    found = []
    if "cost" in settings.sections:
        found += [Job(f"cost/{m}", "cost", {"mixer": m}, alone=True) for m in settings.mixers]
    if "speed" in settings.sections:
        lengths = (512, 4096, 16384) if settings.full else (512, 4096)
        asked = {"mixers": settings.mixers, "lengths": lengths}
        found += [Job(f"speed/{turn}", "speed", asked, alone=True) for turn in range(3)]
    if "capacity" in settings.sections:
        seeds = 10 if settings.full else 3
        found += [
            Job(f"capacity/{name}/{kind}", "capacity", {"name": name, "kind": kind, "seeds": seeds})
            for name in capacity.CASES
            for kind in capacity.KINDS
        ]
    if "tasks" in settings.sections:
        found += [job for task in TASKS for job in _training(settings, task)]
    return found


def _training(settings: Settings, task: str) -> Iterator[Job]:
    for mixer in settings.trained(task):
        for variant, options in _variants(task, mixer).items():
            for rate in RATES[task][settings.full]:
                asked = {"task": task, "mixer": mixer, "options": options, "rate": rate}
                yield Job(
                    f"tasks/{task}/{variant}/{rate:g}",
                    "tasks",
                    {**asked, "steps": STEPS[task]},
                )


def _variants(task: str, mixer: str) -> dict[str, dict[str, Any]]:
    """Parity asks for both signs of the eigenvalues, where a mixer lets them be chosen."""
    if task == "parity" and "negative_eigenvalues" in mixers.find(mixer).options():
        return {
            f"{mixer} [0, 1]": {"negative_eigenvalues": False},
            f"{mixer} [-1, 1]": {"negative_eigenvalues": True},
        }
    return {mixer: {}}


def perform(job: Job) -> tuple[str, Any]:
    """A job's key and what it measured, JSON-able."""
    asked = dict(job.arguments)
    if job.what == "cost":
        return job.key, cost.measure(**asked)
    if job.what == "speed":
        return job.key, speed.measure(**asked)
    if job.what == "capacity":
        return job.key, capacity.measure(**asked)
    task = TASKS[asked.pop("task")]
    return job.key, learning.train(task, rows=ROWS, **asked)


@dataclass
class Run:
    """What has been measured, by the jobs' keys, kept in ``path`` after every job."""

    settings: Settings
    path: Path | None = None
    results: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=lambda: {**machine(), "linstate": __version__})
    seconds: float = 0.0

    @classmethod
    def load(cls, path: Path) -> Run:
        """A run that was written. Raises InputError."""
        try:
            raw = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read measurements in {path}: {error}") from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise InputError(f"{path} holds no measurements of format {FORMAT} of linstate compare")
        asked: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in raw["settings"].items()
        }
        return cls(Settings(**asked), path, raw["results"], raw["machine"], raw["seconds"])

    def save(self) -> None:
        """Write what there is, whole or not at all."""
        if self.path is not None:
            content = {
                "format": FORMAT,
                "command": self.settings.command(),
                "settings": self.settings.to_dict(),
                "machine": self.machine,
                "seconds": self.seconds,
                "results": self.results,
            }
            write_atomically(self.path, (json.dumps(content, indent=1) + "\n").encode())

    def missing(self) -> list[Job]:
        """The jobs that are still to be done."""
        return [job for job in jobs(self.settings) if job.key not in self.results]

    def go_on(self, workers: int, on_done: Callable[[str, Any], None] = lambda key, value: None) -> None:
        """Do what is missing: first what looks at the clock, alone, then the rest in ``workers`` processes of one thread each."""
        before, began = self.seconds, time.perf_counter()
        todo = self.missing()
        alone, rest = [job for job in todo if job.alone], [job for job in todo if not job.alone]
        for source in (map(perform, alone), _in_workers(rest, workers)):
            for key, value in source:
                self.results[key] = value
                self.seconds = round(before + time.perf_counter() - began, 1)
                self.save()
                on_done(key, value)


def _in_workers(todo: Sequence[Job], workers: int) -> Iterator[tuple[str, Any]]:
    if workers < 2 or len(todo) < 2:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a worker: the same sums, the same results
        try:
            yield from map(perform, todo)
        finally:
            torch.set_num_threads(threads)
        return
    with multiprocessing.get_context("spawn").Pool(workers, _begin) as pool:  # leaving it ends the workers
        yield from pool.imap_unordered(perform, todo)


def _begin() -> None:
    """A worker has one thread and leaves Ctrl-C to the process that asked."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
