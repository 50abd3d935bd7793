"""Files that were sealed again after they were changed: their checksum fits, so every other check has to hold.

A checksum keeps accidents out, not people: anybody can compute it. ``LINSTATE_FUZZ=2000`` tries that many files.
"""

from __future__ import annotations

import json
import os
import random
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from linstate import LanguageModel, ModelConfig, State, mixers
from linstate.errors import LinstateError, StateError, StateFileError, StateMismatchError
from linstate.models import Decoder
from linstate.ops import softmax_attention
from linstate.ops.softmax_attention import KVCache
from linstate.state import artifact
from small_models import TEXT, build, tokenizer

TRIES = int(os.environ.get("LINSTATE_FUZZ", "150"))
NONSENSE: list[Any] = [
    "",
    "é",
    "²",
    "-1",
    "5",
    "1e400",
    "nan",
    "true",
    "null",
    "[]",
    "{}",
    "9" * 400,
    "zz" * 32,
    "[" * 3000,
    '{"a": ' * 3000,
    "\ud800",
    '["a", 1, null]',
    '{"x": []}',
    str(2**62),
]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=tokenizer().get_vocab_size(),
        d_model=32,
        pattern=("gated_deltanet", "attention", "sliding_window", "memory_of_states", "mla"),
        options={"sliding_window": {"window": 9}, "memory_of_states": {"segment": 8, "slots": 2}},
    )
    return LanguageModel(Decoder(config).eval(), tokenizer(), name="sealed", grid=16)


@pytest.fixture(scope="module")
def file(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sealed") / "a.state"
    model.read(TEXT[:300], model.empty_state(keep_tokens=True)).save(path)
    return path


def other(tensor: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """The tensor in another shape, dtype or with other numbers."""
    wild = [10**9, -1, 2**62, 7, 0]
    kinds: list[Any] = [
        lambda t: t.reshape(-1),
        lambda t: t[..., :0] if t.dim() else t,
        lambda t: t[None],
        lambda t: torch.cat([t, t], dim=-1) if t.dim() else t,
        lambda t: torch.cat([t, t], dim=min(1, t.dim() - 1)) if t.dim() else t,
        lambda t: t.to(draw.choice([torch.float64, torch.int64, torch.int8, torch.bfloat16, torch.bool])),
        lambda t: torch.full_like(t, draw.choice(wild)) if t.dtype == torch.int64 else -t,
        lambda t: torch.full_like(t, draw.choice(wild)) if t.dtype == torch.int64 else t * 1e30,
    ]
    changed: torch.Tensor = draw.choice(kinds)(tensor)
    return changed.contiguous()


def change(found: artifact.Artifact, draw: random.Random) -> None:
    """One thing of an artifact, other than it was."""
    kind = draw.randrange(6)
    if kind <= 1:
        found.metadata[draw.choice(sorted(found.metadata))] = draw.choice(NONSENSE)
    elif kind == 2:
        key = draw.choice(["notes", "dtypes", "model", "layers", "lineage", "calls"])
        try:
            held = json.loads(found.metadata[key])
        except (ValueError, RecursionError, KeyError):  # changed before
            held = None
        if isinstance(held, dict) and held:
            held[draw.choice(sorted(held))] = draw.choice([5, None, [], "", True, {"a": 1}, "float3"])
        else:
            held = draw.choice([5, None, ["a", 1], [True], [-1], [2**70], "text"])
        found.metadata[key] = json.dumps(held)
    elif kind == 3:
        found.tensors.pop(draw.choice(sorted(found.tensors)))
    elif kind == 4:
        name = draw.choice(sorted(found.tensors))
        found.tensors[name] = other(found.tensors[name], draw)
    else:
        name = (
            draw.choice(["places/", "scale/", "state/"])
            + draw.choice(sorted(found.tensors)).partition("/")[2]
        )
        found.tensors[name] = draw.choice(
            [torch.tensor([10**9]), torch.ones(1, 4000), torch.tensor([-5]), torch.ones(1)]
        )


def test_whatever_was_sealed_again_is_refused_in_a_sentence_or_goes_on(
    model: LanguageModel, file: Path, tmp_path: Path
) -> None:
    refused = 0
    for number in range(TRIES):
        draw, path = random.Random(number), tmp_path / "b.state"
        found = artifact.read(file)
        for _ in range(draw.choice([1, 1, 2])):
            change(found, draw)
        try:
            artifact.write(path, found.metadata, found.tensors)
        except (LinstateError, UnicodeError):  # it cannot even be written
            continue
        try:
            state = model.load_state(path)
        except StateError as error:
            refused += 1
            assert len(str(error)) < 700 and "Traceback" not in str(error)
            continue
        model.append(list(range(1, 20)), state)  # what was taken can be gone on from
    assert refused > TRIES / 2


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("layers.1.mixer.length", 10**9),
        ("layers.1.mixer.length", -1),
        ("layers.2.mixer.length", 9),
        ("layers.3.mixer.count", 10**12),
        ("layers.3.mixer.filled", 3),
        ("layers.4.mixer.position", -5),
    ],
)
def test_whole_numbers_of_a_state_are_held_against_the_model(
    model: LanguageModel, file: Path, tmp_path: Path, place: str, value: int
) -> None:
    state = model.load_state(file)
    tensors = {**state.tensors, place: torch.full_like(state.tensors[place], value)}
    replace(state, tensors=tensors).save(tmp_path / "x.state")
    with pytest.raises(StateMismatchError, match=place):
        model.load_state(tmp_path / "x.state")


