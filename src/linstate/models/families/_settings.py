"""A configuration that keeps account: what was asked of it, and what nobody asked for."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from linstate.errors import ConfigError

T = TypeVar("T")

NO_EFFECT_BECAUSE: Mapping[str, tuple[str, ...]] = {
    "it says where the checkpoint comes from and which classes read it": (
        *("model_type", "architectures", "auto_map", "transformers_version", "name_or_path", "_name_or_path"),
        *("_commit_hash", "tokenizer_class", "processor_class", "torchscript"),
    ),
    "it says how the checkpoint was stored, and which implementation of the same computation is to run": (
        *("dtype", "torch_dtype", "attn_implementation", "_attn_implementation", "experts_implementation"),
        *("_experts_implementation", "_attn_implementation_autoset", "use_bfloat16"),
    ),
    "it is for training: initial values, dropout, losses": (
        *(
            "initializer_range",
            "attention_dropout",
            "hidden_dropout",
            "embd_pdrop",
            "resid_pdrop",
            "attn_pdrop",
        ),
        *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "gradient_checkpointing"),
    ),
    "it says what a call returns, and how much memory it takes": (
        *("use_cache", "return_dict", "output_hidden_states", "output_attentions", "use_return_dict"),
        *("chunk_size_feed_forward", "pretraining_tp", "num_logits_to_keep"),
    ),
    "it is for a classification head": (
        *("id2label", "label2id", "num_labels", "problem_type", "classifier_dropout", "finetuning_task"),
        "task_specific_params",
    ),
    "it says how text is generated; the tokens that end it are read elsewhere": (
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "prefix"),
        *(
            "unk_token_id",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "max_length",
            "min_length",
            "do_sample",
        ),
        *("early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "typical_p"),
        *("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
        *("bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate"),
        *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
        "begin_suppress_tokens",
    ),
    "it is the longest text of training: a limit of nothing here, as long as positions are not scaled": (
        *("max_position_embeddings", "max_sequence_length", "model_max_length", "seq_length"),
    ),
}
NO_EFFECT = frozenset(name for names in NO_EFFECT_BECAUSE.values() for name in names)
"""Settings that change nothing about what a model computes when it reads; a family that needs one takes it all the same."""

HELD: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "compression_config": (None,),
    "per_layer_config": (None, {}),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "tie_last_hidden_states": (None, True),
}
"""Settings that every configuration can have, and the only values that we do."""


HEEDED_ELSEWHERE: Mapping[str, str] = {
    "output_gate_type": "vLLM and SGLang choose the activation of an output gate by it",
    "use_qk_norm": "vLLM and SGLang put norms on queries and keys by it",
    "sliding_window": "vLLM and SGLang bound what attention sees by it",
}
"""Settings that other engines heed where transformers does not: such a checkpoint means them."""

MOST, MOST_LAYERS = 2**31, 10_000
"""The largest whole number of a configuration, and the most layers: beyond, it is no model but an attempt."""


class Rope(NamedTuple):
    """Rotary embeddings: the base of their speeds, and the part of the channels that turns."""

    base: float
    part: float


class Settings:
    """A ``config.json`` whose settings are taken one by one; :meth:`finish` refuses what was never taken.

    A setting that is null counts as not there.

    Args:
        where: what errors call it.
        library: whose checkpoint it is ("transformers", "fla"): what its classes cannot see is left out with a warning. None:
            every setting counts.
        kind: the ``model_type`` where it does not say one itself; "rope" for rotary embeddings. inside: where it stands.
    """

    def __init__(
        self, raw: Mapping[str, Any], where: str, library: str | None = None, kind: str = "", inside: str = ""
    ) -> None:
        self._raw, self.where = dict(raw), where
        self.library, self.kind, self._inside = library, kind, inside
        self._taken: set[str] = set()
        self.ignored: set[str] = set()
        self._parts: list[Settings] = []

    def has(self, name: str) -> bool:
        """Whether it is there; this does not take it."""
        return self._raw.get(name) is not None

    def take(self, name: str, default: Any = ...) -> Any:
        """The value, or the default. Raises ConfigError where there is neither."""
        self._taken.add(name)
        value = self._raw.get(name)
        if value is not None:
            return value
        if default is ...:
            raise ConfigError(f"{self.where} has no {name}")
        return default

    def _typed(self, name: str, default: Any, kind: tuple[type, ...], what: str) -> Any:
        value = self.take(name, default)
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind):
            raise ConfigError(f"{self.where}: {name} must be {what}, found {value!r}")
        return value

    def integer(self, name: str, default: int = ...) -> int:  # type: ignore[assignment]
        """A whole number. Raises ConfigError."""
        found: int = self._typed(name, default, (int,), "a whole number")
        most = MOST_LAYERS if "layer" in name else MOST
        if found > most:
            raise ConfigError(f"{self.where}: {name} is {found:,}, more than the {most:,} that any model has")
        return found

    def number(self, name: str, default: float = ...) -> float:  # type: ignore[assignment]
        """A number. Raises ConfigError."""
        return float(self._typed(name, default, (int, float), "a number"))

    def flag(self, name: str, default: bool = ...) -> bool:  # type: ignore[assignment]
        """True or false. Raises ConfigError."""
        found: bool = self._typed(name, default, (bool,), "true or false")
        return found

    def listed(
        self, name: str, kinds: Mapping[str, T], default: Sequence[str], length: int | None
    ) -> tuple[T, ...]:
        """A name for each layer, and what each stands for; ``length`` None is any but 0. Raises ConfigError for another name or length."""
        value = self.take(name, default)
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        if not listed or not value or len(value) != (length or len(value)):
            many = "" if length is None else f"{length} "
            raise ConfigError(f"{self.where}: {name} must be a list of {many}names, found {value!r}")
        for entry in value:
            if entry not in kinds:
                raise ConfigError(
                    f"{self.where}: {name} has {entry!r}, which Linstate does not do; it does: {', '.join(kinds)}"
                )
        return tuple(kinds[entry] for entry in value)

    def only(self, name: str, *values: Any, default: Any = None) -> Any:
        """The value, which must be one of ``values``. Raises ConfigError for others, whose effect we do not have."""
        value = self.take(name, default)
        if value not in values:
            does = " or ".join(repr(v) for v in values)
            raise ConfigError(
                f"{self.where}: {name} is {value!r}, which Linstate does not do; it does {does}"
            )
        return value

    def first(self, *names: str, default: int) -> int:
        """A whole number, or true or false, under the first of these names that is there. Raises ConfigError."""
        self._taken.update(names)
        there = [name for name in names if self.has(name)]
        if len({self._raw[name] for name in there}) > 1:
            said = ", ".join(f"{name} = {self._raw[name]!r}" for name in there)
            raise ConfigError(f"{self.where}: these must say the same: {said}")
        found: int = self._typed(there[0], ..., (int, bool), "a whole number") if there else default
        return found

    def says_null(self, *path: str) -> bool:
        """Whether the setting under these names stands there, as null; this does not take it."""
        inner: Any = self._raw
        for name in path:
            if not isinstance(inner, Mapping) or name not in inner:
                return False
            inner = inner[name]
        return inner is None

    def one_part(self, rope: Rope) -> None:
        """Raises ConfigError for rotary embeddings of a part of the channels, where their layer turns all of them."""
        if rope.part != 1.0:
            raise ConfigError(
                f"{self.where}: partial_rotary_factor is {rope.part}, which their layer does not heed; expected 1"
            )

    def ignore(self, *names: str) -> None:
        """Take settings that change nothing about what the model computes when it reads."""
        self._taken.update(names)
        self.ignored.update(names)

    def all_ignored(self) -> set[str]:
        """What :meth:`ignore` was given, here and in the objects inside."""
        return self.ignored.union(*(part.all_ignored() for part in self._parts))

    def part(self, name: str, kind: str = "") -> Settings:
        """The settings in an object of their own. Raises ConfigError where there is none."""
        value = self.take(name)
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self.where}: {name} must be an object, found {value!r}")
        kind = kind or self._raw.get("model_type") or self.kind
        made = Settings(value, f"{self.where}: {name}", self.library, str(kind), f"{self._inside}{name}.")
        self._parts.append(made)
        return made

    def rope(self, base: float = 10000.0, part: float = 1.0) -> Rope:
        """Rotary embeddings as transformers writes them, now and before version 5. Raises ConfigError for scaled ones."""
        name = "rope_parameters" if self.has("rope_parameters") else "rope_scaling"
        self._taken.update(("rope_parameters", "rope_scaling"))
        base, part = self.number("rope_theta", base), self.number("partial_rotary_factor", part)
        if not self.has(name):
            return Rope(base, part)
        inner = self.part(name, "rope")
        inner.only("type", "default", default="default")
        inner.only("rope_type", "default", default="default")
        inner.ignore("mrope_section", "mrope_interleaved")  # text has the same position on every axis
        return Rope(inner.number("rope_theta", base), inner.number("partial_rotary_factor", part))

    def finish(self) -> None:
        """Settings that nobody took: those that their library cannot see are named in one warning, others refused.

        Raises ConfigError that names every setting that could mean something.
        """
        unseen = self._refuse()
        if unseen:
            warnings.warn(
                f"{self.where}: {self.library} does not look at these settings, so they change nothing here: {', '.join(unseen)}",
                stacklevel=3,
            )

    def _refuse(self) -> list[str]:
        for name, values in HELD.items():
            if name in self._raw and name not in self._taken and self._raw[name] not in values:
                if name == "quantization_config" and _of_the_cache(self._raw[name]):
                    continue  # the cache is kept as it is computed, which is more precise
                raise ConfigError(f"{self.where}: {_refused(name, self._raw[name])}")
        left = sorted(set(self._raw) - self._taken - NO_EFFECT - set(HELD))
        left = [name for name in left if self._raw[name] is not None]
        for name in left:
            if name in HEEDED_ELSEWHERE:
                raise ConfigError(
                    f"{self.where}: {name} is {self._raw[name]!r}, which Linstate does not do: {HEEDED_ELSEWHERE[name]}"
                )
        sees = self.seen()
        known = left if sees is None else [name for name in left if name in sees]
        if known:
            said = ", ".join(f"{name} = {self._raw[name]!r}" for name in known)
            raise ConfigError(
                f"{self.where} has settings that Linstate does not know, and whose effect it would miss: {said}"
            )
        unseen = [f"{self._inside}{name}" for name in left if name not in known]
        return unseen + [name for part in self._parts for name in part._refuse()]

    def seen(self) -> frozenset[str] | None:
        """Every setting that the library's configuration class or model can look at; None: not known, so all are."""
        data = seen_settings()
        if self.kind == "rope":
            return frozenset(data["rope"]) if self.library else None
        names = data.get(self.library or "", {}).get(self._raw.get("model_type") or self.kind)
        return None if names is None else frozenset(names)


def _of_the_cache(value: Any) -> bool:
    """Whether a ``quantization_config`` says something of the KV cache and nothing of the weights."""
    if not isinstance(value, Mapping):
        return False
    cache = value.get("kv_cache_scheme") or value.get("kv_cache_quant_algo")
    weights = [
        value.get(name)
        for name in ("config_groups", "quant_algo", "bits", "weight_block_size", "activation_scheme")
    ]
    return (
        bool(cache) and not any(weights) and value.get("quant_method") in ("compressed-tensors", "modelopt")
    )


@cache
def seen_settings() -> dict[str, Any]:
    """``seen.json``, which ``tools/seen_settings.py`` writes from the libraries' source."""
    found: dict[str, Any] = json.loads((Path(__file__).parent / "seen.json").read_text("utf-8"))
    return found


def _refused(name: str, value: Any) -> str:
    if name == "quantization_config":
        how = value.get("quant_method", "an unknown way") if isinstance(value, Mapping) else value
        return f"the weights are quantised ({how}), which Linstate does not read; take the checkpoint in bfloat16 or float32"
    return f"{name} is {value!r}, which Linstate does not do"
