"""A new model knows its newlines and words, and finds what followed a key before it has learned anything."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from linstate.engine import LanguageModel
from linstate.engine.asking import question_prompt
from linstate.engine.tokens import encode
from linstate.models import Decoder, ModelConfig
from linstate.train.begin import begin, classes

TEXT = "".join(
    f"{key}: {value}\n"
    for key, value in (
        ("gate", "north"),
        ("seat", "window"),
        ("colour", "green"),
        ("planet", "Mars"),
        ("code", "41"),
    )
)


def _model(seed: int, **more: bool) -> tuple[Decoder, LanguageModel]:
    pocket = LanguageModel.from_pretrained("pocket")
    torch.manual_seed(seed)
    options = {"window": 64, "num_heads": 1, "head_dim": 128, "induction": True, **more}
    config = ModelConfig(2048, 192, ("keyed_window",), options={"keyed_window": options})
    return Decoder(config).eval(), pocket


def _right(decoder: Decoder, pocket: LanguageModel) -> int:
    """How many of five first tokens of answers the layer finds, before any training."""
    found = []
    decoder.layers[0].mixer.register_forward_hook(lambda module, given, out: found.append(out[0][0, -1]))
    right = 0
    for line in TEXT.splitlines():
        key, value = line.split(": ")
        decoder(torch.tensor([encode(pocket.tokenizer, TEXT + question_prompt(key).rstrip(" ") + " ")]))
        close = F.normalize(found[-1], dim=0) @ F.normalize(decoder.embedding.weight, dim=1).T
        right += int(close.argmax()) == encode(pocket.tokenizer, value)[0]
    return right


@torch.no_grad()
def test_a_new_model_recalls() -> None:
    for ahead in (False, True):
        decoder, pocket = _model(0, ahead=ahead)
        begin(decoder, pocket.tokenizer)
        assert _right(decoder, pocket) >= 4


@torch.no_grad()
def test_ahead_a_value_says_what_comes_after_it() -> None:
    """The same value with another token behind it is copied as another vector; without ``ahead`` as the same one."""
    for ahead in (False, True):
        decoder, pocket = _model(0, ahead=ahead)
        begin(decoder, pocket.tokenizer)
        found: list[torch.Tensor] = []
        decoder.layers[0].mixer.register_forward_hook(
            lambda *given, found=found: found.append(given[2][0][0, -1])
        )
        for end in (".", "\n"):
            text = TEXT.replace("window\n", f"window{end}\n") + question_prompt("seat").rstrip(" ") + " "
            decoder(torch.tensor([encode(pocket.tokenizer, text)]))
        difference = (found[-2] - found[-1]).norm() / found[-1].norm()
        assert (difference > 0.1) == ahead, (ahead, difference)


@torch.no_grad()
def test_newlines_end_an_entry_and_words_count() -> None:
    decoder, pocket = _model(0)
    begin(decoder, pocket.tokenizer)
    layer = decoder.layers[0]
    counts, keeps = layer.mixer.entry_gates(layer.mixer_norm(decoder.embedding.weight)).sigmoid().unbind(-1)
    found = classes(pocket.tokenizer, 2048)
    assert keeps[found["newline"]].max() < 0.05 and keeps[found["word"]].median() > 0.95
    assert 0.05 < keeps[found["indented"]].median() < 0.95
    assert counts[found["word"]].median() > 0.9 and counts[found["mark"]].median() < 0.3


def test_classes_are_a_partition() -> None:
    tokenizer = LanguageModel.from_pretrained("pocket").tokenizer
    found = classes(tokenizer, 2048)
    assert torch.stack(list(found.values())).sum(0).eq(1).all()
    newline, word = tokenizer.encode("\n").ids[0], tokenizer.encode("value").ids[0]
    assert found["newline"][newline] and found["word"][word]
