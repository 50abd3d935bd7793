"""Whole models on this CPU: prefill, decode and a resumed conversation, of random weights in the shapes of real models.

Everything is a rate beside what the machine was measured to do in the same run: prefill beside the rate of bf16 matmuls
of the same shapes, decode beside the bytes that a token must read over the bandwidth of memory.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn

from linstate.bench.measure import Clock
from linstate.bench.model_cases import Case
from linstate.bench.reading import resident_bytes
from linstate.engine import LanguageModel
from linstate.engine.reader import call
from linstate.models import Decoder
from linstate.models.checkpoint import load_decoder, read_settings
from linstate.models.packed import PackedLinear, pack
from linstate.ops.native import memory as native_memory
from linstate.ops.native.linear import BITS, FORMATS, Format
from linstate.types import LayerState, state_bytes

BLOCK = 256
LONGEST = 8192
"""Tokens that a model with softmax attention reads at most, here."""
QUESTION = 16
"""Tokens that a resumed conversation reads before its first new one."""


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        prefill: lengths, rising; the first with all formats, the others with the first format; beyond ``LONGEST`` only of
            recurrent models. The last one up to there is also that of a resumed conversation.
        formats: of the weights. tokens: of a decode. rounds: of which the median is taken, for lengths that are not long.
    """

    prefill: tuple[int, ...] = (2048, 8192, 32768)
    formats: tuple[Format, ...] = FORMATS
    tokens: int = 32
    rounds: int = 3
    clock: Clock = time.perf_counter

    def lengths(self, case: Case) -> tuple[int, ...]:
        return self.prefill if case.recurrent else self.short

    @property
    def short(self) -> tuple[int, ...]:
        """The lengths at which every model is measured."""
        return tuple(n for n in self.prefill if n <= LONGEST)

    def turns(self, tokens: int) -> int:
        """How often a prefill of so many tokens is measured."""
        return self.rounds if tokens <= 2048 else 1


def _median(seconds: Iterable[float]) -> float:
    return statistics.median(seconds)


def _timed(run: Callable[[], Any], clock: Clock = time.perf_counter) -> float:
    begin = clock()
    run()
    return clock() - begin


def bandwidth(clock: Clock, rounds: int = 5) -> float:
    """Bytes per second that torch's fastest reader reads from memory: a sum over half a gigabyte, in huge pages as packed weights."""
    x = native_memory.for_weights((1 << 27,), torch.float32).fill_(1.0)
    x.sum()
    return x.nbytes / min(_timed(x.sum, clock) for _ in range(rounds))


def linear_shapes(decoder: Decoder) -> dict[tuple[int, int], int]:
    """``(N, K) -> how many`` of the linear layers that every token passes, without the head."""
    found: dict[tuple[int, int], int] = {}
    for block in decoder.blocks():
        for module in block.modules():
            if isinstance(module, nn.Linear):
                shape = module.out_features, module.in_features
                found[shape] = found.get(shape, 0) + 1
    return found


def gemm_rate(shapes: dict[tuple[int, int], int], clock: Clock, rows: int = 2048, rounds: int = 3) -> float:
    """FLOP/s of torch's bf16 matmuls of these shapes with so many rows, as often as the model has each."""
    seconds = flops = 0.0
    for (n, k), count in shapes.items():
        x, weight = torch.randn(rows, k).bfloat16(), torch.randn(n, k).bfloat16()
        F.linear(x, weight)
        seconds += count * _median(_timed(lambda: F.linear(x, weight), clock) for _ in range(rounds))  # noqa: B023
        flops += count * 2.0 * rows * n * k
    return flops / seconds


class Read(NamedTuple):
    """A reading: its seconds, the state behind it, the most memory of the process that was resident behind a block."""

    seconds: float
    state: LayerState
    resident: int


