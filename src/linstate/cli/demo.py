"""``linstate demo``: the whole idea in two minutes, on this machine and its own files."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from linstate.bench.reading import Point
    from linstate.engine import LanguageModel
    from linstate.state import State

EXAMPLES = ("linstate demo", "linstate demo --notes my-notes.txt --bytes 200000")

GENERATED = 200


def demo(
    size: Annotated[
        int, typer.Option("--bytes", help="Bytes of Python source to read.", min=20_000)
    ] = 1_000_000,
    out: Annotated[Path, typer.Option("--plot", "-o", help="Where the picture goes.", dir_okay=False)] = Path(
        "demo.png"
    ),
    notes: Annotated[
        Path | None, typer.Option(help="Your own notes file, lines of 'key: value'.", exists=True)
    ] = None,
    model_name: Annotated[str, typer.Option("--model", help="Model folder, or 'pocket'.")] = "pocket",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")] = False,
) -> None:
    """Show on this machine what a state is: read much, keep little, come back, ask.

    Reads a million bytes of this machine's own Python sources in constant memory, saves the state, goes on from it
    in a new process, answers questions from a state alone, and draws time and memory against length.
    """
    from rich.console import Console

    from linstate.engine import LanguageModel

    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    started = time.perf_counter()
    model = LanguageModel.from_pretrained(model_name)
    console.print(
        f"[bold]Linstate demo[/]: model {model.name}, {model.decoder.parameter_count():,} weights, "
        f"state {model.decoder.state_bytes(1):,} bytes whatever the length\n"
    )
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="linstate-demo-") as folder:
        state, figures["reading"] = _read(console, model, size)
        file = Path(folder) / "sources.state"
        figures["state"] = _save(console, model, state, file)
        figures["restore"] = _restore(console, model, model_name, state, file)
    figures["questions"] = _ask(console, model, notes)
    figures["picture"] = _picture(console, model, out)
    figures["seconds"] = round(time.perf_counter() - started, 1)
    console.print(f"\nAll of it took {figures['seconds']} s.")
    if as_json:
        print(json.dumps(figures))


def _sources(size: int) -> Iterator[str]:
    """The standard library's sources, then those of installed packages, up to ``size`` bytes."""
    left = size
    for folder in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(Path(folder).rglob("*.py")):
            try:
                text = path.read_text("utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            raw = text.encode()[:left]
            left -= len(raw)
            yield raw.decode(errors="ignore")
            if left <= 0:
                return


def _read(console: Any, model: LanguageModel, size: int) -> tuple[State, dict[str, Any]]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from linstate.bench.reading import resident_bytes
    from linstate.engine import Progress as Done

    console.print(f"[bold]1[/]  Reading {size:,} bytes of this machine's Python sources, each token once")
    marks: list[tuple[float, int]] = [(time.perf_counter(), 0)]
    memory: list[int] = []
    columns = (
        TextColumn("   "),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%  {task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=size, speed="")

        def progress(done: Done) -> None:
            marks.append((time.perf_counter(), done.tokens))
            if done.tokens >= 10_000:
                memory.append(resident_bytes())
            speed = done.tokens / (marks[-1][0] - marks[0][0])
            bar.update(task, completed=done.characters, speed=f"{speed:,.0f} tokens/s")

        state = model.read(_sources(size), on_progress=progress)
    tokens, seconds = marks[-1][1], marks[-1][0] - marks[0][0]
    first, last = _speed(marks, 0, tokens // 10), _speed(marks, tokens - tokens // 10, tokens)
    grown = max(memory) - memory[0] if memory else 0
    console.print(
        f"   {tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s\n"
        f"   first tenth {first:,.0f} tokens/s, last tenth {last:,.0f} tokens/s ({last / first:.0%})\n"
        f"   resident memory grew by {grown / 2**20:.1f} MB after the first 10,000 tokens\n"
    )
    return state, {
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "first_tenth": round(first),
        "last_tenth": round(last),
        "memory_growth_bytes": grown,
    }


def _speed(marks: list[tuple[float, int]], begin: int, end: int) -> float:
    """Tokens per second between two positions, at the marks nearest to them."""
    start = max((m for m in marks if m[1] <= begin), key=lambda m: m[1])
    stop = min((m for m in marks if m[1] >= end), key=lambda m: m[1])
    return (stop[1] - start[1]) / max(stop[0] - start[0], 1e-9)


def _save(console: Any, model: LanguageModel, state: State, file: Path) -> dict[str, Any]:
    from linstate.bench.reading import kv_cache_bytes

    written = state.save(file)
    cache = kv_cache_bytes(model.decoder.config, state.position)
    console.print(
        f"[bold]2[/]  Saved what was read: {written:,} bytes\n"
        f"   the KV cache of a softmax model of the same width would hold {cache:,} bytes, {cache / written:,.0f} times as much\n"
    )
    return {"file_bytes": written, "kv_cache_bytes": cache}


def _restore(console: Any, model: LanguageModel, model_name: str, state: State, file: Path) -> dict[str, Any]:
    console.print(f"[bold]3[/]  Going on from the file in a new process, {GENERATED} tokens")
    here = model.generate("", state, max_tokens=GENERATED)
    command = [sys.executable, "-m", "linstate", "generate", "--model", model_name, "--state", str(file)]
    begin = time.perf_counter()
    there = subprocess.run(
        [*command, "--max-tokens", str(GENERATED), "--json"], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - begin
    if there.returncode:
        console.print(there.stderr)
        raise typer.Exit(1)
    ids = json.loads(there.stdout)["ids"]
    equal = ids == list(here.ids)
    console.print(
        f"   {'[green]identical[/]' if equal else '[red]different[/]'} to the {len(here.ids)} tokens of the process that never "
        f"stopped ({seconds:.1f} s, the start of Python included); they begin:\n"
    )
    console.print(
        "   " + here.text[:160].strip("\n").replace("\n", "\n   "), style="dim", markup=False, highlight=False
    )
    console.print()
    return {"tokens": len(here.ids), "identical": equal, "seconds": round(seconds, 2)}


def _ask(console: Any, model: LanguageModel, notes: Path | None) -> dict[str, Any]:
    from rich.table import Table

    if notes is None:
        text = (resources.files("linstate") / "cli" / "notes.txt").read_text("utf-8")
    else:
        text = notes.read_text("utf-8", errors="replace")
    entries = [
        (key.strip(), value.strip())
        for key, mark, value in (line.partition(":") for line in text.splitlines())
        if mark
    ]
    entries = [(key, value) for key, value in entries if key and value][:20]
    state = model.read(text)
    console.print(
        f"[bold]4[/]  Read {'a' if notes is None else 'your'} notes file ({len(text):,} characters); {len(entries)} questions, "
        "answered from the state alone"
    )
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    for title in ("  ", "question", "answer", "in the notes"):
        table.add_column(title)
    right = 0
    for key, value in entries:
        answer = model.ask(key, state)
        right += answer == value
        table.add_row(
            "[green]ok[/]" if answer == value else "[red]no[/]", key, answer, "" if answer == value else value
        )
    console.print(table)
    console.print(f"   {right} of {len(entries)} right\n")
    return {"right": right, "asked": len(entries)}


def _picture(console: Any, model: LanguageModel, out: Path) -> dict[str, Any]:
    from linstate.bench.reading import read_curve, softmax_twin

    console.print(
        "[bold]5[/]  Time and memory against length, beside a softmax model of the same width, measured here"
    )
    recurrent = list(read_curve(model.decoder, 16_384, seconds=10))
    softmax = list(read_curve(softmax_twin(model.decoder.config), 16_384, seconds=15))
    shared = min(recurrent[-1].position, softmax[-1].position)
    slow, fast = (_median_near(points, shared) for points in (softmax, recurrent))
    console.print(
        f"   at token {shared:,}: recurrent {fast * 1e6:,.0f} µs a token and {recurrent[-1].state_bytes:,} bytes, "
        f"softmax {slow * 1e6:,.0f} µs a token and {softmax[-1].state_bytes:,} bytes"
    )
    figures = {"position": shared, "recurrent_us": round(fast * 1e6, 1), "softmax_us": round(slow * 1e6, 1)}
    try:
        import matplotlib
    except ImportError:
        console.print("   no picture: matplotlib is not installed (pip install 'linstate[plot]')")
        return figures
    matplotlib.use("Agg")
    _draw(recurrent, softmax, out)
    console.print(f"   drawn in {out}")
    return {**figures, "file": str(out)}


def _median_near(points: list[Point], position: int) -> float:
    """Median seconds per token over the last eight blocks up to a position."""
    return statistics.median([p.seconds_per_token for p in points if p.position <= position][-8:])


def _draw(recurrent: list[Point], softmax: list[Point], out: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for points, name, colour in (
        (recurrent, "recurrent state", "tab:blue"),
        (softmax, "softmax, KV cache", "tab:red"),
    ):
        positions = [p.position + 1 for p in points]
        smooth = [_median_near(points[: i + 1], p.position) * 1e6 for i, p in enumerate(points)]
        left.plot(positions, smooth, label=name, color=colour)
        right.plot(positions, [p.state_bytes / 1e6 for p in points], label=name, color=colour)
    left.set(xlabel="tokens read", ylabel="time per token (µs)", ylim=(0, None), title="Time")
    right.set(xlabel="tokens read", ylabel="kept for the next token (MB)", ylim=(0, None), title="Memory")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    part = out.with_name(f".{out.stem}.part{out.suffix or '.png'}")
    figure.savefig(part, dpi=120)
    part.replace(out)
    plt.close(figure)
