"""The tokenizer of RWKV's World models: the longest token that matches, from left to right, over the bytes of UTF-8.

Its vocabulary is a text file, a line for each token: its id, the token as a Python string or bytes literal, and how many
bytes it has.

Source: github.com/BlinkDL/ChatRWKV, ``tokenizer/rwkv_tokenizer.py`` and ``rwkv_vocab_v20230424.txt``.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from linstate.errors import CheckpointError

END = 0
"""The id that ends a text; no token has it."""


class Encoding(NamedTuple):
    """The token ids of a text."""

    ids: list[int]


class WorldTokenizer:
    """See the module. It has the methods of the tokenizers library that Linstate calls.

    >>> lines = [f"{byte + 1} {bytes([byte])!r} 1" for byte in range(256)] + ["257 'ab' 2", "258 'abcd' 4"]
    >>> tokenizer = WorldTokenizer("\\n".join(lines), "a vocabulary")
    >>> tokenizer.encode("abcabcd").ids
    [257, 100, 258]
    >>> tokenizer.decode([257, 100, 258])
    'abcabcd'

    Args:
        text: the vocabulary. where: what errors call it.

    Raises:
        CheckpointError: a line that is none, a token or an id that comes twice, or a byte without a token.
    """

    def __init__(self, text: str, where: str) -> None:
        self._text = text
        self._tokens: dict[int, bytes] = {}
        self._ids: dict[bytes, int] = {}
        lengths: dict[bytes, set[int]] = {}
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            index, token = _entry(line, f"{where}, line {number}")
            if index in self._tokens or token in self._ids:
                raise CheckpointError(f"{where}, line {number}: token {token!r} or id {index} comes twice")
            self._tokens[index], self._ids[token] = token, index
            lengths.setdefault(token[:2], set()).add(len(token))
        if missing := [byte for byte in range(256) if bytes([byte]) not in self._ids]:
            raise CheckpointError(
                f"{where} has no token for the byte {missing[0]:#04x}: some text could not be read"
            )
        self._lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}

    @classmethod
    def load(cls, path: Path) -> WorldTokenizer:
        """Read a vocabulary. Raises CheckpointError."""
        try:
            return cls(path.read_text("utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read as a vocabulary: {error}") from error

    def encode(self, sequence: str, *, add_special_tokens: bool = False) -> Encoding:
        """The ids of a text; there are no special tokens to add."""
        data, ids, at = sequence.encode(), [], 0
        while at < len(data):
            for length in self._lengths.get(data[at : at + 2], ()):
                found = self._ids.get(data[at : at + length])
                if found is not None:
                    break
            else:
                found, length = self._ids[data[at : at + 1]], 1
            ids.append(found)
            at += length
        return Encoding(ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids; what is no UTF-8 (yet), and ids of no token, become U+FFFD."""
        end = b"" if skip_special_tokens else b"<|endoftext|>"
        pieces = (end if index == END else self._tokens.get(index, b"\xff") for index in ids)
        return b"".join(pieces).decode("utf-8", errors="replace")

    def get_vocab_size(self) -> int:
        """One more than the highest id."""
        return max(self._tokens) + 1

    def to_str(self, *, pretty: bool = False) -> str:
        """The vocabulary, as it was read."""
        return self._text


def _entry(line: str, where: str) -> tuple[int, bytes]:
    """Id and token of a line. Raises CheckpointError."""
    try:
        (index, rest), length = line.split(" ", 1), line.rsplit(" ", 1)[1]
        token = ast.literal_eval(rest.rsplit(" ", 1)[0].strip())
        token = token.encode() if isinstance(token, str) else token
        if not isinstance(token, bytes) or len(token) != int(length) or not token:
            raise ValueError(f"a token of {length} bytes")
        return int(index), token
    except (ValueError, SyntaxError, IndexError) as error:
        raise CheckpointError(
            f"{where}: expected an id, a token as a Python literal and its number of bytes, found {line[:60]!r}"
        ) from error
