"""Sources as streams of pieces: to begin where a piece begins is to have begun at the start."""

from __future__ import annotations

import io

import pytest

from cli.conftest import prose
from linstate.cli import sources
from linstate.engine import tokens
from linstate.errors import InputError

TEXTS = {
    "prose": prose(4000).encode(),
    "odd bytes": prose(900).encode() + bytes(range(128, 256)) * 3 + prose(900, seed=1).encode(),
    "no place to cut": "é€ß".encode() * 900,
    "few places to cut": (b"x" * 330 + b" y\n") * 9 + b"-" * 2000,
    "a place to cut just behind the longest piece": (b"x" * 720 + b" y\n") * 5,
    "a mark": b"\xef\xbb\xbf" + prose(2000).encode(),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(tokens, "_PIECE", 200)
    monkeypatch.setattr(tokens, "_WINDOW", 50)
    monkeypatch.setattr(tokens, "_LONGEST", 700)


def pieces(data: bytes, at: int = 0, chunk: int = 100, separate: bool = False) -> list[sources.Piece]:
    digest = sources.new_digest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_CHUNK", chunk)
        found = list(sources.stream(io.BytesIO(data), at, digest, separate=separate))
    expected = sources.new_digest()
    expected.update(data[:at])
    assert digest.digest() == expected.digest()
    return found


@pytest.mark.parametrize("name", TEXTS)
def test_pieces_do_not_depend_on_chunks_or_on_where_one_begins(name):
    data = TEXTS[name]
    whole = pieces(data)
    assert b"".join(piece.data for piece in whole) == data and len(whole) > 3
    at = 0
    for number, piece in enumerate(whole):
        for chunk in (37, 4096):
            assert pieces(data, at, chunk) == whole[number:]
        at += len(piece.data)


def test_text_is_utf8_with_one_replacement_for_each_byte_that_is_none():
    (piece,) = pieces(b"\xef\xbb\xbfa\xff\xc3(\xc3\xa9")
    assert (piece.text, piece.replaced) == ("a\ufffd\ufffd(é", 2)


def test_a_separator_is_text_but_no_byte_of_the_source():
    (piece,) = pieces(b"\xef\xbb\xbfabc", separate=True)
    assert (piece.text, piece.data) == ("\n\nabc", b"\xef\xbb\xbfabc")
    assert pieces(b"", separate=True) == []


def test_a_source_that_is_too_short_has_no_pieces():
    digest = sources.new_digest()
    assert list(sources.stream(io.BytesIO(b"abc"), 5, digest, separate=False)) == []


def test_standard_input_is_read_once():
    assert [s.name for s in sources.find(["-"], print)] == ["-"]
    with pytest.raises(InputError, match="only once"):
        sources.find(["-", "-"], print)