def test_a_small_file_asks_for_no_large_memory(model: LanguageModel, tmp_path: Path) -> None:
    state = model.read(TEXT[:300])
    state.save(tmp_path / "a.state", precision="int8")
    found = artifact.read(tmp_path / "a.state")
    name = next(n for n in found.tensors if n.startswith("scale/"))
    found.tensors[name] = torch.ones(500_000, *[1] * (found.tensors[name].dim() - 1))
    artifact.write(tmp_path / "b.state", found.metadata, found.tensors)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for load in (model.load_state, State.load):
        with pytest.raises(StateError):
            load(tmp_path / "b.state")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # kB
    assert grown < 4 * (tmp_path / "b.state").stat().st_size / 1024


@pytest.mark.parametrize("length", [10**9, -1, 5])
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_public_op_refuses_lengths_that_its_cache_does_not_have(length: int, tokens: int) -> None:
    q, cache = torch.randn(1, tokens, 2, 8), torch.randn(1, 4, 2, 8)
    with pytest.raises(LinstateError, match=r"length must lie in \[0, 4\]"):
        softmax_attention(q, q, q, initial_state=KVCache(cache, cache, torch.tensor([length])))


@pytest.mark.parametrize("name", sorted(mixers.names()))
def test_every_whole_number_of_a_mixers_state_has_a_range(name: str) -> None:
    decoder = Decoder(ModelConfig(vocab_size=32, d_model=64, pattern=(name,), in_place_ttt={"chunk": 8}))
    _, state = decoder(torch.arange(20)[None] % 30)
    decoder.state_table.check(state, name)
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            wrong = {**state, key: torch.full_like(tensor, -1)}
            with pytest.raises(StateMismatchError, match=key):
                decoder.state_table.check(wrong, name)


def test_a_state_of_other_layers_or_tokens(model: LanguageModel, file: Path, tmp_path: Path) -> None:
    state = model.load_state(file)
    for odd in (replace(state, layers=state.layers[::-1]), replace(state, tail=(10**6, *state.tail[1:]))):
        odd.save(tmp_path / "x.state")
        with pytest.raises(StateMismatchError, match="layers or token ids"):
            model.load_state(tmp_path / "x.state")


def test_deep_json_in_a_header(file: Path) -> None:
    blob = b'{"a":' * 100_000
    file2 = file.with_name("deep.state")
    file2.write_bytes(len(blob).to_bytes(8, "little") + blob)
    with pytest.raises(StateFileError, match="header"):
        State.load(file2)


def test_what_a_model_reads_is_held_too() -> None:
    model = build("delta")
    assert model.accept(model.read(TEXT), "x").position > 0
