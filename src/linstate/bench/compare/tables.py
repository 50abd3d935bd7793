"""What a run measured, as tables: the same ones on the terminal, in the report and behind the pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from linstate.bench.compare import capacity, cost, speed
from linstate.bench.compare.jobs import Run
from linstate.bench.compare.tasks import TASKS

BARE = {
    "softmax_attention": ("attention", "mla"),
    "linear_attention": (
        "linear_transformer",
        "retnet",
        "transnormer",
        "lightning",
        "mamba2",
        "mlstm",
        "gla",
        "hgrn2",
        "rwkv5",
        "rwkv6",
    ),
    "selective_scan": ("mamba",),
    "delta_rule": ("deltanet", "gated_deltanet", "kimi_delta", "deltaproduct"),
    "dplr": ("rwkv7",),
    "test_time_training": ("ttt_linear",),
}
"""The mixers that a case of capacity speaks of: a head of theirs is that recurrence, with gates, and keys as they learn them.

Not here: feature maps (another number of channels), windows and segments (more than one memory), scans without keys.
"""


@dataclass(frozen=True)
class Table:
    """A title, names of columns, and rows of text; ``note`` says how to read it."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        lines = [f"| {' | '.join(self.columns)} |", "|---" + "|---:" * (len(self.columns) - 1) + "|"]
        return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in self.rows)])


def part(run: Run, section: str) -> dict[str, Any]:
    """The results of a section, by their keys without its name."""
    start = section + "/"
    return {key.removeprefix(start): value for key, value in run.results.items() if key.startswith(start)}


def speeds(run: Run) -> dict[str, Any]:
    """:func:`speed.summary` of the rounds that there are."""
    rounds = list(part(run, "speed").values())
    return speed.summary(rounds) if rounds else {}


def best(run: Run, task: str) -> dict[str, dict[str, Any]]:
    """By mixer (or its variant), the result at the learning rate with the highest accuracy in the judged test."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in part(run, f"tasks/{task}").items():
        name, _, rate = key.rpartition("/")
        judged = value["accuracy"][TASKS[task].judged]
        if name not in found or judged > found[name]["accuracy"][TASKS[task].judged]:
            found[name] = {**value, "rate": rate}
    return found


def tables(run: Run) -> list[Table]:
    """All tables of what has been measured."""
    made = [_cost(run), _speed(run), _capacity(run), *(_task(run, task) for task in TASKS)]
    return [table for table in made if table.rows]


def _cost(run: Run) -> Table:
    short, long = (str(n) for n in (cost.LENGTHS[0], cost.LENGTHS[-1]))
    rows = sorted(part(run, "cost").items(), key=lambda item: item[1]["state_bytes"][long])
    return Table(
        "cost",
        "State and work",
        (
            "mixer",
            "weights",
            f"state at {int(short):,}",
            f"state at {int(long):,}",
            "FLOPs a token",
            f"at {int(long):,}",
        ),
        tuple(
            (
                f"`{name}`",
                number(found["weights"]),
                number(found["state_bytes"][short]) + "B",
                number(found["state_bytes"][long]) + "B",
                number(found["flops"][short]),
                number(found["flops"][long]),
            )
            for name, found in rows
        ),
        f"One block (mixer and feed-forward) of width {cost.D_MODEL}; state in bytes, float32, of one text; FLOPs to read a "
        f"text of {int(short):,} or {int(long):,} tokens, by the token.",
    )


def _speed(run: Run) -> Table:
    found = speeds(run)
    lengths = list(next(iter(found.values()))["prefill"]) if found else []
    columns = [f"{what} {int(n):,}" for what in ("prefill", "decode") for n in lengths]
    rows = []
    for name, row in sorted(
        found.items(), key=lambda item: -item[1]["decode"][lengths[-1]]["tokens_per_second"]
    ):
        cells = [row[what][n] for what in ("prefill", "decode") for n in lengths]
        rows.append(
            (f"`{name}`", *(f"{number(c['tokens_per_second'])} ({c['times_attention']:.2f}x)" for c in cells))
        )
    return Table(
        "speed",
        "Speed",
        ("mixer", *columns),
        tuple(rows),
        f"Tokens per second of a model of {speed.LAYERS} blocks of width {speed.D_MODEL}, and in brackets how many times that "
        "of softmax attention in the same round; medians of the rounds. Prefill reads so many tokens in one call; decode adds "
        f"tokens behind them, one a call.",
    )


def _capacity(run: Run) -> Table:
    found, rows = part(run, "capacity"), []
    for name, case in capacity.CASES.items():
        if (orthogonal := found.get(f"{name}/orthogonal")) and (random := found.get(f"{name}/random")):
            rows.append(
                (
                    f"`{name}`",
                    str(case.size),
                    str(capacity.exact(orthogonal)),
                    str(capacity.recalls(orthogonal)),
                    f"{capacity.theory('orthogonal', case.size):.0f}",
                    str(capacity.exact(random)),
                    str(capacity.recalls(random)),
                    str(capacity.recalls(random, 0.5)),
                    f"{capacity.theory('random', case.size):.0f}",
                    case.how,
                )
            )
    return Table(
        "capacity",
        "Capacity",
        (
            "recurrence",
            "K",
            "orthogonal: exact",
            "99%",
            "theory",
            "random: exact",
            "99%",
            "50%",
            "theory",
            "set as",
        ),
        tuple(rows),
        "The largest number of pairs, of those tried, up to which every answer is exact, or 99% (50%) of them are nearest to "
        f"the right one of {capacity.CODEBOOK:,} values. Tried: {', '.join(map(str, capacity.PAIRS))}; {capacity.PAIRS[-1]} "
        "means that no end was found. Theory is that of a sum of outer products: K, and K V / (2 ln C).",
    )


def _task(run: Run, task: str) -> Table:
    found = best(run, task)
    rows = sorted(found.items(), key=lambda item: -item[1]["accuracy"][TASKS[task].judged])
    return Table(
        task,
        {"recall": "Associative recall", "copying": "Selective copying", "parity": "Parity"}[task],
        ("mixer", *TASKS[task].test, "loss", "steps", "learning rate"),
        tuple(
            (
                f"`{name}`",
                *(f"{value:.1%}" for value in row["accuracy"].values()),
                f"{row['loss']:.3f}",
                str(row["steps"]),
                row["rate"],
            )
            for name, row in rows
        ),
        f"Right answers at the asked positions; guessing gives {TASKS[task].chance:.1%}.",
    )


def untrained(run: Run, task: str) -> list[str]:
    """Mixers of the run that this task did not train."""
    have = {name.split()[0] for name in best(run, task)}
    return [name for name in run.settings.mixers if name not in have]


def number(value: float) -> str:
    """Three digits and a unit of 1000.

    >>> number(7), number(12_345), number(4.1e9)
    ('7', '12.3k', '4.1G')
    """
    for unit in ("", "k", "M", "G", "T"):
        if value < 999.5 or unit == "T":
            return f"{value:.3g}{unit}"
        value /= 1000
    raise AssertionError("unreachable")
