"""Every checkpoint family gives what its library gives, and keeps the laws of states; a new family is found.

The oracle is always the library's forward pass over the whole text: some of its models are wrong when they go on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families.cases import VOCABULARY, Case, all_cases
from linstate import Decoder, LanguageModel
from linstate.errors import LinstateError
from linstate.models.checkpoint import Weights, load_decoder, own_weights, read_json
from linstate.models.families import all_families, find
from linstate.models.families._rules import Redundant, Rule, save
from linstate.models.families._settings import NO_EFFECT, Settings
from oracles.oracle import BOUND, deviation
from small_models import tokenizer

pytestmark = pytest.mark.oracle

TOKENS, CUT, GREEDY, PADDING = 77, 41, 64, 5
CASES = {case.name: case for case in all_cases()}


@dataclass
class Loaded:
    """A case's checkpoint in a folder, what its library says, and our model of it."""

    case: Case
    folder: Path

    @cached_property
    def oracle(self) -> Any:
        return self.case.save(self.folder)

    @cached_property
    def raw(self) -> dict[str, Any]:
        _ = self.oracle
        return read_json(self.folder / "config.json")

    def ours(self, dtype: torch.dtype) -> Decoder:
        return load_decoder(self.folder, self.raw, dtype=dtype).eval()

    @cached_property
    def decoder(self) -> Decoder:
        return self.ours(torch.float32)

    @cached_property
    def tokens(self) -> Tensor:
        return torch.randint(VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(5))

    @cached_property
    def logits(self) -> Tensor:
        """What the library says of the tokens."""
        found: Tensor = self.oracle(self.tokens, torch.float32)
        return found


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    return {name: Loaded(case, tmp_path_factory.mktemp(name)) for name, case in CASES.items()}


@pytest.fixture(params=CASES)
def loaded(request: pytest.FixtureRequest, folders: dict[str, Loaded]) -> Loaded:
    return folders[request.param]


def test_every_family_has_cases(folders: dict[str, Loaded]) -> None:
    tested = {find(loaded.raw, name).__class__ for name, loaded in folders.items()}
    missing = [
        f.__class__.__name__ for f in all_families() if f.__class__ not in tested and f.library != "linstate"
    ]
    assert not missing, f"families without a checkpoint in tests/families: {missing}"


@torch.no_grad()
def test_logits_are_theirs(loaded: Loaded) -> None:
    found, _ = loaded.decoder(loaded.tokens)
    assert deviation(found, loaded.logits) <= BOUND
    narrow, _ = loaded.ours(torch.bfloat16)(loaded.tokens)
    assert deviation(narrow.float(), loaded.oracle(loaded.tokens, torch.bfloat16).float()) <= loaded.case.bf16


@torch.no_grad()
def test_greedy_text_is_theirs(loaded: Loaded) -> None:
    """Each of our tokens is the likeliest that they find behind all tokens before it."""
    text = loaded.tokens[:1, :13]
    logits, state = loaded.decoder(text)
    for _ in range(GREEDY):
        text = torch.cat([text, logits[:, -1:].argmax(-1)], dim=1)
        logits, state = loaded.decoder(text[:, -1:], state)
    theirs = loaded.oracle(text[:, :-1], torch.float32)[:, 12:].argmax(-1)
    assert theirs.tolist() == text[:, 13:].tolist()
    assert len(set(text[0, 13:].tolist())) > 3, "a text that repeats itself shows little"


@torch.no_grad()
def test_pieces_and_padding_change_nothing(loaded: Loaded) -> None:
    first, state = loaded.decoder(loaded.tokens[:, :CUT])
    middle, after = loaded.decoder(loaded.tokens[:, CUT:-1], state)
    last, _ = loaded.decoder(loaded.tokens[:, -1:], after)
    assert deviation(torch.cat([first, middle, last], dim=1), loaded.logits) <= BOUND
    lost, _ = loaded.decoder(loaded.tokens[:, CUT:-1])
    assert deviation(lost, middle) > 100 * BOUND, "a lost state would not be seen here"

    mask = torch.ones(2, TOKENS)
    mask[1, :PADDING] = 0
    padded = torch.cat(
        [loaded.tokens[1:, -PADDING:], loaded.tokens[1:, :-PADDING]], dim=1
    )  # anything as padding
    found, _ = loaded.decoder(torch.cat([loaded.tokens[:1], padded]), mask=mask)
    assert deviation(found[0], loaded.logits[0]) <= BOUND
    assert deviation(found[1, PADDING:], loaded.logits[1, :-PADDING]) <= BOUND


