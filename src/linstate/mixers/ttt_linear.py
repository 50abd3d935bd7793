"""TTT-Linear: the state is a linear model that learns, at every token, to give the token's value for its key.

    f(x; W) = x + layer_norm([x, 1] W1)

Everything else as in :mod:`linstate.mixers._ttt`.

Source: Sun 2024, Learning to (Learn at Test Time), arXiv 2407.04620, sections 2.1 to 2.7; linear attention is the case
without layer norm and residual whose mini-batch is the whole text (section 2.6).
"""

from __future__ import annotations

from linstate.mixers._ttt import TTTMixer


class TTTLinear(TTTMixer):
    """See the module. State: ``W1, G1 [B, H, K + 1, K]``, ``count [B]`` int64."""

    equation = "W_t = W - c sum_{s <= t} lr_s grad (f(k_s; W) - v_s)^2 / 2, f linear, W per mini-batch"
    source = "Sun 2024, arXiv 2407.04620"
    summed = ("W1", "G1")

    def __init__(
        self,
        d_model: int,
        num_heads: int | None = None,
        head_dim: int = 64,
        mini_batch: int = 16,
        base_lr: float = 1.0,
        rotary_base: float | None = 10000.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(d_model, (), num_heads, head_dim, mini_batch, base_lr, rotary_base, norm_eps)
