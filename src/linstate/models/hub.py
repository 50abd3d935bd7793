"""Model folders from the Hugging Face Hub (extra ``hf``)."""

from __future__ import annotations

import re
from pathlib import Path

from linstate.errors import CheckpointError

_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = [
    *(
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ),
    *("model*.safetensors", "model.safetensors.index.json"),
]
"""What we read, so that no other copy of the weights, and no code, comes along."""


MODELS = (
    "give a folder, a name on the Hugging Face Hub (owner/name), a .pth of RWKV, or 'pocket' for the model that comes"
    " with Linstate"
)
"""What can be given as a model."""


def model_folder(name: str, revision: str | None = None) -> Path:
    """The folder (or file) of this name, or that of the model of this name on the Hub. Raises CheckpointError."""
    path = Path(name)
    if path.exists():
        return path
    if is_hub_id(name):
        return download(name, revision)
    raise CheckpointError(f"there is no model folder {name}; {MODELS}")


def is_hub_id(name: str) -> bool:
    """Whether it can be the name of a model on the Hub: ``owner/name``."""
    return _ID.fullmatch(name) is not None and not name.startswith(".")


def download(name: str, revision: str | None = None) -> Path:
    """The folder of a model on the Hub, of which only what is not in the local cache is fetched; no code among it.

    Raises:
        CheckpointError: there is no such folder and no such model, or no way to the Hub.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise CheckpointError(
            f"there is no model folder {name}, and to look on the Hugging Face Hub the package huggingface_hub is needed:"
            " pip install 'linstate[hf]'"
        ) from error
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"there is no model folder {name}, and the Hugging Face Hub cannot be reached to fetch it ({_first_line(error)});"
            " check the network, or copy the model's folder here"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"there is no model folder {name}, and the Hugging Face Hub has no such model that can be read"
            f" ({_first_line(error)}); a model that asks for consent needs 'hf auth login'"
        ) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
