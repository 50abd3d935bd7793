"""RecurrentGemma mended: its state lives in the cache it is given, pieces join in the convolution, padding is not read.

Made from their methods as in :mod:`linstate.patch.methods`. Source: transformers 5.23, ``modeling_recurrent_gemma.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linstate.ops import causal_conv1d, selective_scan
from linstate.patch.functions import EMPTY, padding
from linstate.types import state_dtype

Method = Callable[..., Any]


def griffin_model(original: Method) -> Method:
    """``RecurrentGemmaModel.forward``: tells its blocks which layer they are and which tokens are padding.

    Where no positions are given they count the tokens that are none, so that a padded row begins at 0 as others do.
    """

    @functools.wraps(original)
    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        given = input_ids if input_ids is not None else inputs_embeds
        mask = padding(attention_mask, given)
        padded = isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 and not attention_mask.all()
        if padded and position_ids is None and given is not None:
            count = attention_mask.long().cumsum(-1)[:, -given.shape[1] :] - 1
            position_ids = count.clamp(min=0)
        for index, layer in enumerate(self.layers):
            layer.temporal_block.layer_idx = index
        if mask is not None:
            kwargs["padding_mask"] = mask  # layers hand on what they do not know
        return original(
            self,
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            past_key_values=past_key_values,
            **kwargs,
        )

    return forward


def griffin_block(original: Method) -> Method:
    """``RecurrentGemmaRecurrentBlock.forward``: its state lives in the cache it is given, and pieces join in the convolution."""

    @functools.wraps(original)
    def forward(
        self: Any,
        input_states: Tensor,
        position_ids: Tensor,
        attention_mask: Any = None,
        use_cache: bool = True,
        past_key_values: Any = None,
        padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        y = self.act_fn(self.linear_y(input_states))
        x = self.linear_x(input_states)  # [B, T, D]
        if padding_mask is not None:
            x = x * padding_mask[..., None].to(x.dtype)
        layer, tail, before = None, None, None
        if use_cache and past_key_values is not None:
            layer = recurrent_layer(past_key_values, self.layer_idx)
            if layer.has_previous_state[0]:
                tail, before = layer.conv_states[0], layer.recurrent_states[0]
        self.rg_lru.recurrent_states = before
        wide = state_dtype(x)
        x, after = causal_conv1d(
            x,
            self.conv_1d.weight[:, 0],
            self.conv_1d.bias,
            initial_state=None if tail is None else tail.transpose(1, 2).to(wide),
        )
        if padding_mask is not None:
            x = x * padding_mask[..., None].to(x.dtype)
        x = self.rg_lru(x, position_ids)
        if layer is not None:
            layer.has_previous_state[0] = (
                False  # what is kept is the tail alone, not what was before and the tail
            )
            layer.update_conv_state(after.transpose(1, 2))
            layer.update_recurrent_state(self.rg_lru.recurrent_states)
        self.rg_lru.recurrent_states = None
        return self.linear_out(x * y), None

    return forward


def recurrent_layer(cache: Any, index: int) -> Any:
    """The place of a recurrent layer in a cache; made where the cache was built without the model's configuration."""
    from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer

    while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    if not isinstance(cache.layers[index], LinearAttentionCacheLayerMixin):
        cache.layers[index] = LinearAttentionLayer()
    return cache.layers[index]


def rg_lru_scan(original: Method) -> Method:
    """``RecurrentGemmaRglru._rnn_scan`` on our selective scan."""

    @functools.wraps(original)
    def _rnn_scan(
        self: Any,
        hidden_states: Tensor,
        recurrent_gate: Tensor,
        reset: Tensor,
        recurrent_states: Tensor | None,
        acc_dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        wide = state_dtype(hidden_states)
        log = recurrent_gate.to(wide).clamp(min=torch.finfo(wide).tiny).log()
        o, after = selective_scan(
            None,
            None,
            hidden_states[:, :, None],  # [B, T, 1, D]
            log.masked_fill(reset, EMPTY)[:, :, None],
            initial_state=None if recurrent_states is None else recurrent_states[:, None, None].to(wide),
        )
        return o[:, :, 0], after[:, 0, 0]

    return _rnn_scan
