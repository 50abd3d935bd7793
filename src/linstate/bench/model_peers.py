"""Other people's programs on the same checkpoint, each in a process of its own that ends before the next one begins.

``python -m linstate.bench.model_peers '{"peer": "transformers", "folder": ..., ...}'`` prints one JSON object.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from linstate.bench.peer_task import DECODE_FROM, Task
from linstate.errors import BackendError


def in_child(task: Task, seconds: float) -> dict[str, Any]:
    """What a peer measures in a fresh process: ``{"version", "prefill": {format: {length: tokens/s}}, "decode": {format: tokens/s}}``.

    Raises:
        BackendError: it is not installed, does not know the model, failed, or took longer than ``seconds``.
    """
    paths = os.pathsep.join(path for path in sys.path if path)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "linstate.bench.model_peers", json.dumps(asdict(task))],
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        raise BackendError(f"it took longer than {seconds:.0f} seconds") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"no word of why (exit code {done.returncode})"]
        raise BackendError(said[-1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def transformers(task: Task) -> dict[str, Any]:
    """transformers in bf16, its own cache, its own functions."""
    # Where FLA can be imported, transformers 5.23 gives its Triton kernels CPU tensors, and fails.
    for name in ("fla", "causal_conv1d", "mamba_ssm"):
        sys.modules[name] = None  # type: ignore[assignment]
    import torch
    import transformers as library

    kind = json.loads((Path(task.folder) / "config.json").read_text())["model_type"]
    if kind not in library.CONFIG_MAPPING:
        raise BackendError(f"transformers {library.__version__} has no {kind}")
    made = library.AutoModelForCausalLM.from_pretrained(task.folder, dtype=torch.bfloat16).eval()
    ids = torch.randint(made.config.vocab_size, (1, max(*task.prefill, DECODE_FROM)))
    rates, times = {}, []
    with torch.no_grad():
        made(ids[:, :64], use_cache=True, logits_to_keep=1)
        for tokens in task.prefill:
            turns = []
            for _ in range(task.turns(tokens)):
                begin = task.now()
                made(ids[:, :tokens], use_cache=True, logits_to_keep=1)
                turns.append(task.now() - begin)
            rates[tokens] = tokens / statistics.median(turns)
        out = made(ids[:, :DECODE_FROM], use_cache=True, logits_to_keep=1)
        cache = {name: out[name] for name in ("past_key_values", "cache_params") if out.get(name) is not None}
        for _ in range(task.tokens):
            begin = task.now()
            out = made(out.logits[:, -1:].argmax(-1), use_cache=True, **cache)
            times.append(task.now() - begin)
    return {
        "version": library.__version__,
        "prefill": {"bf16": rates},
        "decode": {"bf16": 1 / statistics.median(times)},
    }


def _main(words: str) -> None:
    import torch

    from linstate.bench.llama_cpp import llama_cpp

    task = Task(**json.loads(words))
    torch.set_num_threads(task.threads)
    peers = {"transformers": transformers, "llama.cpp": llama_cpp}
    try:
        found = peers[task.peer](task)
    except (BackendError, ImportError) as error:
        sys.exit(str(error))
    print(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
