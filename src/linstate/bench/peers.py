"""Other people's functions for the same work, as they are meant to be called: what is not installed is left out.

Hugging Face's torch functions (``transformers``) and FLA's naive chunk forms (``fla-core``), the only ones of theirs that
run without a GPU. Each gets the layout and precision that it wants, made before the clock starts, and does in its
own way what our op does on the same numbers; ``output`` brings its result to ``[B, T, H, V]``, which the tests
hold to ours. A function without the exact counterpart of a case is not called for it: Hugging Face has no DeltaNet
without a gate and no GLA, FLA no chunk form of GLA or of a scan.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linstate.bench.cases import CONV_WIDTH, SCAN_STATE, Inputs
from linstate.ops.chunks import CHUNK

Run = Callable[[], Any]
_ABSENT: Any = object()


@contextmanager
def without_fla() -> Iterator[None]:
    """Hide FLA from what is imported inside: transformers would call its Triton kernels, which need a GPU."""
    modules: dict[str, Any] = sys.modules
    hidden = modules.get("fla", _ABSENT)
    modules["fla"] = None
    try:
        yield
    finally:
        if hidden is _ABSENT:
            del modules["fla"]
        else:
            modules["fla"] = hidden


def hugging_face(family: str, function: str) -> Any | None:
    """Hugging Face's own torch function of a family; None where transformers is not installed, or has no such function."""
    try:
        with without_fla():
            module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    except ImportError:
        return None
    found = getattr(module, function, None)
    return getattr(found, "__wrapped__", found)


def fla_naive(path: str) -> ModuleType | None:
    """The file ``fla/ops/<path>.py`` of fla-core; None where that, or einops, is not installed.

    Raises FileNotFoundError where this version has no such file. It is loaded by its path: importing the package needs
    Triton and takes ten seconds, its naive references need neither.
    """
    package = importlib.util.find_spec("fla")
    if (
        package is None
        or package.submodule_search_locations is None
        or not importlib.util.find_spec("einops")
    ):
        return None
    for root in package.submodule_search_locations:
        file = Path(root) / "ops" / f"{path}.py"
        if file.is_file():
            spec = importlib.util.spec_from_file_location("fla_ops_" + path.replace("/", "_"), file)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise FileNotFoundError(f"fla-core has no fla/ops/{path}.py")


def _first(result: Any) -> Tensor:
    found: Tensor = result[0] if isinstance(result, tuple) else result
    return found


def _first_head_first(result: Any) -> Tensor:
    return _first(result).transpose(1, 2)


def _from_channels_first(result: Any) -> Tensor:
    return _first(result).transpose(1, 2)  # [B, D, T] -> [B, T, D]


@dataclass(frozen=True)
class Peer:
    """Somebody else's function for a case.

    ``bind(function, inputs)`` brings the inputs to its layout and returns the call that is timed. It takes a T
    in multiples of ``multiple``. ``floats(size)``: how many float32 numbers it holds at most for one token and head, to
    leave it out before memory ends; counted in its source.
    """

    who: str
    function: str
    find: Callable[[], Any | None]
    bind: Callable[[Any, Inputs], Run]
    output: Callable[[Any], Tensor] = _first
    multiple: int = 1
    floats: Callable[[int], int] = lambda size: 24 * size


def _hf(
    family: str,
    function: str,
    bind: Callable[[Any, Inputs], Run],
    *,
    find: Callable[[], Any | None] | None = None,
    **more: Any,
) -> Peer:
    return Peer("transformers", function, find or partial(hugging_face, family, function), bind, **more)


def _fla(path: str, function: str, bind: Callable[[Any, Inputs], Run], **more: Any) -> Peer:
    def find() -> Any | None:
        try:
            return getattr(fla_naive(path), function, None)
        except FileNotFoundError:
            return None

    return Peer("FLA naive", function, find, bind, **more)


def _head_first(inputs: Inputs, *names: str) -> list[Tensor]:
    """``[B, H, T, ...]`` in float32: these references do not convert bfloat16 themselves, or fail on it."""
    return [inputs[name].transpose(1, 2).float().contiguous() for name in names]


