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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn

from linstate.bench.measure import Clock
from linstate.engine import LanguageModel
from linstate.engine.reader import call
from linstate.models import Decoder, ModelConfig
from linstate.models.packed import PackedLinear, pack
from linstate.ops.native_linear import BITS, FORMATS, Format
from linstate.types import LayerState, state_bytes

BLOCK = 256
QUESTION = 16
"""Tokens that a resumed conversation reads before its first new one."""


@dataclass(frozen=True)
class Case:
    """A model to measure.

    Attributes:
        config: ours. recurrent: its state does not grow, so it is measured at 32,768 tokens too.
        peer: how Hugging Face's transformers configures the same: (class of the model, class of the configuration, values).
    """

    name: str
    config: ModelConfig
    recurrent: bool
    peer: tuple[str, str, dict[str, Any]] | None


_MAMBA2 = ModelConfig(
    vocab_size=50288,
    d_model=1024,
    pattern=("mamba2",),
    num_layers=48,
    feed_forward="none",
    norm_eps=1e-5,
)
_QWEN = ModelConfig(
    vocab_size=248320,
    d_model=1024,
    pattern=("gated_deltanet",) * 3 + ("attention",),
    num_layers=24,
    feed_forward="swiglu",
    d_ff=3584,
    options={
        "gated_deltanet": {"num_heads": 16, "head_dim": 128},
        "attention": {
            "num_heads": 8,
            "num_kv_heads": 2,
            "head_dim": 256,
            "rotary_base": 1e7,
            "rotary_dim": 64,
            "qk_norm": True,
            "output_gate": True,
        },
    },
)
_RWKV7 = ModelConfig(
    vocab_size=65536,
    d_model=1024,
    pattern=("rwkv7",),
    num_layers=24,
    d_ff=4096,
    tie_embeddings=False,
    norm="layernorm",
    norm_eps=1e-5,
    embedding_norm=True,
    options={"rwkv7": {"decay_rank": 64, "rate_rank": 64, "value_rank": 32, "gate_rank": 128}},
)
CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case(
            "mamba2-370m",
            _MAMBA2,
            True,
            (
                "Mamba2ForCausalLM",
                "Mamba2Config",
                {
                    "vocab_size": 50288,
                    "hidden_size": 1024,
                    "num_hidden_layers": 48,
                    "state_size": 128,
                    "num_heads": 32,
                    "head_dim": 64,
                    "n_groups": 1,
                    "expand": 2,
                    "tie_word_embeddings": True,
                },
            ),
        ),
        Case(
            "qwen3.5-0.8b",
            _QWEN,
            False,
            (
                "Qwen3_5ForCausalLM",
                "Qwen3_5TextConfig",
                {
                    "vocab_size": 248320,
                    "hidden_size": 1024,
                    "num_hidden_layers": 24,
                    "intermediate_size": 3584,
                    "num_attention_heads": 8,
                    "num_key_value_heads": 2,
                    "head_dim": 256,
                    "linear_num_key_heads": 16,
                    "linear_num_value_heads": 16,
                    "linear_key_head_dim": 128,
                    "linear_value_head_dim": 128,
                    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 6,
                    "tie_word_embeddings": True,
                },
            ),
        ),
        Case("rwkv7-0.4b", _RWKV7, True, None),
    )
}


@dataclass(frozen=True)
class Plan:
    """What to measure. ``prefill``: lengths; the longest only of recurrent models. ``tokens``: of a decode."""

    prefill: tuple[int, ...] = (2048, 8192, 32768)
    formats: tuple[Format, ...] = FORMATS
    tokens: int = 32
    rounds: int = 3
    clock: Clock = time.perf_counter

    def quick(self) -> Plan:
        """The same in a few minutes less: no long texts, single turns."""
        return replace(self, prefill=(2048,), tokens=16, rounds=1)

    def lengths(self, case: Case) -> tuple[int, ...]:
        return self.prefill if case.recurrent else tuple(n for n in self.prefill if n <= 8192)


