"""llama.cpp as a peer: the same checkpoint, converted by its own converter, quantised and run by its own library.

Its Python package (``llama-cpp-python``) has the library; the converter lies in that package's source archive only, under
``vendor/llama.cpp``. A checkpoint of random weights has no tokenizer, so the converted one has none either: llama.cpp knows
such models, and what is measured gives it token ids.
"""

from __future__ import annotations

import ctypes
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from linstate.bench.peer_task import DECODE_FROM, Task
from linstate.errors import BackendError, InputError

CONVERTER = "convert_hf_to_gguf.py"
FORMATS = {"bf16": None, "f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
"""Formats of weights, and what ``LLAMA_FTYPE_MOSTLY_...`` makes them of the first."""

_CONVERT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import convert_hf_to_gguf as converter
find = converter.get_model_class

def without_vocabulary(*words, **more):
    made = find(*words, **more)
    def set_vocab(self):
        self._set_vocab_none()
        self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])
    made.set_vocab = set_vocab
    made.no_mtp = True  # no layers that predict several tokens
    return made

converter.get_model_class = without_vocabulary
sys.argv[0] = converter.__file__
converter.main()
"""


def converter_in(folder: Path) -> Path:
    """The folder of the converter: ``folder`` or ``vendor/llama.cpp`` in it. Raises InputError."""
    for place in (folder, folder / "vendor" / "llama.cpp"):
        if (place / CONVERTER).is_file():
            return place
    raise InputError(
        f"{folder} has no {CONVERTER}: name the folder of llama.cpp's source, or of llama-cpp-python's "
        "(pip download --no-deps --no-binary :all: llama-cpp-python, unpacked)"
    )


def convert(checkpoint: Path, converter: Path, out: Path) -> None:
    """Convert a checkpoint to a bf16 GGUF without a vocabulary. Raises BackendError with the converter's last word."""
    words = ("-c", _CONVERT, str(converter), str(checkpoint), "--outfile", str(out), "--outtype", "bf16")
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    if done.returncode != 0 or not out.is_file():
        said = done.stderr.strip().splitlines() or ["no word of why"]
        raise BackendError(f"llama.cpp's converter failed: {said[-1]}")


def llama_cpp(task: Task) -> dict[str, Any]:
    """llama.cpp in each of ``FORMATS``; the longest lengths only in the one that was fastest before."""
    if not task.source:
        raise BackendError("its converter is not here; name its folder with --llama-cpp")
    try:
        import llama_cpp as package
        import llama_cpp.llama_cpp as library
    except ImportError as error:
        raise BackendError(f"llama-cpp-python cannot be imported: {error}") from error
    except (OSError, RuntimeError, FileNotFoundError) as error:
        raise BackendError(f"llama-cpp-python has no library: {error}") from error
    silent = library.llama_log_callback(lambda *_: None)
    library.llama_log_set(silent, ctypes.c_void_p(0))
    library.llama_backend_init()
    folder = Path(task.folder)
    first = folder / "bf16.gguf"
    convert(folder, Path(task.source), first)
    prefill: dict[str, dict[int, float]] = {}
    decode: dict[str, float] = {}
    short = [tokens for tokens in task.prefill if tokens <= 2048] or list(task.prefill[:1])
    for format, type in FORMATS.items():
        file = folder / f"{format}.gguf"
        if type is not None:
            _quantise(library, first, file, getattr(library, f"LLAMA_FTYPE_MOSTLY_{type}"), task.threads)
        with Model(library, file, task) as model:
            prefill[format] = {tokens: model.prefill(tokens) for tokens in short}
            decode[format] = model.decode()
        if type is not None:
            file.unlink()
    if longer := [tokens for tokens in task.prefill if tokens not in short]:
        best = max(prefill, key=lambda format: prefill[format][short[-1]])
        file = folder / f"{best}.gguf"
        if best != "bf16":
            _quantise(
                library, first, file, getattr(library, f"LLAMA_FTYPE_MOSTLY_{FORMATS[best]}"), task.threads
            )
        with Model(library, file, task) as model:
            prefill[best] |= {tokens: model.prefill(tokens) for tokens in longer}
    return {"version": package.__version__, "prefill": prefill, "decode": decode}


def _quantise(library: Any, source: Path, target: Path, type: int, threads: int) -> None:
    """All matrices in one format, the embedding and the head too: a token then reads the bits that the name says."""
    params = library.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.pure = threads, type, True
    if library.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)):
        raise BackendError(f"llama.cpp could not quantise to {target.stem}")


class Model:
    """A model of llama.cpp with a context for the longest of the task's lengths."""

    def __init__(self, library: Any, file: Path, task: Task) -> None:
        self.library, self.task = library, task
        self.model = library.llama_model_load_from_file(
            os.fsencode(file), library.llama_model_default_params()
        )
        if not self.model:
            raise BackendError(f"llama.cpp could not load {file.name}")
        params = library.llama_context_default_params()
        params.n_ctx = params.n_batch = max(*task.prefill, 512) + task.tokens
        params.n_threads = params.n_threads_batch = task.threads
        self.context = library.llama_init_from_model(self.model, params)
        if not self.context:
            raise BackendError(f"llama.cpp could not make a context for {file.name}")
        self.vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self.model))
        self.run(self.random_ids(64))

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)

    def random_ids(self, tokens: int) -> list[int]:
        draw = random.Random(0)
        return [draw.randrange(self.vocabulary) for _ in range(tokens)]

    def clear(self) -> None:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def run(self, ids: list[int]) -> int:
        """Read ids; the likeliest token behind them."""
        held = (ctypes.c_int32 * len(ids))(*ids)
        if self.library.llama_decode(self.context, self.library.llama_batch_get_one(held, len(ids))):
            raise BackendError(f"llama.cpp could not read {len(ids)} tokens")
        import numpy as np

        logits = self.library.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())

    def _seconds(self, run: Callable[[], Any]) -> float:
        begin = self.task.now()
        run()
        return self.task.now() - begin

    def prefill(self, tokens: int) -> float:
        """Tokens per second of a prefill."""
        ids, turns = self.random_ids(tokens), []
        for _ in range(self.task.turns(tokens)):
            self.clear()
            turns.append(self._seconds(lambda: self.run(ids)))
        return tokens / statistics.median(turns)

    def decode(self) -> float:
        """Tokens per second, each the likeliest after the one before."""
        self.clear()
        token, times = self.run(self.random_ids(DECODE_FROM)), []
        for _ in range(self.task.tokens):
            begin = self.task.now()
            token = self.run([token])
            times.append(self.task.now() - begin)
        return 1 / statistics.median(times)
