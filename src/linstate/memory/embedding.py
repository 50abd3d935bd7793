"""Vectors for passages, from the language model's own hidden states unless somebody brings better ones.

The vector of a text is the weighted mean of a layer's hidden states over its tokens, read from nothing, less that of a fixed
sample, scaled to length 1. A token's weight is ``a / (a + p)``, p the probability that the model gives it on average (Arora
et al. 2017, smooth inverse frequency): else the words that are everywhere decide. Without the sample's mean all vectors point
almost the same way (Ethayarajh 2019, arXiv 1909.00512). Sample and weights are the model's, not the library's, so a vector depends
on its text alone: vectors need not be made anew as the library grows, and no tenant's texts move another's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from linstate.engine import LanguageModel
from linstate.engine.tokens import encode
from linstate.models import Decoder

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


_A = 1e-3


def hidden_states(model: LanguageModel, *, layer: int = 0, batch_tokens: int = 4096) -> Embed:
    """The default: vectors ``[n, d_model]`` from the model's hidden states before ``layer``.

    Before the first layer by default: of the pocket model's, these find best (``linstate bench find``).
    """
    ready: tuple[Tensor, Tensor] | None = None

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        nonlocal ready
        if ready is None:
            weights = _A / (_A + _average_prediction(model))
            ready = weights, _means(model, _SAMPLE, weights, layer, batch_tokens).mean(0)
        weights, sample = ready
        vectors = _means(model, texts, weights, layer, batch_tokens) - sample
        scaled: NDArray[np.float32] = nn.functional.normalize(vectors, dim=1).cpu().numpy()
        return scaled

    return embed


def _average_prediction(model: LanguageModel) -> Tensor:
    """What the model expects next, on average over the sample: a probability for each token ``[vocab]``."""
    device = model.decoder.embedding.weight.device
    tokens = [torch.tensor([encode(model.tokenizer, text)], device=device) for text in _SAMPLE]
    with torch.no_grad():
        return torch.cat([model.decoder(one)[0][0].float().softmax(-1) for one in tokens]).mean(0)


def _means(
    model: LanguageModel, texts: Sequence[str], weights: Tensor, layer: int, batch_tokens: int
) -> Tensor:
    """The weighted mean hidden state ``[n, D]`` of each text; several texts are packed into one call."""
    ids = [encode(model.tokenizer, text) or [0] for text in texts]
    found, batch = list[Tensor](), list[list[int]]()
    for n, one in enumerate(ids):
        batch.append(one)
        if n == len(ids) - 1 or sum(map(len, batch)) + len(ids[n + 1]) > batch_tokens:
            found.append(_packed(model, batch, weights, layer))
            batch = []
    return torch.cat([*found, weights.new_zeros(0, model.decoder.config.d_model)])


def _packed(model: LanguageModel, batch: Sequence[Sequence[int]], weights: Tensor, layer: int) -> Tensor:
    decoder = model.decoder
    lengths = torch.tensor([len(ids) for ids in batch], device=weights.device)
    tokens = torch.tensor([[id for ids in batch for id in ids]], device=weights.device)  # [1, T]
    with torch.no_grad():
        hidden = _before(decoder, layer, tokens, lengths).float()  # [T, D]
    each = weights[tokens[0]]  # [T]
    rows = torch.repeat_interleave(torch.arange(len(batch), device=weights.device), lengths)
    sums = hidden.new_zeros(len(batch), hidden.shape[1]).index_add(0, rows, hidden * each[:, None])
    return sums / each.new_zeros(len(batch)).index_add(0, rows, each)[:, None]  # [n, D]


def _before(decoder: Decoder, layer: int, tokens: Tensor, lengths: Tensor) -> Tensor:
    """The hidden states ``[T, D]`` before a layer of packed texts; before the first one nothing needs to be run."""
    if layer == 0:
        embedded: Tensor = decoder.embedding_norm(decoder.embedding(tokens))
        return embedded[0]
    outputs: list[Tensor] = []

    def keep(module: nn.Module, arguments: object, output: tuple[Tensor, object]) -> None:
        outputs.append(output[0])

    hook = decoder.blocks()[layer - 1].register_forward_hook(keep)
    try:
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        decoder(tokens, cu_seqlens=bounds, logits="none")
    finally:
        hook.remove()
    return outputs[-1][0]
