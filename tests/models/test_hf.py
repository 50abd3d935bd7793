"""The bridge to Hugging Face: saved and loaded through the Auto classes, and `generate` with our state as its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from laws.laws import close, identical, identical_state, same_state, take
from laws.mixer_cases import SEVERAL, VOCABULARY, random_tokens, randomise, variants
from linstate.errors import ArgumentError
from linstate.models import ModelConfig

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")

from linstate.models.hf import LinstateConfig, LinstateForCausalLM, StateCache  # noqa: E402

PATTERN = ("gated_deltanet", "mamba2", "rwkv7", "sliding_window", "attention", "rwkv7")
SAME = 1e-4  # float32, six layers


def config(**fields: Any) -> ModelConfig:
    options = {name: variants(name).get("several heads", {}) for name in set(PATTERN)}
    return ModelConfig(
        **{
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "pattern": PATTERN,
            "options": options,
            "d_ff": 64,
            **fields,
        }
    )


def build(**fields: Any) -> LinstateForCausalLM:
    torch.manual_seed(0)
    model = LinstateForCausalLM(LinstateConfig(config(**fields), eos_token_id=None, pad_token_id=0))
    randomise(model.decoder, seed=3)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> LinstateForCausalLM:
    return build()


def greedy(model: LinstateForCausalLM, prompt: Tensor, count: int) -> Tensor:
    """Tokens that follow ``prompt [1, T]``, by our own state."""
    logits, state = model.decoder(prompt, logits="last")
    found = [logits[:, -1].argmax(-1, keepdim=True)]
    for _ in range(count - 1):
        logits, state = model.decoder(found[-1], state)
        found.append(logits[:, -1].argmax(-1, keepdim=True))
    return torch.cat(found, 1)


def generated(model: LinstateForCausalLM, prompt: Tensor, count: int, **how: Any) -> Any:
    return model.generate(prompt, max_new_tokens=count, do_sample=False, **how)


def test_the_cases_have_a_window_that_overflows() -> None:
    assert config().options["sliding_window"]["window"] == SEVERAL["window"] < 12


@pytest.mark.parametrize("tie", [True, False])
def test_saved_and_loaded_through_the_auto_classes(tmp_path: Path, tie: bool) -> None:
    model = build(tie_embeddings=tie)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    assert not list(tmp_path.glob("*.bin")), "no pickle"
    loaded_config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded_config, LinstateConfig) and loaded_config.model == config(tie_embeddings=tie)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, LinstateForCausalLM)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        identical(theirs[name], tensor, name)
    assert (loaded.decoder.head.weight is loaded.decoder.embedding.weight) == tie
    tokens = random_tokens(2, 9)
    identical(loaded(tokens).logits, model(tokens).logits, "logits of the loaded model")


def test_a_loaded_model_has_no_weight_left_to_chance(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info


def test_loaded_in_bfloat16(tmp_path: Path, model: LinstateForCausalLM) -> None:
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    out = loaded(random_tokens(1, 9))
    assert out.logits.dtype == torch.bfloat16
    assert out.past_key_values.state["layers.0.mixer.S"].dtype == torch.float32
    close(out.logits, model(random_tokens(1, 9)).logits, 0.2, "logits in bfloat16")


def test_forward_is_the_decoder(model: LinstateForCausalLM) -> None:
    tokens = random_tokens(2, 9)
    logits, state = model.decoder(tokens)
    out = model(tokens)
    identical(out.logits, logits, "logits")
    identical_state(out.past_key_values.state, state, "state")
    assert out.past_key_values.get_seq_length() == 9 and out.past_key_values.batch_size == 2
    close(model(tokens, logits_to_keep=1).logits, logits[:, -1:], SAME, "logits_to_keep=1")
    identical(model(tokens, logits_to_keep=3).logits, logits[:, -3:], "logits_to_keep=3")
    assert model(tokens, use_cache=False).past_key_values is None


def test_forward_goes_on_from_a_cache(model: LinstateForCausalLM) -> None:
    tokens = random_tokens(2, 30)
    whole = model(tokens)
    first = model(tokens[:, :17])
    second = model(tokens[:, 17:], past_key_values=first.past_key_values)
    close(torch.cat([first.logits, second.logits], 1), whole.logits, SAME, "logits")
    same_state(second.past_key_values.state, whole.past_key_values.state, SAME, "state")
    assert second.past_key_values.get_seq_length() == 30 and first.past_key_values.get_seq_length() == 17


def test_greedy_generation_is_our_own_loop(model: LinstateForCausalLM) -> None:
    prompt = random_tokens(1, 13)
    found = generated(model, prompt, 25)
    identical(found, torch.cat([prompt, greedy(model, prompt, 25)], 1), "greedy tokens")
    assert len(set(found[0, 13:].tolist())) > 3, "a model that repeats one token shows nothing"


def test_generation_without_a_cache_is_the_same(model: LinstateForCausalLM) -> None:
    prompt = random_tokens(1, 13)
    identical(generated(model, prompt, 12, use_cache=False), generated(model, prompt, 12), "without a cache")


def test_generation_goes_on_from_our_state(model: LinstateForCausalLM) -> None:
    """A conversation: the cache of what was read is given, with the text so far."""
    prompt = random_tokens(1, 13)
    out = generated(model, prompt, 10, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, StateCache)
    # the last token was made, but not read
    assert out.past_key_values.get_seq_length() == 22
    more = generated(model, out.sequences, 8, past_key_values=out.past_key_values)
    identical(more, torch.cat([prompt, greedy(model, prompt, 18)], 1), "tokens after going on")


def test_a_left_padded_batch_is_its_rows(model: LinstateForCausalLM) -> None:
    rows = [random_tokens(1, length, seed=length) for length in (12, 5, 1)]
    tokens, mask = torch.zeros(3, 12, dtype=torch.int64), torch.zeros(3, 12, dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, 12 - row.shape[1] :], mask[i, 12 - row.shape[1] :] = row[0], 1
    found = generated(model, tokens, 15, attention_mask=mask)
    for i, row in enumerate(rows):
        identical(found[i, 12:], greedy(model, row, 15)[0], f"row {i}, left-padded by {12 - row.shape[1]}")


def test_several_answers_to_one_prompt(model: LinstateForCausalLM) -> None:
    torch.manual_seed(0)
    found = model.generate(
        random_tokens(2, 7), max_new_tokens=9, do_sample=True, num_return_sequences=3, top_k=0
    )
    assert found.shape == (6, 16) and len({tuple(row) for row in found.tolist()}) == 6


def beam_search(model: LinstateForCausalLM, prompt: Tensor, beams: int, count: int) -> Tensor:
    """The likeliest of the beams after ``count`` tokens, every sequence read from its start: no state to reorder."""
    kept = [(0.0, prompt)]
    for _ in range(count):
        candidates = []
        for score, tokens in kept:
            logits, _ = model.decoder(tokens, logits="last")
            likely = logits[0, -1].log_softmax(-1).topk(2 * beams)
            for value, token in zip(likely.values.tolist(), likely.indices.tolist(), strict=True):
                candidates.append((score + value, torch.cat([tokens, torch.tensor([[token]])], 1)))
        kept = sorted(candidates, key=lambda c: -c[0])[:beams]
    return kept[0][1]


def test_beam_search_moves_the_states_with_the_beams(model: LinstateForCausalLM) -> None:
    differ = 0
    for seed in range(3):
        prompt = random_tokens(1, 6, seed=seed)
        found = generated(model, prompt, 8, num_beams=3)
        identical(found, beam_search(model, prompt, 3, 8), f"beams, prompt {seed}")
        differ += not torch.equal(found[:, 6:], greedy(model, prompt, 8))
    assert differ, "beam search must find something that greedy search does not, or nothing was reordered"


def test_a_cache_is_reordered_repeated_and_forked_without_touching_the_state(
    model: LinstateForCausalLM,
) -> None:
    state = model(random_tokens(3, 8)).past_key_values.state
    kept = {name: t.clone() for name, t in state.items()}
    cache = StateCache(state, 8)
    fork = cache.fork()
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    for row, source in enumerate((2, 0, 0)):
        identical_state(
            take(cache.state, slice(row, row + 1)), take(kept, slice(source, source + 1)), f"row {row}"
        )
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 6
    cache.reset()
    assert cache.get_seq_length() == 0 and not any(t.count_nonzero() for t in cache.state.values())
    identical_state(state, kept, "the state that the cache was made of")
    identical_state(fork.state, kept, "a fork")
    assert fork.get_seq_length() == 8 and all(fork.state[name] is state[name] for name in state), (
        "a fork copies nothing"
    )


def test_a_fork_goes_its_own_way(model: LinstateForCausalLM) -> None:
    read = model(random_tokens(1, 8)).past_key_values
    fork = read.fork()
    more = random_tokens(1, 4, seed=9)
    first = model(more, past_key_values=read).logits
    model(random_tokens(1, 4, seed=10), past_key_values=fork)
    identical(model(more, past_key_values=read.fork()).logits, first, "after the fork went on")


def test_a_state_is_not_cropped(model: LinstateForCausalLM) -> None:
    cache = model(random_tokens(1, 8)).past_key_values
    assert not cache.is_croppable and not cache.is_compileable
    with pytest.raises(ArgumentError, match=r"a recurrent state cannot be cropped: keep a fork\(\)"):
        cache.crop(3)


def test_the_loss_is_the_cross_entropy_of_the_next_token(model: LinstateForCausalLM) -> None:
    tokens = random_tokens(3, 12)
    labels = tokens.clone()
    labels[0, :5], labels[2, 9:] = -100, -100
    out = model(tokens, labels=labels)
    logits, _ = model.decoder(tokens)
    expected, count = torch.zeros(()), 0
    for row in range(3):
        for t in range(11):
            if labels[row, t + 1] != -100:
                expected, count = expected - logits[row, t].log_softmax(-1)[labels[row, t + 1]], count + 1
    assert count == 33 - 4 - 3
    close(out.loss, expected / count, 1e-5, "loss")
    close(
        model(tokens, labels=labels, num_items_in_batch=100).loss,
        expected / 100,
        1e-5,
        "loss over a larger batch",
    )
    close(
        out.loss,
        F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()),
        1e-5,
        "loss by torch",
    )
    assert model(tokens, labels=torch.full_like(labels, -100)).loss.item() == 0.0, "no label, no NaN"


def test_padding_has_no_part_in_the_loss(model: LinstateForCausalLM) -> None:
    row = random_tokens(1, 7)
    padded, mask = F.pad(row, (0, 4)), F.pad(torch.ones_like(row), (0, 4))
    labels = padded.masked_fill(mask == 0, -100)
    found = model(padded, attention_mask=mask, labels=labels).loss
    close(found, model(row, labels=row).loss, 1e-5, "loss beside padding")


def test_training_lowers_the_loss() -> None:
    model = build().train()
    tokens = random_tokens(4, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        out = model(tokens, labels=tokens)
        assert out.past_key_values is None, "training keeps no state"
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
    assert all(p.grad is not None for p in model.parameters())


def test_what_is_refused(model: LinstateForCausalLM) -> None:
    tokens = random_tokens(1, 4)
    with pytest.raises(ArgumentError, match="not both"):
        model(tokens, inputs_embeds=torch.zeros(1, 4, 32))
    with pytest.raises(
        ArgumentError, match="past_key_values must be a linstate StateCache, got DynamicCache"
    ):
        foreign = transformers.DynamicCache()
        foreign.update(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), 0)
        model(tokens, past_key_values=foreign)
    assert (
        model(tokens, past_key_values=transformers.DynamicCache()).logits.shape[1] == 4
    )  # empty, as generate makes it
    with pytest.raises(ArgumentError, match=r"attention_mask must be \[B, T\], got \[1, 1, 4, 4\]"):
        model(tokens, attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(ArgumentError, match=r"LinstateConfig needs architecture=ModelConfig\(...\)"):
        LinstateForCausalLM(LinstateConfig())
