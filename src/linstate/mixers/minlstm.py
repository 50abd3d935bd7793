"""minLSTM: an LSTM whose gates and candidate look at the token only, so that it is a scan.

    S_t = f'_t * S_{t-1} + i'_t * c_t      o_t = S_t      f' = f / (f + i)      i' = i / (f + i)
    f = sigmoid(W_f x)      i = sigmoid(W_i x)      c = positive(W_c x)
    positive(x) = x + 1/2 for x >= 0, else sigmoid(x)
    y = W_o o

The paper's letters: h_t is S_t, its candidate h~ is c, and ``positive`` is its g. The share ``f / (f + i)`` is
``sigmoid(log f - log i)``, so the log decay is ``g_t = logsigmoid(log f - log i)``, and 0/0 cannot happen. It differs from
minGRU in having two gates where that has one, ``f' = 1 - z``.

Source: Feng 2024, Were RNNs All We Needed?, arXiv 2410.01201, section 3.2 and appendix B.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from linstate.mixers._gated_scan import GatedScan
from linstate.ops.features import positive


class MinLSTM(GatedScan):
    """See the module. State: ``S [B, 1, 1, E]`` for E inner channels."""

    equation = "S_t = f / (f + i) * S_{t-1} + i / (f + i) * c, gates per channel"
    source = "Feng 2024, arXiv 2410.01201"

    def __init__(self, d_model: int, expand: int = 2) -> None:
        super().__init__(d_model, expand * d_model, parts=3)  # f, i, c

    def gates(self, *projected: Tensor, shared: dict[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        f, i, c = projected
        share = F.logsigmoid(f) - F.logsigmoid(i)
        return (-share).sigmoid() * positive(c), F.logsigmoid(share)
