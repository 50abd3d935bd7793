"""The pocket model's training stream: plain text and lookup examples, in one order for one seed.

Example number ``index`` depends on ``(seed, index)`` alone, so a stream starts anywhere at once, and
any number of workers deals out the same batches in the same order.

A lookup example holds one or more lookup documents, each followed by questions. Only the answers are
learned (label -100 elsewhere): in a document of random strings there is nothing else to learn. The
documents grow with progress: a few facts close to their questions first, ``facts`` of them over the
whole length at the end.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset, get_worker_info

from linstate.engine.asking import answer_text, question_prompt
from linstate.engine.tokens import encode
from linstate.errors import ArgumentError, InputError
from linstate.train.corpus import Document, collect
from linstate.train.drill import make_drill, single_token_words
from linstate.train.lookup import STYLES, Lookup, ask, filler_chunks, make_lookup, real_words
from linstate.train.tokenizer import END_ID, encode_documents

__all__ = ["IGNORED", "PocketCache", "PocketStream"]

IGNORED = -100  # the label that the loss leaves out
_FORMAT = 1
_KINDS = ("python", "test", "doc")
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
_CHARS_PER_TOKEN = 1.9  # of lookup documents under the pocket tokenizer
_QUESTION_TOKENS = 22


class PocketCache:
    """The corpus as token ids on disk, with the pieces that lookup documents are filled with.

    A folder of ``python.npy``, ``test.npy``, ``doc.npy`` (``[T]`` uint16, documents separated by
    ``<|end|>``), ``text.json`` (filler pieces and real words) and ``meta.json``.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Opens a cache; the ids stay on disk (memory map).

        Raises:
            InputError: the folder holds no cache, or one of another format.
        """
        self.folder = Path(folder)
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            text = json.loads((self.folder / "text.json").read_text(encoding="utf-8"))
            self.tokens = {kind: np.load(self.folder / f"{kind}.npy", mmap_mode="r") for kind in _KINDS}
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: expected a corpus cache; build it first: {error}") from error
        if self.meta.get("format") != _FORMAT:
            raise InputError(f"{folder}: expected cache format {_FORMAT}, found {self.meta.get('format')}")
        self.filler: list[str] = text["filler"]
        self.words: list[str] = text["words"]

    @classmethod
    def build(
        cls, folder: str | os.PathLike[str], tokenizer: Tokenizer, documents: Iterable[Document] | None = None
    ) -> PocketCache:
        """Opens the cache of this tokenizer, and makes it first if it is not there (about a minute).

        ``documents`` is the training split of the corpus by default. ``meta.json`` is written last,
        so a build that was interrupted is done again.
        """
        path = Path(folder)
        mark = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
        try:
            existing = cls(path)
            if existing.meta.get("tokenizer") == mark:
                return existing
        except InputError:
            pass
        path.mkdir(parents=True, exist_ok=True)
        (path / "meta.json").unlink(missing_ok=True)
        texts: dict[str, list[str]] = {kind: [] for kind in _KINDS}
        for document in documents if documents is not None else collect("train"):
            texts[document.kind].append(document.text)
        sizes = {}
        for kind in _KINDS:
            ids = encode_documents(tokenizer, texts[kind])
            np.save(path / f"{kind}.npy", ids)
            sizes[kind] = len(ids)
        prose = [*texts["doc"], *texts["python"]]
        chunks = filler_chunks(prose)
        random.Random(0).shuffle(chunks)
        words = real_words(prose)
        text = {"filler": chunks[:30_000], "words": words}
        (path / "text.json").write_text(json.dumps(text, ensure_ascii=False), encoding="utf-8")
        meta = {"format": _FORMAT, "tokenizer": mark, "tokens": sizes}
        (path / "meta.json").write_text(json.dumps(meta, indent=1))
        return cls(path)


class PocketStream(IterableDataset):
    """Yields ``{"input_ids": [T] int64, "labels": [T] int64}``; labels equal the ids or are -100.

    The labels stand at the place of their token; a model shifts them, as Hugging Face models do.

    Args:
        cache: the corpus (:class:`PocketCache`).
        tokenizer: the one that the cache was built with.
        total: examples of the whole training; ``index / total`` is the progress of the curriculum.
        lengths: ``(progress, T)`` in rising order of progress; the first must be at 0. T holds for
            whole batches.
        batch: examples in a batch. Worker w of W gives batches w, w + W, ... whole, so a loader with
            this batch size sees the same batches in the same order whatever W is.
        start: index of the first example, a multiple of ``batch``; resuming costs nothing.
        seed: another seed, another stream.
        p_lookup: share of examples that are lookup examples.
        p_drill: share of lookup examples that are drills (:mod:`linstate.train.drill`). drill_parts: most words in
            a key or value of a drill.
        p_document: share of lookup documents whose own text is learned too. even_styles: share of them whose style is drawn
            with equal chances, not by how common it is. emphasis: shares of them that are of a style come what may.
        facts: most facts in a document at the end of the curriculum.
        mixture: weights of ``python``, ``test`` and ``doc`` in plain text.

    Raises:
        ArgumentError: one of these is out of its range.
    """

    def __init__(
        self,
        cache: PocketCache,
        tokenizer: Tokenizer,
        *,
        total: int,
        lengths: Sequence[tuple[float, int]] = ((0.0, 512), (0.3, 1024), (0.6, 2048)),
        batch: int = 1,
        start: int = 0,
        seed: int = 0,
        p_lookup: float = 0.5,
        p_document: float = 0.1,
        even_styles: float = 0.0,
        emphasis: Mapping[str, float] | None = None,
        p_drill: float = 0.0,
        drill_parts: int = 1,
        facts: int = 80,
        mixture: tuple[float, float, float] = (0.7, 0.1, 0.2),
    ) -> None:
        super().__init__()
        if not lengths or lengths[0][0] != 0.0 or list(lengths) != sorted(lengths) or lengths[0][1] < 64:
            raise ArgumentError(
                f"lengths: expected rising (progress, T), the first at 0.0, T >= 64; got {lengths}"
            )
        if total < 1 or batch < 1 or start < 0 or start % batch:
            raise ArgumentError(
                f"expected total >= 1, batch >= 1 and start a multiple of batch; got {total=}, {batch=}, {start=}"
            )
        if not 0.0 <= p_lookup <= 1.0 or facts < 2:
            raise ArgumentError(f"expected p_lookup in [0, 1] and facts >= 2; got {p_lookup=}, {facts=}")
        self.cache, self.tokenizer = cache, tokenizer
        self.total, self.lengths, self.batch, self.start = total, tuple(lengths), batch, start
        self.seed, self.p_lookup, self.p_document, self.facts = seed, p_lookup, p_document, facts
        self.mixture, self.p_drill, self.drill_parts = mixture, p_drill, drill_parts
        self.even_styles, self.emphasis = even_styles, dict(emphasis or {})
        unknown = sorted(set(self.emphasis) - set(STYLES))
        if unknown or sum(self.emphasis.values()) > 1.0:
            raise ArgumentError(
                f"emphasis: expected shares of at most 1 together, of {', '.join(STYLES)}; got {self.emphasis}"
            )
        self.drill_words = single_token_words(tokenizer)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Endless; worker shards as said above."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        self.tokenizer.encode_special_tokens = True
        index = self.start + worker * self.batch
        while True:
            for offset in range(self.batch):
                yield self.example(index + offset)
            index += workers * self.batch

    def length(self, index: int) -> int:
        """T of the example at ``index``: the same for all examples of a batch."""
        progress = (index - index % self.batch) / self.total
        return [length for begin, length in self.lengths if begin <= progress][-1]

    def example(self, index: int) -> dict[str, torch.Tensor]:
        """The example at ``index``, made from ``(seed, index)`` alone."""
        length = self.length(index)
        rng = random.Random(f"{self.seed}:{index}")
        drawn = rng.random()
        if drawn < self.p_lookup * self.p_drill:
            ids, labels = self._drills(rng, length, min(1.0, index / self.total))
        elif drawn < self.p_lookup:
            ids, labels = self._lookup_example(rng, length, min(1.0, index / self.total))
        else:
            ids = self._plain(rng, index, length)
            labels = ids
        return {
            "input_ids": torch.tensor(ids, dtype=torch.int64),  # [T]
            "labels": torch.tensor(labels, dtype=torch.int64),  # [T]
        }

    def _plain(self, rng: random.Random, index: int, length: int) -> list[int]:
        """A window of text. Offsets follow the golden ratio: an epoch covers the corpus evenly."""
        tokens = self.cache.tokens[rng.choices(_KINDS, self.mixture)[0]]
        if len(tokens) <= length:
            tokens = np.resize(tokens, length + 1)
        shift = random.Random(self.seed).random()
        at = int(((index * _GOLDEN + shift) % 1.0) * (len(tokens) - length))
        window: list[int] = tokens[at : at + length].tolist()
        return window

    def _lookup_example(
        self, rng: random.Random, length: int, progress: float
    ) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        long_share = 0.15 + 0.55 * progress
        misses = 0
        while (room := length - len(ids) - 1) >= 64 and misses < 4:
            if rng.random() < long_share:
                share = rng.choice((rng.uniform(0.4, 0.75), rng.uniform(0.4, 0.75), rng.uniform(0.75, 0.95)))
                document_tokens = max(32, int(room * share * 0.7**misses) - _QUESTION_TOKENS)
            else:
                document_tokens = 0
            lookup = self._document(rng, progress, room >> misses, document_tokens)
            document = encode(self.tokenizer, lookup.text)
            if len(document) + _QUESTION_TOKENS > room:  # no question would fit: draw a shorter one
                misses += 1
                continue
            misses = 0
            if ids:
                ids.append(END_ID)
                labels.append(IGNORED)
            self._append(rng, ids, labels, document, ask(rng, lookup), length)
        rest = length - len(ids)
        if rest > 0:
            plain = self._plain(rng, rng.randrange(1 << 20), rest)
            ids += plain
            labels += plain
        return ids[:length], labels[:length]

    def _drills(self, rng: random.Random, length: int, progress: float) -> tuple[list[int], list[int]]:
        """Drills one after another, up to ``length`` tokens."""
        ids: list[int] = []
        labels: list[int] = []
        while len(ids) < length:
            if ids:
                ids.append(END_ID)
                labels.append(IGNORED)
            most = min(4 + 60 * progress, (length - len(ids)) / 16, len(self.drill_words))
            facts = rng.randint(2, max(2, int(most / self.drill_parts**0.5)))
            drill = make_drill(rng, self.drill_words, facts=facts, parts=self.drill_parts)
            document = encode(self.tokenizer, drill.text)
            ids += document
            labels += [IGNORED] * len(document)
            for question, value in drill.asked:
                answer = encode(self.tokenizer, answer_text(value))
                prompt = encode(self.tokenizer, question_prompt(question))
                ids += prompt + answer
                labels += [IGNORED] * len(prompt) + answer
        return ids[:length], labels[:length]

    def _document(self, rng: random.Random, progress: float, room: int, document_tokens: int) -> Lookup:
        """A document for ``room`` tokens: filled up to ``document_tokens``, or short when that is 0."""
        most = 6.0 * (self.facts / 6.0) ** min(1.0, progress / 0.6)
        if document_tokens:
            most = min(most, document_tokens / 13)
            length = int(document_tokens * _CHARS_PER_TOKEN)
        else:
            most = min(most, 24.0, room / 40)
            length = None
        facts = int(2.0 * (max(2.0, most) / 2.0) ** (rng.random() ** 0.7) + 0.5)
        longest = 24 if progress > 0.2 and rng.random() < 0.15 else min(12, 4 + int(60 * progress))
        return make_lookup(
            rng,
            facts=facts,
            length=length,
            style=self._style(rng),
            value_length=(1, longest),
            filler=self.cache.filler,
            words=self.cache.words,
        )

    def _style(self, rng: random.Random) -> str | None:
        """A style that the settings ask for; None leaves it to the document."""
        if self.emphasis:
            drawn = rng.random()
            for style, share in self.emphasis.items():
                if drawn < share:
                    return style
                drawn -= share
        return rng.choice(STYLES) if self.even_styles and rng.random() < self.even_styles else None

    def _append(
        self,
        rng: random.Random,
        ids: list[int],
        labels: list[int],
        document: list[int],
        pairs: list[tuple[str, str]],
        length: int,
    ) -> None:
        """Adds a document and as many questions on it as fit whole."""
        ids += document
        labels += document if rng.random() < self.p_document else [IGNORED] * len(document)
        if rng.random() < 0.1:
            space = min(64, length // 16, length - len(ids) - 2 * _QUESTION_TOKENS)
            gap = self._plain(rng, rng.randrange(1 << 20), rng.randint(1, space)) if space > 0 else []
            ids += gap
            labels += [IGNORED] * len(gap)
        for question, value in pairs[: rng.randint(1, 4) if rng.random() < 0.15 else None]:
            prompt = encode(self.tokenizer, question_prompt(question))
            answer = encode(self.tokenizer, answer_text(value))
            if len(ids) + len(prompt) + len(answer) > length:
                break
            ids += prompt + answer
            labels += [IGNORED] * len(prompt) + answer
