"""Reading, asking, generating, scoring, loading."""

from __future__ import annotations

import json
import math

import pytest
import safetensors.torch
import torch

from linstate import Decoder, LanguageModel, ModelConfig, Sampling, mixers
from linstate.engine.tokens import encode, pieces
from linstate.errors import (
    CheckpointError,
    CompositionError,
    ConfigError,
    InputError,
    ModelError,
    StateMismatchError,
)
from small_models import TEXT, build


@pytest.fixture(scope="module")
def model():
    return build("delta")


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_reading_equals_one_model_call(model):
    ids = encode(model.tokenizer, TEXT)
    state = model.read(TEXT)
    with torch.no_grad():
        logits, _ = model.decoder(torch.tensor([ids]))
    torch.testing.assert_close(model.live(state).logits(), logits[0, -1], rtol=1e-4, atol=1e-4)
    assert state.position == len(ids)


def test_greedy_generation_equals_a_plain_loop(model):
    ids = encode(model.tokenizer, TEXT[:80])
    made = model.generate(TEXT[:80], max_tokens=20)
    with torch.no_grad():
        for token in made.ids:
            logits, _ = model.decoder(torch.tensor([ids]))
            assert int(logits[0, -1].argmax()) == token
            ids.append(token)


def test_progress_is_told_and_ends_at_the_whole(model):
    seen = []
    state = model.read([TEXT, TEXT], on_progress=seen.append)
    assert [p.tokens for p in seen] == sorted(p.tokens for p in seen)
    assert (seen[-1].tokens, seen[-1].characters) == (state.position, 2 * len(TEXT))


@pytest.mark.parametrize("size", [10, 70_000, 200_000])
def test_pieces_have_the_ids_of_the_whole(model, size):
    text = (TEXT * (size // len(TEXT) + 1))[:size]
    parts = list(pieces(text))
    assert "".join(parts) == text
    assert [i for part in parts for i in encode(model.tokenizer, part)] == encode(model.tokenizer, text)
    dealt = list(pieces(text[i : i + 999] for i in range(0, size, 999)))
    assert [i for part in dealt for i in encode(model.tokenizer, part)] == encode(model.tokenizer, text)
    assert size < 100_000 or len(parts) > 1


def test_a_text_without_a_place_to_cut():
    text = "." * 3_000_000
    parts = list(pieces(text))
    assert "".join(parts) == text and max(map(len, parts)) <= 1 << 20


def test_stop_and_end(model):
    whole = model.generate(TEXT[:80], max_tokens=30).text
    mark = whole[5:7]
    cut = model.generate(TEXT[:80], max_tokens=30, stop=(mark,)).text
    assert cut == whole[: whole.index(mark)]


def test_sampling_is_repeatable_and_bounded(model):
    logits = torch.tensor([0.0, 5.0, 4.0, 3.0])
    generator = torch.Generator().manual_seed(0)
    assert {Sampling(1.0, top_k=2).choose(logits, generator) for _ in range(200)} == {1, 2}
    assert {Sampling(1.0, top_p=0.5).choose(logits, generator) for _ in range(50)} == {1}
    assert Sampling().choose(logits, generator) == 1
    drawn = [Sampling(1.0).choose(logits, generator) for _ in range(4000)]
    assert abs(drawn.count(1) / 4000 - float(logits.softmax(0)[1])) < 0.04
    a, b, c = (
        model.generate(TEXT[:60], sampling=Sampling(1.0, seed=s), max_tokens=20).ids for s in (1, 1, 2)
    )
    assert a == b != c
    draw, logits = torch.Generator(), torch.tensor([1.0, 3.0, 2.0, -torch.inf])
    for cold in (Sampling(1e-38, top_p=0.5), Sampling(1e-38), Sampling(5e-324), Sampling(1.0, top_p=5e-324)):
        assert cold.choose(logits, draw) == 1
    for broken in (torch.full((4,), torch.nan), torch.full((4,), -torch.inf), torch.tensor([1.0, torch.inf])):
        with pytest.raises(ModelError, match="not finite"):
            Sampling().choose(broken, draw)
    for wrong in ({"temperature": -1}, {"top_k": -1}, {"top_p": 0.0}):
        with pytest.raises(InputError):
            Sampling(**wrong)


def test_bits_are_those_of_the_softmax(model):
    ids = encode(model.tokenizer, TEXT[:300])
    with torch.no_grad():
        logits, _ = model.decoder(torch.tensor([ids]))
    log = logits[0].double().log_softmax(-1)
    nats = -sum(float(log[t, i]) for t, i in enumerate(ids[1:]))
    assert model.bits(TEXT[:300]) == pytest.approx(math.log2(300) + nats / math.log(2), rel=1e-5)


def test_asking_leaves_the_state_alone(model):
    state = model.read(TEXT)
    name = state.id
    answers = [model.ask("entry 3", state), model.ask("entry 5", state), model.ask("entry 3", state)]
    assert answers[0] == answers[2] and "\n" not in answers[0]
    assert state.id == name


def test_nothing_to_go_on_from(model):
    with pytest.raises(InputError, match="read a text or give a prompt"):
        model.generate("")


def test_save_and_load(folder, model):
    back = LanguageModel.from_pretrained(folder)
    assert back.fingerprint == model.fingerprint
    assert back.generate(TEXT[:50], max_tokens=10).ids == model.generate(TEXT[:50], max_tokens=10).ids


def test_bf16_on_disk(model, tmp_path):
    model.save_pretrained(tmp_path / "b", dtype=torch.bfloat16)
    back = LanguageModel.from_pretrained(tmp_path / "b")
    assert back.decoder.embedding.weight.dtype == torch.float32
    for name, weight in model.decoder.state_dict().items():
        assert torch.equal(back.decoder.state_dict()[name], weight.bfloat16().float()), name


def test_every_mixer_is_saved_and_loaded(tmp_path):
    """A loaded model is built without memory first: nothing of it may be left so."""
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig(vocab_size=300, d_model=64, pattern=mixers.names()))
    model = LanguageModel(decoder, build("delta").tokenizer, name="m")
    model.save_pretrained(tmp_path)
    back = LanguageModel.from_pretrained(tmp_path)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(back.decoder(tokens)[0], model.decoder(tokens)[0])


def edit(path, change):
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def test_what_is_wrong_with_a_folder_is_said(folder, tmp_path):
    with pytest.raises(CheckpointError, match="there is no model folder"):
        LanguageModel.from_pretrained(tmp_path / "none")
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        content = (folder / file).read_bytes()
        (folder / file).unlink()
        with pytest.raises(CheckpointError, match=f"has no {file}"):
            LanguageModel.from_pretrained(folder)
        (folder / file).write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointError, match=file):
            LanguageModel.from_pretrained(folder)
        (folder / file).write_bytes(content)
    LanguageModel.from_pretrained(folder)


