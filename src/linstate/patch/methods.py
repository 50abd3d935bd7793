"""Methods of Hugging Face's modules that lose their state, ignore padding, or hold the recurrence inline; and what mends them.

A *wrap* lets the original run and hands it, or its functions, what it forgot. A *replacement* stands where the original
does the wrong thing inside. Each is made from the original and keeps its arguments.

Source: transformers 5.23, ``models/*/modeling_*.py``; ``docs/transformers.md`` has what each was off by.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linstate.errors import ArgumentError
from linstate.mixers._exponential import ExponentialMixer
from linstate.ops import linear_attention
from linstate.patch.functions import EMPTY, Carried, boundaries, carried, carry, padding
from linstate.patch.recurrent_gemma import griffin_block, griffin_model, rg_lru_scan
from linstate.types import state_dtype

Method = Callable[..., Any]


def begins_from_cache(original: Method) -> Method:
    """A Mamba mixer whose scan begins from the cache's state, and which keeps packed sequences apart in the scan too."""

    @functools.wraps(original)
    def forward(
        self: Any,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if attention_mask is not None:  # of all tokens so far, where the model does not cut it
            attention_mask = attention_mask[:, -hidden_states.shape[1] :]
        states: list[Tensor] = []
        if cache_params is not None:
            state = cache_params.get_recurrent_state(self.layer_idx)
            if state is not None:  # [B, D, N], or [B, heads, D, N] where each head has a scan of its own
                state = state.clone() if torch.is_grad_enabled() else state
                states = list(state.unbind(1)) if state.dim() == 4 else [state]
        bounds = boundaries(kwargs.get("seq_idx"), kwargs.get("cu_seq_lens_q"), hidden_states.shape[0])
        with carry(Carried(states=iter(states), bounds=bounds)):
            return original(self, hidden_states, cache_params, attention_mask, **kwargs)

    return forward


def bounds_step_size(original: Method) -> Method:
    """A Mamba-2 mixer that bounds its step size in decoding as it does in prefill."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        limit = getattr(self, "time_step_limit", None)
        with carry(Carried(dt_limit=None if limit is None else tuple(limit))):
            return original(self, *args, **kwargs)

    return forward


def goes_on_at_position(original: Method) -> Method:
    """A model that counts positions on from the cache where none are given."""

    @functools.wraps(original)
    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        given = input_ids if input_ids is not None else inputs_embeds
        if position_ids is None and past_key_values is not None and given is not None:
            seen = past_key_values.get_seq_length()
            position_ids = torch.arange(seen, seen + given.shape[1], device=given.device)[None]
        return original(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    return forward


# ------------------------------------------------------------------------------------------------------- MiniMax


def lightning_attention(original: Method) -> Method:
    """``MiniMaxLightningAttention.forward`` on our linear attention, its state in float32."""

    @functools.wraps(original)
    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        qkv = self.act_fn(self.qkv_proj(hidden_states))
        if attention_mask is not None:
            qkv = (qkv * attention_mask[:, :, None]).to(qkv.dtype)
        qkv = qkv.unflatten(-1, (self.num_attention_heads, 3 * self.head_dim))
        q, k, v = qkv.split(self.head_dim, dim=-1)  # [B, T, H, D] each
        before = None if past_key_values is None else past_key_values.get_linear_cache(self.layer_idx)
        bounds = boundaries(kwargs.get("seq_idx"), kwargs.get("cu_seq_lens_q"), q.shape[0])
        o, state = linear_attention(
            q,
            k,
            v,
            -self.slope_rate.flatten().to(state_dtype(v)),
            scale=1.0,
            initial_state=before.to(state_dtype(v)) if isinstance(before, Tensor) else None,
            cu_seqlens=bounds,
        )
        o = torch.sigmoid(self.output_gate(hidden_states)) * self.norm(o.flatten(2))
        if past_key_values is not None:
            past_key_values.set_linear_cache(self.layer_idx, state)
        return self.out_proj(o), state

    return forward


def cache_length(original: Method) -> Method:
    """``MiniMaxCache.get_seq_length``: of a layer that has keys, not of a linear layer's empty place."""

    @functools.wraps(original)
    def get_seq_length(self: Any, layer_idx: int = 0) -> int:
        return original(self, _with_keys(self, layer_idx))

    return get_seq_length


def cache_mask_sizes(original: Method) -> Method:
    """``MiniMaxCache.get_mask_sizes``: the same."""

    @functools.wraps(original)
    def get_mask_sizes(self: Any, query_length: int, layer_idx: int) -> tuple[int, int]:
        return original(self, query_length, _with_keys(self, layer_idx))

    return get_mask_sizes


def _with_keys(cache: Any, index: int) -> int:
    if index < len(cache.layers) and cache.layers[index].get_seq_length():
        return index
    return next((i for i, layer in enumerate(cache.layers) if layer.get_seq_length()), index)


def linear_cache(original: Method) -> Method:
    """``MiniMaxCache.get_linear_cache``: None for a layer that has not been read, whatever other layers have."""

    @functools.wraps(original)
    def get_linear_cache(self: Any, layer_idx: int) -> Tensor | None:
        found = self.linear_cache[layer_idx] if layer_idx < len(self.linear_cache) else None
        return found if isinstance(found, Tensor) else None

    return get_linear_cache


def cache_reorder(original: Method) -> Method:
    """``MiniMaxCache.reorder_cache``, for beam search: the linear layers' states too."""

    @functools.wraps(original)
    def reorder_cache(self: Any, beam_idx: Tensor) -> None:
        original(self, beam_idx)
        self.linear_cache = [
            state.index_select(0, beam_idx.to(state.device)) if isinstance(state, Tensor) else state
            for state in self.linear_cache
        ]

    return reorder_cache


# -------------------------------------------------------------------------------------------------------- RWKV-4


def sees_the_mask(original: Method) -> Method:
    """A model that takes an ``attention_mask`` and ignores it (RWKV, xLSTM): it reaches the layers beside the arguments.

    Raises ArgumentError for padding on the left in training with gradient checkpointing.
    """

    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        mask = padding(given.get("attention_mask"), tokens)
        if mask is None:
            mask = carried().mask  # of the model around this one, which may not pass it on
        if mask is not None and self.training:
            if not bool((mask[:, 1:] & ~mask[:, :-1]).any()):
                mask = None  # what is padded on the right reaches nothing that counts
            elif getattr(self, "gradient_checkpointing", False):
                raise ArgumentError(
                    f"{type(self).__name__} with padding on the left cannot be trained with gradient checkpointing: the "
                    "layers would not see the mask again; pad on the right"
                )
        with carry(Carried(mask=mask)):
            return original(self, *args, **kwargs)

    return forward


def _token_shift(self: Any, hidden: Tensor, state: list[Tensor] | None, part: int) -> tuple[Tensor, Tensor]:
    """The tokens, padding set to zero, and the token before each; the last one goes into ``state[part]``."""
    mask = carried().mask
    if mask is not None:
        hidden = hidden.masked_fill(~mask[..., None], 0.0)
    if state is None:
        shifted = torch.nn.functional.pad(hidden, (0, 0, 1, -1))  # [B, T, D]
    else:
        first = state[part][:, :, self.layer_id][:, None].to(hidden.dtype)
        shifted = torch.cat([first, hidden[:, :-1]], dim=1)  # a copy: the state is written below
        if mask is not None:  # behind padding comes the first token, or what the state holds
            begins = mask & ~torch.nn.functional.pad(mask, (1, -1))
            shifted = torch.where(begins[..., None], first, shifted)
        state[part][:, :, self.layer_id] = hidden[:, -1]
    return hidden, shifted


def _mixed(hidden: Tensor, shifted: Tensor, *mixes: Tensor) -> list[Tensor]:
    return [hidden * mix + shifted * (1 - mix) for mix in mixes]


def rwkv_time_mix(original: Method) -> Method:
    """``RwkvSelfAttention.extract_key_value``, where a step gave every row the first row's shift."""

    @functools.wraps(original)
    def extract_key_value(self: Any, hidden: Tensor, state: list[Tensor] | None = None) -> tuple[Any, ...]:
        hidden, shifted = _token_shift(self, hidden, state, 1)
        k, v, r = _mixed(hidden, shifted, self.time_mix_key, self.time_mix_value, self.time_mix_receptance)
        return torch.sigmoid(self.receptance(r)), self.key(k), self.value(v), state

    return extract_key_value


def rwkv_channel_mix(original: Method) -> Method:
    """``RwkvFeedForward.forward``, the same."""

    @functools.wraps(original)
    def forward(self: Any, hidden: Tensor, state: list[Tensor] | None = None) -> tuple[Tensor, Any]:
        hidden, shifted = _token_shift(self, hidden, state, 0)
        k, r = _mixed(hidden, shifted, self.time_mix_key, self.time_mix_receptance)
        value = self.value(torch.square(torch.relu(self.key(k))))
        return torch.sigmoid(self.receptance(r)) * value, state

    return forward


# --------------------------------------------------------------------------------------------------------- xLSTM


def mlstm_backend(original: Method) -> Method:
    """``xLSTMBackend.forward`` on our linear attention, for any number of tokens; the class, since instances keep its functions."""

    @functools.wraps(original)
    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        igate: Tensor,
        fgate: Tensor,
        c_initial: Tensor | None = None,
        n_initial: Tensor | None = None,
        m_initial: Tensor | None = None,
        return_last_states: bool | None = None,
        mode: str | None = None,
    ) -> Any:
        q, k, v, i, f = (t.transpose(1, 2) for t in (query, key, value, igate, fgate))  # [B, T, H, ...]
        wide = state_dtype(q)
        state = None
        if c_initial is not None and n_initial is not None and m_initial is not None:
            matrix = torch.cat([c_initial.to(wide), n_initial[..., None].to(wide)], dim=-1)
            state = {"S": matrix, "m": m_initial[..., 0].to(wide)}
        i, f = i.to(wide), torch.nn.functional.logsigmoid(f.to(wide))
        mask = carried().mask
        if mask is not None:  # padding adds nothing and fades nothing
            if mask.shape[1] != q.shape[1]:
                raise ArgumentError(
                    f"xLSTM read {q.shape[1]} of {mask.shape[1]} tokens of a padded batch in one piece; raise "
                    "config.max_inference_chunksize, or read the padded part alone first"
                )
            i, f = i.masked_fill(~mask[..., None], EMPTY), f.masked_fill(~mask[..., None], 0.0)
        h, n, m, after = ExponentialMixer.attend(q, k, v, i, f, q.shape[-1] ** -0.5, state, None)
        h = (h / (torch.maximum(n.abs(), (-m).exp()) + self.config.eps)).to(query.dtype).transpose(1, 2)
        training = "train" in (mode or self.config.mode)
        wanted = self.config.return_last_states if return_last_states is None else return_last_states
        if training and not wanted:
            return h
        return h, (after["S"][..., :-1], after["S"][..., -1], after["m"][..., None])

    return forward


