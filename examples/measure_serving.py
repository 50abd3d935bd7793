"""Measure `linstate serve` over HTTP: the figures of docs/serving.md. Servers are started and stopped by this script.

python examples/measure_serving.py                     # everything but the soak
python examples/measure_serving.py parallel restore    # some of it
python examples/measure_serving.py restore --model mamba2-370m   # of that size, with random weights
python examples/measure_serving.py soak --seconds 600 --clients 64
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from linstate import State

WORDS = [
    "river",
    "stone",
    "lamp",
    "door",
    "green",
    "seven",
    "winter",
    "paper",
    "copper",
    "quiet",
    "engine",
    "harbour",
    "market",
    "letter",
    "north",
    "glass",
]


COMMON: list[str] = []
"""Options of every server."""


class Server:
    """A server process on a free port of loopback."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.command = [
            sys.executable,
            "-m",
            "linstate",
            "serve",
            "--store",
            str(folder),
            "--log",
            "off",
            *COMMON,
            *options,
        ]
        self.port = "0"
        self.start()

    def start(self) -> None:
        """Start, at the port of the last start if there was one."""
        self.process = subprocess.Popen(
            [*self.command, "--port", self.port], stderr=subprocess.PIPE, text=True, env=os.environ
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("listening"):
                self.url = line.split()[-1].rstrip("/")
                self.port = self.url.rsplit(":", 1)[1]
                break
        else:
            raise SystemExit(f"the server did not start: {self.command}")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """SIGTERM, and wait."""
        self.process.terminate()
        self.process.wait(60)

    def resident(self) -> int:
        """Bytes of memory that the process holds (Linux; 0 elsewhere)."""
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
                if line.startswith("VmRSS"):
                    return int(line.split()[1]) * 1024
        return 0

    def metrics(self, headers: dict[str, str] | None = None) -> dict[str, float]:
        text = httpx.get(f"{self.url}/metrics", headers=headers, trust_env=False, timeout=60).text
        pairs = (line.rsplit(" ", 1) for line in text.splitlines() if line and line[0] != "#")
        return {name: float(value) for name, value in pairs}


@contextlib.contextmanager
def serving(*options: str, folder: Path | None = None) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as temporary:
        made = Server(folder or Path(temporary), *options)
        try:
            yield made
        finally:
            if made.process.poll() is None:
                made.stop()


def client(server: Server, **options: Any) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=256, max_keepalive_connections=256)
    return httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=600, limits=limits, **options)


def text_of(words: int, seed: int) -> str:
    chosen = random.Random(seed)
    return " ".join(chosen.choice(WORDS) for _ in range(words)) + "\n"