def test_weights_that_do_not_fit_are_named(folder):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    for change, says in (
        (lambda w: w.pop("decoder.norm.weight"), r"missing decoder\.norm\.weight"),
        (lambda w: w.update(extra=torch.zeros(1)), "unknown extra"),
        (
            lambda w: w.update({"decoder.norm.weight": torch.zeros(7)}),
            r"norm.weight is \[7\], expected \[32\]",
        ),
    ):
        changed = dict(weights)
        change(changed)
        safetensors.torch.save_file(changed, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=says):
            LanguageModel.from_pretrained(folder)


def test_configurations_that_cannot_be_built(folder):
    content = (folder / "config.json").read_text()
    edit(folder / "config.json", lambda raw: raw.update(model_type="llama"))
    with pytest.raises(CheckpointError, match="'llama' cannot be read"):
        LanguageModel.from_pretrained(folder)
    (folder / "config.json").write_text(content)
    edit(folder / "config.json", lambda raw: raw["architecture"].update(pattern=["none_such"]))
    with pytest.raises(ConfigError, match="there is no mixer 'none_such'"):
        LanguageModel.from_pretrained(folder)
    (folder / "config.json").write_text(content)
    edit(folder / "config.json", lambda raw: raw["architecture"].update(rope_scaling=2))
    with pytest.raises(ConfigError, match="unknown fields in the configuration: rope_scaling"):
        LanguageModel.from_pretrained(folder)


def test_composition_is_exact_for_one_layer_without_decay():
    model = build("sum")
    a, b = TEXT[:300], TEXT[300:700]
    ids_b = encode(model.tokenizer, b)
    first = model.settle(model.read(a))
    composed = first.compose(model.read(b))
    assert composed.composition == "exact"
    read_on = model.append(ids_b, model.read(a))
    assert composed.position == read_on.position
    torch.testing.assert_close(
        model.live(composed).logits(), model.live(read_on).logits(), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(model.live(composed).logits(), model.live(model.read(b)).logits(), rtol=1e-2)


def test_composition_says_when_it_is_approximate_or_refuses():
    model = build("delta")
    first, second = model.settle(model.read(TEXT[:200])), model.read(TEXT[200:400])
    composed = first.compose(second)
    assert composed.composition == "approximate" and composed.info()["composition"] == "approximate"
    assert composed.lineage[-2:] == (first.id, second.id)
    model.generate("", composed, max_tokens=5)
    with pytest.raises(CompositionError, match="settle it first"):
        model.read(TEXT[:100]).compose(second)
    hybrid = build("hybrid")
    with pytest.raises(
        CompositionError, match=r"layer 2 \(sliding_window\) keeps keys at absolute positions"
    ):
        hybrid.settle(hybrid.read(TEXT[:100])).compose(hybrid.read(TEXT[:90]))
    with pytest.raises(StateMismatchError, match="cannot be composed"):
        first.compose(hybrid.read(TEXT[:90]))


def test_settling_changes_nothing_but_the_grid():
    model = build("hybrid")
    state = model.read(TEXT[:333])
    settled = model.settle(state)
    assert settled.tail == () and settled.position == state.position == settled.origin
    a = model.generate("x y z", state, max_tokens=10)
    b = model.generate("x y z", settled, max_tokens=10)
    assert a.ids == b.ids
