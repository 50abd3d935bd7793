"""Every checkpoint family gives what its library gives, and keeps the laws of states; a new family is found.

The oracle is always the library's forward pass over the whole text: some of its models are wrong when they go on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families.cases import VOCABULARY, Case, all_cases
from linstate import Decoder, LanguageModel, ModelConfig
from linstate.errors import LinstateError
from linstate.mixers.short_convolution import GatedShortConvolution
from linstate.models.checkpoint import Weights, load_decoder, own_weights, read_settings
from linstate.models.decoder import Block
from linstate.models.families import all_families, find
from linstate.models.families._rules import Concat, Redundant, Rule, Table, save
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
        return read_settings(self.folder)

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
    """Each of our tokens is the likeliest that they find behind all tokens before it; none of the last eight comes again."""
    text, start = loaded.tokens[:1, :13], 13
    logits, state = loaded.decoder(text)
    for _ in range(GREEDY):
        text = torch.cat([text, likeliest(logits[:, -1], text)], dim=1)
        logits, state = loaded.decoder(text[:, -1:], state)
    theirs = loaded.oracle(text[:, :-1], torch.float32)
    for at in range(start, start + GREEDY):
        assert likeliest(theirs[:, at - 1], text[:, :at]).item() == text[0, at], f"token {at}"


def likeliest(logits: Tensor, text: Tensor) -> Tensor:
    """``[1, 1]``: where the embedding is the head too, small random models repeat themselves if they can."""
    return logits.index_fill(1, text[0, -8:], float("-inf")).argmax(-1, keepdim=True)


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
        theirs = {
            name: weights.read(name)
            for name in weights.headers
            if not any(re.match(pattern, name) for pattern in family.ignored)
        }
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
    config, written = described(loaded.raw)
    unseen = [
        ".".join(path)
        for path, values in changes(loaded.raw)
        if not any(counts(loaded.raw, path, value, config, written) for value in values)
    ]
    assert not unseen, f"these settings would be ignored: {unseen}"


Path_ = tuple[str, ...]


def changes(raw: dict[str, Any], path: Path_ = ()) -> list[tuple[Path_, list[Any]]]:
    """Each setting with values that it has not, and one that does not exist."""
    found: list[tuple[Path_, list[Any]]] = [((*path, "no_such_setting"), [3])]
    for name, value in raw.items():
        here = (*path, name)
        match value:
            case dict():
                found += changes(value, here)
            case bool():
                found.append((here, [not value]))
            case int() | float():
                found.append((here, [value + 1, 2 * value + 1]))
            case str():
                found.append((here, ["something else"]))
            case list() if value and all(isinstance(entry, str) for entry in value):
                found += [(here, [value[1:]]), (here, [["something else", *value[1:]]])]
            case list():
                found.append((here, [[*value, 0], [*value, 1], value[:-1]]))
            case None:
                found.append((here, [3]))
    return found


def counts(raw: dict[str, Any], path: Path_, value: Any, config: Any, written: Any) -> bool:
    changed = json.loads(json.dumps(raw))
    inner = changed
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    family, settings = find(raw, "config"), Settings(changed, "config")
    try:
        made = family.config(settings)
        table = family.weights(made, settings, {})
        settings.finish()
    except LinstateError:
        return True
    known = NO_EFFECT | settings.all_ignored()
    if any(name in known for name in path) or made.to_dict() != config:
        return True
    return digests(made, table) != written


def described(raw: dict[str, Any]) -> tuple[Any, Any]:
    """Our configuration, and what the weight table makes of weights that are all different."""
    family, settings = find(raw, "config"), Settings(raw, "config")
    config = family.config(settings)
    table = family.weights(config, settings, {})
    settings.finish()
    return config.to_dict(), digests(config, table)


def digests(config: ModelConfig, table: Table) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.rand(t.shape, generator=generator) for name, t in own_weights(config).items()}
    return {name: t.double().sum().item() for name, t in save(table, weights).items()}


def test_these_tests_bite(
    folders: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Broken on purpose, each is seen to fail."""
    loaded = Loaded(folders["lfm2"].case, tmp_path)
    _ = loaded.raw

    def fails(test: Callable[[Loaded], None]) -> None:
        again = Loaded(loaded.case, loaded.folder)
        again.__dict__["oracle"] = loaded.oracle
        with pytest.raises(AssertionError):
            test(again)

    with monkeypatch.context() as broken:  # settings that only we do are taken, whatever they say
        broken.setattr(Settings, "only", lambda self, name, *_, default=None: self.take(name, default))
        fails(test_every_setting_counts_or_is_refused)
    with monkeypatch.context() as broken:  # parts change places when they are written
        broken.setattr(Concat, "undo", lambda self, t: list(t[0].split(self.sizes, self.axis))[::-1])
        fails(test_the_weight_table_is_its_own_inverse)
    with monkeypatch.context() as broken:  # a convolution forgets its oldest token
        init = GatedShortConvolution.forward

        def forgets(self, x, state=None, **more):
            state = None if state is None else {"conv": state["conv"] * torch.tensor([0.0, 1.0])[:, None]}
            return init(self, x, state, **more)

        broken.setattr(GatedShortConvolution, "forward", forgets)
        fails(test_greedy_text_is_theirs)
        fails(test_pieces_and_padding_change_nothing)
    with monkeypatch.context() as broken:  # two of a layer's norms change places
        broken.setattr(Block, "_into", lambda self, x, norm: (x, self.ff_norm(x)))
        fails(test_logits_are_theirs)
