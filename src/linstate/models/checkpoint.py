"""Checkpoints: the files of a model folder, and how their tensors become a model, every name and shape checked first."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from linstate.errors import CheckpointError
from linstate.models.config import ModelConfig
from linstate.models.decoder import Decoder
from linstate.models.families import find
from linstate.models.families._rules import Redundant, Rule, Table
from linstate.models.families._settings import Settings
from linstate.models.families.base import Header
from linstate.models.feed_forward import Experts
from linstate.models.pth import PthFile, settings_of

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SMALL = 1 << 20
"""Bytes of a tensor below which it is copied, not mapped."""
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises CheckpointError."""
    try:
        raw = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON object: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is no JSON object: found {type(raw).__name__}")
    return raw


class Weights:
    """The tensors of a folder's safetensors files, one or several with an index; they are read from disk when asked for.

    In place of a folder there may be a ``.pth`` of RWKV (:mod:`linstate.models.pth`), or a folder with one and nothing else.

    Raises CheckpointError for files that are missing, cut short, or not what the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.headers = folder, dict[str, Header]()
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()
        with ExitStack() as failed:
            failed.callback(self.close)
            for file in self._files():
                self._add(file)
            failed.pop_all()

    def _files(self) -> list[Path]:
        index = self.folder / INDEX
        if (file := pth_of(self.folder)) is not None:
            return [file]
        if (self.folder / SINGLE).is_file():
            return [self.folder / SINGLE]
        if not index.is_file():
            pickled = ", ".join(sorted(path.name for path in self.folder.glob("*.bin")))
            hint = (
                f"; {pickled} may be pickled, which Linstate does not read: save it as safetensors"
                if pickled
                else ""
            )
            raise CheckpointError(f"the model folder {self.folder} has no {SINGLE}{hint}")
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict):
            raise CheckpointError(f"{index} has no weight_map, which says in which file each tensor is")
        names = set(map(str, places.values()))
        if odd := sorted(
            name for name in names if not name.endswith(".safetensors") or Path(name).name != name
        ):
            raise CheckpointError(f"{index}: {odd[0]!r} is no name of a safetensors file in this folder")
        return [self.folder / name for name in sorted(names)]

    def _add(self, path: Path) -> None:
        try:
            opened = PthFile(path) if path.suffix == ".pth" else safe_open(path, "pt")
            file = self._stack.enter_context(opened)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); take another copy") from error
        self._open[path] = file
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            if name in self.headers:
                raise CheckpointError(f"{path} holds {name}, which {self.headers[name].file.name} holds too")
            part = file.get_slice(name)
            self.headers[name] = Header(path, tuple(part.get_shape()), part.get_dtype())

    def read(self, name: str) -> Tensor:
        """A tensor; a large one is mapped into memory: it takes some as it is read, and gives it back when nobody holds it."""
        path = self.headers[name].file
        if path.suffix == ".pth":
            tensor: Tensor = self._open[path].get_tensor(name)
            return tensor
        with safe_open(
            path, "pt"
        ) as file:  # a mapping of its own: one for all would stay until the last is let go
            tensor = file.get_tensor(name)
        # A mapping of a small one would hold more than that: the kernel maps what lies around it, too.
        return tensor.clone() if tensor.nbytes < SMALL else tensor

    def close(self) -> None:
        self._stack.close()
        self._open.clear()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def pth_of(source: Path) -> Path | None:
    """The ``.pth`` that is meant by a path: itself, or the only one in a folder that has no configuration."""
    if source.suffix == ".pth" and source.is_file():
        return source
    found = [] if (source / "config.json").is_file() else sorted(source.glob("*.pth"))
    return found[0] if len(found) == 1 else None


def read_settings(source: Path) -> dict[str, Any]:
    """The configuration of a model: ``config.json`` in its folder, or what a ``.pth`` tells. Raises CheckpointError."""
    if (file := pth_of(source)) is not None:
        with Weights(file) as weights:
            return settings_of(weights.headers, str(file))
    return read_json(source / "config.json")


def read_config(folder: Path) -> ModelConfig:
    """Our configuration of the model in a folder, without its weights. Raises CheckpointError, ConfigError."""
    where, raw = str(folder / "config.json"), read_settings(folder)
    family = find(raw, where)
    settings = Settings(raw, where, family.library)
    config = family.config(settings)
    family.weights(config, settings, {})
    settings.finish()
    return config


def load_decoder(
    folder: Path, raw: Mapping[str, Any], *, device: str = "cpu", dtype: torch.dtype | None = None
) -> Decoder:
    """The model in a folder (or ``.pth``) whose configuration is ``raw`` (:func:`read_settings`).

    Args:
        dtype: of the weights in memory; float32 on a CPU, else as they are stored.

    Raises:
        ConfigError: a setting that we do not do, by its name. CheckpointError: an unknown model type, or files that are
            missing, broken, or do not fit; no tensor was read then.
    """
    where = str(folder / "config.json")
    family = find(raw, where)
    settings = Settings(raw, where, family.library)
    config = family.config(settings)
    with Weights(folder) as weights:
        if config.num_layers > len(weights.headers):  # before anything of that size is made
            raise CheckpointError(
                f"{where} says {config.num_layers:,} layers, and the files hold {len(weights.headers):,} tensors"
            )
        table = family.weights(config, settings, weights.headers)
        settings.finish()
        with torch.device("meta"):
            decoder = Decoder(config)
        check(decoder, table, weights, family.ignored)
        if dtype is None:
            dtype = torch.float32 if device == "cpu" else stored(weights)
        return assign(decoder, translated(table, weights), device=device, dtype=dtype)


def end_tokens(folder: Path, raw: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end a text, of ``generation_config.json`` where it says so, else of ``config.json``. Raises CheckpointError."""
    path = folder / "generation_config.json"
    said = [read_json(path)] if path.is_file() else []
    for source in (*said, raw, raw.get("text_config") or {}):
        end = source.get("eos_token_id")
        if end is not None:
            ids = tuple(end) if isinstance(end, list) else (end,)
            if not all(isinstance(token, int) for token in ids):
                raise CheckpointError(
                    f"{folder}: eos_token_id must be a number or a list of numbers, found {end!r}"
                )
            return ids
    return ()


