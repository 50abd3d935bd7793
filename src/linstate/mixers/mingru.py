"""minGRU: a GRU whose gate and candidate look at the token only, so that it is a scan.

    S_t = (1 - z_t) * S_{t-1} + z_t * c_t      o_t = S_t      z = sigmoid(W_z x)      c = positive(W_c x)
    positive(x) = x + 1/2 for x >= 0, else sigmoid(x)
    y = W_o o

The paper's letters: h_t is S_t, its candidate h~ is c, and ``positive`` is its g, by which the candidates stay
positive. The paper scans their logarithms; here only decays are logarithms, ``g_t = log(1 - z_t) = logsigmoid(-W_z x)``,
so nothing is lost either way, and the parallel form is the recurrent one.

Source: Feng 2024, Were RNNs All We Needed?, arXiv 2410.01201, section 3.1 and appendix B.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from linstate.mixers._gated_scan import GatedScan
from linstate.ops.features import positive


class MinGRU(GatedScan):
    """See the module. State: ``S [B, 1, 1, E]`` for E inner channels."""

    equation = "S_t = (1 - z) * S_{t-1} + z * c, z per channel"
    source = "Feng 2024, arXiv 2410.01201"

    def __init__(self, d_model: int, expand: int = 2) -> None:
        super().__init__(d_model, expand * d_model, parts=2)  # z, c

    def gates(self, *projected: Tensor, shared: dict[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        z, c = projected
        return z.sigmoid() * positive(c), F.logsigmoid(-z)
