"""Passages: the pieces of a text that are found, cut from its token ids so that their places in it are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from linstate.engine.tokens import AnyTokenizer

LONGEST = 96
_ENDS = ("\n", ".", "!", "?", ";")


@dataclass(frozen=True)
class Passage:
    """Tokens ``begin`` to ``end`` of a text, and what they say."""

    begin: int
    end: int
    text: str


def cut(
    ids: Sequence[int], tokenizer: AnyTokenizer, *, begin: int = 0, longest: int = LONGEST
) -> list[Passage]:
    """The passages of ``ids[begin:]``: at most ``longest`` tokens each, ended where a line or sentence does, if one does.

    A cut depends only on the tokens between it and the next one, so a text that grows keeps all its passages but the last.
    """
    made = []
    while begin < len(ids):
        end = min(begin + longest, len(ids))
        if end < len(ids):
            end = begin + _last_end(ids[begin:end], tokenizer)
        made.append(Passage(begin, end, tokenizer.decode(list(ids[begin:end]), skip_special_tokens=False)))
        begin = end
    return made


def _last_end(ids: Sequence[int], tokenizer: AnyTokenizer) -> int:
    """How many of the tokens to take: up to the last end of a line in the second half, else of a sentence, else all."""
    pieces = [tokenizer.decode([id], skip_special_tokens=False) for id in ids]
    for marks in (_ENDS[:1], _ENDS):
        for n in range(len(ids), len(ids) // 2, -1):
            if pieces[n - 1].rstrip(" ").endswith(marks):
                return n
    return len(ids)
