"""Caches of Hugging Face's models as artifacts: save, load, fork.

A cache is a tree of plain things (layers, and in them tensors, numbers, flags) that its model changes in place. It is written as
that tree in JSON, with the tensors beside it, in the file format of :mod:`linstate.state.artifact`; back come only the kinds of
cache and layer that transformers itself has, and only data goes into them. A file belongs to the model whose configuration
and weights it names.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from linstate.errors import ArgumentError, StateError, StateFileError, StateMismatchError
from linstate.models.fingerprint import Fingerprint, tensor_bytes
from linstate.patch.recurrent_gemma import recurrent_layer
from linstate.state import artifact

KIND = "transformers-cache"
_CACHES = {
    "DynamicCache": "transformers.cache_utils",
    "StaticCache": "transformers.cache_utils",
    "MiniMaxCache": "transformers.models.minimax.modeling_minimax",
    "xLSTMCache": "transformers.models.xlstm.modeling_xlstm",
}
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.bool,
    )
}
_NOT_THE_MODEL = {
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
}
"""What a configuration says and a cache does not depend on; the weights say their dtype themselves."""


def save_cache(cache: Any, path: str | Path, model: nn.Module, *, key: bytes | None = None) -> int:
    """Write a cache to a file, atomically; returns the file's size in bytes.

    Args:
        cache: what the model gave as ``past_key_values``, ``cache_params`` (xLSTM) or ``state`` (RWKV).
        model: the model it belongs to; its configuration and weights go into the file as digests.
        key: sign the file with this key (HMAC-SHA256).

    Raises:
        StateError: it is no cache that we know, or holds nothing.
        ArgumentError: ``model`` is no model of transformers.
    """
    _check_model(model)
    tensors: dict[str, Tensor] = {}
    tree = _describe(_with_module_state(cache, model), tensors)
    if not tensors:
        raise StateError("this cache holds nothing yet: let the model read a text first")
    metadata = {
        "kind": KIND,
        "model": json.dumps(asdict(fingerprint(model))),
        "model_name": str(getattr(model.config, "_name_or_path", "") or type(model).__name__),
        "cache": json.dumps(tree),
        "tokens": str(_tokens_read(cache)),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return artifact.write(path, metadata, tensors, key=key)


def load_cache(path: str | Path, model: nn.Module, *, key: bytes | None = None) -> Any:
    """Read a cache from a file, to be given to ``model`` as the one that was saved; its tensors lie where the model does.

    Raises:
        StateFileError: the file is cut short, altered, not signed with ``key``, or no cache of transformers.
        StateMismatchError: it belongs to another model; says in which part that one differs.
    """
    _check_model(model)
    found = artifact.read(path, key=key)
    meta = found.metadata
    if meta.get("kind") != KIND:
        raise StateFileError(
            f"{path}: it is a Linstate state, not a cache of transformers; load it with State.load or LanguageModel.load_state"
        )
    try:
        owner = Fingerprint(**json.loads(meta["model"]))
        tree = json.loads(meta["cache"])
    except (KeyError, ValueError, TypeError) as error:
        raise StateFileError(f"{path}: its description is incomplete or wrong ({error})") from error
    if differ := owner.differences(fingerprint(model)):
        raise StateMismatchError(
            f"{path}: this cache was made by the model {meta.get('model_name', '')!r}, whose {' and '.join(differ)} differ from "
            "the model in use; load that model, or read the text again with this one"
        )
    device = next(model.parameters()).device
    try:
        cache = _build(tree, found.tensors, device, model.config)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise StateFileError(
            f"{path}: its description is incomplete or wrong ({type(error).__name__}: {error})"
        ) from error
    _into_modules(cache, model)
    return cache


def fork_cache(cache: Any) -> Any:
    """A second cache that goes on from the same place; what one reads does not change the other.

    Models change their caches in place, so the tensors are copied.

    Raises:
        StateError: it is no cache that we know, or its model keeps the state outside (RecurrentGemma, not patched).

    >>> import torch
    >>> cache = [torch.zeros(1, 2, 3) for _ in range(5)]  # RWKV's
    >>> fork = fork_cache(cache)
    >>> fork[0] is cache[0], torch.equal(fork[0], cache[0])
    (False, True)
    """
    if _state_is_elsewhere(cache):
        raise StateError(
            "this cache holds the keys of the attention layers alone: the model keeps its recurrent state in its own "
            "modules, so it has one conversation at a time; call linstate.patch_transformers() and read the text again"
        )
    tensors: dict[str, Tensor] = {}
    tree = _describe(cache, tensors)
    return _build(tree, tensors, None, getattr(cache, "config", None))


# ----------------------------------------------------------------------------------------- caches as trees of data


def _describe(cache: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if isinstance(cache, list | tuple):  # RWKV's state
        return {"cache": "list", "state": _encode(list(cache), "state", tensors)}
    kind = type(cache).__name__
    if _CACHES.get(kind) != type(cache).__module__:
        raise StateError(
            f"a cache of the kind {kind} cannot be kept; there are: {', '.join(_CACHES)} and RWKV's list of tensors"
        )
    if kind == "xLSTMCache":
        held = {name: value for name, value in vars(cache).items() if name != "config"}
        return {"cache": kind, "state": _encode(held, "state", tensors)}
    if cache.offloading:
        raise StateError("a cache that is offloaded cannot be kept; build it with offloading=False")
    known = _layer_classes()
    layers = []
    for index, layer in enumerate(cache.layers):
        name = type(layer).__name__
        if known.get(name) is not type(layer):
            raise StateError(f"a cache layer of the kind {name} cannot be kept")
        layers.append([name, _encode(vars(layer), f"layers.{index}", tensors)])
    tree: dict[str, Any] = {
        "cache": kind,
        "layers": layers,
        "grows": cache.layer_class_to_replicate is not None,
    }
    if kind == "MiniMaxCache":
        tree["linear"] = _encode(cache.linear_cache, "linear", tensors)
    return tree


def _build(
    tree: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device | None, config: Any
) -> Any:
    kind = tree["cache"]
    if kind == "list":
        return _decode(tree["state"], tensors, device)
    module = importlib.import_module(_CACHES[kind])
    cache = object.__new__(getattr(module, kind))
    if kind == "xLSTMCache":
        vars(cache).update(_decode(tree["state"], tensors, device), config=config)
        return cache
    from transformers.cache_utils import Cache, DynamicLayer

    known = _layer_classes()
    layers = []
    for name, held in tree["layers"]:
        layer: Any = object.__new__(known[name])
        vars(layer).update(_decode(held, tensors, device))
        layers.append(layer)
    if tree["grows"]:
        Cache.__init__(cache, layer_class_to_replicate=DynamicLayer)
        cache.layers = layers
    else:
        Cache.__init__(cache, layers=layers)
    if kind == "MiniMaxCache":
        cache.linear_cache = _decode(tree["linear"], tensors, device)
    return cache


def _layer_classes() -> dict[str, type]:
    """The kinds of layer that transformers' caches have, by name."""
    from transformers import cache_utils

    bases = (cache_utils.CacheLayerMixin, cache_utils.LinearAttentionCacheLayerMixin, cache_utils.DummyLayer)
    return {
        name: kind
        for name, kind in vars(cache_utils).items()
        if isinstance(kind, type) and issubclass(kind, bases) and "Quantized" not in name
    }


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for a value: a mapping with one key ``$...`` stands for what JSON has not."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        tensors[path] = value.detach().clone()
        return {"$tensor": path}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"$device": str(value)}
    if isinstance(value, Mapping):
        items = [[name, _encode(v, f"{path}.{name}", tensors)] for name, v in value.items()]
        return {"$items": items}
    if isinstance(value, list | tuple):
        parts = [_encode(v, f"{path}.{i}", tensors) for i, v in enumerate(value)]
        return {"$tuple": parts} if isinstance(value, tuple) else parts
    raise StateError(f"{path}: a {type(value).__name__} in a cache cannot be kept")


