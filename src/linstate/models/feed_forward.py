"""Feed-forward layers: ``y, state = ff(x, state)``; most have no state."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linstate.errors import ConfigError
from linstate.mixers.base import ALONE, Place, divide
from linstate.mixers.parts import plain_linear, token_shift
from linstate.types import LayerState, Range, state_dtype


class FeedForward(nn.Module, ABC):
    """Base: a feed-forward without a state. ``place`` is where in the model it stands; most do not look at it.

    The options of a feed-forward are ``d_ff`` and the keyword-only arguments of its ``__init__``.
    """

    def __init__(self, d_model: int, d_ff: int | None = None, place: Place = ALONE) -> None:
        super().__init__()
        self.d_model, self.d_ff = d_model, d_ff or self.default_width(d_model)

    @staticmethod
    def default_width(d_model: int) -> int:
        return 4 * d_model

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        """The empty state, ``batch`` rows."""
        return {}

    def ranges(self) -> dict[str, Range]:
        """As :meth:`linstate.mixers.Mixer.ranges`."""
        return {}

    def flops(self, tokens: int) -> int:
        """FLOPs (a multiply-add is two) for ``tokens`` tokens."""
        return 2 * tokens * sum(p.numel() for p in self.parameters() if p.dim() > 1)

    @abstractmethod
    def forward(
        self, x: Tensor, state: LayerState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        """``x [B, T, D] -> y [B, T, D]`` and the state after."""


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu2": _relu2,
}


def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    """The function of :data:`ACTIVATIONS`. Raises ConfigError."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


