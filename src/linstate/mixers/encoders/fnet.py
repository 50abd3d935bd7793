"""FNet: tokens are mixed by Fourier transforms along the text and along the channels, without a weight.

    y = Re(F_seq F_hidden x)

A row of a padded batch is transformed over its own length: padding changes nothing.

Source: Lee-Thorp, Ainslie, Eckstein, Ontanon 2021, FNet, arXiv 2105.03824, section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linstate.mixers.encoders.base import EncoderMixer
from linstate.types import state_dtype


class FNet(EncoderMixer):
    """See the module."""

    equation = "y = Re(F_seq F_hidden x)"
    source = "Lee-Thorp 2021, arXiv 2105.03824"

    def __init__(self, d_model: int, max_length: int) -> None:
        super().__init__(d_model)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        wide = x.to(state_dtype(x))
        if lengths is None:
            return torch.fft.fft2(wide).real.to(x.dtype)
        y = torch.zeros_like(wide)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()[:, 0]
            y[rows, :length] = torch.fft.fft2(wide[rows, :length]).real
        return y.to(x.dtype)
