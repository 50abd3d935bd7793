"""The corpus: what is gathered, what is left out, and a held-out part that training never meets."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from linstate.train.corpus import Document, collect, held_out_python, is_held_out, standard_library

NAMES = [f"module{number}.py" for number in range(40)]


def _source(name: str) -> str:
    """A module; every other one is too short to be known again by its lines."""
    count = 4 if name[-4] in "02468" else 20
    return "".join(
        f"def {Path(name).stem}_function_number_{n}(argument):\n    return {n}\n" for n in range(count)
    )


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "library"
    root.mkdir()
    for name in NAMES:
        (root / name).write_text(_source(name))
    return root


@pytest.fixture
def papers(tmp_path: Path) -> Path:
    root = tmp_path / "doc"
    root.mkdir()
    return root


def _sources(documents) -> set[str]:
    return {document.source for document in documents}


def test_held_out_and_training_are_disjoint_and_complete(library):
    train = [d for d in collect("train", stdlib=library, doc_roots=()) if d.kind == "python"]
    held = list(collect("held_out", stdlib=library, doc_roots=()))
    assert _sources(held) == {name for name in NAMES if is_held_out(name)}
    assert _sources(train) == set(NAMES) - _sources(held)
    assert 2 <= len(held) <= 20
    assert all(isinstance(d, Document) and d.text == _source(d.source) for d in train + held)


def test_held_out_goes_by_module_name_so_it_is_the_same_everywhere():
    names = [f"{a}/{b}.py" for a in ("asyncio", "json", "email") for b in "abcdefghijklmnopqrstuvwxyz"]
    held = [name for name in names if is_held_out(name)]
    assert 4 <= len(held) <= 32
    assert is_held_out("uuid.py") and not is_held_out("textwrap.py")  # fixed: a shipped model depends on it
    assert all(is_held_out(n) == is_held_out(n.replace(".py", "/__init__.py")) for n in names)


def test_a_training_document_that_repeats_a_held_out_one_is_dropped(library, papers):
    held = next(name for name in NAMES if is_held_out(name) and len(_source(name)) > 1000)
    (library / "test").mkdir()
    (library / "test" / "copy.py").write_text("import os\n" + _source(held))
    (library / "test" / "own.py").write_text(_source("own.py"))
    (papers / "README").write_text(_source(held))
    found = list(collect("train", stdlib=library, doc_roots=(papers,)))
    assert "test/copy.py" not in _sources(found) and "doc/README" not in _sources(found)
    assert next(d for d in found if d.source == "test/own.py").kind == "test"


def test_tests_and_installed_packages_are_never_held_out(library):
    for folder in ("test", "json/tests", "site-packages/other"):
        (library / folder).mkdir(parents=True)
        for name in NAMES:
            (library / folder / name).write_text(
                _source(f"{folder.replace('/', '_').replace('-', '_')}_{name}")
            )
    held = _sources(collect("held_out", stdlib=library, doc_roots=()))
    train = _sources(collect("train", stdlib=library, doc_roots=()))
    assert not any("/" in source for source in held)
    assert {f"test/{name}" for name in NAMES} <= train
    assert not any(source.startswith("site-packages") for source in train | held)


def test_what_the_evaluation_asks_about_is_left_out(library, papers):
    ports = "".join(f"service{n}\t{n}/tcp\n" for n in range(30)) + "x" * 200
    capitals = "Kenya: Nairobi, Nepal: Kathmandu, Iceland: Reykjavik, Estonia: Tallinn. " * 5
    good = "A text about nothing in particular, long enough to be kept by the collector. " * 5
    for name, text in {
        "README.list": ports,
        "NEWS": capitals,
        "services.txt": good + "1",
        "iso-3166.txt": good + "2",
        "README.kept": good + "3",
    }.items():
        (papers / name).write_text(text)
    found = {
        d.source for d in collect("train", stdlib=library, doc_roots=(papers,)) if d.source.startswith("doc/")
    }
    assert found == {"doc/README.kept"}


def test_packed_files_are_read_and_what_is_no_text_is_skipped(library, papers):
    text = "Plain words that were packed, and then a few more of them, so that it is kept. " * 4
    (papers / "NEWS.gz").write_bytes(gzip.compress(text.encode()))
    (papers / "README.bad").write_bytes(b"\xff\xfe\x00\x01" * 100)
    (papers / "README.cut.gz").write_bytes(gzip.compress(text.encode())[:20])
    (papers / "README.link").symlink_to(papers / "NEWS.gz")
    found = {
        d.source: d.text
        for d in collect("train", stdlib=library, doc_roots=(papers, papers / "missing"))
        if d.source.startswith("doc/")
    }
    assert found == {"doc/NEWS.gz": text.strip("\n") + "\n"}


def test_a_shared_paragraph_is_kept_once(library, papers):
    licence = "Permission is granted to do as one likes, as long as one likes what one does with it all."
    for number in range(3):
        (papers / f"README.{number}").write_text(f"{f'Own words of file {number}. ' * 12}\n\n{licence}\n")
    texts = [
        d.text for d in collect("train", stdlib=library, doc_roots=(papers,)) if d.source.startswith("doc/")
    ]
    assert len(texts) == 3
    assert sum(licence in text for text in texts) == 1


def test_held_out_bytes_are_stable_and_cut_to_size(library):
    whole = held_out_python(stdlib=library)
    assert held_out_python(500, stdlib=library) == whole[:500]
    assert len(whole) == sum(len(d.text) for d in collect("held_out", stdlib=library))


def test_a_folder_without_sources_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no Python source"):
        list(collect("train", stdlib=tmp_path))


def test_this_machine_has_a_library():
    assert (standard_library() / "json" / "decoder.py").is_file()
