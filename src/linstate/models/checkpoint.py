"""Weights from a file into a model, every name and shape checked."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from linstate.errors import CheckpointError
from linstate.models.decoder import Decoder


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of ``folder / "model.safetensors"`` under the decoder's names. Raises CheckpointError."""
    path = folder / "model.safetensors"
    try:
        weights = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); take another copy") from error
    return {name.removeprefix("decoder."): tensor for name, tensor in weights.items()}


def fill(model: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Copy weights into a model. Raises CheckpointError that names every tensor that is missing, unknown or misshapen."""
    own = model.state_dict()
    if isinstance(model, Decoder) and model.config.tie_embeddings:
        weights.setdefault("head.weight", weights.get("embedding.weight", own["head.weight"]))
    wrong = [f"missing {name}" for name in own if name not in weights]
    wrong += [f"unknown {name}" for name in weights if name not in own]
    wrong += [
        f"{name} is {list(weights[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"{where}: the weights do not fit the configuration: {'; '.join(wrong[:5])}{more}"
        )
    model.load_state_dict(weights)
