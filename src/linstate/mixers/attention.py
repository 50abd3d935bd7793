"""Softmax attention: the baseline, and the exact part of hybrids. Its state, the cache, grows with the text.

    o_t = sum_{s <= t} softmax_s(q_t . k_s / sqrt K) v_s
    q = rotate(norm(W_q x), t)      k = rotate(norm(W_k x), t)      v = W_v x      y = W_o o

Grouped heads (Ainslie 2023, arXiv 2305.13245): ``num_heads`` a multiple of ``num_kv_heads``. ``rotary_base`` None
turns the rotation (Su 2021, arXiv 2104.09864) off, ``rotary_dim`` turns only that many channels; ``qk_norm`` puts
an RMS norm on each head of q and k ("zero_centred": its weight is kept as its distance from one; "whole": one norm over
all heads), ``output_gate`` multiplies o by ``sigmoid(W_z x)`` before W_o (Qiu 2025, Gated Attention, arXiv 2505.06708;
Qwen3-Next); both are off unless asked for, and so are biases (``bias``; "out": of W_o only). ``scale`` stands for ``1 / sqrt K``.

Source: Vaswani 2017, Attention Is All You Need, arXiv 1706.03762, section 3.2.
"""

from __future__ import annotations

from linstate.mixers._softmax import SoftmaxMixer


class Attention(SoftmaxMixer):
    """See the module. State: ``k, v [B, S, Hk, K]`` of the S tokens before, ``length [B]``, ``position [B]``."""

    equation = "o_t = sum_{s <= t} softmax_s(q_t . k_s) v_s"
    source = "Vaswani 2017, arXiv 1706.03762"

    def __init__(
        self,
        d_model: int,
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
            None,
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
