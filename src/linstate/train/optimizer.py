"""Muon for the matrices inside the model, AdamW for the rest, as one optimiser that Trainer can checkpoint.

``torch.optim.Muon`` orthogonalises in bfloat16, which a CPU without bf16 units multiplies a hundred times slower than
float32; this one works in the parameter's own dtype. Associations that are rarely seen are learned faster than with
AdamW alone (``docs/log.md`` has the runs).

Source: Jordan 2024, https://kellerjordan.github.io/posts/muon; the common scale of both updates: Liu 2025, arXiv 2502.16982.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_MATCH_ADAMW = 0.2  # an orthogonal update scaled so has the root mean square of a typical AdamW update


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: singular values of ``matrix [M, N]`` are moved to about one."""
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-12)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class MuonAdamW(torch.optim.Optimizer):
    """Parameter groups carry ``muon``: True for matrices (Muon with Nesterov momentum), False for the rest (AdamW)."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 3e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "betas": betas,
            "weight_decay": weight_decay,
            "eps": eps,
            "muon": False,
        }
        super().__init__(list(groups), defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            rule = self._muon if group["muon"] else self._adamw
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                update = rule(weight, weight.grad, group)
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _muon(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].lerp_(grad, 1 - group["momentum"])
        direction = grad.lerp(state["momentum"], group["momentum"])
        return orthogonalise(direction) * (_MATCH_ADAMW * max(weight.shape) ** 0.5)

    def _adamw(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[weight]
        if not state:
            state |= {
                "steps": torch.zeros(()),
                "mean": torch.zeros_like(weight),
                "square": torch.zeros_like(weight),
            }
        beta1, beta2 = group["betas"]
        state["steps"] += 1
        state["mean"].lerp_(grad, 1 - beta1)
        state["square"].lerp_(grad.square(), 1 - beta2)
        steps = float(state["steps"])
        spread = (state["square"] / (1 - beta2**steps)).sqrt_().add_(group["eps"])
        return state["mean"] / (1 - beta1**steps) / spread


def build_optimizer(
    model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float
) -> MuonAdamW:
    """Muon for the weights of linear layers except the head; AdamW for embedding, head, norms, gates and convolutions."""
    head = {id(p) for name, p in model.named_parameters() if "embedding" in name or "head" in name}
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} - head
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if id(p) in linear], "muon": True, "weight_decay": weight_decay},
        {"params": [p for p in weights if id(p) not in linear], "muon": False, "weight_decay": 0.0},
    ]
    return MuonAdamW([g for g in groups if g["params"]], lr=lr, betas=betas)