def _decode(value: Any, tensors: Mapping[str, Tensor], device: torch.device | None) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors, device) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "$tensor":
        return tensors[held] if device is None else tensors[held].to(device)
    if kind == "$dtype":
        return _DTYPES[held]
    if kind == "$device":
        return torch.device(held) if device is None else device
    if kind == "$tuple":
        return tuple(_decode(v, tensors, device) for v in held)
    if kind == "$items":
        return {name: _decode(v, tensors, device) for name, v in held}
    raise ValueError(f"unknown kind of value {kind!r}")


def _tokens_read(cache: Any) -> int:
    """How many tokens a cache has seen; -1 where it does not count them."""
    if hasattr(cache, "seqlen_offset"):
        return int(cache.seqlen_offset)
    lengths = [
        layer.get_seq_length() for layer in getattr(cache, "layers", ()) if hasattr(layer, "get_seq_length")
    ]
    return max((int(n) for n in lengths), default=0) or -1


# -------------------------------------------------------------------- RecurrentGemma, whose state is in the modules


def _blocks(model: nn.Module) -> list[tuple[int, Any]]:
    """RecurrentGemma's recurrent blocks, with the number of their layer."""
    if getattr(model.config, "model_type", "") != "recurrent_gemma":
        return []
    layers: Any = getattr(model, "model", model).layers
    return [
        (index, layer.temporal_block)
        for index, layer in enumerate(layers)
        if hasattr(layer.temporal_block, "rg_lru")
    ]


