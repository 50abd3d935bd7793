"""The stream: one order for one seed, resumed and sharded at no cost, and labels on the answers only."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from linstate.engine.tokens import encode
from linstate.errors import ArgumentError, InputError
from linstate.train import stream as module
from linstate.train.corpus import Document
from linstate.train.stream import IGNORED, PocketCache, PocketStream
from linstate.train.tokenizer import train_tokenizer

CODE = "".join(
    f"def function_{n}(value):\n    '''Returns the value number {n}.'''\n    return value + {n}\n\n"
    for n in range(150)
)
DOCUMENTS = [
    Document("a.py", "python", CODE),
    Document("t.py", "test", "assert " + CODE),
    Document("r", "doc", CODE[::2]),
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    tokenizer = train_tokenizer([CODE, "? key: value\n" * 50], 400)
    return PocketCache.build(tmp_path_factory.mktemp("cache"), tokenizer, DOCUMENTS), tokenizer


def _stream(parts, **options):
    cache, tokenizer = parts
    return PocketStream(cache, tokenizer, **{"total": 400, "lengths": ((0.0, 256),), **options})


def _take(stream, count):
    return list(itertools.islice(iter(stream), count))


def _same(a, b):
    return all(torch.equal(a[name], b[name]) for name in ("input_ids", "labels"))


def test_the_same_seed_gives_the_same_stream_and_another_seed_another(parts):
    first, again, other = (_take(_stream(parts, seed=seed), 12) for seed in (3, 3, 4))
    assert all(_same(a, b) for a, b in zip(first, again, strict=True))
    assert not any(_same(a, b) for a, b in zip(first, other, strict=True))
    assert len({tuple(e["input_ids"].tolist()) for e in first}) == 12
    lookups = [
        _stream(parts, seed=seed, p_lookup=1.0).example(7)["input_ids"][:60].tolist() for seed in (3, 4)
    ]
    assert lookups[0] != lookups[1]


def test_a_resumed_stream_is_the_uninterrupted_one(parts):
    whole = _take(_stream(parts), 24)
    resumed = _take(_stream(parts, start=17), 7)
    assert all(_same(a, b) for a, b in zip(whole[17:], resumed, strict=True))


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_deal_out_the_same_batches_in_the_same_order(parts, workers, monkeypatch):
    batch, count = 4, 24
    whole = _take(_stream(parts, batch=batch), count)
    shards = []
    for worker in range(workers):
        info = SimpleNamespace(id=worker, num_workers=workers)
        monkeypatch.setattr(module, "get_worker_info", lambda info=info: info)
        shards.append(_take(_stream(parts, batch=batch), count // workers))
    dealt = []
    for number in range(count // batch):
        at = number // workers * batch
        dealt += shards[number % workers][at : at + batch]
    assert all(_same(a, b) for a, b in zip(whole, dealt, strict=True))


def test_shapes_types_and_labels_aligned(parts):
    for example in _take(_stream(parts), 30):
        ids, labels = example["input_ids"], example["labels"]
        assert ids.shape == labels.shape == (256,)
        assert ids.dtype == labels.dtype == torch.int64
        assert bool(((labels == ids) | (labels == IGNORED)).all())
        assert bool((labels != IGNORED).any())


def test_length_follows_the_schedule_in_whole_batches(parts):
    stream = _stream(parts, total=100, batch=8, lengths=((0.0, 64), (0.5, 128)))
    lengths = [len(e["input_ids"]) for e in _take(stream, 72)]
    assert lengths == [64] * 56 + [128] * 16  # 50 is inside a batch: the next one changes


def test_only_answers_are_learned_in_lookup_examples(parts):
    _, tokenizer = parts
    seen = 0
    for example in _take(_stream(parts, p_lookup=1.0, p_document=0.0), 40):
        ids, labels = example["input_ids"].tolist(), example["labels"].tolist()
        runs = [
            [at for at, _ in group]
            for learned, group in itertools.groupby(enumerate(labels), lambda pair: pair[1] != IGNORED)
            if learned
        ]
        for run in runs:
            before = tokenizer.decode(ids[: run[0]], skip_special_tokens=False)
            if not re.search(r"\n\? [^\n]*:$", before):  # the rest of an example is plain text
                assert run[-1] == 255 and len(run) < 80
                continue
            text = tokenizer.decode([ids[at] for at in run], skip_special_tokens=False)
            value = text.split("\n")[0].strip()
            assert text.startswith(f" {value}\n") and value in before
            assert run[-1] == 255 or ids[run[-1] + 1] == 1 or text == f" {value}\n"
            seen += 1
    assert seen > 100


def test_plain_examples_are_windows_of_the_corpus_learned_whole(parts):
    cache, tokenizer = parts
    for example in _take(_stream(parts, p_lookup=0.0, mixture=(1.0, 0.0, 0.0)), 10):
        assert torch.equal(example["input_ids"], example["labels"])
        assert tokenizer.decode(example["input_ids"].tolist()) in CODE
    assert cache.tokens["python"][-1] == 1 and cache.tokens["python"].dtype == "uint16"


def test_plain_windows_cover_the_corpus_evenly(parts):
    stream = _stream(parts, p_lookup=0.0, mixture=(1.0, 0.0, 0.0))
    starts = {CODE.find(parts[1].decode(e["input_ids"].tolist())) * 8 // len(CODE) for e in _take(stream, 40)}
    assert len(starts) >= 7


def test_documents_are_learned_when_asked_for(parts):
    def share(p_document):
        stream = _stream(parts, p_lookup=1.0, p_document=p_document)
        return sum(float((e["labels"] != IGNORED).float().mean()) for e in _take(stream, 20)) / 20

    assert share(1.0) > share(0.0) + 0.2


def test_documents_grow_with_progress(parts):
    def facts(start):
        stream = _stream(parts, p_lookup=1.0, start=start, lengths=((0.0, 2048),))
        ends = [e["input_ids"].tolist().count(1) for e in _take(stream, 10)]
        return sum(ends) / 10

    assert facts(0) > 2 * facts(390)  # many short documents first, few long ones last


def test_emphasis_draws_documents_of_a_style(parts):
    rng = random.Random(0)
    stream = _stream(parts, emphasis={"sentences": 0.7, "json": 0.3})
    styles = Counter(stream._document(rng, 1.0, 200, 0).style for _ in range(60))
    assert set(styles) == {"sentences", "json"} and styles["sentences"] > styles["json"]
    assert len({_stream(parts)._document(rng, 1.0, 200, 0).style for _ in range(30)}) > 5


def test_the_cache_is_reused_and_rebuilt_for_another_tokenizer(parts, tmp_path):
    _, tokenizer = parts
    PocketCache.build(tmp_path, tokenizer, DOCUMENTS)
    assert len(PocketCache.build(tmp_path, tokenizer, []).tokens["python"]) > 0  # not built again
    other = train_tokenizer([CODE], 300)
    rebuilt = PocketCache.build(tmp_path, other, DOCUMENTS)
    assert rebuilt.tokens["python"].tolist() == [*encode(other, CODE), 1]
    (tmp_path / "meta.json").unlink()
    with pytest.raises(InputError, match="cache"):
        PocketCache(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"start": 3, "batch": 2},
        {"total": 0},
        {"p_lookup": 1.5},
        {"lengths": ((0.5, 64),)},
        {"lengths": ((0.0, 8),)},
        {"emphasis": {"novel": 0.1}},
        {"emphasis": {"json": 0.8, "yaml": 0.3}},
    ],
)
def test_bad_arguments_are_refused(parts, options):
    with pytest.raises(ArgumentError):
        _stream(parts, **options)
