"""Sliding window attention: softmax attention over the last W tokens, its state of constant size.

    o_t = sum_{t - W < s <= t} softmax_s(q_t . k_s / sqrt K) v_s

Everything else, and the other options, as in :mod:`linstate.mixers.attention`.

Source: Beltagy, Peters, Cohan 2020, Longformer, arXiv 2004.05150, section 3.1.
"""

from __future__ import annotations

from linstate.mixers._softmax import SoftmaxMixer


class SlidingWindow(SoftmaxMixer):
    """See the module. State: ``k, v [B, W - 1, Hk, K]``, ``length [B]`` of them in use, ``position [B]``."""

    equation = "o_t = sum_{t-W < s <= t} softmax_s(q_t . k_s) v_s"
    source = "Beltagy 2020, arXiv 2004.05150"

    def __init__(
        self,
        d_model: int,
        window: int = 512,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int = 64,
        rotary_base: float | None = 10000.0,
        rotary_dim: int | None = None,
        qk_norm: bool | str = False,
        output_gate: bool = False,
        norm_eps: float = 1e-6,
        bias: bool | str = False,
        scale: float | None = None,
    ) -> None:
        super().__init__(
            d_model,
            window,
            num_heads,
            num_kv_heads,
            head_dim,
            rotary_base,
            rotary_dim,
            qk_norm,
            output_gate,
            norm_eps,
            bias,
            scale,
        )