def _hf_delta(function: Any, x: Inputs) -> Run:
    return lambda: function(x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"], output_final_state=True)


def _hf_mamba2(function: Any, x: Inputs) -> Run:
    return lambda: function(
        x["v"], x["dt"], x["A"], x["k"], x["q"], chunk_size=CHUNK, return_final_states=True
    )


def _hf_mamba(function: Any, x: Inputs) -> Run:
    u, dt = (x[name].flatten(2).transpose(1, 2).contiguous() for name in ("v", "dt"))  # [B, D, T]
    b, c = (x[name].squeeze(2).transpose(1, 2) for name in ("k", "q"))  # [B, N, T]
    a = x["A"].transpose(1, 2).flatten(0, 1).contiguous()  # [D, N]
    return lambda: function(u, dt, a, b, c, return_last_state=True)


def _hf_rglru_find() -> Any | None:
    layer = hugging_face("recurrent_gemma", "RecurrentGemmaRglru")
    scan = getattr(layer, "_rnn_scan", None)
    return None if scan is None else partial(scan, None)  # it does not use the layer


def _hf_rglru(function: Any, x: Inputs) -> Run:
    v, g = (x[name].flatten(2) for name in ("v", "g"))  # [B, T, D]
    never = torch.zeros(*v.shape[:2], 1, dtype=torch.bool)
    return lambda: function(v, g.exp(), never, None)


def _hf_conv(function: Any, x: Inputs) -> Run:
    channels_first = x["x"].transpose(1, 2).contiguous()
    return lambda: function(channels_first, x["weight"], None, "silu")


def _fla_linear(function: Any, x: Inputs) -> Run:
    q, k, v = (x[name].float() for name in "qkv")
    return lambda: function(q, k, v)


def _fla_simple_gla(function: Any, x: Inputs) -> Run:
    def run() -> Any:
        dt = x["dt"]
        written = x["v"] * dt.to(x["v"].dtype)[..., None]
        return function(x["q"], x["k"], written, x["A"] * dt, scale=1.0, output_final_state=True)

    return run


def _fla_rwkv6(function: Any, x: Inputs) -> Run:
    q, k, v, g = _head_first(x, *"qkvg")
    q = q * q.shape[-1] ** -0.5  # it has no scale
    return lambda: function(q, k, v, g, x["bonus"])


def _fla_delta(function: Any, x: Inputs) -> Run:
    q, k, v, beta = _head_first(x, "q", "k", "v", "beta")
    return lambda: function(q, k, v, beta)


def _fla_gated_delta(function: Any, x: Inputs) -> Run:
    return lambda: function(x["q"], x["k"], x["v"], x["g"], x["beta"], output_final_state=True)


def _fla_dplr(function: Any, x: Inputs) -> Run:
    # theirs reads the old state with its first and writes along its second: our b and a
    q, k, v, a, b, g = _head_first(x, "q", "k", "v", "b", "a", "g")
    return lambda: function(q, k, v, a, b, g)


def _chunk_states(size: int) -> int:
    """A state [K, V] kept for each chunk, three times over, beside a dozen copies of the inputs."""
    return 24 * size + 3 * size * size // CHUNK


PEERS: dict[str, tuple[Peer, ...]] = {
    "delta_rule, no gate": (
        _fla(
            "delta_rule/naive", "delta_rule_chunkwise", _fla_delta, output=_first_head_first, multiple=CHUNK
        ),
    ),
    "delta_rule, g per head": (
        _hf("qwen3_next", "torch_chunk_gated_delta_rule", _hf_delta),
        _fla("gated_delta_rule/naive", "naive_chunk_gated_delta_rule", _fla_gated_delta),
    ),
    "delta_rule, g per channel": (
        _hf(
            "kimi_linear",
            "chunk_kimi_delta_attention",
            _hf_delta,
            # products of rows, columns and decays, [C, C, K] for each chunk, with their intermediate results
            floats=lambda size: 4 * CHUNK * size,
        ),
        _fla("kda/naive", "naive_chunk_kda", _fla_gated_delta, multiple=CHUNK),
    ),
    "linear_attention, no gate": (
        _fla(
            "linear_attn/naive", "naive_chunk_linear_attn", _fla_linear, multiple=CHUNK, floats=_chunk_states
        ),
    ),
    "linear_attention, g per head": (
        _hf(
            "mamba2",
            "mamba2_chunk_scan",
            _hf_mamba2,
            floats=lambda size: _chunk_states(size) + 8 * CHUNK,
        ),
        _fla("simple_gla/naive", "naive_chunk_simple_gla", _fla_simple_gla),
    ),
    "linear_attention, g per channel, bonus": (
        _fla(
            "rwkv6/chunk_naive",
            "naive_chunk_rwkv6",
            _fla_rwkv6,
            output=_first_head_first,
            multiple=CHUNK,
            floats=lambda size: 2 * _chunk_states(size),  # its chunk is 32
        ),
    ),
    "dplr, g per channel": (
        _fla(
            "generalized_delta_rule/dplr/naive",
            "dplr_chunkwise",
            _fla_dplr,
            output=_first_head_first,
            multiple=CHUNK,
        ),
    ),
    f"selective_scan, K = {SCAN_STATE}": (
        _hf(
            "mamba",
            "mamba_selective_scan",
            _hf_mamba,
            output=_from_channels_first,
            floats=lambda size: 5 * SCAN_STATE * size,
        ),
    ),
    "selective_scan, K = 1": (
        _hf("recurrent_gemma", "RecurrentGemmaRglru._rnn_scan", _hf_rglru, find=_hf_rglru_find),
    ),
    f"causal_conv1d, W = {CONV_WIDTH}, SiLU": (
        _hf("qwen3_next", "causal_conv1d_fn", _hf_conv, output=_from_channels_first),
    ),
}
"""Peers by the name of the case."""


def missing() -> list[str]:
    """Packages of the extra ``bench`` that are not installed."""
    modules = {"transformers": "transformers", "fla-core": "fla", "einops": "einops"}
    return [package for package, module in modules.items() if importlib.util.find_spec(module) is None]