@dataclass(frozen=True)
class Mend:
    """A method of a class in a modeling file, what makes the new one from the old, and what it mends."""

    owner: str
    name: str
    make: Callable[[Method], Method]
    mends: str


_LOST = "a call that goes on from the cache began the scan from zeros"
_UNBOUND = "decoding did not bound the step size, prefill did"

METHODS: dict[str, tuple[Mend, ...]] = {
    "mamba": (Mend("MambaMixer", "forward", begins_from_cache, _LOST),),
    "falcon_mamba": (Mend("FalconMambaMixer", "forward", begins_from_cache, _LOST),),
    "jamba": (Mend("JambaMambaMixer", "forward", begins_from_cache, _LOST),),
    "zamba": (Mend("ZambaMambaMixer", "forward", begins_from_cache, _LOST),),
    "mamba2": (Mend("Mamba2Mixer", "forward", bounds_step_size, _UNBOUND),),
    "bamba": (
        Mend("BambaMixer", "forward", bounds_step_size, _UNBOUND),
        Mend("BambaModel", "forward", goes_on_at_position, "positions began at 0 in every call"),
    ),
    "falcon_h1": (Mend("FalconH1Mixer", "forward", bounds_step_size, _UNBOUND),),
    "granitemoehybrid": (Mend("GraniteMoeHybridMambaLayer", "forward", bounds_step_size, _UNBOUND),),
    "nemotron_h": (Mend("NemotronHMamba2Mixer", "forward", bounds_step_size, _UNBOUND),),
    "zamba2": (Mend("Zamba2MambaMixer", "forward", bounds_step_size, _UNBOUND),),
    "minimax": (
        Mend("MiniMaxLightningAttention", "forward", lightning_attention, "a loop over blocks or tokens"),
        Mend("MiniMaxCache", "get_seq_length", cache_length, "the length of an empty layer"),
        Mend("MiniMaxCache", "get_mask_sizes", cache_mask_sizes, "the length of an empty layer"),
        Mend(
            "MiniMaxCache",
            "reorder_cache",
            cache_reorder,
            "beam search left the states of linear layers behind",
        ),
        Mend("MiniMaxCache", "get_linear_cache", linear_cache, "a state was looked up where there is none"),
    ),
    "recurrent_gemma": (
        Mend("RecurrentGemmaModel", "forward", griffin_model, "padding was read"),
        Mend(
            "RecurrentGemmaRecurrentBlock",
            "forward",
            griffin_block,
            "one conversation at a time, its state in the model; pieces did not join in the convolution",
        ),
        Mend("RecurrentGemmaRglru", "_rnn_scan", rg_lru_scan, "a loop over tokens"),
    ),
    "rwkv": (
        Mend("RwkvForCausalLM", "forward", sees_the_mask, "padding was read"),
        Mend("RwkvModel", "forward", sees_the_mask, "padding was read"),
        Mend("RwkvSelfAttention", "extract_key_value", rwkv_time_mix, "a step mixed up the rows of a batch"),
        Mend("RwkvFeedForward", "forward", rwkv_channel_mix, "a step mixed up the rows of a batch"),
    ),
    "xlstm": (
        Mend("xLSTMForCausalLM", "forward", sees_the_mask, "padding was read"),
        Mend("xLSTMModel", "forward", sees_the_mask, "padding was read"),
        Mend("xLSTMBackend", "forward", mlstm_backend, "a loop over tokens behind the last chunk"),
    ),
}
"""Family -> what is mended in its classes."""
