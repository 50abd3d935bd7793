"""TTT-MLP: the state is a model of two layers that learns, at every token, to give the token's value for its key.

    f(x; W) = x + layer_norm([gelu([x, 1] W1), 1] W2)

``expand`` times as many hidden channels as K (the paper: 4), eta_base 0.1. Everything else as in
:mod:`linstate.mixers._ttt`.

Source: Sun 2024, Learning to (Learn at Test Time), arXiv 2407.04620, sections 2.1 to 2.7.
"""

from __future__ import annotations

from linstate.mixers._ttt import TTTMixer


class TTTMLP(TTTMixer):
    """See the module. State: ``W1, G1 [B, H, K + 1, F]``, ``W2, G2 [B, H, F + 1, K]``, ``count [B]`` int64."""

    equation = (
        "W_t = W - share_c sum_{s <= t} lr_s grad (f(k_s; W) - v_s)^2 / 2, f of two layers, W per mini-batch"
    )
    source = "Sun 2024, arXiv 2407.04620"
    summed = ("W1", "W2", "G1", "G2")

    def __init__(
        self,
        d_model: int,
        num_heads: int | None = None,
        head_dim: int = 64,
        mini_batch: int = 16,
        expand: float = 4.0,
        base_lr: float = 0.1,
        rotary_base: float | None = 10000.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(d_model, (expand,), num_heads, head_dim, mini_batch, base_lr, rotary_base, norm_eps)
