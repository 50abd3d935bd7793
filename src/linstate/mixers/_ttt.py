"""What the mixers of test-time training share: everything but the inner model.

    q, k = rotate(W_q x, c), rotate(W_k x, c)      v = W_v x      c = t mod C, the place in the mini-batch
    lr_t = eta_base sigmoid(w_lr . x + b) / K      share_c = max(0, 1 + m_c) / (c + 1), m learned
    G_t = G_{t-1} + lr_t grad_W |f(k_t; W) - v_t|^2 / 2      W_t = W - share_c G_t      o_t = f(q_t; W_t)
    y = W_o layer_norm(o)

W are the inner model's weights before the mini-batch; behind its last token W becomes W_t and G zero. The paper's
theta_K, theta_V, theta_Q are the projections, its W_0 the learned first weights (``W1``, ``W2``: the bias is the last
row), its eta is ``lr_t``, its b is C (section 2.4: 16), f has a residual and a layer norm (section 2.7). The paper's
loss has no half. The rotation and ``share`` are of the authors' implementation: the mean over the tokens of the
mini-batch so far, to begin with (theirs adds what is learned to 1 / (c + 1), instead of scaling it).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from linstate.errors import ConfigError
from linstate.mixers.base import Mixer, divide, head_count
from linstate.mixers.parts import heads, positions
from linstate.ops import test_time_training
from linstate.ops.features import rotate
from linstate.types import LayerState, Range


class TTTMixer(Mixer):
    """See the module. State, of every layer of the inner model: ``W1 [B, H, K + 1, F]``, by how much its weights have
    moved, ``G1`` the gradients of the unfinished mini-batch, and ``count [B]`` int64, its tokens."""

    recurrence = "test_time_training"

    def __init__(
        self,
        d_model: int,
        widths: Sequence[float],
        num_heads: int | None,
        head_dim: int,
        mini_batch: int,
        base_lr: float,
        rotary_base: float | None,
        norm_eps: float,
    ) -> None:
        super().__init__(d_model)
        divide(head_dim, 2, "head_dim of rotated channels")
        if mini_batch < 1:
            raise ConfigError(f"mini_batch must be at least 1 token, got {mini_batch}")
        self.num_heads, self.head_dim = head_count(num_heads, d_model, head_dim), head_dim
        self.base_lr, self.rotary_base, self.eps = base_lr, rotary_base, norm_eps
        inner = self.num_heads * head_dim
        self.sizes = [inner, inner, inner, self.num_heads]  # q, k, v, lr
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.lr_bias = nn.Parameter(torch.zeros(self.num_heads))
        self.share = nn.Parameter(torch.zeros(mini_batch))  # m
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.norm_bias = nn.Parameter(torch.zeros(inner))
        sizes = [round(head_dim * width) for width in (1, *widths, 1)]
        self.layers = [f"W{i}" for i in range(1, len(sizes))]
        for name, size, to in zip(self.layers, sizes, sizes[1:], strict=False):
            first = torch.cat(
                [0.02 * torch.randn(self.num_heads, size, to), torch.zeros(self.num_heads, 1, to)], 1
            )
            setattr(self, name, nn.Parameter(first))  # [H, size + 1, to]
        self.norm = nn.LayerNorm(inner, norm_eps)
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        *qkv, lr = self.in_proj(x).split(self.sizes, dim=-1)
        q, k, v = (heads(part, self.num_heads) for part in qkv)
        if self.rotary_base is not None:
            position, _ = positions(state["count"] if state else None, x, cu_seqlens)
            q, k = rotate(position % len(self.share), q, k, base=self.rotary_base)
        lr = self.base_lr / self.head_dim * (lr + self.lr_bias).sigmoid()  # [B, T, H]
        place = torch.arange(1, len(self.share) + 1, device=x.device)
        o, after = test_time_training(
            q,
            k,
            v,
            lr,
            *(getattr(self, name) for name in self.layers),
            norm_weight=heads(self.norm_weight, self.num_heads),
            norm_bias=heads(self.norm_bias, self.num_heads),
            share=(1 + self.share).clamp(min=0) / place,
            eps=self.eps,
            initial_state=state or None,
            cu_seqlens=cu_seqlens,
        )  # [B, T, H, K]
        return self.out_proj(self.norm(o.flatten(-2))), after

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        shapes = {name: getattr(self, name).shape for name in self.layers}
        moved = {name: self.zeros(batch, *shape, device=device) for name, shape in shapes.items()}
        waiting = {f"G{name[1:]}": torch.zeros_like(w) for name, w in moved.items()}
        count = torch.zeros(batch, dtype=torch.int64, device=device or self.device)
        return {**moved, **waiting, "count": count}

    def ranges(self) -> dict[str, Range]:
        return {"count": (0, len(self.share) - 1)}

    def recurrence_flops(self, tokens: int) -> int:
        """Per weight and token: answer to k 2, its gradient 3, answer to q from W and from G 4."""
        weights: int = sum(getattr(self, name).numel() for name in self.layers)
        return tokens * weights * 9
