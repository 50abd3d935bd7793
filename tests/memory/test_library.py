"""The library: texts are found by their words and by their meaning, and asked; the store says what there is."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from linstate.errors import ArgumentError, InputError
from linstate.memory import Index, Library, cut, hidden_states
from linstate.state.store import StateStore
from small_models import TEXT, build

pytest.importorskip("lancedb")

TEXTS = {
    "lamps": "The red lamp in the hall is broken; order a new one.\n" * 3,
    "stones": "Grey stones have number seven. They lie beside the pond.\n" * 3,
    "books": "A blue book about whales was left on the chair by the door.\n" * 3,
}


@pytest.fixture(scope="module")
def model():
    return build("delta")


@pytest.fixture
def store(tmp_path):
    return StateStore(tmp_path)


@pytest.fixture
def library(store, model):
    made = Library(store, model)
    for name, text in TEXTS.items():
        made.add(text, name=name)
    return made


def names(found):
    return [one.handle.name for one in found]


@pytest.mark.parametrize("how", ["hybrid", "words"])
@pytest.mark.parametrize(
    ("question", "name"), [("whales", "books"), ("broken lamps", "lamps"), ("pond?", "stones")]
)
def test_found_by_words(library, how, question, name):
    best = library.find(question, how=how)[0]
    assert best.handle.name == name
    assert best.passage.text in TEXTS[name]


def test_found_by_vectors(library):
    for name, text in TEXTS.items():
        best = library.find(text.splitlines()[0] + "\n", how="vectors")[0]
        assert best.handle.name == name


def test_by_default_words_come_first_and_vectors_if_there_are_none(library):
    assert names(library.find("whales")) == ["books"]
    assert len(library.find("xyzzy", limit=2)) == 2
    assert (
        names(library.find("whales", how="hybrid"))[0]
        == "books"
        != names(library.find("whales", how="hybrid"))[-1]
    )


def test_a_passage_knows_its_place(library, model):
    best = library.find("whales", how="words")[0]
    ids = library.store.ids(best.handle.id)
    assert model.tokenizer.decode(ids[best.passage.begin : best.passage.end]) == best.passage.text


def test_what_the_store_has_no_more_is_not_found(library):
    library.store.delete("books")
    assert library.find("whales", how="words") == []
    fork = library.store.fork("lamps", name="lamps again")
    library.store.delete("lamps")
    assert [f.handle.id for f in library.find("lamp", how="words")] == [fork.id]  # found by what it has read


def test_tenants_find_only_their_own(library, store, model):
    yours = Library(store, model, tenant="o'you", index=library.index)
    assert yours.find("whales") == []
    yours.add(TEXTS["books"], name="mine")
    assert names(yours.find("whales")) == ["mine"] and names(library.find("whales"))[0] == "books"


def test_a_text_that_grows_is_read_and_embedded_from_where_it_ended(store, model):
    embedded = []
    own = hidden_states(model)

    def embed(texts):
        embedded.extend(texts)
        return own(texts)

    library = Library(store, model, embed=embed, embed_name="counted")
    first = library.add(TEXT, name=None)
    assert first.new == first.handle.position
    before = len(embedded)
    grown = library.add(TEXT + "\nAnd a whale came by.\n", name="grown")
    assert grown.new < 40 and grown.handle.parent == first.handle.id
    assert len(embedded) - before <= 3
    assert names(library.find("whale", how="words")) == ["grown"]
    assert names(library.find("pink spoon", how="words")) == [
        "grown"
    ]  # not its predecessor, which nobody named
    assert library.add(TEXT + "\nAnd a whale came by.\n").new == 0


@pytest.mark.parametrize("kind", ["folder", "url"])
def test_the_index_can_be_made_anew(library, store, model, tmp_path, kind):
    where = tmp_path / "elsewhere"
    other = Library(
        store, model, index=Index(where.as_uri() if kind == "url" else where, name="x", dimension=32)
    )
    assert other.find("whales") == []
    assert other.rebuild() == 3
    assert [f.passage for f in other.find("whales")] == [f.passage for f in library.find("whales")]


def test_an_answer_says_from_which_states(library, model):
    answer = library.ask("whales", max_tokens=5)
    assert names(answer.sources) == ["books"] and answer.composition == "alone"
    assert answer.text == model.ask("whales", library.store.load("books", replay=False), max_tokens=5)
    several = library.ask("the red stone", states=2, max_tokens=5)
    assert len(several.sources) == 2 and several.composition == "approximate"
    with pytest.raises(InputError, match="nothing in the library"):
        Library(library.store, model, tenant="nobody").ask("whales")


def test_other_vectors(store, model):
    def embed(texts):
        return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)

    library = Library(store, model, embed=embed, embed_name="lengths")
    library.add(TEXTS["lamps"], name="lamps")
    assert names(library.find("x" * 50, how="vectors")) == ["lamps"]
    with pytest.raises(ArgumentError, match=r"expected \[1, 2\]"):
        library.index.add("default", "c", cut([1, 2], model.tokenizer), np.zeros((1, 3), np.float32))


def test_vectors_depend_on_their_text_alone(model):
    embed = hidden_states(model)
    texts = [*TEXTS.values(), "x", ""]
    together = embed(texts)
    assert together.shape == (5, 32)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    for text, vector in zip(texts, together, strict=True):
        np.testing.assert_allclose(hidden_states(model, batch_tokens=1)([text])[0], vector, atol=1e-4)
    assert not np.allclose(together[0], together[1], atol=0.05)
    deeper = hidden_states(model, layer=1)(texts)
    assert deeper.shape == (5, 32) and not np.allclose(deeper[0], together[0], atol=0.05)


def test_passages(model):
    ids = model.tokenizer.encode(TEXT).ids
    made = cut(ids, model.tokenizer, longest=40)
    assert "".join(p.text for p in made) == TEXT
    assert [p.begin for p in made] == [0, *(p.end for p in made[:-1])]
    assert all(p.end - p.begin <= 40 for p in made)
    assert all(p.text.rstrip(" ")[-1] in "\n.;" for p in made)  # where a line or a sentence ends
    longer = cut([*ids, 5, 6, 7], model.tokenizer, longest=40)
    assert longer[: len(made) - 1] == made[:-1]


def test_states_without_ids_cannot_be_indexed(store, model, library):
    with pytest.raises(InputError, match="keep-tokens"):
        library.index_state(store.put(model.read("hello")))


def test_without_lancedb(store, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(InputError, match=r"pip install 'linstate\[memory\]'"):
        Library(store, model).find("x")
