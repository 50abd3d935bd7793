"""The tokenizer and the corpus cache of a work folder, made once."""

from __future__ import annotations

import random
from pathlib import Path

from linstate.train.corpus import collect
from linstate.train.lookup import as_text, ask, filler_chunks, make_lookup, real_words
from linstate.train.stream import PocketCache
from linstate.train.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

_SAMPLE = {
    "python": 8_400_000,
    "doc": 3_500_000,
    "test": 600_000,
}  # characters that the tokenizer is trained on
_LONGEST = 40_000
_LOOKUPS = 3000


def prepare(work: Path, vocab_size: int) -> PocketCache:
    """The corpus cache in ``work / "cache"``; trains ``work / "tokenizer.json"`` first if it is not there."""
    documents = list(collect("train"))
    path = work / "tokenizer.json"
    if not path.exists():
        rng = random.Random(0)
        by_kind: dict[str, list[str]] = {kind: [] for kind in _SAMPLE}
        for document in documents:
            by_kind[document.kind].append(document.text)
        sample: list[str] = []
        for kind, budget in _SAMPLE.items():
            texts = rng.sample(by_kind[kind], len(by_kind[kind]))
            while texts and budget > 0:
                sample.append(texts.pop()[:_LONGEST])
                budget -= len(sample[-1])
        filler, words = filler_chunks(by_kind["doc"]), real_words(by_kind["doc"] + by_kind["python"])
        for _ in range(_LOOKUPS):
            lookup = make_lookup(rng, facts=16, filler=filler, words=words)
            sample.append(lookup.text + as_text(ask(rng, lookup)))
        save_tokenizer(train_tokenizer(sample, vocab_size), path)
    return PocketCache.build(work / "cache", load_tokenizer(path), documents)