def table(title: str, rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print(f"\n{title}")
    for row in rows:
        print(
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(),
            flush=True,
        )


CONTEXTS = {"about 100 tokens": 30, "about 900 tokens": 300}
"""What those who generate in parallel have read before, in words."""


async def engine(quick: bool) -> dict[str, Any]:
    """Tokens of 1 and 32 conversations in the scheduler alone, without HTTP, by CPU time."""
    from linstate import LanguageModel, Sampling
    from linstate.engine.generation import Live
    from linstate.engine.jobs import Request
    from linstate.engine.scheduler import Scheduler
    from linstate.engine.tokens import encode

    tokens = 32 if quick else 200
    model = LanguageModel.from_pretrained(_option("--model", "pocket"))
    found: dict[str, Any] = {}
    with Scheduler(model) as scheduler:
        for context, words in CONTEXTS.items():
            state = Live(model.decoder, model.read(text_of(words, 0))).settled()

            def request(n: int, state: State = state) -> Request:
                ids = tuple(encode(model.tokenizer, f" {WORDS[n % len(WORDS)]} {n}", goes_on=True))
                return Request(state, ids, tokens, Sampling(1.0, seed=n))

            scheduler.submit(request(0)).result()
            rates: dict[str, float] = {}
            for clients in (1, 32, 1, 32):
                began = time.process_time()
                jobs = [scheduler.submit(request(n)) for n in range(clients)]
                made = sum(len(job.result().ids) for job in jobs)
                rate = made / (time.process_time() - began)
                rates[str(clients)] = max(rate, rates.get(str(clients), 0.0))
            found[context] = rates
            _rates(f"In parallel in the engine, behind {context}: tokens/CPU s", rates)
    return found


def _rates(title: str, rates: dict[str, float]) -> None:
    """A table of rates by number of clients; each is the better of two runs in turn."""
    rows = [("clients", "tokens/s", "of one")]
    rows += [(n, f"{rate:,.0f}", f"{rate / rates['1']:.1f}x") for n, rate in rates.items()]
    table(f"{title} (better of two runs in turn)", rows)


def _option(name: str, default: str) -> str:
    return COMMON[COMMON.index(name) + 1] if name in COMMON else default


def random_model(name: str, folder: Path) -> None:
    """A model of the size that `linstate bench model` has under this name, with random weights, in ``folder``."""
    from linstate import LanguageModel
    from linstate.bench.model_cases import CASES, random_decoder

    tokenizer = LanguageModel.from_pretrained("pocket").tokenizer
    LanguageModel(random_decoder(CASES[name].config), tokenizer, name=name).save_pretrained(folder)


async def parallel(quick: bool) -> dict[str, Any]:
    """Tokens a second of 1, 8 and 32 clients that generate at the same time."""
    tokens = 32 if quick else 200
    found: dict[str, Any] = {}
    with serving() as server:
        async with client(server) as http:
            for context, words in CONTEXTS.items():
                talk = [{"role": "user", "content": f"{text_of(words, 0)}river"}]
                body = {"messages": talk, "max_tokens": 1, "store": True}
                state = (await http.post("/v1/chat/completions", json=body)).json()["state"]

                async def one(n: int, state: str = state) -> int:
                    body = {
                        "prompt": f" {WORDS[n % len(WORDS)]} {n}",
                        "state": state,
                        "max_tokens": tokens,
                        "temperature": 1,
                        "seed": n,
                    }
                    answer = (await http.post("/v1/completions", json=body)).json()
                    return int(answer["usage"]["completion_tokens"])

                await one(0)
                rates: dict[str, float] = {}
                for clients in (1, 8, 32, 1, 8, 32):
                    began = time.perf_counter()
                    made = sum(await asyncio.gather(*(one(n) for n in range(clients))))
                    rate = made / (time.perf_counter() - began)
                    rates[str(clients)] = max(rate, rates.get(str(clients), 0.0))
                found[context] = rates
                _rates(f"Generating in parallel, behind {context}", rates)
    return found


async def restore(quick: bool) -> dict[str, Any]:
    """A kept state in a new process to its first token, beside reading 8,192 tokens again."""
    large = _option("--model", "pocket") != "pocket"
    words, count = (1000 if quick else 2000 if large else 5400), (2 if quick else 3 if large else 7)
    slots = (
        ("--slots", "8") if large else ()
    )  # more would take memory and time at the start, and nobody uses them
    with tempfile.TemporaryDirectory() as temporary:
        reading, states, first = [], [], []
        with serving(*slots, folder=Path(temporary)) as server:
            async with client(server) as http:
                for n in range(count):
                    made = (await http.post("/v1/states", json={"text": text_of(words, n)})).json()
                    states.append(made["id"])
                    reading.append(made["read"]["seconds"] * 8192 / made["read"]["tokens"])
        with serving(*slots, folder=Path(temporary)) as server:
            async with client(server) as http:
                await http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
                for state in states:  # each once: a second time it would be in memory
                    began = time.perf_counter()
                    body = {"prompt": "\n? river:", "state": state, "max_tokens": 1}
                    (await http.post("/v1/completions", json=body)).raise_for_status()
                    first.append(time.perf_counter() - began)
    again, ttft = statistics.median(reading), statistics.median(first)
    table(
        "A kept state in a new process (medians)",
        [
            ("reading 8,192 tokens", f"{again * 1000:,.0f} ms"),
            ("kept state to first token, HTTP included", f"{ttft * 1000:,.1f} ms"),
            ("share", f"{100 * ttft / again:.2f} %"),
        ],
    )
    return {"read_8192_s": again, "first_token_s": ttft, "share": ttft / again}


async def conversations(quick: bool, count: int = 1000) -> dict[str, Any]:
    """Many conversations of 20 turns on kept states: what is computed, and the latency of each turn."""
    count, turns, at_once = (20 if quick else count), 20, 16
    latency: list[list[float]] = [[] for _ in range(turns)]
    new = 0
    with serving("--max-states", "100000") as server:
        before = server.metrics()
        async with client(server) as http:
            gate = asyncio.Semaphore(at_once)

            async def talk(n: int) -> None:
                nonlocal new
                last, known = None, 0
                async with gate:
                    for turn in range(turns):
                        body = {"input": f"{WORDS[(n + turn) % len(WORDS)]} {turn}", "max_output_tokens": 8}
                        began = time.perf_counter()
                        answer = (
                            await http.post("/v1/responses", json={**body, "previous_response_id": last})
                        ).json()
                        latency[turn].append(time.perf_counter() - began)
                        usage = answer["usage"]
                        new += usage["input_tokens"] - known
                        last, known = answer["id"], usage["total_tokens"]

            began = time.perf_counter()
            await asyncio.gather(*(talk(n) for n in range(count)))
            seconds = time.perf_counter() - began
        after = server.metrics()
    computed = after["linstate_prompt_tokens_total"] - before["linstate_prompt_tokens_total"]
    tail = after["linstate_tail_tokens_total"] - before["linstate_tail_tokens_total"]
    medians = [1000 * statistics.median(x) for x in latency]
    table(
        f"{count:,} conversations of {turns} turns, {at_once} at a time, {seconds:.0f} s",
        [
            ("new tokens in all turns", f"{new:,}"),
            ("prompt tokens that were new to the server", f"{computed:,.0f}"),
            ("tokens behind the grid that were run again", f"{tail:,.0f}"),
            (
                "median latency of turn 1, 2, 10, 20",
                ", ".join(f"{medians[i]:.0f}" for i in (0, 1, 9, 19)) + " ms",
            ),
        ],
    )
    return {"new": new, "computed": computed, "tail": tail, "median_ms": medians, "seconds": seconds}


async def prefill(quick: bool) -> dict[str, Any]:
    """What a prefill worker ships for one text, and how long the first token takes, beside a softmax model's KV cache."""
    sizes = (700, 2000) if quick else (1350, 5400, 21600)
    rows = [("tokens", "read here", "worker, exact", "bytes", "bf16", "int8", "KV cache, 16 bits")]
    found = []
    for words in sizes:
        bytes_, seconds, tokens, kv = {}, {}, 0, 0
        for ship in ("here", "exact", "bf16", "int8"):
            with contextlib.ExitStack() as stack:
                options: tuple[str, ...] = ()
                if ship != "here":
                    worker = stack.enter_context(serving("--role", "prefill"))
                    options = ("--role", "decode", "--worker", worker.url, "--offload", "512", "--ship", ship)
                server = stack.enter_context(serving(*options))
                async with client(server) as http:
                    await http.post("/v1/completions", json={"prompt": "warm", "max_tokens": 2})
                    began = time.perf_counter()
                    made = await http.post(
                        "/v1/completions", json={"prompt": text_of(words, 1), "max_tokens": 1, "store": True}
                    )
                    seconds[ship] = time.perf_counter() - began
                    tokens = made.json()["usage"]["prompt_tokens"]
                    bytes_[ship] = server.metrics()["linstate_shipped_bytes_total"]
                    kv = (await http.get(f"/v1/states/{made.json()['state']}")).json()["kv_cache_bytes"]
        rows.append(
            (
                f"{tokens:,}",
                f"{seconds['here'] * 1000:,.0f} ms",
                f"{seconds['exact'] * 1000:,.0f} ms",
                *(f"{bytes_[ship] / 1000:,.0f} kB" for ship in ("exact", "bf16", "int8")),
                f"{kv / 1000:,.0f} kB",
            )
        )
        found.append({"tokens": tokens, "seconds": seconds, "bytes": bytes_, "kv_cache_bytes": kv})
    table("One text, to its first token (all processes on this machine)", rows)
    return {"requests": found}


HELD = {
    "linstate_state_bytes": "granted to requests under way",
    'linstate_store_tier_bytes{tier="memory"}': "the store's memory tier",
    "linstate_prefix_bytes": "beginnings of texts",
}
"""Bytes of states in memory as ``/metrics`` has them: those of windows that are not full count as if they were."""


async def soak(quick: bool, seconds: float, clients: int) -> dict[str, Any]:
    """Clients that talk, leave, ask nonsense and look into each other's states, while workers are killed."""
    counts: dict[str, int] = {}

    def count(what: str) -> None:
        counts[what] = counts.get(what, 0) + 1

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tenants = ["ann", "bob", "cy"]
        made = {
            name: subprocess.run(
                [sys.executable, "-m", "linstate", "keys", "add", name, "--file", str(folder / "keys.json")],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
            for name in (*tenants, "metrics")
        }
        keyed = {name: {"authorization": f"Bearer {key}"} for name, key in made.items()}
        workers = [Server(folder / f"w{n}", "--role", "prefill") for n in range(2)]
        urls = [part for w in workers for part in ("--worker", w.url)]
        server = Server(
            folder / "store",
            "--keys",
            str(folder / "keys.json"),
            "--offload",
            "512",
            "--max-states",
            "1000000",
            *urls,
        )
        kept: dict[str, list[tuple[str, str]]] = {name: [] for name in tenants}
        memory: list[tuple[float, int]] = []
        tiers: list[dict[str, float]] = []
        wrong: list[str] = []
        end = time.monotonic() + seconds

        async def live(n: int) -> None:
            chosen = random.Random(n)
            name = tenants[n % len(tenants)]
            async with client(server, headers=keyed[name]) as http:
                last: str | None = None
                while time.monotonic() < end:
                    what = chosen.random()
                    try:
                        if what < 0.1:
                            text = text_of(chosen.choice((20, 200, 900)), chosen.randrange(50))
                            answer = await http.post("/v1/states", json={"text": text})
                            if answer.status_code == 201:
                                kept[name].append((answer.json()["id"], "state"))
                        elif what < 0.5:
                            body = {
                                "input": chosen.choice(WORDS),
                                "max_output_tokens": chosen.randrange(4, 24),
                                "previous_response_id": last,
                            }
                            answer = await http.post("/v1/responses", json=body)
                            if answer.status_code == 200:
                                last = answer.json()["id"] if chosen.random() < 0.95 else None
                                kept[name].append((answer.json()["id"], "response"))
                        elif what < 0.7:  # leave in the middle of a stream
                            body = {
                                "prompt": text_of(10, n),
                                "max_tokens": 200,
                                "stream": True,
                                "temperature": 1,
                            }
                            async with http.stream("POST", "/v1/completions", json=body) as answer:
                                lines = answer.aiter_lines()
                                for _ in range(chosen.randrange(6)):
                                    await anext(lines, None)
                        elif what < 0.8:  # leave before an answer
                            body = {"prompt": text_of(10, n), "max_tokens": 200}
                            with contextlib.suppress(TimeoutError):
                                async with asyncio.timeout(chosen.random() * 0.2):
                                    await http.post("/v1/completions", json=body)
                            count("left")
                            continue
                        elif what < 0.9:
                            body = chosen.choice(
                                (
                                    {"prompt": 5},
                                    {"prompt": "x", "max_tokens": -1},
                                    {"messages": []},
                                    {"prompt": "x", "state": "../x"},
                                )
                            )
                            answer = await http.post(
                                chosen.choice(("/v1/completions", "/v1/responses", "/v1/states")), json=body
                            )
                            if answer.status_code < 400:
                                wrong.append(f"nonsense was taken: {body}")
                        else:
                            other = chosen.choice([t for t in tenants if t != name])
                            if not kept[other]:
                                continue
                            id, kind = chosen.choice(kept[other])
                            answer = await http.get(f"/v1/{kind}s/{id}")
                            if answer.status_code != 404:
                                wrong.append(f"{name} saw a {kind} of {other}")
                        count(str(answer.status_code))
                        if answer.status_code >= 500:
                            wrong.append(f"{answer.status_code}")
                        if answer.status_code == 429:
                            await asyncio.sleep(chosen.random())
                    except httpx.HTTPError as error:
                        wrong.append(f"{type(error).__name__}: {error}")

        async def watch() -> None:
            while (now := time.monotonic() - end + seconds) < seconds:
                memory.append((now, server.resident()))
                if len(tiers) < 1 + int(3 * now / seconds):
                    found = await asyncio.to_thread(server.metrics, keyed["metrics"])
                    tiers.append({name: found[name] for name in HELD})
                await asyncio.sleep(min(2.0, seconds / 30))

        async def trouble() -> None:
            while time.monotonic() < end:
                await asyncio.sleep(min(2.0, seconds / 5))
                worker = random.choice(workers)
                worker.kill()
                count("workers killed")
                await asyncio.sleep(min(1.0, seconds / 10))
                await asyncio.to_thread(worker.start)

        await asyncio.gather(watch(), trouble(), *(live(n) for n in range(clients)))
        after = server.metrics(keyed["metrics"])
        tiers.append({name: after[name] for name in HELD})
        server.kill()  # what was acknowledged must be there all the same
        server.start()
        lost = 0
        for name in tenants:
            async with client(server, headers=keyed[name]) as http:
                for id, kind in kept[name]:
                    lost += (await http.get(f"/v1/{kind}s/{id}")).status_code != 200
        for each in (server, *workers):
            each.stop()
    thirds = [[m for t, m in memory if n <= 3 * t / seconds < n + 1] or [memory[-1][1]] for n in range(3)]
    medians = [statistics.median(part) for part in thirds]
    late = [(t, m) for t, m in memory if t >= seconds / 2]
    slope = statistics.linear_regression(*zip(*late, strict=True)).slope * 60 if len(late) > 2 else 0.0
    rows = [(what, f"{n:,}") for what, n in sorted(counts.items())]
    rows += [
        ("acknowledged states and responses", f"{sum(map(len, kept.values())):,}"),
        ("of those lost after SIGKILL", f"{lost}"),
        ("wrong", f"{len(wrong)} {sorted(set(wrong))[:5] if wrong else ''}"),
        ("memory, median of each third", ", ".join(f"{m / 1e6:,.0f}" for m in medians) + " MB"),
        ("memory, least-squares slope of the second half", f"{slope / 1e6:+.2f} MB/min"),
        *(
            (f"{about}, by third and at last", ", ".join(f"{t[name] / 1e6:,.0f}" for t in tiers) + " MB")
            for name, about in HELD.items()
        ),
        (
            "readings by workers / read here instead",
            "{:.0f} / {:.0f}".format(
                after.get('linstate_prefills_sent_total{outcome="done"}', 0),
                after.get('linstate_prefills_sent_total{outcome="local"}', 0),
            ),
        ),
        ("generated tokens", f"{after['linstate_generated_tokens_total']:,.0f}"),
    ]
    table(f"{clients} clients, {seconds:.0f} s", rows)
    return {
        "counts": counts,
        "lost": lost,
        "wrong": wrong[:20],
        "kept": sum(map(len, kept.values())),
        "memory_bytes": medians,
        "slope_bytes_per_minute": slope,
        "held": tiers,
    }


def main() -> None:
    parts = {
        "engine": engine,
        "parallel": parallel,
        "restore": restore,
        "conversations": conversations,
        "prefill": prefill,
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", choices=[*parts, "soak", []], help="what to measure; default all but the soak"
    )
    parser.add_argument("--quick", action="store_true", help="small: to see that it works")
    parser.add_argument("--seconds", type=float, default=600, help="of the soak")
    parser.add_argument("--clients", type=int, default=64, help="of the soak")
    parser.add_argument("--conversations", type=int, default=1000, help="how many")
    parser.add_argument("--model", default="pocket", help="model folder, or a size of 'linstate bench model'")
    parser.add_argument("--threads", type=int, help="threads of a server's model")
    asked = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if asked.threads:
            COMMON.extend(("--threads", str(asked.threads)))
            os.environ["OMP_NUM_THREADS"] = str(asked.threads)
        model = asked.model
        if model != "pocket" and not Path(model).is_dir():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / model
            random_model(asked.model, folder)
            model = str(folder)
        COMMON.extend(("--model", model))
        run(asked, parts)


def run(asked: argparse.Namespace, parts: dict[str, Any]) -> None:
    """Measure the parts that were asked for, and print the JSON line."""
    found: dict[str, Any] = {}
    for part in asked.parts or parts:
        if part == "soak":
            found[part] = asyncio.run(soak(asked.quick, asked.seconds, asked.clients))
        elif part == "conversations":
            found[part] = asyncio.run(conversations(asked.quick, asked.conversations))
        else:
            found[part] = asyncio.run(parts[part](asked.quick))
    print(json.dumps(found))
    if found.get("soak", {}).get("lost") or found.get("soak", {}).get("wrong"):
        raise SystemExit("error: something was lost or wrong")


if __name__ == "__main__":
    main()
