"""FNet, an encoder: bare, for masked words, or for a label of the text.

What a checkpoint holds for other tasks (the next sentence, the pooled first token where no label is asked for) is not
read. Heads for one label per token, spans or choices are refused.

Source: transformers ``models/fnet``; google/fnet-base, google/fnet-large.
"""

from __future__ import annotations

from collections.abc import Mapping

from linstate.errors import ConfigError
from linstate.models.encoder_config import EncoderConfig
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Redundant, Table, rule, tied
from linstate.models.families._settings import Settings
from linstate.models.families.base import EncoderFamily, Header

HEADS = {
    "FNetModel": None,
    "FNetForMaskedLM": "masked_lm",
    "FNetForPreTraining": "masked_lm",
    "FNetForSequenceClassification": "classification",
}


class FNet(EncoderFamily):
    """See the module."""

    model_types = ("fnet",)
    mixers = ("fnet",)
    checked = "its outputs: bare, masked words, labels, pre-training"
    ignored = {  # noqa: RUF012
        r"(fnet\.)?pooler\.": "the pooled first token, for tasks that it is no part of",
        r"cls\.seq_relationship\.": "whether a sentence follows another",
    }

    def config(self, settings: Settings) -> EncoderConfig:
        settings.only("hidden_act", "gelu_new", "gelu_pytorch_tanh", default="gelu_new")
        settings.only("tie_word_embeddings", True, default=True)
        # dropout, and which Fourier transform of the same result runs
        settings.ignore("hidden_dropout_prob", "use_tpu_fourier_optimizations", "tpu_short_seq_length")
        kinds = settings.take("architectures", ["FNetModel"])
        if not isinstance(kinds, list) or len(kinds) != 1 or kinds[0] not in HEADS:
            raise ConfigError(
                f"{settings.where}: architectures is {kinds!r}, which Linstate does not do; it does {', '.join(HEADS)}"
            )
        head = HEADS[kinds[0]]
        labels = settings.take("id2label", {}), settings.take("num_labels", 2)
        return EncoderConfig(
            settings.integer("vocab_size", 32000),
            settings.integer("hidden_size", 768),
            ("fnet",) * settings.integer("num_hidden_layers", 12),
            d_ff=settings.integer("intermediate_size", 3072),
            max_length=settings.integer("max_position_embeddings", 512),
            token_types=settings.integer("type_vocab_size", 4),
            head=head,
            num_labels=(len(labels[0]) or labels[1]) if head == "classification" else 0,
            norm_eps=settings.number("layer_norm_eps", 1e-12),
        )

    def weights(self, config: EncoderConfig, settings: Settings, found: Mapping[str, Header]) -> Table:
        (kind,) = settings.take("architectures", ["FNetModel"])
        base = "" if kind == "FNetModel" else "fnet."
        word = f"{base}embeddings.word_embeddings.weight"
        named = {
            f"{base}embeddings.LayerNorm": "embedding_norm",
            f"{base}embeddings.projection": "embedding_proj",
        }
        for i in range(config.num_layers):
            theirs, ours = f"{base}encoder.layer.{i}.", f"layers.{i}."
            named |= {
                f"{theirs}fourier.output.LayerNorm": f"{ours}mixer_norm",
                f"{theirs}intermediate.dense": f"{ours}up",
                f"{theirs}output.dense": f"{ours}down",
                f"{theirs}output.LayerNorm": f"{ours}ff_norm",
            }
        last: list[Redundant] = []
        table = [
            rule(word, "embedding.weight"),
            rule(f"{base}embeddings.position_embeddings.weight", "positions.weight"),
            rule(f"{base}embeddings.token_type_embeddings.weight", "types.weight"),
        ]
        if config.head == "masked_lm":
            predictions = "cls.predictions"
            named |= {
                f"{predictions}.transform.dense": "head_proj",
                f"{predictions}.transform.LayerNorm": "head_norm",
            }
            table.append(rule(f"{predictions}.bias", "head_bias"))
            last = [
                tied(word, f"{predictions}.decoder.weight"),
                tied(f"{predictions}.bias", f"{predictions}.decoder.bias"),
            ]
        elif config.head == "classification":
            named |= {f"{base}pooler.dense": "head_proj", "classifier": "labels"}
        for theirs, ours in named.items():
            table += parts.normed(theirs, ours, bias=True)
        return [*table, *last]
