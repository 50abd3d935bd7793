"""HGRN: a gated average per channel, whose forget gates have a lower bound that rises with depth.

    S_t = f_t * S_{t-1} + (1 - f_t) * c_t      o_t = S_t      c = silu(W_c x)
    f_t = gamma + (1 - gamma) sigmoid(W_f x)      gamma of layer l: sum_{1 <= j <= l} softmax(Gamma)_j, layers from 0
    y = W_o (rms_norm(o) * silu(W_z x))

The paper's letters: h_t is S_t, its lambda_t is f_t, its Gamma has a row for each layer of the model, so that the first
layer's bound is 0. The paper also lets S turn by a fixed angle theta per channel; as in the authors' later code the
state is real here (theta = 0). The model's first HGRN layer holds Gamma, and hands the bounds to the others.

Source: Qin 2023, Hierarchically Gated Recurrent Neural Network, arXiv 2311.04823, section 3.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from linstate.mixers._gated_scan import GatedScan
from linstate.mixers.base import ALONE, Place
from linstate.mixers.parts import GatedRMSNorm, GateFloor


class HGRN(GatedScan):
    """See the module. State: ``S [B, 1, 1, E]`` for E inner channels.

    ``shared["hgrn_floor"]`` hands Gamma from the first HGRN layer on.
    """

    equation = "S_t = f * S_{t-1} + (1 - f) * c, f above a bound that rises with depth"
    source = "Qin 2023, arXiv 2311.04823"

    def __init__(
        self, d_model: int, expand: int = 1, norm_eps: float = 1e-5, *, place: Place = ALONE
    ) -> None:
        super().__init__(d_model, expand * d_model, parts=3)  # c, f, z
        self.floor = GateFloor(self.inner, place, "hgrn_floor")
        self.norm = GatedRMSNorm(self.inner, norm_eps)

    def gates(self, *projected: Tensor, shared: dict[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        c, f, _ = projected
        g, written = self.floor(f, shared)  # log f, 1 - f
        return written * F.silu(c), g

    def finish(self, o: Tensor, *projected: Tensor) -> Tensor:
        return self.norm(o, projected[2])
