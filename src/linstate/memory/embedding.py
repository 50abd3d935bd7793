"""Vectors for passages, from the language model's own hidden states unless somebody brings better ones.

The vector of a text is the mean of the last layer's normalised hidden states over its tokens, read from nothing, less the mean
over a fixed sample, scaled to length 1. Without the sample's mean all vectors point almost the same way (Ethayarajh 2019,
arXiv 1909.00512). The sample is fixed, and not what a library holds, so that a vector depends on its text alone: vectors need
not be made anew as the library grows, and no tenant's texts move another's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from linstate.engine import LanguageModel
from linstate.engine.tokens import encode

Embed = Callable[[Sequence[str]], NDArray[np.float32]]
"""Texts to vectors ``[n, D]``, one each; D is always the same."""

_SAMPLE = (
    "The ship left the harbour before dawn, and nobody on board knew how long the voyage would take.",
    "Water boils at 100 degrees Celsius at sea level; higher up, where the air is thinner, it boils earlier.",
    "def area(radius):\n    return 3.14159 * radius ** 2\n",
    "name: Ada\nborn: 1815\nknown for: the first program\n",
    "Dear Sir or Madam, I am writing to ask about the flat that you have advertised. Yours faithfully",
    "1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233",
    "What did she say? She said that she would come tomorrow, if it does not rain.",
    "# Installing\n\nRun the command below, then open the page in a browser.\n",
)


def hidden_states(model: LanguageModel, *, batch_tokens: int = 4096) -> Embed:
    """The default: vectors ``[n, d_model]`` from the model's hidden states."""
    sample: NDArray[np.float32] | None = None

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        nonlocal sample
        if sample is None:
            sample = _means(model, _SAMPLE, batch_tokens).mean(0)
        vectors = _means(model, texts, batch_tokens) - sample
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)

    return embed


def _means(model: LanguageModel, texts: Sequence[str], batch_tokens: int) -> NDArray[np.float32]:
    """The mean hidden state ``[n, D]`` of each text; several texts are packed into one call."""
    ids = [encode(model.tokenizer, text) or [0] for text in texts]
    found, batch = list[Tensor](), list[list[int]]()
    for n, one in enumerate(ids):
        batch.append(one)
        if n == len(ids) - 1 or sum(map(len, batch)) + len(ids[n + 1]) > batch_tokens:
            found.append(_packed(model, batch))
            batch = []
    width = model.decoder.config.d_model
    vectors: NDArray[np.float32] = torch.cat([*found, torch.zeros(0, width)]).numpy()
    return vectors


def _packed(model: LanguageModel, batch: Sequence[Sequence[int]]) -> Tensor:
    decoder = model.decoder
    device = decoder.embedding.weight.device
    lengths = torch.tensor([len(ids) for ids in batch], device=device)
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    tokens = torch.tensor([[id for ids in batch for id in ids]], device=device)  # [1, T]
    outputs: list[Tensor] = []

    def keep(module: nn.Module, arguments: object, output: tuple[Tensor, object]) -> None:
        outputs.append(output[0])

    hook = decoder.blocks()[-1].register_forward_hook(keep)
    try:
        with torch.no_grad():
            decoder(tokens, cu_seqlens=bounds, logits="none")
            hidden = decoder.norm(outputs[-1])[0].float()  # [T, D]
    finally:
        hook.remove()
    sums = hidden.new_zeros(len(batch), hidden.shape[1])
    rows = torch.repeat_interleave(torch.arange(len(batch), device=device), lengths)
    return (sums.index_add(0, rows, hidden) / lengths[:, None]).cpu()  # [n, D]
