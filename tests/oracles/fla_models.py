"""FLA's models and layers where there is no GPU: their kernels are replaced, for a while, by its naive references and by torch's own functions.

What stands between the kernels, FLA's layers and blocks, runs as it is.
"""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracles.fla_layers import fla_module, token_shift
from oracles.oracle import fla_naive


def model(name: str, **settings: Any) -> nn.Module:
    """A new model of FLA's family ``name`` with this configuration."""
    module = fla_module(f"models.{name}.modeling_{name}")
    config = next(
        v
        for n, v in vars(module).items()
        if n.endswith("Config") and v.__module__.startswith("fla.models.") and v.model_type == name
    )
    kind = next(
        v for n, v in vars(module).items() if n.endswith("ForCausalLM") and v.__module__ == module.__name__
    )
    with warnings.catch_warnings():  # RWKV's say to check against the authors' own
        warnings.simplefilter("ignore")
        made = kind(config(**settings)).eval()
    for part in made.modules():  # activations of theirs are kernels, or compiled
        for attribute, activation in (("act_fn", SquaredReLU), ("gate_fn", nn.SiLU), ("act", nn.SiLU)):
            if hasattr(part, attribute):
                setattr(part, attribute, activation())
    return made


class SquaredReLU(nn.Module):
    """``relu(x)^2``."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


def plain(name: str, patch: pytest.MonkeyPatch) -> None:
    """Bring what the family ``name`` calls to a CPU."""
    for module, kinds in (
        ("modules.norm.layernorm", {"LayerNorm": layer_norm, "RMSNorm": rms_norm, "GroupNorm": group_norm}),
        ("modules.norm.fused_norm_gate", {"FusedRMSNormGated": gated_norm}),
        ("modules.norm.layernorm_gated", {"RMSNormGated": mamba_norm}),
        ("modules.causal_conv1d.ops", {"ShortConvolution": short_convolution}),
        ("modules.rotary.ops", {"RotaryEmbedding": rotary}),
        ("modules.mlp", {"GatedMLP": gated_mlp}),
    ):
        for kind, forward in kinds.items():
            patch.setattr(getattr(fla_module(module), kind), "forward", forward)
    layer = fla_module(f"layers.{LAYERS.get(name, name)}")
    for kernel, function in KERNELS.items():
        if hasattr(layer, kernel):
            patch.setattr(layer, kernel, function)
    modeling = fla_module(f"models.{name}.modeling_{name}")
    if hasattr(modeling, "token_shift"):
        patch.setattr(modeling, "token_shift", token_shift)
    if name == "rwkv7":
        rwkv7(layer, patch)


LAYERS = {"retnet": "multiscale_retention"}


def added(x: Tensor, residual: Tensor | None, prenorm: bool, norm: Any) -> Any:
    x = x if residual is None else x + residual
    return (norm(x), x) if prenorm else norm(x)


def layer_norm(self: Any, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, **_: Any) -> Any:
    return added(
        x, residual, prenorm, lambda x: F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
    )


def rms_norm(self: Any, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, **_: Any) -> Any:
    return added(x, residual, prenorm, lambda x: F.rms_norm(x, x.shape[-1:], self.weight, self.eps))


def group_norm(self: Any, x: Tensor, **_: Any) -> Tensor:
    return F.group_norm(x.flatten(0, -2), self.num_groups, self.weight, self.bias, self.eps).view_as(x)


def gated_norm(self: Any, x: Tensor, g: Tensor) -> Tensor:
    gate = torch.sigmoid if self.activation == "sigmoid" else F.silu
    return F.rms_norm(x, x.shape[-1:], self.weight, self.eps) * gate(g)


def mamba_norm(self: Any, x: Tensor, z: Tensor) -> Tensor:
    reference = fla_module("modules.norm.layernorm_gated").rms_norm_ref
    rest = {"eps": self.eps, "group_size": self.group_size, "norm_before_gate": self.norm_before_gate}
    return reference(x, self.weight, self.bias, z=z, **rest)


def short_convolution(self: Any, x: Tensor, **_: Any) -> tuple[Tensor, None]:
    return causal_conv1d(x, self.weight.squeeze(1), self.bias, self.activation)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, **_: Any
) -> tuple[Tensor, None]:
    padded = F.pad(x.transpose(1, 2), (weight.shape[-1] - 1, 0))
    y = F.conv1d(padded, weight[:, None], bias, groups=len(weight)).transpose(1, 2)
    return (y if activation is None else F.silu(y)), None


def rotary(self: Any, q: Tensor, k: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    self._update_cos_sin_cache(q.shape[1], device=q.device, dtype=q.dtype)
    turn = fla_module("modules.rotary.ops").rotary_embedding_ref
    cos, sin = self._cos_cached[: q.shape[1]], self._sin_cached[: q.shape[1]]
    return turn(q, cos, sin, self.interleaved), turn(k, cos, sin, self.interleaved)


def gated_mlp(self: Any, x: Tensor, **_: Any) -> Tensor:
    return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def gla(
    q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None = None, **rest: Any
) -> tuple[Tensor, Tensor]:
    g = rest["gk"] if "gk" in rest else rest["g"]
    naive = fla_naive("gla/naive").naive_recurrent_gla
    found: tuple[Tensor, Tensor] = naive(q, k, v, g, initial_state=initial_state, output_final_state=True)
    return found


def retention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, None]:
    o = fla_naive("retention/naive").naive_retention(*(t.transpose(1, 2) for t in (q, k, v)))
    return o.transpose(1, 2), None


def unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, **rest: Any) -> tuple[Tensor, None]:
    assert rest["use_qk_l2norm_in_kernel"]
    first = (t.transpose(1, 2) for t in (unit(q), unit(k), v, beta))
    o, _ = fla_naive("delta_rule/naive").delta_rule_recurrence(*first)
    return o.transpose(1, 2), None


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **rest: Any
) -> tuple[Tensor, None]:
    g = -rest["A_log"].exp() * F.softplus(g + rest["dt_bias"])
    beta = beta.sigmoid() * (2 if rest["allow_neg_eigval"] else 1)
    q, k = (unit(t).repeat_interleave(v.shape[2] // t.shape[2], dim=2) for t in (q, k))
    o, _ = fla_naive("gated_delta_rule/naive").naive_recurrent_gated_delta_rule(q, k, v, beta, g)
    return o, None


def kda(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **rest: Any) -> tuple[Tensor, None]:
    bias = rest["dt_bias"].view(g.shape[2:])
    g = -rest["A_log"].exp()[:, None] * F.softplus(g + bias)
    beta = beta.sigmoid() * (2 if rest["allow_neg_eigval"] else 1)
    return fla_naive("kda/naive").naive_recurrent_kda(unit(q), unit(k), v, g, beta)[0], None


def rwkv6(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, initial_state: Tensor | None = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """Their naive recurrence is head-first, and multiplies by K^-1/2 unless told."""
    first = (t.transpose(1, 2) for t in (r, k, v, w))
    naive = fla_naive("rwkv6/recurrent_naive").naive_recurrent_rwkv6
    o, state = naive(*first, u, scale=1.0, initial_state=initial_state, output_final_state=True)
    return o.transpose(1, 2), state


def rwkv7(layer: ModuleType, patch: pytest.MonkeyPatch) -> None:
    from fla.ops.rwkv7 import fused_addcmul, fused_k_update, gate_output_correction

    def recurrence(r: Tensor, initial_state: Tensor | None = None, **rest: Any) -> tuple[Tensor, Tensor]:
        r, w, k, v, a, b = (t.transpose(1, 2) for t in (r, *(rest[name] for name in "wkvab")))
        naive = fla_naive("generalized_delta_rule/dplr/naive").dplr_recurrence
        o, state = naive(r * r.shape[-1] ** 0.5, k, v, a, b, w, initial_state=initial_state)
        return o.transpose(1, 2), state

    patch.setattr(layer, "fused_addcmul_rwkv7", fused_addcmul.torch_addcmul_rwkv7)
    patch.setattr(layer, "fused_k_rwkv7", fused_k_update.k_update_ref)
    patch.setattr(layer, "gate_output_correction", gate_output_correction.gate_output_correction_ref)
    patch.setattr(layer, "l2_norm", unit)
    patch.setattr(layer, "chunk_rwkv7", recurrence)
    patch.setattr(
        layer, "fused_mul_recurrent_rwkv7", lambda kk, a, **rest: recurrence(a=-kk, b=kk * a, **rest)
    )


def norm_and_project(x: Tensor, weight: Tensor, bias: None, linear: Tensor, linear_bias: None) -> Tensor:
    """``rms_norm_linear`` with the eps that it has unless told."""
    return F.linear(F.rms_norm(x, x.shape[-1:], weight, 1e-5), linear)


KERNELS = {
    "token_shift": token_shift,
    "swish": F.silu,
    "rms_norm_linear": norm_and_project,
    "causal_conv1d": causal_conv1d,
    **dict.fromkeys(("chunk_gla", "fused_recurrent_gla"), gla),
    **dict.fromkeys(("chunk_retention", "fused_recurrent_retention"), retention),
    **dict.fromkeys(("chunk_delta_rule", "fused_recurrent_delta_rule"), delta_rule),
    **dict.fromkeys(("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"), gated_delta_rule),
    **dict.fromkeys(("chunk_kda", "fused_recurrent_kda"), kda),
    **dict.fromkeys(("chunk_rwkv6", "fused_recurrent_rwkv6"), rwkv6),
}
"""What their layers call, by its name there."""
