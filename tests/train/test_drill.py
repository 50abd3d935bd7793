"""Drills: short facts, asked for one by one."""

from __future__ import annotations

import random
import re

import pytest
import torch

from linstate.engine.tokens import encode
from linstate.train.corpus import Document
from linstate.train.drill import FORMS, make_drill, single_token_words
from linstate.train.stream import IGNORED, PocketCache, PocketStream
from linstate.train.tokenizer import train_tokenizer

CODE = "".join(f"def name{n}(value):\n    return value + other * {n}\n\n" for n in range(200))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([CODE, "? key: value\n" * 50], 400)


def test_words_are_one_token_wherever_they_stand(tokenizer):
    words = single_token_words(tokenizer)
    assert len(words) > 20
    for word in words:
        for text in (f"{word}: x", f"x = {word}\n", f'"{word}",', f"\t{word}"):
            token = encode(tokenizer, word)
            assert len(token) == 1 and token[0] in encode(tokenizer, text), (word, text)


@pytest.mark.parametrize("parts", [1, 3])
def test_every_fact_stands_in_the_text_once_and_is_asked(tokenizer, parts):
    words = single_token_words(tokenizer)
    for seed in range(40):
        drill = make_drill(random.Random(seed), words, facts=6, parts=parts)
        assert len({key for key, _ in drill.facts}) == 6
        assert set(drill.asked) == set(drill.facts)
        rest = drill.text
        for key, value in drill.facts:
            forms = (re.escape(form.format(key, value, "@")).replace("@", r"\w+") for form in FORMS)
            found = [match for form in forms if (match := re.match(form, rest))]
            assert found, (key, value, rest)
            rest = rest[found[0].end() :]
        assert not rest


def test_keys_of_several_words_share_parts(tokenizer):
    words = single_token_words(tokenizer)
    shared = 0
    for seed in range(20):
        keys = [key for key, _ in make_drill(random.Random(seed), words, facts=8, parts=3).facts]
        ids = [set(encode(tokenizer, key)) for key in keys]
        shared += any(a & b for i, a in enumerate(ids) for b in ids[:i])
    assert shared > 10


def test_a_drill_example_learns_the_answers_only(tokenizer, tmp_path):
    documents = [Document(kind, kind, CODE) for kind in ("python", "test", "doc")]
    cache = PocketCache.build(tmp_path, tokenizer, documents)
    stream = PocketStream(
        cache, tokenizer, total=100, lengths=((0.0, 256),), p_lookup=1.0, p_drill=1.0, drill_parts=1
    )
    for index in (0, 50):
        example = stream.example(index)
        ids, labels = example["input_ids"], example["labels"]
        assert ids.shape == labels.shape == (256,)
        learned = labels != IGNORED
        assert torch.equal(ids[learned], labels[learned])
        assert 0.1 < learned.float().mean() < 0.5
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        assert text.count("\n? ") >= 10
