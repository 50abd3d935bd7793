"""In-Place TTT: the down projection of a feed-forward learns while the model reads, chunk by chunk.

    y_t = W h_t      h_t: what the down projection gets      W = W_down + the state, one for each row
    V = conv(X) W_target      W += lr sum_{t in chunk} V_t h_t^T      behind each chunk of C tokens

which is a step on the loss ``-sum_t V_t . W h_t``: W learns to answer h_t with V_t, a mixture of the inputs X of the
feed-forward at the tokens around t, by the convolution's taps at the tokens behind t the next ones (the objective that
is aligned with predicting the next token). The convolution sees nothing beyond the chunk, and a chunk is read with the
weights before it, so nothing looks ahead. The paper's Z is h, its V-hat is V, its eta ``lr``.

The convolution is zero at first: switched on, a model answers as before, until the convolution is trained.

Source: Feng 2026, In-Place Test-Time Training, arXiv 2604.06169, section 3; X is the layer's input, as its authors'
code has it for models that are trained on (their ``ttt_target: hidden_states``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linstate.errors import ConfigError
from linstate.models.feed_forward import FeedForward
from linstate.ops.slots import Slots
from linstate.types import LayerState, Range, prefixed, state_dtype, under

FAST = "fast"
"""The name of the state by which W_down has moved; states compose by adding it."""


class InPlaceTTT(FeedForward):
    """A feed-forward whose down projection learns as it reads: see the module.

    State: ``fast [B, D, F]``; of the unfinished chunk ``keys [B, C - 1, F]`` (h), ``inputs [B, C - 1, D]`` and its tokens
    ``count [B]`` int64; and that of ``inner``, under ``inner.``.

    Args:
        inner: a feed-forward with a linear layer ``down``.
        chunk: C. lr: the paper's eta. width: taps of the convolution, odd, as many before the token as behind.

    Raises:
        ConfigError: ``inner`` has no ``down``, or an option has no meaning.
    """

    def __init__(self, inner: FeedForward, *, chunk: int = 512, lr: float = 0.3, width: int = 5) -> None:
        super().__init__(inner.d_model, inner.d_ff)
        down = inner._modules.get("down")
        if not isinstance(down, nn.Linear):
            raise ConfigError(
                f"in_place_ttt needs a feed-forward with a linear layer 'down', {type(inner).__name__} has none"
            )
        if chunk < 1 or width < 1 or width % 2 == 0:
            raise ConfigError(
                f"in_place_ttt: chunk must be at least 1 and width odd, got chunk={chunk}, width={width}"
            )
        self.inner, self.keys = inner, down.in_features
        self.chunk, self.lr, self.width = chunk, lr, width
        self.conv = nn.Parameter(torch.zeros(self.d_model, 1, width))
        self.target = nn.Parameter(torch.eye(self.d_model))

    def forward(
        self, x: Tensor, state: LayerState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        state = state or {}
        after: LayerState = {}

        def down(h: Tensor) -> Tensor:
            y, learned = self.learn(h, x, state, cu_seqlens)
            after.update(learned)
            return y

        y, mixed = _with_down(self.inner, down)(x, under("inner", state), cu_seqlens=cu_seqlens)
        return y, {**after, **prefixed("inner", mixed)}

    def learn(
        self, h: Tensor, x: Tensor, state: LayerState, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        """``W h_t`` of every token of ``h [B, T, F]``, ``x [B, T, D]``, and the state after."""
        wide = state_dtype(h)
        slots = Slots(h, state.get("count"), self.chunk, cu_seqlens)
        keys = slots.fill(h.to(wide), state.get("keys"))  # [rows, N, C, F]
        inputs = slots.fill(x.to(wide), state.get("inputs"))  # [rows, N, C, D]
        fast = state.get(FAST)
        if fast is None:
            fast = h.new_zeros((len(slots.count), self.d_model, self.keys), dtype=wide)
        answers = []
        for n, full in enumerate(slots.complete.unbind(1)):
            answers.append(keys[:, n, slots.used] @ fast.transpose(-1, -2))  # [rows, C, D]
            if n < slots.done:
                step = self.lr * self.targets(inputs[:, n]).transpose(-1, -2) @ keys[:, n]  # [rows, D, F]
                fast = torch.where(full[:, None, None], fast + step, fast)
        y = self.inner.get_submodule("down")(h) + slots.take(torch.stack(answers, 1)).to(h.dtype)
        return y, {
            FAST: fast,
            "keys": slots.pending(keys),
            "inputs": slots.pending(inputs),
            "count": slots.after,
        }

    def targets(self, inputs: Tensor) -> Tensor:
        """V of a chunk ``[rows, C, D]``."""
        taps = self.conv.to(inputs.dtype)
        near = F.conv1d(inputs.transpose(1, 2), taps, padding=self.width // 2, groups=self.d_model)
        return near.transpose(1, 2) @ self.target.to(inputs.dtype)

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        device = device or self.conv.device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch, *shape, dtype=state_dtype(self.conv), device=device)

        return {
            FAST: zeros(self.d_model, self.keys),
            "keys": zeros(self.chunk - 1, self.keys),
            "inputs": zeros(self.chunk - 1, self.d_model),
            "count": torch.zeros(batch, dtype=torch.int64, device=device),
            **prefixed("inner", self.inner.init_state(batch, device=device)),
        }

    def ranges(self) -> dict[str, Range]:
        inner = {f"inner.{name}": held for name, held in self.inner.ranges().items()}
        return {"count": (0, self.chunk - 1), **inner}


def _with_down(ff: FeedForward, down: Callable[[Tensor], Tensor]) -> FeedForward:
    """The same feed-forward, same weights, for one call: what it asks of its down projection is answered by ``down``."""
    view = copy.copy(ff)
    view._modules = {**ff._modules, "down": down}  # type: ignore[dict-item]
    return view