def random_ids(decoder: Decoder, tokens: int) -> list[int]:
    """So many token ids, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    ids: list[int] = torch.randint(decoder.config.vocab_size, (tokens,), generator=generator).tolist()
    return ids


def read(decoder: Decoder, tokens: int, clock: Clock = time.perf_counter) -> Read:
    """Read so many random tokens from nothing, in blocks as a reading does."""
    ids, state, resident = random_ids(decoder, tokens), decoder.init_state(1), 0
    begin = clock()
    for at in range(0, tokens, BLOCK):
        _, state = call(decoder, ids[at : at + BLOCK], state, "none")
        resident = max(resident, resident_bytes())
    return Read(clock() - begin, state, resident)


def decode_seconds(decoder: Decoder, state: LayerState, tokens: int, clock: Clock) -> float:
    """Seconds of one decoded token: the median of so many, each the likeliest after the one before."""
    logits, state = call(decoder, [1], state, "last")
    logits, state = call(decoder, [2], state, "last")
    times = []
    for _ in range(tokens):
        begin = clock()
        logits, state = call(decoder, [int(logits[0, -1].argmax())], state, "last")
        times.append(clock() - begin)
    return _median(times)


def packed_bytes(decoder: Decoder) -> int:
    """Bytes of weights that a decoded token reads."""
    return sum(m.packed.nbytes for m in decoder.modules() if isinstance(m, PackedLinear))


def resumed_seconds(model: LanguageModel, tokens: int, rounds: int, clock: Clock) -> dict[str, float]:
    """Seconds to the first new token of a conversation of so many tokens that lies in a file: load, read a question, logits.

    ``settled``: kept as the server keeps turns, all of it run. ``tail``: as a reading leaves it, which runs again what hangs
    over the grid, here a whole block, the most that it can be.
    """
    ids = random_ids(model.decoder, tokens + QUESTION)
    kept, found = model.append(ids[:tokens]), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, state in (("settled", model.settle(kept)), ("tail", kept)):
            file = Path(folder) / f"{name}.state"
            state.save(file)

            def resume(file: Path = file) -> None:
                model.live(model.append(ids[tokens:], model.load_state(file))).logits()

            resume()
            found[name] = _median(_timed(resume, clock) for _ in range(rounds))
    return found


def measure(case: Case, plan: Plan, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure our model from a checkpoint that :func:`write_checkpoint` wrote.

    Yields what was done last and the figures so far, the same dictionary each time.
    """
    decoder = _load(folder)
    shapes = linear_shapes(decoder)
    per_token = sum(2 * n * k * count for (n, k), count in shapes.items())
    found: dict[str, Any] = {
        "model": case.name,
        "parameters": decoder.parameter_count(),
        "bandwidth": bandwidth(plan.clock),
        "gemm_flops": gemm_rate(shapes, plan.clock),
        "prefill": {},
        "decode": {},
    }
    yield "rates of the machine", found
    for number, format in enumerate(plan.formats):
        del decoder
        gc.collect()
        decoder = _load(folder)
        pack(decoder, format)
        read(decoder, BLOCK)
        for tokens in plan.lengths(case) if number == 0 else plan.prefill[:1]:
            turns = [read(decoder, tokens, plan.clock) for _ in range(plan.turns(tokens))]
            seconds = _median(turn.seconds for turn in turns)
            found["prefill"].setdefault(format, {})[tokens] = {
                "tokens_per_second": tokens / seconds,
                "of_gemm": tokens * per_token / seconds / found["gemm_flops"],
                "resident": max(turn.resident for turn in turns),
            }
            yield f"{format}, prefill of {tokens:,}", found
        state = read(decoder, BLOCK).state
        seconds = decode_seconds(decoder, state, plan.tokens, plan.clock)
        count = packed_bytes(decoder) + state_bytes(state)
        found["decode"][format] = {
            "tokens_per_second": 1 / seconds,
            "bytes": count,
            "of_bandwidth": count / seconds / found["bandwidth"],
            "bits": BITS[format] + (0 if format == "bf16" else 0.5),
        }
        yield f"{format}, decode", found
        if number == 0 and plan.short:
            tokens = plan.short[-1]
            model = LanguageModel(decoder, Tokenizer(WordLevel({"a": 0}, unk_token="a")), name="bench")
            again = tokens / found["prefill"][format][tokens]["tokens_per_second"]
            kept = resumed_seconds(model, tokens, plan.rounds, plan.clock)
            found["resumed"] = {"tokens": tokens, "again_seconds": again, "seconds": kept}
            del model
            yield "resumed conversation", found


def _load(folder: Path) -> Decoder:
    return load_decoder(folder, read_settings(folder), dtype=torch.bfloat16).eval()
