"""The bridge to Hugging Face (extra ``hf``): ``AutoConfig``, ``AutoModelForCausalLM``, Trainer, PEFT, ``generate``.

Importing this module registers the model type ``linstate``. ``generate`` works with our state as its cache:
:class:`StateCache` holds one flat state and how many tokens it has seen.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from linstate.errors import ArgumentError
from linstate.models.boundaries import packed_boundaries
from linstate.models.config import ModelConfig
from linstate.models.decoder import Decoder, Logits
from linstate.types import LayerState


class LinstateConfig(PreTrainedConfig):
    """Hugging Face's view of a :class:`~linstate.models.ModelConfig`, kept whole under ``architecture``."""

    model_type = "linstate"
    auto_map: ClassVar[dict[str, str]] = {}
    """No code comes with a model. (TRL asks, where an architecture is none of transformers' own.)"""

    def __init__(self, architecture: dict[str, Any] | ModelConfig | None = None, **kwargs: Any) -> None:
        if isinstance(architecture, ModelConfig):
            architecture = architecture.to_dict()
        self.architecture = architecture
        if architecture is not None:
            config = ModelConfig.from_dict(architecture)
            self.vocab_size, self.hidden_size = config.vocab_size, config.d_model
            self.num_hidden_layers = config.num_layers
            # For those who compute logits from hidden states themselves, under the names that they look for.
            self.logit_scale, self.final_logit_softcapping = config.logit_scale, config.logit_softcap
            kwargs["tie_word_embeddings"] = config.tie_embeddings
        super().__init__(**kwargs)

    @property
    def model(self) -> ModelConfig:
        """The configuration as a :class:`~linstate.models.ModelConfig`. Raises ArgumentError if there is none."""
        if self.architecture is None:
            raise ArgumentError("LinstateConfig needs architecture=ModelConfig(...)")
        return ModelConfig.from_dict(self.architecture)


class StateCache(Cache):
    """A Linstate state in the clothes of a Hugging Face cache. The state itself is never mutated: a fork is a copy of the reference."""

    def __init__(self, state: LayerState, seen: int = 0) -> None:
        super().__init__(layers=[])
        self.state, self.seen = state, seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def batch_size(self) -> int:
        return next(iter(self.state.values())).shape[0]

    def fork(self) -> StateCache:
        """A cache that goes on from the same state; O(1)."""
        return StateCache(dict(self.state), self.seen)

    def reset(self) -> None:
        self.state, self.seen = {name: torch.zeros_like(t) for name, t in self.state.items()}, 0

    def batch_select_indices(self, indices: Tensor) -> None:
        self.state = {name: t.index_select(0, indices.to(t.device)) for name, t in self.state.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state = {name: t.repeat_interleave(repeats, dim=0) for name, t in self.state.items()}

    def crop(self, tokens_to_remove: int) -> None:
        raise ArgumentError(
            "a recurrent state cannot be cropped: keep a fork() of the cache at the place to come back to, and go on from it"
        )


_HARMLESS = frozenset(
    (
        "cache_position",  # where the newest tokens stand: the state knows
        "max_length_q",  # the longest of packed sequences, for kernels that want to know
        "max_length_k",
        "is_causal",
        "logits_to_keep",
        "num_items_in_batch",
        "position_embeddings",
        "return_loss",
    )
)
"""Keyword arguments that change nothing here, whatever they say. Every other one that is not named is refused."""


def _refuse_unknown(given: dict[str, Any]) -> None:
    for name, value in given.items():
        if name in _HARMLESS or value is None or (name.startswith("output_") and value is False):
            continue
        raise ArgumentError(
            f"{name}={value!r:.60}: a Linstate model has no such argument, and leaving it out might change what is computed"
        )


class _Linstate(PreTrainedModel):
    """What the models share: a :class:`~linstate.models.Decoder` under the name ``decoder``, so that their files are the same."""

    config_class = LinstateConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]  # noqa: RUF012 (Hugging Face's convention)
    supports_gradient_checkpointing = True
    _is_stateful = True

    def __init__(self, config: LinstateConfig) -> None:
        super().__init__(config)
        self.decoder = Decoder(config.model)

    def _init_weights(self, module: torch.nn.Module) -> None:
        """The decoder initialises itself when it is built."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.decoder.embedding

    def set_input_embeddings(self, value: torch.nn.Embedding) -> None:
        self.decoder.embedding = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the configuration follows, so that what is saved then is loaded again."""
        made = super().resize_token_embeddings(*args, **kwargs)
        size = made.num_embeddings
        self.config.architecture = {**self.config.model.to_dict(), "vocab_size": size}
        self.decoder.config = self.config.model
        return made

    def read(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        use_cache: bool | None,
        logits: Logits,
        hidden: list[Tensor] | None,
        packed: dict[str, Tensor | None],
    ) -> tuple[Tensor, StateCache | None, Tensor | None]:
        """What the decoder makes of a batch, the cache after, and the boundaries of packed sequences. Raises ArgumentError."""
        if past_key_values is not None and not isinstance(past_key_values, StateCache):
            if past_key_values.get_seq_length():
                raise ArgumentError(
                    f"past_key_values must be a linstate StateCache, got {type(past_key_values).__name__}"
                )
            past_key_values = None  # an empty one of another kind, as generate makes it
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None:
            raise ArgumentError("give input_ids or inputs_embeds")
        batch, tokens = given.shape[:2]
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise ArgumentError(f"attention_mask must be [B, T], got {list(attention_mask.shape)}")
            attention_mask = attention_mask[:, -tokens:]
        bounds = packed_boundaries((batch, tokens), mask=attention_mask, **packed)
        if bounds is not None:
            if past_key_values is not None:
                raise ArgumentError("packed sequences begin anew: they cannot go on from past_key_values")
            attention_mask = None
            input_ids = None if input_ids is None else input_ids.reshape(1, -1)
            inputs_embeds = None if inputs_embeds is None else inputs_embeds.reshape(1, batch * tokens, -1)
        state = None if past_key_values is None else past_key_values.state
        found, after = self.decoder(
            input_ids,
            state,
            mask=attention_mask,
            cu_seqlens=bounds,
            logits="all" if logits == "last" and bounds is not None else logits,
            inputs_embeds=inputs_embeds,
            hidden=hidden,
        )
        if bounds is not None and batch > 1:
            found = found.view(batch, tokens, -1)
            if hidden is not None:
                hidden[:] = [x.view(batch, tokens, -1) for x in hidden]
        cache = None
        if bounds is None and (use_cache if use_cache is not None else not self.training):
            cache = StateCache(after, (0 if past_key_values is None else past_key_values.seen) + tokens)
        return found, cache, bounds


