"""Text to token ids and back, piece by piece."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer

from linstate.engine.world_tokenizer import WorldTokenizer
from linstate.errors import CheckpointError

_PIECE = 1 << 16
_WINDOW = 1 << 12
_LONGEST = 1 << 20
_CUT = re.compile(r"(?<=[^\W_])(?=[ \n][^\W_])")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a ``tokenizer.json``; special tokens inside a text are read as plain text. Raises CheckpointError."""
    try:
        tokenizer = Tokenizer.from_str(Path(path).read_text("utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(
            f"{path}: expected a tokenizer.json of the tokenizers library ({error})"
        ) from error
    tokenizer.encode_special_tokens = True
    return tokenizer


AnyTokenizer = Tokenizer | WorldTokenizer
VOCABULARY = "*vocab*.txt"
"""What the vocabulary of RWKV's World models is called."""


def tokenizer_of(folder: Path) -> AnyTokenizer:
    """The tokenizer in a model's folder: ``tokenizer.json``, or the vocabulary of RWKV's World models. Raises CheckpointError."""
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder / "tokenizer.json")
    found = sorted(folder.glob(VOCABULARY))
    if len(found) != 1:
        raise CheckpointError(
            f"the model folder {folder} has no tokenizer.json; transformers writes one:"
            " AutoTokenizer.from_pretrained(...).save_pretrained(folder)."
            f" A World model of RWKV needs its vocabulary there, one file {VOCABULARY}; found {len(found)}"
        )
    return WorldTokenizer.load(found[0])


_ANCHOR = "a"
_SHORT = 4096


def encode(tokenizer: AnyTokenizer, text: str, *, goes_on: bool = False) -> list[int]:
    """Token ids of a text, no special tokens added.

    Args:
        goes_on: the text goes on behind a word, so what the tokenizer puts before a text (a space) is not wanted.
    """
    if (
        goes_on
        and isinstance(tokenizer, Tokenizer)
        and any(
            encode(tokenizer, _ANCHOR + then) != encode(tokenizer, _ANCHOR) + encode(tokenizer, then)
            for then in (" b", "\nb")
        )
    ):
        found = tokenizer.encode(_ANCHOR + text, add_special_tokens=False)
        return [token for token, (_, end) in zip(found.ids, found.offsets, strict=True) if end > len(_ANCHOR)]
    if len(text) > _SHORT and isinstance(tokenizer, Tokenizer):
        # Without offsets, and without Python's lock: other threads go on meanwhile.
        return list(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def encode_at_most(
    tokenizer: AnyTokenizer, text: str, most: int, *, goes_on: bool = False
) -> list[int] | None:
    """:func:`encode`, or None where there are more than ``most`` tokens: found out in pieces, so a text that is refused costs
    no more than one that is not."""
    if strips(tokenizer):  # what stands beside a special token may be cut only with it
        found = encode(tokenizer, text, goes_on=goes_on)
        return found if len(found) <= most else None
    found = []
    for piece in pieces(text):
        found += encode(tokenizer, piece, goes_on=goes_on or bool(found))
        if len(found) > most:
            return None
    return found


def strips(tokenizer: AnyTokenizer) -> bool:
    """Whether a special token takes the blanks beside it along."""
    return isinstance(tokenizer, Tokenizer) and any(
        token.lstrip or token.rstrip for token in tokenizer.get_added_tokens_decoder().values()
    )


def with_special_tokens(tokenizer: AnyTokenizer) -> AnyTokenizer:
    """The same tokenizer, to which the text of a special token is that token."""
    if isinstance(tokenizer, WorldTokenizer):
        return tokenizer
    made = Tokenizer.from_str(tokenizer.to_str())
    made.encode_special_tokens = False
    return made


def first_tokens(tokenizer: AnyTokenizer) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts before every text (a begin of text); most have none."""
    whole, bare = (tokenizer.encode(_ANCHOR, add_special_tokens=added).ids for added in (True, False))
    for begin in range(len(whole) - len(bare) + 1):
        if whole[begin : begin + len(bare)] == bare:
            return tuple(whole[:begin])
    return ()


def pieces(text: str | Iterable[str]) -> Iterator[str]:
    """A text, or the parts that it comes in, cut where tokenizers cut: the ids of all pieces are the ids of the whole.

    A piece ends between a word and the space or newline before the next word. A text without such a place is cut
    after a million characters, wherever that is. Where a piece ends depends on the text behind its begin alone, not on
    the parts: who begins anew where a piece began gets the same pieces.
    """
    held = ""
    for part in [text] if isinstance(text, str) else text:
        held += part
        while len(held) >= 2 * _PIECE:
            cut = _last_cut(held[:_LONGEST])
            if cut == 0 and len(held) < _LONGEST:
                break
            yield held[: cut or _LONGEST]
            held = held[cut or _LONGEST :]
    if held:
        yield held


def _last_cut(text: str) -> int:
    """The last place within a piece's length that ends a piece, or else the first one behind it; 0 if there is none."""
    for begin in range(_PIECE - _WINDOW, -1, -_WINDOW):
        if places := [found.start() for found in _CUT.finditer(text, begin, begin + _WINDOW)]:
            return places[-1]
    found = _CUT.search(text, _PIECE)
    return found.start() if found else 0
