"""The decoder: ``logits, state = model(tokens, state)``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from linstate import mixers
from linstate.errors import ArgumentError, ConfigError
from linstate.mixers.base import Mixer, Place
from linstate.mixers.parts import RMSNorm
from linstate.models import feed_forward
from linstate.models.config import NONE, ModelConfig
from linstate.models.in_place_ttt import InPlaceTTT
from linstate.models.shared_blocks import SharedBlocks
from linstate.models.state_table import StateTable
from linstate.ops.checks import check_cu_seqlens
from linstate.ops.native import norm as native_norm
from linstate.types import LayerState, Range, by_layer, prefixed, state_bytes, state_dtype, under

Logits = Literal["all", "last", "none", "hidden"]


def _norm(config: ModelConfig) -> nn.Module:
    if config.norm == "layernorm":
        return nn.LayerNorm(config.d_model, config.norm_eps)
    centred = config.norm == "zero_centred_rmsnorm"
    return RMSNorm(config.d_model, config.norm_eps, weight=config.norm != "srmsnorm", centred=centred)


def _learning(config: ModelConfig, layer: int, ff: feed_forward.FeedForward) -> feed_forward.FeedForward:
    """The feed-forward, with in-place test-time training where the configuration asks for it."""
    options = dict(config.in_place_ttt or {})  # a layer without a feed-forward has nothing that could learn
    if config.in_place_ttt is None or layer not in options.pop("layers", (layer,)):
        return ff
    unknown = sorted(set(options) - {"chunk", "lr", "width"})
    if unknown:
        raise ConfigError(
            f"in_place_ttt has no option {', '.join(unknown)}; it has: layers, chunk, lr, width"
        )
    return InPlaceTTT(ff, **options)


def _add(x: Tensor, y: Tensor, scales: Sequence[float] | None) -> Tensor:
    """``a x + b y``."""
    if scales is None and native_norm.adds(x, y):
        return native_norm.add(x, y)
    return x + y if scales is None else scales[0] * x + scales[1] * y


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + feed_forward(norm(x))``; one of the two may be missing.

    ``ModelConfig.norm_place`` has the other places of norms.
    """

    mixer: Mixer | None
    ff: feed_forward.FeedForward | None

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        name = config.layers[layer]
        self.norm_place = config.norm_place.get(name, "before")
        self.mixer_scales = config.residual_scales.get(name)
        self.ff_scales = config.residual_scales.get(config.feed_forwards[layer])
        before = frozenset(part for other in config.layers[:layer] for part in mixers.split(other))
        place = Place(layer, config.num_layers, before=before).of(name)
        self.residual_in_fp32 = config.residual_in_fp32
        self.mixer = self.ff = None
        if name != NONE:
            self.mixer_norm = _norm(config)
            options = dict(config.options.get(name, {}))
            self.mixer = mixers.find(name).build(name, config.d_model, options, place)
        name = config.feed_forwards[layer]
        if name != NONE:
            self.ff_norm = _norm(config)
            ff = feed_forward.build(name, config.d_model, config.d_ff, place, config.options.get(name))
            self.ff = _learning(config, layer, ff)

    def forward(
        self,
        x: Tensor,
        state: LayerState,
        cu_seqlens: Tensor | None,
        shared: dict[str, Tensor],
        beside: Tensor | None = None,
    ) -> tuple[Tensor, LayerState]:
        """``x [B, T, D]`` and the state after. ``beside [B, T, D]`` is added to what the mixer reads, and to nothing else."""
        after: LayerState = {}
        if self.mixer is not None:
            if beside is None:
                x, into = self._into(x, self.mixer_norm)  # [B, T, D] both
            else:
                _, into = self._into(x + beside, self.mixer_norm)
            y, mixed = self.mixer(into, under("mixer", state), cu_seqlens=cu_seqlens, shared=shared)
            x = _add(x, self._out(y, self.mixer_norm), self.mixer_scales)
            after |= prefixed("mixer", mixed)
        if self.ff is not None:
            x, into = self._into(x, self.ff_norm)
            y, fed = self.ff(into, under("ff", state), cu_seqlens=cu_seqlens)
            x = _add(x, self._out(y, self.ff_norm), self.ff_scales)
            after |= prefixed("ff", fed)
        return x, after

    def _into(self, x: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """The residual stream, and what goes into a branch."""
        dtype = next(self.parameters()).dtype if self.residual_in_fp32 else x.dtype
        if self.norm_place == "after":
            return x, x.to(dtype)
        normed: Tensor = norm(x, dtype) if isinstance(norm, RMSNorm) else norm(x.to(dtype))
        return (normed if self.norm_place == "both" else x), normed

    def _out(self, y: Tensor, norm: nn.Module) -> Tensor:
        """What comes out of a branch."""
        return norm(y) if self.norm_place == "after" else y

    def init_state(self, batch: int, device: torch.device | str | None) -> LayerState:
        state: LayerState = {}
        if self.mixer is not None:
            state |= prefixed("mixer", self.mixer.init_state(batch, device=device))
        if self.ff is not None:
            state |= prefixed("ff", self.ff.init_state(batch, device=device))
        return state

    def state_bytes(self, tokens: int) -> int:
        """Bytes of one row's state after ``tokens`` tokens."""
        mixed = 0 if self.mixer is None else self.mixer.state_bytes(tokens)
        return mixed + (0 if self.ff is None else state_bytes(self.ff.init_state(1, device="meta")))

    def flops(self, tokens: int) -> int:
        """FLOPs to decode ``tokens`` tokens."""
        mixed = 0 if self.mixer is None else self.mixer.flops(tokens)
        return mixed + (0 if self.ff is None else self.ff.flops(tokens))


class Step(Protocol):
    """What may serve single tokens of a decoder."""

    def __call__(
        self, decoder: Decoder, tokens: Tensor, state: LayerState, logits: bool
    ) -> tuple[Tensor, LayerState] | None:
        """Logits and the state after the tokens; None where the decoder itself has to serve."""
        ...


class Decoder(nn.Module):
    """A language model over any pattern of mixers.

    >>> config = ModelConfig(vocab_size=32, d_model=16, pattern=("gated_deltanet",),
    ...     options={"gated_deltanet": {"num_heads": 2, "head_dim": 8}})
    >>> model = Decoder(config).eval()
    >>> tokens = torch.tensor([[1, 2, 3, 4]])
    >>> _, state = model(tokens[:, :3])
    >>> logits, state = model(tokens[:, 3:], state)
    >>> logits.shape
    torch.Size([1, 1, 32])
    """

    gradient_checkpointing = False
    """In training: each layer is run again in the backward pass instead of keeping what it computed."""
    step: Step | None = None
    """Serves single tokens where it can; a packed model has one (:mod:`linstate.models.packed`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.embedding_norm = _norm(config) if config.embedding_norm else nn.Identity()
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.shared_blocks = SharedBlocks(config) if config.shared_blocks is not None else None
        self.norm = _norm(config)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.init_weights()
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.state_names = frozenset(self.init_state(1, device="meta"))
        self.caches = self._caches()

    def _caches(self) -> dict[str, int | None]:
        """``Mixer.caches`` of all layers, by the names that the tensors have in the state."""
        found: dict[str, int | None] = {}
        for i, block in enumerate(self.blocks()):
            held = {"mixer": block.mixer, "shared": None}
            if self.shared_blocks is not None and i in self.shared_blocks.uses:
                held["shared"] = self.shared_blocks.block(i).attention
            for part, mixer in held.items():
                if mixer is not None:
                    found |= {f"layers.{i}.{part}.{name}": places for name, places in mixer.caches().items()}
        return found

    @cached_property
    def state_table(self) -> StateTable:
        """What a state of this model may hold: dtype, shape and range of every tensor."""
        return StateTable(
            self.init_state(1, device="meta"),
            self._ranges(),
            {name for name, places in self.caches.items() if places is not None},
        )

    def _ranges(self) -> dict[str, Range]:
        """``Mixer.ranges`` of all layers, by the names that the tensors have in the state."""
        ranges: dict[str, Range] = {}
        for i, block in enumerate(self.blocks()):
            parts: dict[str, Mixer | feed_forward.FeedForward | None] = {"mixer": block.mixer, "ff": block.ff}
            if self.shared_blocks is not None and i in self.shared_blocks.uses:
                parts["shared"] = self.shared_blocks.block(i).attention
            for part, layer in parts.items():
                if layer is not None:
                    ranges |= {f"layers.{i}.{part}.{name}": held for name, held in layer.ranges().items()}
        return ranges

    def init_weights(self, std: float = 0.02) -> None:
        """Normal(0, ``std``) for the projections; those that write into the residual stream smaller with depth."""
        depth = self.config.num_layers * self.config.repeats
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding) and not getattr(module, "keep_init", False):
                residual = name.endswith(("out_proj", "down"))
                nn.init.normal_(module.weight, std=std / (2 * depth) ** 0.5 if residual else std)

    def init_state(self, batch: int = 1, *, device: torch.device | str | None = None) -> LayerState:
        """The empty state with ``batch`` rows, a flat mapping ``layers.<i>.mixer.<name> -> tensor [B, ...]``.

        i counts applications of layers: with ``repeats`` r, layer j is applied as i = r j to r j + r - 1.
        """
        state: LayerState = {}
        for i, block in enumerate(self.blocks()):
            state |= prefixed(f"layers.{i}", block.init_state(batch, device))
        if self.shared_blocks is not None:
            for i in self.shared_blocks.uses:
                state |= prefixed(f"layers.{i}.shared", self.shared_blocks.init_state(i, batch, device))
        return state

    def forward(
        self,
        tokens: Tensor | None,
        state: LayerState | None = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        logits: Logits = "all",
        inputs_embeds: Tensor | None = None,
        hidden: list[Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        """Read ``tokens [B, T]`` from ``state`` (default empty) and return logits ``[B, T, vocab]`` and the state after.

        Args:
            mask: ``[B, T]``, nonzero where a token counts; padded tokens change nothing, on either side.
            cu_seqlens: ``[N + 1]`` boundaries of N sequences packed along T (then B = 1, the state has N rows).
            logits: ``"last"`` computes them for the last token only (``[B, 1, vocab]``; with cu_seqlens, of each
                sequence), ``"none"`` not at all (an empty tensor); ``"hidden"`` returns what the head would read, ``[B, T, D]``.
            inputs_embeds: ``[B, T, D]``, rows of the embedding instead of ``tokens``, which is None then.
            hidden: gets what each layer reads and what the head reads, ``[B, T, D]`` each.

        Raises:
            ArgumentError: tokens or a mask of a wrong shape, dtype or range, a state of another model, or
                ``logits="last"`` of a row without a token.
        """
        given = self._checked(tokens, inputs_embeds)
        shape = given.shape[:2]
        if logits not in get_args(Logits):
            raise ArgumentError(f"logits must be 'all', 'last', 'none' or 'hidden', got {logits!r}")
        if mask is not None:
            if mask.shape != shape:
                raise ArgumentError(
                    f"mask must have the shape of tokens {list(shape)}, got {list(mask.shape)}"
                )
            if cu_seqlens is not None:
                raise ArgumentError("give mask or cu_seqlens, not both: packed sequences have no padding")
            if not bool(mask.all()):
                return self._masked(tokens, state, mask.bool(), logits, inputs_embeds, hidden)
        rows, shortest = shape
        if cu_seqlens is not None:
            bounds = check_cu_seqlens("Decoder", cu_seqlens, *shape)
            rows, shortest = len(bounds) - 1, min(b - a for a, b in zip(bounds, bounds[1:], strict=False))
        if logits == "last" and shortest == 0:
            raise ArgumentError("logits='last' needs at least one token in every row")
        if state is None:
            state = self.init_state(rows)
        elif state.keys() != self.state_names:
            raise ArgumentError(
                "state is not of this model: "
                f"missing {sorted(self.state_names - state.keys())}, unknown {sorted(state.keys() - self.state_names)}"
            )
        plain = tokens is not None and cu_seqlens is None and hidden is None and logits != "hidden"
        if self.step is not None and plain and shape[1] == 1:
            assert tokens is not None
            stepped = self.step(self, tokens, state, logits != "none")
            if stepped is not None:
                return stepped
        x = self.embed(given) if inputs_embeds is None else self._embedded(inputs_embeds)
        embedded, dtype = x, x.dtype
        if self.config.residual_in_fp32:
            x = x.to(state_dtype(x))
        shared: dict[str, Tensor] = {}
        after: LayerState = {}
        layers = by_layer(state)
        again = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks()):
            before, beside = layers.get(i, {}), None
            if hidden is not None:
                hidden.append(x)
            if self.shared_blocks is not None and i in self.shared_blocks.uses:
                beside, part = self.shared_blocks(i, x, embedded, under("shared", before), cu_seqlens)
                after |= prefixed(f"layers.{i}.shared", part)
            if again:
                x, part = checkpoint(block, x, before, cu_seqlens, shared, beside, use_reentrant=False)
            else:
                x, part = block(x, before, cu_seqlens, shared, beside)
            after |= prefixed(f"layers.{i}", part)
        if logits == "none" and hidden is None:
            return x.new_empty(0), after
        if logits == "last" and hidden is None:
            x = x[:, -1:] if cu_seqlens is None else x[0, cu_seqlens[1:] - 1][:, None]  # [B, 1, D]
        x = self.norm(x.to(dtype))
        if hidden is not None:
            hidden.append(x)
            if logits == "last":
                x = x[:, -1:] if cu_seqlens is None else x[0, cu_seqlens[1:] - 1][:, None]
        if logits == "hidden" or logits == "none":
            return (x if logits == "hidden" else x.new_empty(0)), after
        return self.logits_of(x), after

    def _checked(self, tokens: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """What is to be read: ids ``[B, T]`` or embeddings ``[B, T, D]``. Raises ArgumentError."""
        if inputs_embeds is not None:
            if tokens is not None:
                raise ArgumentError("give tokens or inputs_embeds, not both")
            if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != self.config.d_model:
                raise ArgumentError(
                    f"inputs_embeds must be [B, T, {self.config.d_model}], got {list(inputs_embeds.shape)}"
                )
            return inputs_embeds
        if tokens is None or tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            found = "none" if tokens is None else f"{tokens.dtype} {list(tokens.shape)}"
            raise ArgumentError(f"tokens must be int64 [B, T], got {found}")
        # A graph waits for no number, and an exported program checks it itself.
        unseen = (
            tokens.is_cuda and torch.cuda.is_current_stream_capturing()
        ) or torch.compiler.is_exporting()
        if (
            tokens.numel()
            and not unseen
            and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab_size
        ):
            raise ArgumentError(
                f"token ids must lie in [0, {self.config.vocab_size}), got {int(tokens.min())} to {int(tokens.max())}"
            )
        return tokens

    def logits_of(self, x: Tensor) -> Tensor:
        """The logits of what the last norm made, ``[B, T, D] -> [B, T, vocab]``."""
        found: Tensor = self.head(x)
        if self.config.logit_scale != 1.0:
            found = found * self.config.logit_scale
        cap = self.config.logit_softcap
        return found if cap is None else ((found.to(state_dtype(x)) / cap).tanh() * cap).to(found.dtype)

    def embed(self, tokens: Tensor) -> Tensor:
        """``tokens [B, T]`` -> what the first layer reads, ``[B, T, D]``."""
        return self._embedded(self.embedding(tokens))

    def _embedded(self, x: Tensor) -> Tensor:
        """Rows of the embedding ``[B, T, D]`` -> what the first layer reads."""
        x = self.embedding_norm(x)
        return x if self.config.embedding_scale == 1.0 else x * self.config.embedding_scale

    def _masked(
        self,
        tokens: Tensor | None,
        state: LayerState | None,
        mask: Tensor,
        logits: Logits,
        inputs_embeds: Tensor | None,
        hidden: list[Tensor] | None,
    ) -> tuple[Tensor, LayerState]:
        """Padding is taken out: the tokens that count run as packed sequences, one for each row."""
        lengths = mask.sum(1)
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        if logits == "last" and int(lengths.min()) == 0:
            raise ArgumentError("logits='last' needs at least one token that counts in every row of mask")
        packed: list[Tensor] | None = None if hidden is None else []
        found, after = self(
            None if tokens is None else tokens[mask][None],
            state,
            cu_seqlens=bounds,
            logits=logits,
            inputs_embeds=None if inputs_embeds is None else inputs_embeds[mask][None],
            hidden=packed,
        )

        def spread(x: Tensor) -> Tensor:
            full = x.new_zeros((*mask.shape, x.shape[-1]))
            full[mask] = x[0]
            return full

        if hidden is not None:
            hidden.extend(map(spread, packed or ()))
        return (spread(found) if logits in ("all", "hidden") else found), after

    def with_in_place_ttt(self, **options: Any) -> Decoder:
        """A copy of this model whose feed-forwards learn while they read (``ModelConfig.in_place_ttt``, all layers by default).

        It answers as this one does, until its new weights are trained. Its states are not states of this model.

        Raises:
            ConfigError: an option that does not exist or has no meaning, a feed-forward without a down projection, or
                a model that has it already.
        """
        if self.config.in_place_ttt is not None:
            raise ConfigError("in_place_ttt is switched on already")
        made = Decoder(replace(self.config, in_place_ttt=options))
        weights = made.state_dict()  # of those that only it has, as they are made
        for name, tensor in self.state_dict().items():
            inner = name.replace(".ff.", ".ff.inner.")
            weights[inner if inner in weights else name] = tensor
        made.load_state_dict(weights)
        return made.to(self.embedding.weight).train(self.training)

    def parameter_count(self) -> int:
        """Number of weights, tied ones once."""
        return sum(p.numel() for p in self.parameters())

    def state_bytes(self, tokens: int) -> int:
        """Bytes of one row's state after ``tokens`` tokens."""
        shared = 0 if self.shared_blocks is None else self.shared_blocks.state_bytes(tokens)
        return shared + sum(block.state_bytes(tokens) for block in self.blocks())

    def flops(self, tokens: int) -> int:
        """FLOPs to decode ``tokens`` tokens."""
        head = 2 * tokens * self.config.vocab_size * self.config.d_model
        shared = 0 if self.shared_blocks is None else self.shared_blocks.flops(tokens)
        return head + shared + sum(block.flops(tokens) for block in self.blocks())

    def blocks(self) -> list[Block]:
        """The layers as they are applied: one that is applied r times stands here r times in a row."""
        layers = (block for block in self.layers if isinstance(block, Block))
        return [block for block in layers for _ in range(self.config.repeats)]