class LinstateModel(_Linstate):
    """The layers without the head: hidden states of every token."""

    def __init__(self, config: LinstateConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """``last_hidden_state [B, T, D]``, after the last norm. Raises ArgumentError for what is not served."""
        _refuse_unknown(kwargs)
        hidden = _asked_hidden(self.config, output_hidden_states)
        packed = {
            "position_ids": position_ids,
            "cu_seq_lens_q": cu_seq_lens_q,
            "cu_seq_lens_k": cu_seq_lens_k,
            "seq_idx": seq_idx,
        }
        found, cache, _ = self.read(
            input_ids, inputs_embeds, attention_mask, past_key_values, use_cache, "hidden", hidden, packed
        )
        made = BaseModelOutputWithPast(
            last_hidden_state=found,
            past_key_values=cache,
            hidden_states=None if hidden is None else tuple(hidden),
        )
        return made if _as_dict(self.config, return_dict) else made.to_tuple()


class LinstateForCausalLM(_Linstate, GenerationMixin):
    """A :class:`~linstate.models.Decoder` as a Hugging Face causal language model."""

    _tied_weights_keys = {"decoder.head.weight": "decoder.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: LinstateConfig) -> None:
        super().__init__(config)
        self.post_init()

    @property
    def model(self) -> LinstateModel:
        """The layers below the head, as a model of their own that shares these weights."""
        view = LinstateModel.__new__(LinstateModel)
        torch.nn.Module.__init__(view)
        view.config, view.decoder, view.training = self.config, self.decoder, self.training
        return view

    @property
    def base_model(self) -> LinstateModel:
        return self.model

    def get_decoder(self) -> LinstateModel:
        return self.model

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.decoder.head

    def set_output_embeddings(self, value: torch.nn.Linear) -> None:
        self.decoder.head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, the loss where labels are given (label t belongs to token t; they are shifted here), and the cache after.

        Packed sequences (:mod:`linstate.models.boundaries`) are read as if each were alone, and no label is predicted from
        the sequence before its own.

        Raises:
            ArgumentError: an argument that is not served and might change what is computed, 4D masks, another kind of cache.
        """
        _refuse_unknown(kwargs)
        hidden = _asked_hidden(self.config, output_hidden_states)
        last = isinstance(logits_to_keep, int) and logits_to_keep == 1 and labels is None
        packed = {
            "position_ids": position_ids,
            "cu_seq_lens_q": cu_seq_lens_q,
            "cu_seq_lens_k": cu_seq_lens_k,
            "seq_idx": seq_idx,
        }
        logits, cache, bounds = self.read(
            input_ids,
            inputs_embeds,
            attention_mask,
            past_key_values,
            use_cache,
            "last" if last else "all",
            hidden,
            packed,
        )
        if labels is None and (not last or bounds is not None):
            if isinstance(logits_to_keep, Tensor):
                logits = logits[:, logits_to_keep]
            elif logits_to_keep:
                logits = logits[:, -logits_to_keep:]
        loss = None
        if labels is not None:
            loss = _loss(logits, labels, bounds, num_items_in_batch)
        made = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=None if hidden is None else tuple(hidden),
        )
        return made if _as_dict(self.config, return_dict) else made.to_tuple()


def _asked_hidden(config: LinstateConfig, asked: bool | None) -> list[Tensor] | None:
    return [] if (config.output_hidden_states if asked is None else asked) else None


def _as_dict(config: LinstateConfig, asked: bool | None) -> bool:
    return bool(config.return_dict if asked is None else asked)


def _loss(
    logits: Tensor, labels: Tensor, bounds: Tensor | None, num_items_in_batch: Tensor | int | None
) -> Tensor:
    """Cross-entropy of each label given the tokens before it; -100 is none."""
    if bounds is not None:  # the first token of a sequence is predicted by nothing
        labels = labels.clone()
        labels.view(-1)[bounds[:-1]] = -100
    flat, target = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    total = F.cross_entropy(flat, target, reduction="sum", ignore_index=-100)
    count = (target != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)


AutoConfig.register("linstate", LinstateConfig, exist_ok=True)
AutoModel.register(LinstateConfig, LinstateModel, exist_ok=True)
AutoModelForCausalLM.register(LinstateConfig, LinstateForCausalLM, exist_ok=True)
