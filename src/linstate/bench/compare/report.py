"""docs/compare.md: every table, picture and sentence of it comes from one run."""

from __future__ import annotations

from collections.abc import Iterable

from linstate.bench.compare import capacity, evidence, sizes, tables
from linstate.bench.compare.jobs import ROWS, Run
from linstate.bench.compare.tasks import TASKS

ABOUT = {
    "cost": "By the formulas of each mixer. All models here have the same width, depth and number of weights (to 1%): every "
    "feed-forward is a SwiGLU as wide as the mixer's own weights leave room for.",
    "speed": "Measured here, so these figures are this machine's; between machines the ratios travel further than the "
    "speeds. With softmax attention the work for a token grows with the text before it, so its ratios change with the length.",
    "capacity": "No training, one head, keys as good as they can be: what the state itself holds. Orthogonal keys do not disturb each "
    "other, and there are K of them; behind the last come the first again. With random keys a sum of outer products "
    "drowns in its own noise; the delta rule replaces what it holds for a key, at the price of disturbing others "
    "that are not orthogonal to it, and comes to least squares when it reads again; a decay forgets the oldest. Time-invariant "
    "state spaces (`s4`, `s4d`) are not here: they have no keys, what they keep is found by its distance only. The row of test-time training "
    "has its inner rate, key length and first weights chosen by hand; the others have nothing to choose.",
    "recall": "Pairs of a key and a value, then each key again: what was its value? (MQAR of Zoology, arXiv 2312.04927, with a "
    "small vocabulary of 128.) A model must learn to bind two neighbouring tokens: with a short convolution that "
    "is at hand, without one it takes two layers that work together, which is found later. What is found at all in so few steps depends "
    "on the size of the first weights: with a standard deviation of 0.02, as large models have it, softmax attention was not among those that "
    "learned; here it is 0.05 for all. The learning rate of --quick is one for all, --full takes the better of two. "
    "A low row here says that it was not learned in these steps, not that it cannot be.",
    "copying": "Letters stand among blanks; at the end they are to be said in their order (Mamba, arXiv 2312.00752). What "
    "counts is to let letters in and blanks not.",
    "parity": "After every bit: is the number of ones even or odd? A state that can only decay cannot flip; a transition with "
    "the eigenvalue -1 can (arXiv 2411.12537). Training stops at 40 bits, so only what has found the rule goes on behind them.",
}


def markdown(run: Run, name: str) -> str:
    """The report on a run, to be written to a file ``name``.md with the pictures in the folder ``name`` beside it."""
    parts = [
        "# Which architecture for what",
        f"<!-- Generated: {run.settings.command()} --report {name}.md. Do not edit. -->",
        _how(run),
        "## In short",
        _short(run),
    ]
    for table in tables.tables(run):
        parts += [f"## {table.title}", ABOUT[table.name]]
        parts.append(f"![{table.title}]({name}/{table.name}.png)")
        parts += [table.markdown(), table.note]
        if table.name in TASKS and (left := tables.untrained(run, table.name)):
            parts.append(f"Not trained in this run: {_named(left)}. `linstate compare --full` trains all.")
    return "\n\n".join([*parts, "## Mixer by mixer", _mixers(run)]) + "\n"


def _how(run: Run) -> str:
    about = run.machine
    steps = f"Tiny models (2 blocks of width 64, batches of {ROWS}, AdamW, seed 0) show what is learned soon, not what is learned at last."
    return (
        f"Measured with `{run.settings.command()}` in {run.seconds / 60:.0f} minutes: {about['processor']}, {about['threads']} "
        f"threads, Python {about['python']}, torch {about['versions']['torch']}, linstate {about['linstate']}. {steps} Softmax attention is in "
        "every table."
    )


def _short(run: Run) -> str:
    lines = []
    costs, speeds, held = tables.part(run, "cost"), tables.speeds(run), tables.part(run, "capacity")
    if base := costs.get(sizes.BASE):
        length = list(base["state_bytes"])[-1]
        constant = [
            found["state_bytes"][length]
            for found in costs.values()
            if found["state_bytes"][length] < 0.01 * base["state_bytes"][length]
        ]
        lines.append(
            f"**Long texts, many states, small memory: a recurrent mixer.** After {int(length):,} tokens softmax attention keeps "
            f"{tables.number(base['state_bytes'][length])}B in a block, {len(constant)} of the others less than a hundredth of it."
        )
    if speeds:
        for what in ("prefill", "decode"):
            length = list(speeds[sizes.BASE][what])[-1]
            ratios = {
                name: row[what][length]["times_attention"]
                for name, row in speeds.items()
                if name != sizes.BASE
            }
            won = [name for name, times in ratios.items() if times > evidence.FASTER]
            lost = [name for name, times in ratios.items() if times < 1 / evidence.FASTER]
            lines.append(
                f"**Speed of {what} at {int(length):,} tokens:** faster than softmax attention: {_named(won)}; slower: {_named(lost)}."
            )
    if (soft := held.get("softmax_attention/random")) and (linear := held.get("linear_attention/random")):
        lines.append(
            f"**Exact recall of anything from a long text: softmax attention, or some layers of it.** With random keys it recalls "
            f"all of {capacity.recalls(soft):,} pairs (no end found), a sum of outer products of {capacity.SIZE} x {capacity.SIZE} numbers 99% of "
            f"{capacity.recalls(linear)} and half of {capacity.recalls(linear, 0.5)}. A fixed state is full at some point, whatever the training."
        )
    for task, about in TASKS.items():
        if found := tables.best(run, task):
            right = {name: row["accuracy"][about.judged] for name, row in found.items()}
            lines.append(
                f"**{task.capitalize()}** ({about.judged}): at least {evidence.GOOD:.0%} right: "
                f"{_named(n for n, a in right.items() if a >= evidence.GOOD)}; not learned in so few steps, below {evidence.BAD:.0%}: "
                f"{_named(n for n, a in right.items() if a < evidence.BAD)}."
            )
    return "\n".join(f"- {line}" for line in lines)


def _mixers(run: Run) -> str:
    lines = ["| mixer | for it | against it | its recurrence |", "|---|---|---|---|"]
    for name in run.settings.mixers:
        found = evidence.findings(run, name)
        cells = ("; ".join(f.text for f in found if f.good is good) or "-" for good in (True, False, None))
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _named(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"