def stored(weights: Weights) -> torch.dtype:
    """The dtype of most numbers."""
    count: Counter[str] = Counter()
    for header in weights.headers.values():
        count[header.dtype] += torch.Size(header.shape).numel()
    return DTYPES[count.most_common(1)[0][0]]


def own_weights(config: ModelConfig) -> dict[str, Tensor]:
    """The weights of a model under our names, without memory: each tensor once, tied ones too."""
    with torch.device("meta"):
        decoder = Decoder(config)
    return _once(decoder)


def _once(model: nn.Module) -> dict[str, Tensor]:
    own = model.state_dict()
    if isinstance(model, Decoder) and model.config.tie_embeddings:
        del own["head.weight"]
    return own


def check(model: nn.Module, table: Table, weights: Weights, ignored: Iterable[str] = ()) -> None:
    """Hold the headers against what the table needs. Raises CheckpointError that names every tensor that does not fit."""
    own = _once(model)
    made = Counter(name for entry in table if isinstance(entry, Rule) for name in entry.ours)
    if made != Counter(own.keys()):
        odd = sorted((made - Counter(own)) + (Counter(own.keys()) - made))
        raise CheckpointError(
            f"the weight table of this family does not make each of our weights once: {', '.join(odd[:5])}"
        )
    expected: dict[str, Tensor] = {}
    for entry in table:
        if isinstance(entry, Rule):
            expected |= entry.save(own.__getitem__)
    known = expected.keys() | {entry.name for entry in table if isinstance(entry, Redundant)}
    found = weights.headers
    wrong = [f"missing {name}" for name in expected if name not in found]
    wrong += [
        f"unknown {name}"
        for name in found
        if name not in known and not any(re.match(pattern, name) for pattern in ignored)
    ]
    for name in known & found.keys():
        header = found[name]
        if header.dtype not in DTYPES:
            wrong.append(
                f"{name} is stored as {header.dtype}, which is quantised or no weight; expected {', '.join(DTYPES)}"
            )
        elif name in expected and header.shape != expected[name].shape:
            wrong.append(f"{name} is {list(header.shape)}, expected {list(expected[name].shape)}")
    complain(wrong, str(weights.folder))


def complain(wrong: list[str], where: str) -> None:
    """Raises CheckpointError if anything is wrong."""
    if wrong:
        more = f"; and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise CheckpointError(
            f"{where}: the weights do not fit the configuration: {'; '.join(wrong[:20])}{more}"
        )


def translated(table: Table, weights: Weights) -> Iterable[tuple[str, Tensor]]:
    """Our weights, made one by one."""
    for entry in table:
        if isinstance(entry, Rule):
            yield from entry.load(weights.read).items()
        elif entry.name in weights.headers:
            entry.check(weights.read)


def assign(
    decoder: Decoder, weights: Iterable[tuple[str, Tensor]], *, device: str, dtype: torch.dtype
) -> Decoder:
    """Put weights into a decoder that was built without memory.

    What only moves the choice of experts stays float32, as transformers has it: rounded, it would choose others.
    """
    routers = ((name, part) for name, part in decoder.named_modules() if isinstance(part, Experts))
    wide = {f"{name}.bias" for name, router in routers if router.bias is not None}
    made = {name: t.to(device=device, dtype=torch.float32 if name in wide else dtype) for name, t in weights}
    if decoder.config.tie_embeddings:
        made["head.weight"] = made["embedding.weight"]
    decoder.load_state_dict(made, assign=True)
    if decoder.config.tie_embeddings:
        decoder.head.weight = decoder.embedding.weight
    return decoder


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of ``folder / "model.safetensors"`` under our names. Raises CheckpointError."""
    path = folder / SINGLE
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
    complain(wrong, where)
    model.load_state_dict(weights)
