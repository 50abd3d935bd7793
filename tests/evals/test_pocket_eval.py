"""The measured table: an oracle gets everything, a broken model little, and the rules of judging hold."""

from __future__ import annotations

import json
import lzma

import pytest

from linstate.evals import pocket
from linstate.train.corpus import held_out_python, is_held_out
from linstate.train.names import is_reserved

SMALL = {"documents": 4, "grid_documents": 1, "python_bytes": 20_000}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    root = tmp_path_factory.mktemp("library")
    for number in range(40):
        lines = [
            f"def module{number}_function_number_{n}(value):\n    return value * {n}\n" for n in range(30)
        ]
        (root / f"module{number}.py").write_text("".join(lines))
    assert sum(is_held_out(path.name) for path in root.iterdir()) >= 2
    return root


@pytest.fixture
def known(library, monkeypatch):
    """Every document that is drawn, by its text."""
    texts = {file.text: dict(file.entries) for file in pocket.real_files()}
    drawn = pocket._Draw.documents

    def documents(self, facts, size, count):
        found = drawn(self, facts, size, count)
        texts.update({x.text: {key: (value,) for key, value in x.facts} for x in found})
        return found

    monkeypatch.setattr(pocket._Draw, "documents", documents)
    return texts


def _oracle(known):
    def answer(text, questions):
        facts = known[text]
        replies = []
        for question in questions:
            key = max((k for k in facts if k in question), key=len)
            assert facts[key][-1] in text
            replies.append(f" {facts[key][-1]}\n\n? more")
        return replies

    return answer


def test_an_oracle_scores_everything_and_reaches_every_goal(known, library):
    rows = []
    table = pocket.evaluate(
        _oracle(known), lambda data: 0.01 * len(data), stdlib=library, on_row=rows.append, **SMALL
    )
    exact = [row for row in table.rows if row.unit == "exact match" and not row.skipped]
    assert len(exact) > 40 and all(row.score == 1.0 for row in exact)
    assert table.wrong == () and list(table.rows) == rows
    assert all(row.reached for row in table.rows if row.goal is not None and not row.skipped)
    assert table.row("unseen lookup", "16 facts in 2000 bytes").asked == 64


def test_a_broken_model_scores_low_and_its_mistakes_are_kept(known, library):
    oracle = _oracle(known)
    shifted = pocket.evaluate(
        lambda text, questions: [*oracle(text, questions)[1:], "x"],
        stdlib=library,
        **{**SMALL, "grid_documents": 0},
    )
    row = shifted.row("unseen lookup", "64 facts in 8000 bytes")
    assert row.score is not None and row.score < 0.1 and row.reached is False
    assert shifted.wrong and not shifted.wrong[0].right
    assert not any(row.unit == "bits per byte" or row.group == "grid" for row in shifted.rows)


def test_judging_strips_white_space_and_nothing_else(library):
    (document,) = pocket.unseen_documents(4, 400, 1, stdlib=library)
    values = [value for _, value in document.facts]

    def right(replies):
        return [o.right for o in pocket._ask_all(lambda *_: replies, [document], most=4)]

    assert right([f"  {value} \nand more" for value in values]) == [True] * 4
    assert right([value + "." for value in values]) == [False] * 4
    with pytest.raises(ValueError, match="expected 4 answers"):
        right(values[:3])


def test_bits_are_compared_with_xz_on_the_same_bytes(library):
    data = held_out_python(20_000, stdlib=library)
    seen = []

    def bits(raw):
        seen.append(raw)
        return 2.0 * len(raw)

    model, xz = pocket._compression(bits, 20_000, library)
    packed = 8 * len(lzma.compress(data, preset=9)) / len(data)
    assert seen == [data] and model.score == 2.0
    assert (xz.score, model.goal) == (packed, packed)
    assert model.reached == (xz.score > 2.0)


def test_test_documents_are_unseen_and_of_the_size_asked_for(library):
    documents = pocket.unseen_documents(16, 2000, 17, stdlib=library)
    assert len({document.style for document in documents}) == 17
    assert all(1700 <= len(document.text) <= 2300 for document in documents)
    texts = [text for document in documents for pair in document.facts for text in pair]
    assert all(is_reserved(text) for text in texts if len(text) >= 4)
    assert documents[3] == pocket.unseen_documents(16, 2000, 17, stdlib=library)[3]
    assert documents[3] != pocket.unseen_documents(16, 2000, 17, stdlib=library, seed=5)[3]


def test_system_tables_count_every_value_of_a_name():
    lines = ["# network\n", "echo\t7/tcp\n", "echo\t7/udp # again\n", "\n"]
    lines += [f"name{n}\t\t{n}/tcp\talias\n" for n in range(40)] + ["echo 4/ddp\n"]
    head, whole = pocket._system_table("table", "".join(lines))
    assert len(head.entries) == len(whole.entries) == 32
    assert head.entries[0] == ("echo", ("7/tcp", "7/udp")) and whole.entries[0][1] == (
        "7/tcp",
        "7/udp",
        "4/ddp",
    )
    assert head.text.endswith("name30\t\t30/tcp\talias\n") and whole.text == "".join(lines)


def test_a_missing_system_file_is_skipped_with_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(pocket, "_SERVICES", tmp_path / "services")
    row = pocket._real_row(lambda *_: [], pocket.real_files()[0], [])
    assert row.score is None and "not on this machine" in row.skipped and row.reached is None


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("countries.csv", "Bolivia", "Sucre"),
        ("workshop.ini", "listen_port", "8473"),
        ("camera.json", "infrared", "true"),
        ("camera.json", "contrast", "1.2"),
    ],
)
def test_the_stored_files_hold_32_entries_that_stand_in_them(name, key, value):
    file = next(file for file in pocket.real_files() if file.name == name)
    entries = dict(file.entries)
    assert len(entries) == 32 and entries[key] == (value,)
    assert all(k in file.text and v in file.text for k, values in entries.items() for v in values)


def test_the_table_goes_to_json_and_to_cells(library):
    table = pocket.PocketTable(
        (
            pocket.Row("a", "b", 0.5, 4, 0.9),
            pocket.Row("c", "d", None, skipped="no file"),
            pocket.Row("e", "f", 1.5, unit="bits per byte", goal=1.7),
        )
    )
    rows = json.loads(table.to_json())["rows"]
    assert [row["reached"] for row in rows] == [False, None, True]
    assert table.cells() == [
        ("a", "b", "50.0%", "4", ">= 90%"),
        ("c", "d", "no file", "", ""),
        ("e", "f", "1.500", "", "< 1.700"),
    ]
    with pytest.raises(KeyError, match="no row"):
        table.row("a", "z")
