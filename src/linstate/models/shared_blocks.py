"""Transformer blocks that several layers share, each use with small weights of its own (Zamba, Zamba2).

    t = W_out FF(norm_2(A(norm_1([x, e]))))      the layer's mixer then reads norm(x + t), and its residual stream stays x

x is what the layer reads and e the embedding of the same token, side by side 2 D channels for the attention A, which
makes D of them. Nothing is added on the way from x to t. A model has ``blocks`` of these blocks; its layers ``layers``
take them in turn. What a use has of its own is W_out and low-rank adapters, added to the projection that makes q, k, v
(``adapt_attention``) and to that which makes the feed-forward's gate and up: ``W x + W_2 W_1 x``, one pair of W_1 and W_2
for each of q, k and v.

Source: Glorioso 2024, Zamba, arXiv 2405.16712, section 3; the adapters: Glorioso 2024, Zamba2, arXiv 2411.15242, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linstate.errors import ConfigError
from linstate.mixers.attention import Attention
from linstate.mixers.parts import LowRank, RMSNorm
from linstate.models.config import ModelConfig
from linstate.models.feed_forward import SwiGLU
from linstate.types import LayerState


class SharedBlock(nn.Module):
    """One block: its weights, which all of its uses share."""

    def __init__(
        self, d_model: int, d_ff: int | None, activation: str, eps: float, attention: dict[str, Any]
    ) -> None:
        super().__init__()
        self.norm = RMSNorm(2 * d_model, eps)
        self.attention = Attention(2 * d_model, **attention)
        self.attention.out_proj = nn.Linear(sum(self.attention.sizes[:1]), d_model, bias=False)
        self.ff_norm = RMSNorm(d_model, eps)
        self.ff = SwiGLU(d_model, d_ff, activation=activation)


class Use(nn.Module):
    """What one use of a block has of its own."""

    def __init__(self, block: SharedBlock, d_model: int, rank: int, adapt_attention: bool) -> None:
        super().__init__()
        sizes = block.attention.sizes[:3] if adapt_attention else []  # q, k, v
        self.attention = nn.ModuleList(LowRank(2 * d_model, size, rank) for size in sizes)
        self.ff = LowRank(d_model, 2 * block.ff.d_ff, rank)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)


class SharedBlocks(nn.Module):
    """See the module. ``uses`` maps the numbers of the layers that use a block to the number of the use.

    The options in ``ModelConfig.shared_blocks``: ``layers``; ``blocks``; ``rank`` of the adapters; ``adapt_attention``;
    ``activation`` and ``d_ff`` of the feed-forward; ``attention``, the options of the mixer of that name.

    Raises:
        ConfigError: an option that does not exist, or no layer.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        options = dict(config.shared_blocks or {})
        known = ("layers", "blocks", "rank", "adapt_attention", "activation", "d_ff", "attention")
        if unknown := sorted(set(options) - set(known)):
            raise ConfigError(f"shared_blocks has no option {', '.join(unknown)}; it has: {', '.join(known)}")
        layers: Sequence[int] = options.get("layers", ())
        blocks, d_model = options.get("blocks", 1), config.d_model
        if not 1 <= blocks <= len(layers):
            raise ConfigError(f"shared_blocks: blocks must be 1 to the {len(layers)} layers, got {blocks}")
        self.uses = {layer: use for use, layer in enumerate(layers)}
        attention = dict(options.get("attention", {}))
        Attention.check_options("attention", attention)
        self.blocks = nn.ModuleList(
            SharedBlock(
                d_model, options.get("d_ff"), options.get("activation", "gelu"), config.norm_eps, attention
            )
            for _ in range(blocks)
        )
        rank, adapt = options.get("rank", 128), options.get("adapt_attention", False)
        self.own = nn.ModuleList(Use(self.block(layer), d_model, rank, adapt) for layer in layers)

    def block(self, layer: int) -> SharedBlock:
        """The block that the layer uses."""
        block = self.blocks[self.uses[layer] % len(self.blocks)]
        assert isinstance(block, SharedBlock)
        return block

    def forward(
        self, layer: int, x: Tensor, embedded: Tensor, state: LayerState, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        """t ``[B, T, D]`` for ``x``, ``embedded [B, T, D]``, and the state of the attention after: as that of the mixer."""
        block, own = self.block(layer), self.own[self.uses[layer]]
        assert isinstance(own, Use)
        both = block.norm(torch.cat([x.to(embedded.dtype), embedded], dim=-1))  # [B, T, 2 D]
        projected = block.attention.in_proj(both)
        if len(own.attention):
            projected = projected + torch.cat([adapter(both) for adapter in own.attention], dim=-1)
        y, after = block.attention.attend(projected, state, cu_seqlens)
        y = block.ff_norm(y)
        return own.out_proj(block.ff.project(block.ff.up(y) + own.ff(y))), after

    def init_state(self, layer: int, batch: int, device: torch.device | str | None) -> LayerState:
        """The empty state of a use, ``batch`` rows."""
        return self.block(layer).attention.init_state(batch, device=device)

    def state_bytes(self, tokens: int) -> int:
        """Bytes of one row's state of all uses after ``tokens`` tokens."""
        return sum(self.block(layer).attention.state_bytes(tokens) for layer in self.uses)

    def flops(self, tokens: int) -> int:
        """FLOPs to decode ``tokens`` tokens, all uses."""
        own = 2 * tokens * sum(p.numel() for p in self.own.parameters())
        blocks = [self.block(layer) for layer in self.uses]
        return own + sum(b.attention.flops(tokens) + b.ff.flops(tokens) for b in blocks)
