"""The authors' own files of RWKV-6 and RWKV-7: one ``.pth`` with tensors by name and nothing else; no code in it is run.

There is no configuration: what it would say is in the names and shapes of the tensors. A file is mapped into memory, so a
tensor is read when it is used.

Source: github.com/BlinkDL/RWKV-LM, ``RWKV-v7/rwkv_v7_demo_rnn.py``; github.com/BlinkDL/ChatRWKV, ``RWKV_v6_demo.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linstate.errors import CheckpointError
from linstate.models.families.base import Header

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
"""Dtypes as safetensors writes them."""


class PthFile:
    """The tensors of a ``.pth``, with the methods of an open safetensors file.

    Raises:
        CheckpointError: the file cannot be read, is of torch before 1.6, or holds anything but tensors by name.
    """

    def __init__(self, path: Path) -> None:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (
            Exception
        ) as error:  # torch raises errors of many kinds, one of them of the module that is not imported here
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise CheckpointError(
                f"{path} cannot be read as tensors by name, and nothing else is read from a .pth ({first})"
            ) from error
        if not isinstance(found, Mapping):
            raise CheckpointError(f"{path} holds no tensors by name but {type(found).__name__}")
        odd = [
            str(name)
            for name, value in found.items()
            if not isinstance(value, Tensor) or not isinstance(name, str)
        ]
        if odd:
            raise CheckpointError(f"{path} holds things that are no tensors: {', '.join(odd[:5])}")
        self._tensors: dict[str, Tensor] = dict(found)

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_slice(self, name: str) -> PthSlice:
        return PthSlice(self._tensors[name])

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def __enter__(self) -> PthFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.clear()


class PthSlice:
    """What a file says of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return NAMES.get(self._tensor.dtype, str(self._tensor.dtype))


def settings_of(headers: Mapping[str, Header], where: str) -> dict[str, Any]:
    """The configuration that names and shapes tell, as a ``config.json`` would have it.

    Raises:
        CheckpointError: the tensors are not those of RWKV-6 or RWKV-7.
    """
    layers = [int(found[1]) for name in headers if (found := re.match(r"blocks\.(\d+)\.", name))]
    try:
        if "blocks.0.att.r_k" in headers:
            kind, heads = "rwkv_x070", headers["blocks.0.att.r_k"].shape
            ranks = {
                "decay_rank": headers["blocks.0.att.w1"].shape[1],
                "rate_rank": headers["blocks.0.att.a1"].shape[1],
                "gate_rank": headers["blocks.0.att.g1"].shape[1],
                "value_rank": headers["blocks.1.att.v1"].shape[1] if max(layers) else 32,
            }
        else:
            kind, heads = "rwkv_x060", headers["blocks.0.att.time_faaaa"].shape
            ranks = {
                "mix_rank": headers["blocks.0.att.time_maa_w2"].shape[1],
                "decay_rank": headers["blocks.0.att.time_decay_w1"].shape[1],
            }
        vocabulary, width = headers["emb.weight"].shape
        num_heads, head_dim = heads
        return {
            "model_type": kind,
            "vocab_size": vocabulary,
            "hidden_size": width,
            "num_hidden_layers": max(layers) + 1,
            "num_heads": num_heads,
            "head_dim": head_dim,
            "intermediate_size": headers["blocks.0.ffn.key.weight"].shape[0],
            **ranks,
            "eos_token_id": 0,
        }
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"{where}: its tensors are not those of RWKV-6 (x060) or RWKV-7 (x070), the .pth files that Linstate reads"
            f" ({error} missing or of another shape)"
        ) from error