class MLP(FeedForward):
    """``W_down act(W_up x)``. ``activation``: one of :data:`ACTIVATIONS`; "relu2" is ``relu(x)^2`` (So 2021, arXiv 2109.08668)."""

    def __init__(
        self, d_model: int, d_ff: int | None = None, place: Place = ALONE, *, activation: str = "gelu"
    ) -> None:
        super().__init__(d_model, d_ff, place)
        self.activation = activation_of(activation)
        self.up = nn.Linear(d_model, self.d_ff, bias=False)
        self.down = nn.Linear(self.d_ff, d_model, bias=False)

    def forward(
        self, x: Tensor, state: LayerState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        return self.down(self.activation(self.up(x))), {}


class SwiGLU(FeedForward):
    """``W_down (act(c W_gate x) * W_up x)`` (Shazeer 2020, arXiv 2002.05202).

    ``activation``: one of :data:`ACTIVATIONS` ("gelu" makes it GeGLU); ``gate_multiplier`` is c (Falcon-H1), ``bias`` gives each
    projection one (Gemma's recurrent models).
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        place: Place = ALONE,
        *,
        activation: str = "silu",
        gate_multiplier: float = 1.0,
        bias: bool = False,
    ) -> None:
        super().__init__(d_model, d_ff, place)
        self.activation, self.gate_multiplier = activation_of(activation), gate_multiplier
        self.up = nn.Linear(d_model, 2 * self.d_ff, bias=bias)  # gate and up in one product
        self.down = nn.Linear(self.d_ff, d_model, bias=bias)

    @staticmethod
    def default_width(d_model: int) -> int:
        return -(-8 * d_model // 3 // 32) * 32

    def forward(
        self, x: Tensor, state: LayerState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        return self.project(self.up(x)), {}

    def project(self, gate_up: Tensor) -> Tensor:
        """What :meth:`forward` does behind the first projection: ``gate_up [B, T, 2 F]``."""
        gate, up = gate_up.chunk(2, dim=-1)
        if self.gate_multiplier != 1.0:
            gate = gate * self.gate_multiplier
        return self.down(self.activation(gate) * up)


class SGLU(FeedForward):
    """``W_down (W_gate x * W_up x)``, a gate without an activation (TransNormerLLM, Qin 2023, arXiv 2307.14995)."""

    def __init__(self, d_model: int, d_ff: int | None = None, place: Place = ALONE) -> None:
        super().__init__(d_model, d_ff, place)
        self.up = nn.Linear(d_model, 2 * self.d_ff, bias=False)  # gate and up in one product
        self.down = nn.Linear(self.d_ff, d_model, bias=False)

    @staticmethod
    def default_width(d_model: int) -> int:
        return SwiGLU.default_width(d_model)

    def forward(
        self, x: Tensor, state: LayerState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(gate * up), {}


class ChannelMix(FeedForward):
    """Base of RWKV's channel mixes: ``mix`` are the rates at which the token before mixes in. State: ``shift [B, 1, D]``."""

    depth_power = 1
    """How fast the initial rates change with depth."""
    rates = 1

    def __init__(self, d_model: int, d_ff: int | None = None, place: Place = ALONE) -> None:
        super().__init__(d_model, d_ff, place)
        rest = 1 - place.layer / place.layers  # 1 to almost 0 with depth
        mix = 1 - (torch.arange(d_model) / d_model) ** rest**self.depth_power
        self.mix = nn.Parameter(mix if self.rates == 1 else mix.repeat(self.rates, 1))
        self.up = nn.Linear(d_model, self.d_ff, bias=False)
        self.down = nn.Linear(self.d_ff, d_model, bias=False)

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        weight = self.up.weight
        return {
            "shift": torch.zeros(
                batch, 1, self.d_model, device=device or weight.device, dtype=state_dtype(weight)
            )
        }


class RWKVChannelMix(ChannelMix):
    """``sigmoid(W_r x_r) * W_down relu(W_up x_k)^2``, x_r and x_k each a ``lerp(x_t, x_{t-1}, mu)``: RWKV-4 to RWKV-6.

    Source: Peng 2023, arXiv 2305.13048; Peng 2024, arXiv 2404.05892. State: ``shift [B, 1, D]``.
    """

    rates = 2

    def __init__(self, d_model: int, d_ff: int | None = None, place: Place = ALONE) -> None:
        super().__init__(d_model, d_ff, place)
        self.receptance = nn.Linear(d_model, d_model, bias=False)

    @staticmethod
    def default_width(d_model: int) -> int:
        return max(32, 7 * d_model // 2 // 32 * 32)  # of RWKV-5 and RWKV-6

    def forward(
        self, x: Tensor, state: LayerState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        before, last = token_shift(x, (state or {}).get("shift"), cu_seqlens)
        k, r = (torch.lerp(x, before, mix) for mix in self.mix)
        y = self.down(F.relu(self.up(k)).square())  # [B, T, D]
        return self.receptance(r).sigmoid() * y, {"shift": last}


class RWKV4ChannelMix(RWKVChannelMix):
    """RWKV-4's is as wide as the plain feed-forward (Peng 2023, arXiv 2305.13048, section 3.1)."""

    @staticmethod
    def default_width(d_model: int) -> int:
        return FeedForward.default_width(d_model)


class RWKV7ChannelMix(ChannelMix):
    """``W_down relu(W_up lerp(x_t, x_{t-1}, mu))^2`` (RWKV-7, Peng 2025, arXiv 2503.14456). State: ``shift [B, 1, D]``."""

    depth_power = 4

    def forward(
        self, x: Tensor, state: LayerState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        before, last = token_shift(x, (state or {}).get("shift"), cu_seqlens)
        return self.down(F.relu(self.up(torch.lerp(x, before, self.mix))).square()), {"shift": last}


EXPERT_BLOCK = 32
"""Tokens that an expert is given at once."""


class Experts(FeedForward):
    """Mixture of experts: many feed-forwards, of which a router takes a few for each token, and one that all tokens share.

        y = c sum_{i in top k} p_i SwiGLU_i(x) + SwiGLU_shared(x) [* sigmoid(w x), with ``shared_gate``]
        sigmoid router:  s = sigmoid(W x)      top k of s + bias      p = s of those, divided by their sum
        softmax router:  s = softmax(W x)      top k of s             p = s of those, divided by their sum

    The bias moves the choice, not the weight: it is no weight but a buffer, by which training balances the load without a
    loss. ``groups`` G, ``top_groups`` g: only the g groups of experts count whose two best sum highest. ``scale`` is c;
    ``renormalise`` False leaves p as it is; ``shared`` is how many shared experts there are (one of their joint width, or
    of ``shared_width``).

    ``gated`` False makes every expert a plain ``W_down act(W_up x)`` with ``activation``. ``latent`` has the routed ones
    work on that many channels: ``y = W_widen sum_i p_i expert_i(W_narrow x)`` (both Nemotron-H).

    An expert is given its tokens in blocks of fixed size, filled up with zeros: so a token's result does not depend, not by
    a bit, on how many others came to the same expert.

    Source: Shazeer 2017, arXiv 1701.06538; shared expert: DeepSeekMoE, Dai 2024, arXiv 2401.06066, section 3; the sigmoid
    router: DeepSeek-V3 2024, arXiv 2412.19437, section 2.1.2; the gate of the shared expert: Qwen3-Next.

    ``d_ff`` is the width of one expert. No state.
    """

    bias: Tensor | None

    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        place: Place = ALONE,
        *,
        num_experts: int = 8,
        top_k: int = 2,
        router: str = "sigmoid",
        shared: int = 1,
        shared_width: int | None = None,
        shared_gate: bool = False,
        renormalise: bool = True,
        scale: float = 1.0,
        groups: int = 1,
        top_groups: int = 1,
        activation: str = "silu",
        gated: bool = True,
        latent: int | None = None,
    ) -> None:
        super().__init__(d_model, d_ff, place)
        self.activation, self.gated = activation_of(activation), gated
        if router not in ("sigmoid", "softmax"):
            raise ConfigError(f"router must be 'sigmoid' or 'softmax', got {router!r}")
        self.group_size = divide(num_experts, groups, "num_experts into groups")
        if not 1 <= top_groups <= groups:
            raise ConfigError(f"top_groups must be 1 to groups = {groups}, got {top_groups}")
        if not 1 <= top_k <= top_groups * self.group_size:
            raise ConfigError(
                f"top_k must be 1 to the {top_groups * self.group_size} experts of the top groups, got {top_k}"
            )
        self.num_experts, self.top_k, self.top_groups, self.groups = num_experts, top_k, top_groups, groups
        self.kind, self.renormalise, self.scale = router, renormalise, scale
        self.router = nn.Linear(d_model, num_experts, bias=False)
        self.router.keep_plain = True  # type: ignore[assignment]  # it works in float32
        self.register_buffer("bias", torch.zeros(num_experts) if router == "sigmoid" else None)
        inner = latent or d_model
        up = (2 if gated else 1) * self.d_ff  # gate and up in one product
        self.up = nn.Parameter(torch.empty(num_experts, up, inner))
        self.down = nn.Parameter(torch.empty(num_experts, inner, self.d_ff))
        nn.init.normal_(self.up, std=0.02)
        nn.init.normal_(self.down, std=0.02 / (2 * place.layers) ** 0.5)
        self.narrow = nn.Linear(d_model, latent, bias=False) if latent else nn.Identity()
        self.widen = nn.Linear(latent, d_model, bias=False) if latent else nn.Identity()
        common: type[SwiGLU | MLP] = SwiGLU if gated else MLP
        width = shared_width or shared * self.d_ff
        self.shared = common(d_model, width, place, activation=activation) if shared else None
        self.shared_gate = nn.Linear(d_model, 1, bias=False) if shared and shared_gate else None

    @staticmethod
    def default_width(d_model: int) -> int:
        return SwiGLU.default_width(d_model)

    def forward(
        self, x: Tensor, state: LayerState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        flat = x.flatten(0, 1)  # [N, D], N = B * T tokens
        y = self.widen(self._apply_experts(self.narrow(flat), *self.route(flat))).view_as(x)
        if self.shared is not None:
            common, _ = self.shared(x)
            y = y + (common if self.shared_gate is None else common * self.shared_gate(x).sigmoid())
        return y, {}

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of the top k experts of each token of ``x [N, D]`` and which they are, ``[N, k]`` both."""
        wide = state_dtype(x)
        if plain_linear(self.router):
            logits = F.linear(x.to(wide), self.router.weight.to(wide))  # [N, E]
        else:  # an adapter
            logits = self.router(x).to(wide)
        scores = logits.sigmoid() if self.kind == "sigmoid" else logits.softmax(-1)
        choice = scores if self.bias is None else scores + self.bias.to(wide)
        if self.top_groups < self.groups:
            grouped = choice.unflatten(-1, (self.groups, self.group_size))  # [N, G, E / G]
            best = grouped.topk(min(2, self.group_size)).values.sum(-1).topk(self.top_groups).indices
            out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, False)
            choice = grouped.masked_fill(out[..., None], float("-inf")).flatten(-2)
        chosen = choice.topk(self.top_k).indices
        weight = scores.gather(-1, chosen)
        if self.renormalise:
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        return weight * self.scale, chosen

    def _apply_experts(self, x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        """``x [N, D]``, or ``[N, latent]``, -> the weighted sum of what the chosen experts make of each token."""
        block = EXPERT_BLOCK if len(x) > 1 else 1
        slots = chosen.flatten()  # [N * k]: slot s is of token s // k
        y = torch.zeros_like(x, dtype=weight.dtype)
        taken = slots.argsort(stable=True).split(slots.bincount(minlength=self.num_experts).tolist())
        for expert, of_expert in enumerate(taken):
            for slot in of_expert.split(block):
                if not len(slot):
                    continue
                token = slot // self.top_k
                rows = F.pad(x[token], (0, 0, 0, block - len(slot)))  # [block, D]
                inner = F.linear(rows, self.up[expert])
                if self.gated:
                    gate, up = inner.chunk(2, dim=-1)
                    inner = self.activation(gate) * up
                else:
                    inner = self.activation(inner)
                made = F.linear(inner, self.down[expert])[: len(slot)]
                y.index_add_(0, token, made * weight.flatten()[slot, None])
        return y.to(x.dtype)

    def flops(self, tokens: int) -> int:
        expert = self.up[0].numel() + self.down[0].numel()
        dense = sum(p.numel() for p in self.parameters() if p.dim() == 2)
        return 2 * tokens * (dense + self.top_k * expert)


KINDS: dict[str, type[FeedForward]] = {
    "swiglu": SwiGLU,
    "mlp": MLP,
    "sglu": SGLU,
    "rwkv_channel_mix": RWKVChannelMix,
    "rwkv4_channel_mix": RWKV4ChannelMix,
    "rwkv7_channel_mix": RWKV7ChannelMix,
    "experts": Experts,
}


def build(
    name: str,
    d_model: int,
    d_ff: int | None,
    place: Place = ALONE,
    options: Mapping[str, Any] | None = None,
) -> FeedForward:
    """The feed-forward of this name with these options, of which ``d_ff`` goes before the argument. Raises ConfigError."""
    if name not in KINDS:
        raise ConfigError(f"there is no feed-forward {name!r}; there are: {', '.join(KINDS)}")
    given = {"d_ff": d_ff, **(options or {})}
    parameters = inspect.signature(KINDS[name]).parameters.values()
    known = ["d_ff", *(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)]
    for option in given:
        if option not in known:
            raise ConfigError(f"feed-forward {name!r} has no option {option!r}; it has: {', '.join(known)}")
    return KINDS[name](d_model, place=place, **given)
