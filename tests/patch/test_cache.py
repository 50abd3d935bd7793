"""Caches of every family, saved, loaded and forked: what goes on from them is bit for bit what goes on without."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="extra 'hf' is not installed")

import linstate
from linstate.errors import ArgumentError, StateError, StateFileError, StateMismatchError
from linstate.state import State, artifact
from patch.families import FAMILIES, build, read, tokens

pytestmark = pytest.mark.oracle


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def patched() -> Iterator[None]:
    with linstate.patch_transformers(quiet=True):
        yield


def go_on(model: Any, cache: Any) -> Tensor:
    """Several tokens, then one and one."""
    ids, logits = tokens(2, 30)[:, 21:], []
    for begin, end in ((0, 7), (7, 8), (8, 9)):
        part, cache = read(model, ids[:, begin:end], cache)
        logits.append(part)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_loaded_forked(family: str, patched: None, tmp_path: Path) -> None:
    model = build(family)
    _, cache = read(model, tokens())
    size = linstate.save_cache(cache, tmp_path / "cache.state", model)
    assert size == (tmp_path / "cache.state").stat().st_size
    fork = linstate.fork_cache(cache)
    loaded = linstate.load_cache(tmp_path / "cache.state", model)
    assert type(fork) is type(loaded) is type(cache)
    expected = go_on(model, cache)  # moves the cache on, and must move neither of the others
    assert torch.equal(go_on(model, fork), expected)
    assert torch.equal(go_on(model, loaded), expected)
    assert (go_on(model, None) - expected).abs().max() > 1e-3, "a lost state would not be seen here"


@pytest.mark.slow
def test_a_new_process_goes_on(patched: None, tmp_path: Path) -> None:
    """With the model from its own files, which it saved."""
    model = build("jamba")
    model.save_pretrained(tmp_path / "model")
    _, cache = read(model, tokens())
    linstate.save_cache(cache, tmp_path / "cache.state", model)
    script = f"""
        import sys, torch
        sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
        sys.modules["fla"] = None
        import linstate
        from transformers import AutoModelForCausalLM
        from patch.test_cache import go_on
        linstate.patch_transformers(quiet=True)
        model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}).eval()
        cache = linstate.load_cache({str(tmp_path / "cache.state")!r}, model)
        with torch.no_grad():
            logits = go_on(model, cache)
        sys.stdout.buffer.write(logits.numpy().tobytes())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert done.stdout == go_on(model, cache).numpy().tobytes()


def test_recurrent_gemma_as_it_is_keeps_its_state_in_its_modules(tmp_path: Path) -> None:
    """Not patched: the file holds it all the same, for a patched model too; a fork is refused."""
    model = build("recurrent_gemma")
    _, cache = read(model, tokens())
    linstate.save_cache(cache, tmp_path / "cache.state", model)
    step = tokens()[:, :1]
    expected, _ = read(model, step, cache)
    read(model, tokens(2, 9))  # another conversation
    loaded = linstate.load_cache(tmp_path / "cache.state", model)
    assert torch.equal(read(model, step, loaded)[0], expected)
    with linstate.patch_transformers(quiet=True):
        loaded = linstate.load_cache(tmp_path / "cache.state", model)
        assert (read(model, step, loaded)[0] - expected).abs().max() < 1e-5
    _, unpatched = read(model, tokens())
    with pytest.raises(StateError, match="one conversation at a time"):
        linstate.fork_cache(unpatched)


def test_a_static_cache(patched: None, tmp_path: Path) -> None:
    from transformers import StaticCache

    model = build("jamba")
    _, cache = read(model, tokens(), StaticCache(config=model.config, max_cache_len=40))
    linstate.save_cache(cache, tmp_path / "cache.state", model)
    loaded = linstate.load_cache(tmp_path / "cache.state", model)
    expected = go_on(model, cache)
    assert torch.equal(go_on(model, loaded), expected)


def test_whose_cache_it_is(patched: None, tmp_path: Path) -> None:
    path, model = tmp_path / "cache.state", build("mamba")
    _, cache = read(model, tokens())
    linstate.save_cache(cache, path, model, key=b"secret")
    linstate.load_cache(path, model, key=b"secret")
    with pytest.raises(StateFileError, match="not signed with this key"):
        linstate.load_cache(path, model, key=b"other")
    other = build("mamba", seed=1)
    with pytest.raises(StateMismatchError, match="whose weights differ"):
        linstate.load_cache(path, other)
    with pytest.raises(StateMismatchError, match="whose config and weights differ"):
        linstate.load_cache(path, build("mamba2"))
    other.load_state_dict(model.state_dict())  # a fingerprint that is remembered would be stale now
    linstate.load_cache(path, other)
    rwkv, again = build("rwkv"), build("rwkv")
    linstate.save_cache(read(rwkv, tokens())[1], path, rwkv)
    linstate.load_cache(path, again)  # it has not read, so its weights are not scaled for reading yet


def test_what_cannot_be_kept_or_loaded(patched: None, tmp_path: Path) -> None:
    from transformers import DynamicCache

    path, model = tmp_path / "cache.state", build("mamba")
    with pytest.raises(StateError, match="holds nothing yet"):
        linstate.save_cache(DynamicCache(config=model.config), path, model)
    with pytest.raises(StateError, match="of the kind dict cannot be kept"):
        linstate.save_cache({}, path, model)
    with pytest.raises(ArgumentError, match="must be a model of transformers"):
        linstate.load_cache(path, torch.nn.Linear(1, 1))
    with pytest.raises(StateFileError, match="cannot read the state"):
        linstate.load_cache(path, model)
    assert not list(tmp_path.iterdir())
    _, cache = read(model, tokens())
    linstate.save_cache(cache, path, model)
    with pytest.raises(StateFileError):
        State.load(path)
    whole = artifact.read(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StateFileError, match="cut short"):
        linstate.load_cache(path, model)
    for name, value, match in (
        ("kind", "", "not a cache of transformers"),
        ("model", "[]", "description is incomplete"),
        ("cache", '{"cache": "os", "layers": []}', "description is incomplete"),
        (
            "cache",
            '{"cache": "DynamicCache", "layers": [["Popen", {}]], "grows": false}',
            "description is incomplete",
        ),
    ):
        artifact.write(path, {**whole.metadata, name: value}, whole.tensors)
        with pytest.raises(StateFileError, match=match):
            linstate.load_cache(path, model)