@torch.no_grad()
def test_saved_restored_forked_and_rolled_back_is_uninterrupted(loaded: Loaded, tmp_path: Path) -> None:
    model = LanguageModel(loaded.decoder, tokenizer(), name="m", grid=16)
    a, b, c = loaded.tokens[0, :37].tolist(), loaded.tokens[0, 37:].tolist(), loaded.tokens[1].tolist()
    kept = model.append(a)
    kept.save(tmp_path / "a.state")
    restored = model.load_state(tmp_path / "a.state")
    whole, other = model.append(a + b), model.append(a + c)
    for start in (restored, restored.fork()):
        assert_same(model, model.append(b, start), whole)
    model.append(b, kept)  # and back:
    assert_same(model, model.append(c, kept), other)


def assert_same(model: LanguageModel, found: Any, expected: Any) -> None:
    """To the bit: the same tensors, and the same logits of the next token."""
    assert found.tail == expected.tail and found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(t, expected.tensors[name]) for name, t in found.tensors.items())
    assert torch.equal(model.live(found).logits(), model.live(expected).logits())


def test_the_weight_table_is_its_own_inverse(loaded: Loaded) -> None:
    family, settings = find(loaded.raw, "config"), Settings(loaded.raw, "config")
    config = family.config(settings)
    with Weights(loaded.folder) as weights:
        table = family.weights(config, settings, weights.headers)
        ours = {
            name: t
            for entry in table
            if isinstance(entry, Rule)
            for name, t in entry.load(weights.read).items()
        }
        theirs = {name: weights.read(name) for name in weights.headers}
    assert ours.keys() == own_weights(config).keys()
    back = save(table, ours)
    assert back.keys() == theirs.keys()
    for name, tensor in back.items():
        assert tensor.shape == theirs[name].shape, name
        assert same(tensor, theirs[name], loaded.case), name
    again = {
        name: t
        for entry in table
        if isinstance(entry, Rule)
        for name, t in entry.load(back.__getitem__).items()
    }
    assert all(same(again[name], tensor, loaded.case) for name, tensor in ours.items())
    assert all(entry.name in back for entry in table if isinstance(entry, Redundant) and entry.written)


def same(found: Tensor, expected: Tensor, case: Case) -> bool:
    if case.rounds:
        return torch.allclose(found.float(), expected.float(), rtol=1e-6, atol=0)
    return torch.equal(found, expected)


def test_every_setting_counts_or_is_refused(loaded: Loaded) -> None:
    """Whatever else a setting says, our model is another one, or it is refused; unless it is known to have no effect."""
    kept = description(loaded.raw, loaded.raw)
    unseen = [
        f"{'.'.join(path)} = {value!r}"
        for path, value in changes(loaded.raw)
        if not refused_or_changed(loaded.raw, path, value, kept)
    ]
    assert not unseen, f"these settings would be ignored: {unseen}"


def changes(raw: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Each setting with values that it has not."""
    found: list[tuple[tuple[str, ...], Any]] = [((*path, "no_such_setting"), 3)]
    for name, value in raw.items():
        here = (*path, name)
        match value:
            case dict():
                found += changes(value, here)
            case bool():
                found.append((here, not value))
            case int():
                found.append((here, value + 1))
            case float():
                found.append((here, 1.5 * value + 0.5))
            case str():
                found.append((here, "something else"))
            case list() if value and all(isinstance(entry, str) for entry in value):
                found += [(here, value[1:]), (here, ["something else", *value[1:]])]
            case list():
                found.append((here, [*value, 0] if 0 not in value else value[:-1]))
            case None:
                found.append((here, 3))
    return found


def refused_or_changed(raw: dict[str, Any], path: tuple[str, ...], value: Any, kept: Any) -> bool:
    changed = json.loads(json.dumps(raw))
    inner = changed
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    try:
        return description(changed, raw, path) != kept
    except LinstateError:
        return True


def description(raw: dict[str, Any], unchanged: dict[str, Any], path: tuple[str, ...] = ("",)) -> Any:
    """Our configuration, and what the weight table makes of weights that are all different."""
    family, settings = find(unchanged, "config"), Settings(raw, "config")
    config = family.config(settings)
    table = family.weights(config, settings, ())
    settings.finish()
    if path[-1] in NO_EFFECT | settings.all_ignored():
        raise LinstateError("known to have no effect")
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.rand(t.shape, generator=generator) for name, t in own_weights(config).items()}
    written = save(table, weights)
    return config.to_dict(), {name: t.double().sum().item() for name, t in written.items()}
