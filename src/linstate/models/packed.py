"""A model made ready for one machine's CPU: linear layers with packed weights (bf16, int8 or int4), norms in one call each.

What stands between the recurrences is put on ``ops/native/linear.py`` and ``ops/native/norm.py``, whatever the mixers are:
a layer is replaced by its type. States and activations stay what they were; inside a product x is bf16.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linstate.errors import ArgumentError, BackendError
from linstate.mixers.parts import GatedRMSNorm, HeadNorm, LowRank, RMSNorm
from linstate.models.decoder import Decoder
from linstate.models.feed_forward import RWKV7ChannelMix, SwiGLU
from linstate.models.fingerprint import Parts
from linstate.models.static_step import StaticStep
from linstate.ops import native
from linstate.ops.native import linear as native_linear
from linstate.ops.native import norm as native_norm
from linstate.ops.native import rwkv as native_rwkv
from linstate.ops.native.linear import FORMATS, Format, Packed
from linstate.types import LayerState


class _Packed(nn.Module):
    """What layers with a packed weight have in common.

    ``weight`` keeps shape, dtype and device for those who ask, and is NaN, in no memory: whoever needs the numbers reads
    :meth:`unpacked`. ``state_dict`` has the weight that the packed one stands for.
    """

    packed: Packed

    def unpacked(self) -> Tensor:
        """The weight bf16 ``[N, K]`` that this layer computes with."""
        return native_linear.unpack(self.packed)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weights={self.packed.format}"

    def _save_to_state_dict(
        self, destination: MutableMapping[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[prefix + "weight"] = self.unpacked()
        bias = getattr(self, "bias", None)
        if bias is not None:
            destination[prefix + "bias"] = bias if keep_vars else bias.detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise ArgumentError("a packed model loads no weights: load them into a model first, then pack that")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        dtype = self.get_parameter("weight").dtype
        moved = fn(torch.empty(0, dtype=dtype))
        if not moved.is_cpu or moved.dtype is not dtype:
            raise ArgumentError(
                f"packed weights stay on the CPU in their format, they cannot go to {moved.dtype} on {moved.device};"
                " move a model first, then pack it"
            )
        return self


class PackedLinear(_Packed, nn.Linear):
    """A linear layer whose weight is packed. No gradients.

    A mixer that multiplies with a layer's weight by itself sets ``keep_plain`` on the layer, and it stays as it is.
    """

    def __init__(self, linear: nn.Linear, format: Format) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.unpacked() if isinstance(linear, PackedLinear) else linear.weight
        self.packed = native_linear.pack(weight, format)
        nothing = torch.full((1, 1), float("nan"), dtype=linear.weight.dtype).expand(linear.weight.shape)
        self.weight = nn.Parameter(nothing, requires_grad=False)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        return native_linear.linear(input, self.packed, self.bias)


class PackedEmbedding(_Packed, nn.Embedding):
    """An embedding that reads its rows from the packed weight of the head that it is tied to: one weight, packed once."""

    def __init__(self, embedding: nn.Embedding, head: PackedLinear) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = None, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.packed, self.weight = head.packed, head.weight

    def forward(self, input: Tensor) -> Tensor:
        return native_linear.rows(self.packed, input).to(self.weight.dtype)


class PackedRMSNorm(RMSNorm):
    """An :class:`RMSNorm` in one native call."""

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if not native_norm.serves(x, self.weight) or dtype not in (None, x.dtype, torch.bfloat16):
            return super().forward(x, dtype)
        plus = float(self.centred)
        return native_norm.norm(x, self.groups, self.weight, eps=self.eps, weight_plus=plus, dtype=dtype)


class PackedGatedRMSNorm(GatedRMSNorm):
    """A :class:`GatedRMSNorm` in one native call with its gate."""

    def forward(self, o: Tensor, z: Tensor) -> Tensor:  # type: ignore[override]
        if o.dim() < 2 or self.groups > 1 or not native_norm.serves(o, z, self.weight):
            return super().forward(o, z)
        y = native_norm.norm(
            o.flatten(-2),  # [..., H * V]
            o.shape[-2],
            self.weight,
            eps=self.eps,
            weight_plus=float(self.centred),
            gate="silu" if self.gate is F.silu else "sigmoid",
            z=z.flatten(-2),
        )
        return y.view(o.shape)


class PackedHeadNorm(HeadNorm):
    """A :class:`HeadNorm` in one native call."""

    def forward(self, o: Tensor) -> Tensor:
        if not native_norm.serves(o, self.weight, self.bias):
            return super().forward(o)
        return native_norm.norm(o.flatten(-2), o.shape[-2], self.weight, self.bias, eps=self.eps, centre=True)


class PackedLayerNorm(nn.LayerNorm):
    """A layer norm over the last axis in one native call."""

    def forward(self, input: Tensor) -> Tensor:
        if len(self.normalized_shape) > 1 or not native_norm.serves(input, self.weight, self.bias):
            return super().forward(input)
        return native_norm.norm(input, 1, self.weight, self.bias, eps=self.eps, centre=True)


class PackedLowRank(LowRank):
    """A :class:`LowRank` whose activation is one native call."""

    def activated(self, inner: Tensor) -> Tensor:
        kind = {torch.tanh: "tanh", torch.sigmoid: "sigmoid"}.get(self.activation)  # type: ignore[arg-type]
        if kind is None or inner.dtype is not torch.bfloat16 or not native_norm.serves(inner):
            return super().activated(inner)
        return native_norm.activate(inner, kind)


class PackedRWKV7ChannelMix(RWKV7ChannelMix):
    """An :class:`RWKV7ChannelMix` whose shift and activation are a native call each."""

    def forward(
        self, x: Tensor, state: LayerState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        plain = x.shape[1] > 0 and cu_seqlens is None and x.dtype is torch.bfloat16
        before = (state or {}).get("shift")
        if not plain or not native_norm.serves(x, before, self.mix):
            return super().forward(x, state, cu_seqlens=cu_seqlens)
        (mixed,), last = native_rwkv.shift(x, before, self.mix[None])
        return self.down(native_norm.activate(self.up(mixed), "relu_squared")), {"shift": last}


class PackedSwiGLU(SwiGLU):
    """A :class:`SwiGLU` whose gate is one native call."""

    def project(self, gate_up: Tensor) -> Tensor:
        plain = self.activation is F.silu and self.gate_multiplier == 1.0
        if not plain or gate_up.dtype is not torch.bfloat16 or not native_norm.serves(gate_up):
            return super().project(gate_up)
        return self.down(native_norm.gated(gate_up))


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    RMSNorm: PackedRMSNorm,
    GatedRMSNorm: PackedGatedRMSNorm,
    HeadNorm: PackedHeadNorm,
    nn.LayerNorm: PackedLayerNorm,
    SwiGLU: PackedSwiGLU,
    LowRank: PackedLowRank,
    RWKV7ChannelMix: PackedRWKV7ChannelMix,
}
"""What else :func:`pack` replaces: the same module, parameters and all, with another forward."""


def weights_of(model: nn.Module) -> dict[str, Tensor | Parts]:
    """``model.state_dict()``, but what is packed is not unpacked: bf16 comes in parts, codes as their words and scales.

    So a fingerprint needs no second copy of a model, and a bf16 model has the same one packed or not.
    """
    found: dict[str, Tensor | Parts] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        passing = module._non_persistent_buffers_set
        own = {**module._parameters, **{n: t for n, t in module._buffers.items() if n not in passing}}
        found |= {prefix + n: t.detach() for n, t in own.items() if t is not None}
        if not isinstance(module, _Packed):
            continue
        packed = module.packed
        if packed.scales is None:
            parts = partial(native_linear.unpacked_parts, packed)
            found[f"{prefix}weight"] = Parts(torch.bfloat16, module.get_parameter("weight").shape, parts)
        else:
            found[f"{prefix}weight"] = packed.words
            found[f"{prefix}weight.scales"] = packed.scales
    return found


def packable(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers that :func:`pack` replaces: what holds each, its name there, and it."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if (
                isinstance(child, nn.Linear)
                and type(child) in (nn.Linear, PackedLinear)
                and not getattr(child, "keep_plain", False)
            ):
                yield module, name, child


def pack(model: nn.Module, format: Format = "bf16") -> int:
    """Make ``model`` ready for this machine, in place: pack the weights of its linear layers and replace its norms; layer by layer, so that no second copy of all is in memory.

    An embedding stays as it is (a token reads one row of it), unless it is tied to the head: then it reads its rows from
    that. Experts stay as they are. A model that is packed already is packed anew, from the weights that it has then.

    Returns:
        The bytes of packed weights, all of which a decoded token reads.

    Raises:
        ArgumentError: the format is unknown, or the model is not float32 or bf16 on the CPU.
        BackendError: the native extension is not there.
    """
    if format not in FORMATS:
        raise ArgumentError(f"pack: format must be one of {', '.join(FORMATS)}, got {format!r}")
    if native.reason:
        raise BackendError(f"packed weights need the native kernels: {native.reason}")
    found = list(packable(model))
    for _, name, linear in found:
        if not linear.weight.is_cpu or linear.weight.dtype not in (torch.float32, torch.bfloat16):
            raise ArgumentError(
                f"pack: {name} must be float32 or bfloat16 on the CPU, got {linear.weight.dtype} on {linear.weight.device}"
            )
    embeddings = {
        id(child.weight): (module, name, child)
        for module in list(model.modules())
        for name, child in module.named_children()
        if isinstance(child, nn.Embedding)
    }
    total = 0
    while found:
        module, name, linear = found.pop()  # whose weight is let go before the next one is packed
        packed = PackedLinear(linear, format)
        setattr(module, name, packed.train(linear.training))
        if id(linear.weight) in embeddings:
            holder, its_name, embedding = embeddings[id(linear.weight)]
            setattr(holder, its_name, PackedEmbedding(embedding, packed).train(embedding.training))
        total += packed.packed.nbytes
    for module in model.modules():
        if type(module) in FUSED:
            module.__class__ = FUSED[type(module)]
        if isinstance(module, Decoder):
            module.step = StaticStep()
    return total
