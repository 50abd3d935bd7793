"""Speed of the recurrences on this machine, peers measured in turn in the same run."""

from __future__ import annotations

import importlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from linstate.errors import ArgumentError
from linstate.ops import delta_rule, dplr, linear_attention, selective_scan, softmax_attention

Run = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One implementation of one case: median and fastest milliseconds, microseconds per token and head."""

    case: str
    who: str
    tokens: int
    dtype: str
    ms: float
    fastest_ms: float
    us_per_token_head: float
    ratio: float
    """Median time of ours over this one's in the same run: below 1 where ours is faster."""


@dataclass(frozen=True)
class Shape:
    """What is measured: ``[B, T, H, K]`` with values of K."""

    tokens: int = 4096
    heads: int = 16
    size: int = 128
    dtype: torch.dtype = torch.float32


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor()


def hugging_face(family: str, function: str) -> Callable[..., Any] | None:
    """Hugging Face's own torch function of a family, or None where transformers is not installed.

    FLA is hidden while the file is imported: with it, its Triton kernels would be called, which need a GPU.
    """
    modules: dict[str, Any] = sys.modules
    hidden = modules.get("fla", _ABSENT)
    modules["fla"] = None
    try:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    except ImportError:
        return None
    finally:
        if hidden is _ABSENT:
            del modules["fla"]
        else:
            modules["fla"] = hidden
    found = getattr(module, function)
    plain: Callable[..., Any] = getattr(found, "__wrapped__", found)
    return plain


_ABSENT: Any = object()


def cases(shape: Shape) -> dict[str, dict[str, Run]]:
    """For each case: implementations by name, ours ("linstate") first; all do the same work on the same inputs."""
    t, h, k, dtype = shape.tokens, shape.heads, shape.size, shape.dtype
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    q, key = (F.normalize(normal(1, t, h, k).float(), dim=-1).to(dtype) for _ in range(2))
    v, beta = normal(1, t, h, k), torch.rand(1, t, h, generator=generator).to(dtype)
    scalar, channel = (
        -torch.rand(1, t, h, generator=generator),
        -torch.rand(1, t, h, k, generator=generator) * 0.1,
    )
    hf_delta = hugging_face("qwen3_next", "torch_chunk_gated_delta_rule")
    hf_kda = hugging_face("kimi_linear", "chunk_kimi_delta_attention")
    hf_mamba2 = hugging_face("mamba2", "mamba2_chunk_scan")
    a = -torch.rand(h, generator=generator)
    found: dict[str, dict[str, Run | None]] = {
        "delta_rule, g per head": {
            "linstate": lambda: delta_rule(q, key, v, beta, scalar),
            "transformers": hf_delta
            and (lambda: hf_delta(q, key, v, g=scalar, beta=beta, output_final_state=True)),
        },
        "delta_rule, g per channel": {
            "linstate": lambda: delta_rule(q, key, v, beta, channel),
            "transformers": hf_kda
            and (lambda: hf_kda(q, key, v, g=channel, beta=beta, output_final_state=True)),
        },
        "linear_attention, g per head": {
            "linstate": lambda: linear_attention(q, key, v * beta[..., None], a * beta.float(), scale=1.0),
            "transformers": hf_mamba2
            and (lambda: hf_mamba2(v, beta.float(), a, key, q, chunk_size=64, return_final_states=True)),
        },
        "linear_attention, g per channel": {"linstate": lambda: linear_attention(q, key, v, channel)},
        "dplr, g per channel": {"linstate": lambda: dplr(q, key, v, -key, key, channel)},
        "selective_scan, K = 1": {"linstate": lambda: selective_scan(None, None, v, channel)},
        "softmax_attention": {
            "linstate": lambda: softmax_attention(q, key, v),
            "torch sdpa": lambda: F.scaled_dot_product_attention(
                q.transpose(1, 2), key.transpose(1, 2), v.transpose(1, 2), is_causal=True
            ),
        },
    }
    return {case: {who: run for who, run in runs.items() if run is not None} for case, runs in found.items()}


def measure(shape: Shape, *, rounds: int = 5, only: str = "") -> Iterator[list[Row]]:
    """Rows of one case after another; in each round every implementation runs once, in turn, after one that does not count.

    Raises:
        ArgumentError: ``only`` is in no case's name.
    """
    chosen = {case: runs for case, runs in cases(shape).items() if only in case}
    if not chosen:
        raise ArgumentError(f"no case has {only!r} in its name; there are: {'; '.join(cases(shape))}")
    for case, runs in chosen.items():
        times: dict[str, list[float]] = {who: [] for who in runs}
        for turn in range(rounds + 1):
            for who, run in runs.items():
                begin = time.perf_counter()
                with torch.no_grad():
                    run()
                if turn:
                    times[who].append(time.perf_counter() - begin)
        ours = statistics.median(times["linstate"])
        yield [
            Row(
                case,
                who,
                shape.tokens,
                str(shape.dtype).removeprefix("torch."),
                statistics.median(seconds) * 1e3,
                min(seconds) * 1e3,
                statistics.median(seconds) * 1e6 / (shape.tokens * shape.heads),
                ours / statistics.median(seconds),
            )
            for who, seconds in times.items()
        ]


def as_json(rows: list[Row]) -> dict[str, Any]:
    """Everything of a run as one JSON-able object."""
    return {"machine": machine(), "rows": [asdict(row) for row in rows]}
