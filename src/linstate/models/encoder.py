"""Encoders: a whole text in, a vector for every token or an answer for the text out. They have no state.

    x = W_e norm(word + position + type)
    x = norm(x + mixer(x))      x = norm(x + W_down gelu(W_up x))      in every layer
    masked_lm:       logits_t = E norm(gelu(W x_t)) + b, E the word embedding
    classification:  logits = W_2 tanh(W_1 x_0), x_0 the first token that counts

Layer norms stand behind the sums, as in BERT (Devlin 2019, arXiv 1810.04805), which FNet and Linformer were built on.
"""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linstate.errors import ArgumentError, CheckpointError
from linstate.files import write_atomically
from linstate.mixers import encoders
from linstate.models.checkpoint import Weights, check, fill, load_weights, read_json, stored, translated
from linstate.models.encoder_config import MODEL_TYPE, EncoderConfig
from linstate.models.families import find_encoder
from linstate.models.families._settings import Settings


class EncoderBlock(nn.Module):
    """``norm(x + mixer(x))``, then ``norm(x + W_down gelu(W_up x))``."""

    def __init__(self, config: EncoderConfig, layer: int) -> None:
        super().__init__()
        name = config.layers[layer]
        options = dict(config.options.get(name, {}))
        self.mixer = encoders.find(name).build(name, config.d_model, config.max_length, options)
        self.mixer_norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.up = nn.Linear(config.d_model, config.d_ff)
        self.down = nn.Linear(config.d_ff, config.d_model)
        self.ff_norm = nn.LayerNorm(config.d_model, config.norm_eps)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        x = self.mixer_norm(x + self.mixer(x, lengths))
        y: Tensor = self.ff_norm(x + self.down(F.gelu(self.up(x), approximate="tanh")))
        return y


