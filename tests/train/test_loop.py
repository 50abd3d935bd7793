"""Recipes and the training loop: errors, the curriculum, and going on from a checkpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("transformers", reason="extra 'train' is not installed")

import torch

from linstate import LanguageModel
from linstate.errors import ConfigError, InputError
from linstate.train import loop
from linstate.train.corpus import Document
from linstate.train.recipe import Recipe
from linstate.train.stream import PocketCache
from linstate.train.tokenizer import save_tokenizer, train_tokenizer

CODE = "def double(x):\n    return 2 * x  # twice\n\n\nclass Box:\n    pass\n" * 60
RECIPE = Recipe(
    model={
        "d_model": 32,
        "pattern": ["gated_deltanet"],
        "options": {"gated_deltanet": {"num_heads": 1, "head_dim": 16}},
    },
    vocab_size=320,
    steps=6,
    tokens_per_step=256,
    lengths=[[0.0, 64], [0.5, 128]],
    lookup_share=[[0.0, 0.0], [0.5, 1.0]],
    warmup_steps=1,
    decay_steps=2,
    save_steps=3,
    log_steps=1,
)


@pytest.fixture
def work(tmp_path, monkeypatch):
    tokenizer = train_tokenizer([CODE, "? key: value\n" * 50], 320)
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    documents = [
        Document(f"{kind}{i}.py", kind, CODE) for kind in ("python", "test", "doc") for i in range(3)
    ]
    cache = PocketCache.build(tmp_path / "cache", tokenizer, documents)
    monkeypatch.setattr(loop, "prepare", lambda work, size: cache)
    return tmp_path


def test_a_recipe_file_and_its_errors(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('steps = 3\n[model]\nd_model = 16\npattern = ["gla"]\n')
    recipe = Recipe.load(path)
    assert recipe.config().pattern == ("gla",) and recipe.steps == 3
    path.write_text("stepz = 3\n[model]\n")
    with pytest.raises(InputError, match=r"unknown: stepz; missing: steps"):
        Recipe.load(path)
    path.write_text("steps = \n")
    with pytest.raises(InputError, match="cannot read the recipe"):
        Recipe.load(path)
    with pytest.raises(ConfigError, match="no mixer 'gpt'"):
        replace(RECIPE, model={"d_model": 16, "pattern": ["gpt"]}).config()


def test_the_recipe_of_the_project_is_that_of_the_shipped_model():
    from pathlib import Path

    recipe = Recipe.load(Path(__file__).parents[2] / "recipes" / "pocket.toml")
    shipped = LanguageModel.from_pretrained("pocket").decoder.config
    assert recipe.config() == shipped


def test_steps_follow_the_curriculum(work):
    tokenizer = loop.load_tokenizer(work / "tokenizer.json")
    batches = iter(loop.StepBatches(loop.prepare(work, 320), tokenizer, RECIPE, 0))
    steps = [next(batches) for _ in range(6)]
    assert [tuple(s["input_ids"].shape) for s in steps] == [(4, 64)] * 3 + [(2, 128)] * 3
    lookups = [bool((s["labels"] == -100).any()) for s in steps]
    assert lookups == [False] * 3 + [True] * 3
    later = next(iter(loop.StepBatches(loop.prepare(work, 320), tokenizer, RECIPE, 4)))
    assert torch.equal(later["input_ids"], steps[4]["input_ids"])


def test_training_stopped_and_gone_on_is_training(work):
    whole = loop.train(RECIPE, work).decoder.state_dict()
    made = LanguageModel.from_pretrained(work / "model")
    assert made.generate("def double", max_tokens=3).ids
    last = sorted((work / "checkpoints").iterdir())
    assert [p.name for p in last] == ["checkpoint-3", "checkpoint-6"]
    for file in sorted(last[1].iterdir()):
        file.unlink()
    last[1].rmdir()
    resumed = loop.train(RECIPE, work).decoder.state_dict()
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-5, atol=1e-6)


def test_training_starts_from_given_weights(work):
    loop.train(replace(RECIPE, steps=2), work)
    begun = LanguageModel.from_pretrained(work / "model").decoder.state_dict()
    (work / "checkpoints").rename(work / "old")
    again = loop.train(
        replace(RECIPE, steps=1, learning_rate=0.0), work, start=work / "model"
    ).decoder.state_dict()
    assert all(torch.equal(begun[name], again[name]) for name in begun)
