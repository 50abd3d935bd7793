"""Drills: the bare skill of recall, with as little around it as possible.

A lookup document teaches the matching of a key once in some thirty tokens (the first token of an answer; the others follow
from it). A drill has keys and values of one token each and asks for every fact, some several times: a lesson every eight
tokens. Recall forms on drills first and is carried over to real documents (``docs/log.md`` has the runs).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from tokenizers import Tokenizer

from linstate.train.lookup import Lookup

FORMS = (
    "{}: {}\n",
    "{} = {}\n",
    "{}={}\n",
    "{},{}\n",
    "{}\t{}\n",
    "{}\t\t{}\n",
    "{}   {}\n",
    '"{}": "{}",\n',
    "{} is {}.\n",
    "- {} -> {}\n",
)
_WORD = re.compile(r"[A-Za-z]{2,}|[0-9]")


def single_token_words(tokenizer: Tokenizer) -> list[str]:
    """Words of letters that are one token wherever they stand, sorted."""
    words = (word for word in tokenizer.get_vocab() if _WORD.fullmatch(word))
    return sorted(word for word in words if len(tokenizer.encode(word, add_special_tokens=False).ids) == 1)


def make_drill(rng: random.Random, words: Sequence[str], *, facts: int) -> Lookup:
    """Facts of one-word keys and values in one form; ``asked`` repeats some of them."""
    keys = rng.sample(words, facts)
    pairs = [(key, rng.choice(words)) for key in keys]
    form = rng.choice(FORMS)
    text = "".join(form.format(key, value) for key, value in pairs)
    questions = [pair for pair in pairs for _ in range(rng.choice((1, 1, 2, 3)))]
    rng.shuffle(questions)
    return Lookup(text, pairs, "drill", questions)
