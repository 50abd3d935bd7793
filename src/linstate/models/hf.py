"""The bridge to Hugging Face (extra ``hf``): ``AutoConfig``, ``AutoModelForCausalLM``, Trainer, PEFT, ``generate``.

Importing this module registers the model type ``linstate``. ``generate`` works with our state as its cache:
:class:`StateCache` holds one flat state and how many tokens it has seen.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from linstate.errors import ArgumentError
from linstate.models.config import ModelConfig
from linstate.models.decoder import Decoder
from linstate.types import LayerState


class LinstateConfig(PreTrainedConfig):
    """Hugging Face's view of a :class:`~linstate.models.ModelConfig`, kept whole under ``architecture``."""

    model_type = "linstate"

    def __init__(self, architecture: dict[str, Any] | ModelConfig | None = None, **kwargs: Any) -> None:
        if isinstance(architecture, ModelConfig):
            architecture = architecture.to_dict()
        self.architecture = architecture
        if architecture is not None:
            config = ModelConfig.from_dict(architecture)
            self.vocab_size, self.hidden_size = config.vocab_size, config.d_model
            self.num_hidden_layers = config.num_layers
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


class LinstateForCausalLM(PreTrainedModel, GenerationMixin):
    """A :class:`~linstate.models.Decoder` as a Hugging Face causal language model."""

    config_class = LinstateConfig
    base_model_prefix = "decoder"
    _no_split_modules = ["Block"]  # noqa: RUF012 (Hugging Face's convention)
    _tied_weights_keys = {"decoder.head.weight": "decoder.embedding.weight"}  # noqa: RUF012
    supports_gradient_checkpointing = False

    def __init__(self, config: LinstateConfig) -> None:
        super().__init__(config)
        self.decoder = Decoder(config.model)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """The decoder initialises itself when it is built."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.decoder.embedding

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.decoder.head

    def set_input_embeddings(self, value: torch.nn.Embedding) -> None:
        self.decoder.embedding = value

    def set_output_embeddings(self, value: torch.nn.Linear) -> None:
        self.decoder.head = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, the loss where labels are given (label t belongs to token t; they are shifted here), and the cache after.

        Raises:
            ArgumentError: for ``inputs_embeds``, 4D masks or another kind of cache.
        """
        if kwargs.get("inputs_embeds") is not None:
            raise ArgumentError("Linstate models read input_ids; inputs_embeds is not supported")
        if past_key_values is not None and not isinstance(past_key_values, StateCache):
            raise ArgumentError(
                f"past_key_values must be a linstate StateCache, got {type(past_key_values).__name__}"
            )
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise ArgumentError(f"attention_mask must be [B, T], got {list(attention_mask.shape)}")
            attention_mask = attention_mask[:, -input_ids.shape[1] :]
        state = None if past_key_values is None else past_key_values.state
        which: Literal["all", "last"] = "last" if logits_to_keep == 1 and labels is None else "all"
        logits, after = self.decoder(input_ids, state, mask=attention_mask, logits=which)
        if which == "all" and logits_to_keep and labels is None:
            logits = logits[:, -logits_to_keep:]
        loss = None
        if labels is not None:
            flat, target = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
            total = F.cross_entropy(flat, target, reduction="sum", ignore_index=-100)
            count = (target != -100).sum() if num_items_in_batch is None else num_items_in_batch
            loss = total / torch.as_tensor(count, device=total.device).clamp(min=1)
        cache = None
        if use_cache if use_cache is not None else not self.training:
            seen = (0 if past_key_values is None else past_key_values.seen) + input_ids.shape[1]
            cache = StateCache(after, seen)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)


AutoConfig.register("linstate", LinstateConfig, exist_ok=True)
AutoModelForCausalLM.register(LinstateConfig, LinstateForCausalLM, exist_ok=True)
