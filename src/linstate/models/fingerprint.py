"""What makes a state belong to a model: its configuration, its weights and its tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from linstate.models.config import ModelConfig


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 digests (hex) of the three things a state depends on."""

    config: str
    weights: str
    tokenizer: str

    def differences(self, other: Fingerprint) -> list[str]:
        """The names of the parts that differ."""
        return [name for name, digest in asdict(self).items() if digest != asdict(other)[name]]


@dataclass(frozen=True)
class Parts:
    """A tensor that is made part by part, in row order, when it is asked for."""

    dtype: torch.dtype
    shape: torch.Size
    make: Callable[[], Iterable[Tensor]]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row order, without a copy where it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def fingerprint(
    config: ModelConfig, weights: Mapping[str, Tensor | Parts], tokenizer_json: str
) -> Fingerprint:
    """The fingerprint of a model: equal for equal configuration, weights (dtype included) and tokenizer."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        for part in tensor.make() if isinstance(tensor, Parts) else (tensor,):
            digest.update(tensor_bytes(part))
    canonical = json.dumps(config.to_dict(), sort_keys=True)
    return Fingerprint(
        hashlib.sha256(canonical.encode()).hexdigest(),
        digest.hexdigest(),
        hashlib.sha256(tokenizer_json.encode()).hexdigest(),
    )
