"""Other people's programs on the same models, each in a process of its own that ends before the next one begins.

``python -m linstate.bench.model_peers transformers MODEL PREFILL TOKENS THREADS CLOCK`` prints one JSON object.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from linstate.bench.measure import Clock
from linstate.errors import BackendError

DECODE_FROM = 256
"""Tokens read before those that are decoded, as in ours."""


def in_child(
    peer: str, model: str, prefill: int, tokens: int, threads: int, seconds: float, clock: Clock
) -> dict[str, Any]:
    """Tokens per second of a peer in a fresh process: ``{"prefill": ..., "decode": ...}``.

    Raises:
        BackendError: it is not installed, does not know the model, failed, or took longer than ``seconds``.
    """
    words = (peer, model, prefill, tokens, threads, clock.__name__)
    paths = os.pathsep.join(path for path in sys.path if path)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "linstate.bench.model_peers", *map(str, words)],
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        raise BackendError(f"it took longer than {seconds:.0f} seconds") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["no word of why"]
        raise BackendError(said[-1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _transformers(model: str, prefill: int, tokens: int, clock: Clock) -> dict[str, Any]:
    """transformers in bf16, its own cache, its own functions."""
    # Where FLA can be imported, transformers 5.23 gives its Triton kernels CPU tensors, and fails.
    for name in ("fla", "causal_conv1d", "mamba_ssm"):
        sys.modules[name] = None  # type: ignore[assignment]
    import torch
    import transformers

    from linstate.bench.models import CASES

    peer = CASES[model].peer
    if peer is None:
        raise BackendError(f"transformers has no {model}")
    kind, config, values = peer
    made = getattr(transformers, kind)(getattr(transformers, config)(**values, dtype="bfloat16"))
    made = made.to(torch.bfloat16).eval()
    ids = torch.randint(values["vocab_size"], (1, max(prefill, DECODE_FROM)))
    with torch.no_grad():
        made(ids[:, :64], use_cache=True, logits_to_keep=1)
        begin = clock()
        made(ids[:, :prefill], use_cache=True, logits_to_keep=1)
        read = clock() - begin
        out = made(ids[:, :DECODE_FROM], use_cache=True, logits_to_keep=1)
        cache = {name: out[name] for name in ("past_key_values", "cache_params") if out.get(name) is not None}
        times = []
        for at in range(DECODE_FROM, DECODE_FROM + tokens):
            token = out.logits[:, -1:].argmax(-1)
            begin = clock()
            out = made(token, use_cache=True, **cache, **_position(kind, at))
            times.append(clock() - begin)
    return {"prefill": prefill / read, "decode": 1 / statistics.median(times)}


def _position(kind: str, at: int) -> dict[str, Any]:
    """What a model wants to know of where it is, beside its cache."""
    import torch

    return {"cache_position": torch.tensor([at])} if kind.startswith("Mamba") else {}


def _main(peer: str, model: str, prefill: str, tokens: str, threads: str, clock: str) -> None:
    import torch

    torch.set_num_threads(int(threads))
    if peer != "transformers":
        raise BackendError(f"there is no peer {peer!r}")
    print(json.dumps(_transformers(model, int(prefill), int(tokens), getattr(time, clock))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