def _state_is_elsewhere(cache: Any) -> bool:
    """Whether there are keys in a cache and places for recurrent states, and none of these was ever filled."""
    layers = getattr(cache, "layers", [])
    linear = [layer for layer in layers if hasattr(layer, "recurrent_states")]
    return (
        bool(linear)
        and any(getattr(layer, "keys", None) is not None for layer in layers)
        and not any(flag for layer in linear for flag in layer.has_previous_state.values())
    )


def _with_module_state(cache: Any, model: nn.Module) -> Any:
    """The cache, or a copy of it that also holds what an unpatched RecurrentGemma keeps in its modules."""
    blocks = _blocks(model)
    if not blocks or not _state_is_elsewhere(cache):
        return cache
    tensors: dict[str, Tensor] = {}
    copy = _build(_describe(cache, tensors), tensors, None, None)
    for index, block in blocks:
        if block.conv1d_state is None or block.rg_lru.recurrent_states is None:
            raise StateError(
                "the model's modules hold no recurrent state: let it read the text with use_cache=True"
            )
        layer = recurrent_layer(copy, index)
        layer.update_conv_state(block.conv1d_state.float())
        layer.update_recurrent_state(block.rg_lru.recurrent_states)
    return copy


def _into_modules(cache: Any, model: nn.Module) -> None:
    """For an unpatched RecurrentGemma: what the cache holds, where its modules look for it."""
    for index, block in _blocks(model):
        layer = cache.layers[index]
        dtype = block.linear_x.weight.dtype
        block.conv1d_state = layer.conv_states[0].to(dtype).clone()
        block.rg_lru.recurrent_states = layer.recurrent_states[0].clone()


# --------------------------------------------------------------------------------------------- whose cache it is


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module) or not hasattr(getattr(model, "config", None), "to_dict"):
        raise ArgumentError(f"model must be a model of transformers, got {type(model).__name__}")


_known: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], Fingerprint]] = WeakKeyDictionary()


def fingerprint(model: Any) -> Fingerprint:
    """Digests of a model's configuration and weights; the tokenizer's is empty, as a model does not know its tokenizer.

    It is remembered until a weight is written to.
    """
    for module in model.modules():  # RWKV scales its weights in place before it reads, one way or the other
        if hasattr(module, "_rescale_layers") and module.training == module.layers_are_rescaled:
            module._rescale_layers()
    weights: dict[str, Tensor] = model.state_dict()
    mark = tuple((name, t.data_ptr(), 0 if t.is_inference() else t._version) for name, t in weights.items())
    before = _known.get(model)
    if before is not None and before[0] == mark:
        return before[1]
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor_bytes(tensor))
    canonical = json.dumps(_of_the_model(model.config.to_dict()), sort_keys=True, default=str)
    made = Fingerprint(hashlib.sha256(canonical.encode()).hexdigest(), digest.hexdigest(), "")
    _known[model] = (mark, made)
    return made


def _of_the_model(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _of_the_model(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if name not in _NOT_THE_MODEL
    }