class Encoder(nn.Module):
    """An encoder over any pattern of ``mixers/encoders/``.

    >>> model = Encoder(EncoderConfig(vocab_size=32, d_model=16, pattern=("fnet",), head="masked_lm")).eval()
    >>> model(torch.tensor([[1, 2, 3, 4]])).shape
    torch.Size([1, 4, 32])
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config, width = config, config.d_model
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(config.max_length, width)
        self.types = nn.Embedding(config.token_types, width) if config.token_types else None
        self.embedding_norm = nn.LayerNorm(width, config.norm_eps)
        self.embedding_proj = nn.Linear(width, width)
        self.layers = nn.ModuleList(EncoderBlock(config, layer) for layer in range(config.num_layers))
        if config.head is not None:
            self.head_proj = nn.Linear(width, width)
        if config.head == "masked_lm":
            self.head_norm = nn.LayerNorm(width, config.norm_eps)
            self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))
        if config.head == "classification":
            self.labels = nn.Linear(width, config.num_labels)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None, types: Tensor | None = None) -> Tensor:
        """Read ``tokens [B, T]``: what the head makes of them, without one a vector for each token ``[B, T, D]``.

        With the head "masked_lm" logits ``[B, T, vocab]``, with "classification" ``[B, num_labels]``.

        Args:
            mask: ``[B, T]``, nonzero where a token counts. Other tokens have no effect, wherever they stand, and get
                zeros; positions count the tokens that count.
            types: ``[B, T]`` int64, the kind of every token, default 0.

        Raises:
            ArgumentError: a shape or range that does not fit, a text longer than ``max_length``, a row without a token.
        """
        self._check(tokens, mask, types)
        if mask is None or bool(mask.all()):
            return self._head(self._encode(tokens, types, None))
        keep = mask.bool()
        lengths = keep.sum(1)
        if int(lengths.min()) == 0:
            raise ArgumentError("mask must let at least one token count in every row")
        order = (~keep).to(torch.int8).argsort(dim=1, stable=True)  # the tokens that count come first
        order, back = order[:, : int(lengths.max())], keep.cumsum(1) - 1
        x = self._encode(tokens.gather(1, order), None if types is None else types.gather(1, order), lengths)
        found = self._head(x)
        if self.config.head == "classification":
            return found
        wide = back.clamp(min=0)[..., None].expand(-1, -1, found.shape[-1])
        return found.gather(1, wide).masked_fill(~keep[..., None], 0.0)

    def _encode(self, tokens: Tensor, types: Tensor | None, lengths: Tensor | None) -> Tensor:
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]  # [B, T, D]
        if self.types is not None:
            x = x + self.types(torch.zeros_like(tokens) if types is None else types)
        x = self.embedding_proj(self.embedding_norm(x))
        for block in self.layers:
            x = block(x, lengths)
        return x

    def _head(self, x: Tensor) -> Tensor:
        if self.config.head is None:
            return x
        if self.config.head == "classification":
            answer: Tensor = self.labels(torch.tanh(self.head_proj(x[:, 0])))
            return answer
        x = self.head_norm(F.gelu(self.head_proj(x), approximate="tanh"))
        return F.linear(x, self.embedding.weight, self.head_bias)

    def _check(self, tokens: Tensor, mask: Tensor | None, types: Tensor | None) -> None:
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ArgumentError(f"tokens must be int64 [B, T], got {tokens.dtype} {list(tokens.shape)}")
        if not 1 <= tokens.shape[1] <= self.config.max_length:
            raise ArgumentError(
                f"a text must have 1 to max_length={self.config.max_length} tokens, got {tokens.shape[1]}"
            )
        ranges = {"tokens": (tokens, self.config.vocab_size), "types": (types, self.config.token_types)}
        for name, (given, size) in ranges.items():
            if given is None:
                continue
            if given.shape != tokens.shape:
                raise ArgumentError(
                    f"{name} must have the shape of tokens {list(tokens.shape)}, got {list(given.shape)}"
                )
            if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < size:
                raise ArgumentError(
                    f"{name} must lie in [0, {size}), got {int(given.min())} to {int(given.max())}"
                )
        if mask is not None and mask.shape != tokens.shape:
            raise ArgumentError(
                f"mask must have the shape of tokens {list(tokens.shape)}, got {list(mask.shape)}"
            )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, which :meth:`from_pretrained` reads."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        weights = {name: t.contiguous() for name, t in self.state_dict().items()}
        config = {"model_type": MODEL_TYPE, "architecture": self.config.to_dict()}
        write_atomically(target / "model.safetensors", safetensors.torch.save(weights, {"format": "pt"}))
        write_atomically(target / "config.json", json.dumps(config, indent=1).encode())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Encoder:
        """The encoder of a folder, of ours or of a family in ``models/families``, in evaluation mode.

        Raises:
            CheckpointError: a file is missing or broken, or names, shapes and configuration do not fit.
            ConfigError: the configuration asks for something that we do not do, by name.
        """
        source = Path(folder)
        raw, where = read_json(source / "config.json"), str(source / "config.json")
        if raw.get("model_type") == MODEL_TYPE:
            if not isinstance(raw.get("architecture"), dict):
                raise CheckpointError(
                    f"{where}: an encoder of Linstate must have an architecture, found none"
                )
            model = cls(EncoderConfig.from_dict(raw["architecture"]))
            weights = load_weights(source)
            fill(model, weights, str(source))
            return model.to(next(iter(weights.values())).dtype).eval()
        family = find_encoder(raw, where)
        settings = Settings(raw, where, family.library)
        config = family.config(settings)
        with Weights(source) as theirs:
            table = family.weights(config, settings, theirs.headers)
            settings.finish()
            with torch.device("meta"):
                model = cls(config)
            check(model, table, theirs, family.ignored)
            dtype = stored(theirs)
            made = {name: t.to(dtype) for name, t in translated(table, theirs)}
        model.load_state_dict(made, assign=True)
        return model.eval()
