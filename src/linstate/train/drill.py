"""Drills: the bare skill of recall, with as little around it as possible.

A lookup document teaches the matching of a key once in some thirty tokens (the first token of an answer; the others follow
from it). A drill has keys and values of one token each, later of a few, and asks for every fact, some several times: a
lesson every eight tokens. Recall forms on drills first and is carried over to real documents (``docs/log.md`` has the runs).
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
    "{0} comes with {2} {1}.\n",
    "The {2} of {0} is {1}. ",
)
"""Key, value, and any word."""
_WORD = re.compile(r"[A-Za-z]{2,}|[0-9]")


def single_token_words(tokenizer: Tokenizer) -> list[str]:
    """Words of letters that are one token wherever they stand, sorted."""
    words = (word for word in tokenizer.get_vocab() if _WORD.fullmatch(word))
    return sorted(word for word in words if len(tokenizer.encode(word, add_special_tokens=False).ids) == 1)


def make_drill(rng: random.Random, words: Sequence[str], *, facts: int, parts: int = 1) -> Lookup:
    """Facts in one form, keys and values of at most ``parts`` words; ``asked`` repeats some of them."""
    keys = rng.sample(words, facts) if parts == 1 else _distinct(rng, words, facts, parts)
    pairs = [(key, _joined(rng, words, parts)) for key in keys]
    form = rng.choice(FORMS)
    text = "".join(form.format(key, value, rng.choice(words)) for key, value in pairs)
    questions = [pair for pair in pairs for _ in range(rng.choice((1, 1, 2, 3)))]
    rng.shuffle(questions)
    return Lookup(text, pairs, "drill", questions)


def _joined(rng: random.Random, words: Sequence[str], parts: int) -> str:
    """One to ``parts`` words, or digits, with a mark between them or none."""
    if parts > 1 and rng.random() < 0.25:
        return str(rng.randrange(10 ** rng.randint(1, parts + 1)))
    return rng.choice(("", "", "_", "-", " ", ".", "/")).join(rng.choices(words, k=rng.randint(1, parts)))


def _distinct(rng: random.Random, words: Sequence[str], count: int, parts: int) -> list[str]:
    """``count`` different keys; half of them share a part with another, so that no single token tells them apart."""
    few = rng.sample(words, max(2, count // 2))
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[_joined(rng, few if rng.random() < 0.5 else words, parts)] = None
    return list(keys)