def random_decoder(config: ModelConfig) -> Decoder:
    """A decoder in bf16 with random weights, made without a float32 copy."""
    with torch.device("meta"):
        made = Decoder(config)
    decoder = made.to(torch.bfloat16).to_empty(device="cpu").eval()
    if config.tie_embeddings:
        decoder.head.weight = decoder.embedding.weight
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in decoder.parameters():
            if p.dim() > 1:
                p.normal_(std=0.02, generator=generator)
            else:
                p.uniform_(0, 1, generator=generator)
    return decoder


def _median(seconds: Iterable[float]) -> float:
    return statistics.median(seconds)


def _timed(run: Callable[[], Any], clock: Clock = time.perf_counter) -> float:
    begin = clock()
    run()
    return clock() - begin


def bandwidth(clock: Clock, rounds: int = 5) -> float:
    """Bytes per second that torch's fastest reader reads from memory: a sum over half a gigabyte."""
    x = torch.ones(1 << 27)
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


def read(decoder: Decoder, tokens: int, clock: Clock = time.perf_counter) -> tuple[float, LayerState]:
    """Seconds to read so many random tokens from nothing, in blocks as a reading does, and the state behind them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.config.vocab_size, (tokens,), generator=generator).tolist()
    state, begin = decoder.init_state(1), clock()
    for at in range(0, tokens, BLOCK):
        _, state = call(decoder, ids[at : at + BLOCK], state, "none")
    return clock() - begin, state


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


def resumed_seconds(decoder: Decoder, tokens: int, rounds: int, clock: Clock) -> float:
    """Seconds to the first new token of a conversation of so many tokens that lies in a file: load, read a question, logits."""
    tokenizer = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    model = LanguageModel(decoder, tokenizer, name="bench")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.config.vocab_size, (tokens + QUESTION,), generator=generator).tolist()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "conversation.state"
        model.append(ids[:tokens]).save(file)

        def resume() -> None:
            state = model.append(ids[tokens:], model.load_state(file))
            model.live(state).logits()

        resume()
        return _median(_timed(resume, clock) for _ in range(rounds))


def measure(case: Case, plan: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure our model; yields what was done last and the figures so far, the same dictionary each time."""
    found: dict[str, Any] = {"model": case.name, "prefill": {}, "decode": {}}
    decoder = random_decoder(case.config)
    shapes = linear_shapes(decoder)
    found["parameters"] = decoder.parameter_count()
    per_token = sum(2 * n * k * count for (n, k), count in shapes.items())
    yield "weights", found
    found["bandwidth"] = bandwidth(plan.clock)
    found["gemm_flops"] = gemm_rate(shapes, plan.clock)
    yield "rates of the machine", found
    state: LayerState = {}
    for number, format in enumerate(plan.formats):
        pack(decoder, format)
        gc.collect()
        read(decoder, BLOCK)
        rounds = plan.rounds if number == 0 else 1
        for tokens in plan.lengths(case) if number == 0 else plan.prefill[:1]:
            turns = [read(decoder, tokens, plan.clock) for _ in range(rounds if tokens <= 2048 else 1)]
            seconds, state = _median(s for s, _ in turns), turns[-1][1]
            figures = {
                "tokens_per_second": tokens / seconds,
                "of_gemm": tokens * per_token / seconds / found["gemm_flops"],
            }
            found["prefill"].setdefault(format, {})[tokens] = figures
            yield f"{format}, prefill of {tokens:,}", found
        state = read(decoder, BLOCK)[1]
        seconds = decode_seconds(decoder, state, plan.tokens, plan.clock)
        count = packed_bytes(decoder) + state_bytes(state)
        found["decode"][format] = {
            "tokens_per_second": 1 / seconds,
            "bytes": count,
            "of_bandwidth": count / seconds / found["bandwidth"],
            "bits": BITS[format] + (0 if format == "bf16" else 0.5),
        }
        yield f"{format}, decode", found
        if number == 0 and 8192 in plan.lengths(case):
            seconds = resumed_seconds(decoder, 8192, plan.rounds, plan.clock)
            again = 8192 / found["prefill"][format][8192]["tokens_per_second"]
            found["resumed"] = {"seconds": seconds, "again_seconds": again, "share": seconds / again}
            yield "resumed conversation", found
