"""Lookup documents: the same for the same seed, true to their facts, and unseen where they say so."""

from __future__ import annotations

import configparser
import csv
import io
import json
import random

import pytest

from linstate.engine.asking import answer_text, parse_answer, question_prompt
from linstate.errors import ArgumentError
from linstate.train.formats import json_object
from linstate.train.lookup import STYLES, as_text, ask, filler_chunks, make_lookup, real_words
from linstate.train.names import KEY_FORMS, VALUE_FORMS, Names, is_reserved

FILLER = filler_chunks(["The quick brown fox jumps over the lazy dog.\nIt did so again, twice.\n\n" * 20])
WORDS = real_words(["apple banana cherry damson elder fig grape hazel iris juniper"])


def _draw(seed: int, **options):
    return make_lookup(random.Random(seed), filler=FILLER, words=WORDS, **options)


@pytest.mark.parametrize("style", STYLES)
def test_every_fact_stands_in_the_text_once_asked_for(style):
    for seed in range(6):
        lookup = _draw(seed, facts=12, length=900, style=style)
        assert lookup.style == style and len(lookup.facts) == 12
        assert len({key.casefold() for key, _ in lookup.facts}) == 12
        for key, value in lookup.facts:
            assert key in lookup.text and value in lookup.text
            assert 2 <= len(key) <= 20 and 1 <= len(value) <= 12
            assert key == key.strip() and value == value.strip() and "\n" not in key + value


def test_the_same_seed_gives_the_same_document_and_another_seed_another():
    first, again, other = (_draw(seed, facts=9, length=700) for seed in (4, 4, 5))
    assert first == again
    assert first.text != other.text


@pytest.mark.parametrize("style", ["colon", "csv", "json", "sentences", "tabs", "ini", "mixed"])
def test_filler_reaches_the_length_asked_for(style):
    sizes = [len(_draw(seed, facts=16, length=2000, style=style).text) for seed in range(12)]
    assert all(1700 <= size <= 2300 for size in sizes)
    assert 1900 <= sum(sizes) / len(sizes) <= 2100


def test_filler_spreads_the_facts_over_the_text():
    places = []
    for seed in range(40):
        lookup = _draw(seed, facts=8, length=4000, style="colon")
        places += [lookup.text.find(key) / len(lookup.text) for key, _ in lookup.facts]
    for quarter in range(4):
        assert sum(quarter / 4 <= place < (quarter + 1) / 4 for place in places) > len(places) // 20


def test_json_ini_and_csv_are_read_back_by_their_own_parsers():
    for seed in range(8):
        rng = random.Random(seed)
        facts = _draw(seed, facts=10, length=0, style="colon").facts
        layout = json_object(rng, facts, Names(rng))
        nested = json.loads(layout.head + "".join(layout.items) + layout.tail, parse_int=str, parse_float=str)
        flat = {}
        for key, value in nested.items():
            flat.update(value if isinstance(value, dict) else {key: value})
        assert flat == dict(facts)

        lookup = _draw(seed, facts=10, length=0, style="ini")
        parser = configparser.ConfigParser(interpolation=None, strict=False)
        parser.optionxform = str
        parser.read_string(lookup.text)
        read = {key: value.strip('"') for name in parser.sections() for key, value in parser.items(name)}
        assert {key.split(":")[0]: value for key, value in lookup.facts}.keys() == {
            key.split(":")[0] for key in read
        }

        lookup = _draw(seed, facts=10, length=0, style="csv")
        delimiter = next(mark for mark in (";", "|", ",") if mark in lookup.text)
        rows = {
            row[0]: row[1].strip()
            for row in csv.reader(io.StringIO(lookup.text), delimiter=delimiter, skipinitialspace=True)
        }
        assert all(rows[key] == value for key, value in lookup.facts)


def test_unseen_documents_share_no_key_or_value_with_training_documents():
    train, test = set(), set()
    for seed in range(60):
        train |= {text for pair in _draw(seed, facts=20).facts for text in pair}
        test |= {text for pair in _draw(1000 + seed, facts=20, unseen=True).facts for text in pair}
    switches = {"true", "false", "none", "auto", "default", "enabled", "disabled", "medium", "high"}
    assert not any(is_reserved(text) for text in train - switches)
    assert all(is_reserved(text) for text in test if len(text) >= 4)
    assert not {text for text in train & test if len(text) >= 4}
    assert len({text for text in test if len(text) >= 4}) > 400


def test_an_unseen_draw_avoids_the_words_it_is_told():
    free = {
        key.casefold() for s in range(30) for key, _ in _draw(s, facts=10, unseen=True).facts if len(key) > 3
    }
    names = Names(random.Random(0), unseen=True, seen=frozenset(free))
    assert free and not any(names.allowed(key) for key in free)


@pytest.mark.parametrize("form", sorted(KEY_FORMS))
def test_key_forms_keep_their_length(form):
    names = Names(random.Random(form), words=WORDS)
    keys = [names.key(form, longest=14) for _ in range(50)]
    assert all(2 <= len(key) <= 14 for key in keys) and len(set(keys)) > 5


@pytest.mark.parametrize("form", sorted(VALUE_FORMS))
def test_value_forms_keep_their_length(form):
    names = Names(random.Random(form), words=WORDS)
    assert all(3 <= len(names.value(form, shortest=3, longest=9)) <= 9 for _ in range(50))


def test_questions_cover_every_fact_once_with_its_value():
    lookup = _draw(3, facts=15, style="colon")
    pairs = ask(random.Random(0), lookup, bare=1.0)
    assert sorted(pairs) == sorted(lookup.facts)
    assert pairs != lookup.facts  # shuffled
    worded = ask(random.Random(0), lookup, bare=0.0)
    assert all(any(key in question for key, v in lookup.facts if v == value) for question, value in worded)
    assert not any(question == key for question, _ in worded for key, _ in lookup.facts)
    assert len(ask(random.Random(0), lookup, most=4)) == 4


def test_filler_never_seems_to_state_a_fact_about_a_key():
    def keys(decoy):
        options = {"facts": 8, "length": 1200, "style": "colon", "words": ["banana"]}
        drawn = [make_lookup(random.Random(seed), filler=[decoy], **options) for seed in range(80)]
        return {key for lookup in drawn if decoy in lookup.text for key, _ in lookup.facts}

    assert "banana" in keys("We mention a banana here, and do not say what it might have.")
    assert "banana" not in keys("banana: 77 is what this line says, and it is no fact of the document.")


def test_the_wording_of_questions_and_answers_is_fixed():
    assert question_prompt("a  b\nc") == "\n? a b c:"
    assert answer_text("23/tcp") == " 23/tcp\n"
    assert as_text([("k", "v"), ("l", "w")]) == "\n? k: v\n\n? l: w\n"
    assert parse_answer(" 23/tcp \n\n? other: x") == "23/tcp"
    assert parse_answer("") == ""


def test_errors_name_the_argument():
    with pytest.raises(ArgumentError, match="facts"):
        _draw(0, facts=0)
    with pytest.raises(ArgumentError, match=r"style.*'prose'"):
        _draw(0, facts=2, style="prose")
