"""The tokenizer's contract: bytes round trip, and a key or value has the same ids wherever it stands."""

from __future__ import annotations

import random

import pytest

from linstate.engine.asking import answer_text, question_prompt
from linstate.engine.tokens import encode
from linstate.errors import ArgumentError, CheckpointError
from linstate.train.lookup import as_text, ask, make_lookup
from linstate.train.tokenizer import (
    END_ID,
    bytes_per_token,
    encode_documents,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

PROSE = "for name in names:\n        if not name:\n            continue\n    return the value of the table\n"


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(0)
    lookups = [make_lookup(rng, facts=10) for _ in range(60)]
    return train_tokenizer([PROSE * 40, *(x.text + as_text(ask(rng, x)) for x in lookups)], 700)


CONTEXTS = (
    "{k}: {v}\n",
    "{k} = {v}\n",
    "{k}={v}\n",
    '    "{k}": "{v}",\n',
    "'{k}': '{v}',\n",
    "{k},{v}\n",
    "{k}\t\t{v}\t# comment\n",
    "{k}      {v}\n",
    "\n? {k}: {v}\n",
    "[section]\n{k} = {v}\n\n",
    "The code of {k} is {v}.\n",
    "| {k} | {v} |\n",
)
STRINGS = (
    "telnet",
    "23/tcp",
    "x_y-z",
    "Buenos Aires",
    "aB3kQ",
    "naïve",
    "São Tomé",
    "0x3f",
    "__init__",
    "a.b.c",
    "12:45",
)


def _contains(ids: list[int], part: list[int]) -> bool:
    return any(ids[at : at + len(part)] == part for at in range(len(ids) - len(part) + 1))


@pytest.mark.parametrize("text", STRINGS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_string_has_the_same_ids_wherever_it_stands(tokenizer, text, context):
    alone = encode(tokenizer, text)
    as_key = encode(tokenizer, "before\n" + context.format(k=text, v="other"))
    as_value = encode(tokenizer, "before\n" + context.format(k="other", v=text))
    assert _contains(as_key, alone) and _contains(as_value, alone)


def test_the_pieces_of_a_dialogue_tokenise_as_the_whole(tokenizer):
    rng = random.Random(1)
    for _ in range(40):
        lookup = make_lookup(rng, facts=6)
        whole, ids = lookup.text, encode(tokenizer, lookup.text)
        for question, value in ask(rng, lookup):
            whole += question_prompt(question) + answer_text(value)
            ids += encode(tokenizer, question_prompt(question))
            ids += encode(tokenizer, answer_text(value))
        assert ids == encode(tokenizer, whole)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\r\n\t x",
        "a\0b",
        "日本語 😀",
        "def f():\n\n\n\n    pass\n",
        "<|end|><|pad|>",
        "x" * 300,
        " " * 77,
        "ⁿ½e\u0301",
    ],
)
def test_every_text_round_trips(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, text), skip_special_tokens=False) == text


def test_special_tokens_are_set_by_id_only(tokenizer, tmp_path):
    again = load_tokenizer(save_tokenizer(tokenizer, tmp_path / "deep" / "tokenizer.json"))
    assert again.token_to_id("<|pad|>") == 0 and again.token_to_id("<|end|>") == END_ID == 1
    for each in (tokenizer, again):
        assert not {0, 1} & set(encode(each, "a<|end|>b<|pad|>"))
    assert encode(again, PROSE) == encode(tokenizer, PROSE)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["tokenizer.json"]


def test_digits_stand_alone_and_frequent_words_are_one_token(tokenizer):
    assert len(encode(tokenizer, "8080")) == 4
    assert len(encode(tokenizer, "return")) == 1
    assert len(encode(tokenizer, "\n        ")) == 1
    assert tokenizer.get_vocab_size() == 700


def test_documents_are_separated_by_the_end_token(tokenizer):
    ids = encode_documents(tokenizer, ["one", "two"], batch=1)
    assert ids.dtype == "uint16"
    assert ids.tolist() == [*encode(tokenizer, "one"), 1, *encode(tokenizer, "two"), 1]
    assert encode_documents(tokenizer, []).shape == (0,)


def test_bytes_per_token_counts_bytes(tokenizer):
    assert bytes_per_token(tokenizer, "8080") == 1.0
    assert bytes_per_token(tokenizer, "日") == 3 / len(encode(tokenizer, "日"))
    assert bytes_per_token(tokenizer, "") == 0.0


def test_errors_say_what_is_wrong(tokenizer, tmp_path):
    with pytest.raises(ArgumentError, match="258"):
        train_tokenizer(["x"], 100)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"broken\.json"):
        load_tokenizer(tmp_path / "broken.json")
    with pytest.raises(CheckpointError, match=r"missing\.json"):
        load_tokenizer(tmp_path / "missing.json")
