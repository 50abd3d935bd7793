"""What people train with around transformers: packed batches, adapters, TRL's trainers, checkpointing; each equal to what it stands for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
from linstate import LanguageModel, ModelConfig, mixers  # noqa: E402
from linstate.errors import ArgumentError  # noqa: E402
from linstate.models.boundaries import packed_boundaries  # noqa: E402
from linstate.models.hf import LinstateConfig, LinstateForCausalLM, LinstateModel  # noqa: E402

VOCABULARY = 50
# PEFT and TRL still call transformers by names that it renames, and multiprocessing by ways that Python renames.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("FutureWarning", "DeprecationWarning", "UserWarning")
]


def build(*pattern: str, **options: Any) -> LinstateForCausalLM:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=VOCABULARY, d_model=32, pattern=pattern, d_ff=48, **options)
    model = LinstateForCausalLM(LinstateConfig(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def ids(tokens: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def hybrid() -> LinstateForCausalLM:
    return build("gated_deltanet", "attention", "mamba2")


@pytest.mark.parametrize("more", [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}])
def test_packed_texts_are_read_as_if_each_were_alone(
    hybrid: LinstateForCausalLM, more: dict[str, Any]
) -> None:
    texts = [ids(8, 1), ids(10, 2), ids(3, 3)]
    collate = transformers.DataCollatorWithFlattening(return_tensors="pt", **more)
    packed = hybrid(**collate([{"input_ids": text} for text in texts]))
    at, total = 0, 0.0
    for text in texts:
        alone = hybrid(torch.tensor([text]), labels=torch.tensor([text]))
        assert torch.allclose(packed.logits[0, at : at + len(text)], alone.logits[0], atol=1e-5, rtol=0)
        at, total = at + len(text), total + float(alone.loss) * (len(text) - 1)
    assert float(packed.loss) == pytest.approx(total / (at - len(texts)), rel=1e-5)


def test_rows_that_hold_several_texts(hybrid: LinstateForCausalLM) -> None:
    rows = torch.tensor([ids(9, 4), ids(9, 5)])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    packed = hybrid(rows, position_ids=positions, output_hidden_states=True)
    assert torch.allclose(packed.logits[0, 4:], hybrid(rows[:1, 4:]).logits[0], atol=1e-5, rtol=0)
    assert torch.allclose(packed.logits[1], hybrid(rows[1:]).logits[0], atol=1e-5, rtol=0)
    assert packed.logits.shape == (2, 9, VOCABULARY) and packed.hidden_states[-1].shape == (2, 9, 32)
    assert packed.past_key_values is None
    assert torch.equal(hybrid(rows, position_ids=positions, logits_to_keep=1).logits, packed.logits[:, -1:])


def test_positions_of_plain_and_padded_rows_are_no_packing(hybrid: LinstateForCausalLM) -> None:
    rows, mask = torch.tensor([ids(6, 6), ids(6, 7)]), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    for positions in (mask.cumsum(-1) - 1, (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)):
        assert packed_boundaries((2, 6), mask=mask, position_ids=positions.clamp(min=0)) is None
    assert packed_boundaries((2, 6), position_ids=torch.arange(6)) is None
    assert packed_boundaries((1, 6), position_ids=torch.arange(7, 13)[None]) is None
    left = hybrid(rows, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    assert torch.allclose(left.logits[1, 2:], hybrid(rows[1:, 2:]).logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"position_ids": torch.tensor([[0, 1, 3, 4]])}, "count up by one"),
        (
            {"position_ids": torch.tensor([[0, 1, 0, 1]]), "seq_idx": torch.tensor([[0, 0, 0, 1]])},
            "different places",
        ),
        ({"seq_idx": torch.tensor([[0, 0, 1]])}, r"seq_idx must be \[1, 4\]"),
        (
            {"seq_idx": torch.tensor([[0, 0, 1, 1]]), "attention_mask": torch.tensor([[0, 1, 1, 1]])},
            "no padding",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 9])}, "cu_seqlens"),
        ({"head_mask": torch.ones(2)}, "head_mask"),
        ({"output_attentions": True}, "output_attentions"),
        ({"inputs_embeds": torch.zeros(1, 4, 7)}, "inputs_embeds must be"),
    ],
)
def test_what_contradicts_itself_or_is_not_served_is_an_error(
    hybrid: LinstateForCausalLM, given: dict[str, Any], says: str
) -> None:
    tokens = None if "inputs_embeds" in given else torch.tensor([ids(4, 8)])
    with pytest.raises(ArgumentError, match=says):
        hybrid(tokens, **given)


def test_the_layers_below_the_head(hybrid: LinstateForCausalLM) -> None:
    tokens = torch.tensor([ids(7, 9)])
    whole = hybrid(tokens, output_hidden_states=True)
    below = hybrid.base_model(tokens)
    assert isinstance(below, transformers.modeling_outputs.BaseModelOutputWithPast)
    assert torch.equal(hybrid.get_output_embeddings()(below.last_hidden_state), whole.logits)
    assert torch.equal(whole.hidden_states[-1], below.last_hidden_state)
    assert len(whole.hidden_states) == hybrid.config.num_hidden_layers + 1
    embedded = hybrid(inputs_embeds=hybrid.get_input_embeddings()(tokens))
    assert torch.equal(embedded.logits, whole.logits)
    assert isinstance(hybrid(tokens, return_dict=False), tuple)
    assert {id(p) for p in hybrid.model.parameters()} == {id(p) for p in hybrid.parameters()}


def test_layers_run_again_give_the_same_gradients() -> None:
    found = []
    for again in (False, True):
        model = build("rwkv7", "attention", "gated_deltanet").train()
        if again:
            model.gradient_checkpointing_enable()
        tokens = torch.tensor([ids(12, 1), ids(12, 2)])
        model(tokens, labels=tokens).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-6), name


def test_resized_embeddings_are_saved_and_loaded(tmp_path: Path) -> None:
    model = build("gated_deltanet")
    model.resize_token_embeddings(VOCABULARY + 20, mean_resizing=False)
    model.save_pretrained(tmp_path)
    for loaded in (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path),
        transformers.AutoModel.from_pretrained(tmp_path),
    ):
        assert loaded.get_input_embeddings().weight.shape[0] == VOCABULARY + 20
        assert loaded.config.vocab_size == loaded.config.architecture["vocab_size"] == VOCABULARY + 20
    assert isinstance(loaded, LinstateModel)
    tokens = torch.tensor([[VOCABULARY + 19, 3]])
    assert torch.equal(loaded(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


@pytest.mark.parametrize("name", sorted(mixers.names()))
def test_an_adapter_is_what_it_is_when_merged(name: str) -> None:
    """Read whole, by steps, and merged into the weights: a weight that is read past its layer's own call would forget it."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = build(name)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    tokens = torch.tensor([ids(7, 3)])
    with torch.no_grad():
        whole = model(tokens).logits
        first = model(tokens[:, :3])
        steps, cache = [first.logits], first.past_key_values
        for at in range(3, 7):
            out = model(tokens[:, at : at + 1], past_key_values=cache)
            steps.append(out.logits)
            cache = out.past_key_values
        with model.disable_adapter():
            without = model(tokens).logits
        merged = model.merge_and_unload()(tokens).logits
    size = float(whole.abs().max())
    assert float((whole - without).abs().max()) > 1e-3 * size, "the adapter changes nothing"
    for other in (torch.cat(steps, 1), merged):
        assert float((other - whole).abs().max()) < 1e-4 * size


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "sft packed", "dpo"])
def test_trl_trains_at_its_defaults(tmp_path: Path, kind: str) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    LanguageModel.from_pretrained("pocket").save_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.eos_token == tokenizer.pad_token == "<|end|>"
    given = dict(max_steps=2, use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_steps=1)
    texts = [f"entry {i}: the red lamp has number {i}; keep it." for i in range(8)]
    if kind == "dpo":
        data = datasets.Dataset.from_dict(
            {"prompt": texts, "chosen": [" yes"] * 8, "rejected": [" no, never"] * 8}
        )
        trainer = trl.DPOTrainer(
            model,
            args=trl.DPOConfig(str(tmp_path / "o"), **given),
            train_dataset=data,
            processing_class=tokenizer,
        )
    else:
        more = {"packing": True, "max_length": 64} if "packed" in kind else {}
        trainer = trl.SFTTrainer(
            model,
            args=trl.SFTConfig(str(tmp_path / "o"), **given, **more),
            train_dataset=datasets.Dataset.from_dict({"text": texts}),
            processing_class=tokenizer,
        )
    before = model.decoder.head.weight.detach().clone()
    loss = trainer.train().training_loss
    assert 0 < loss < 10 and not torch.equal(before, model.decoder.head.weight)


def test_every_mixer_builds_after_transformers_has_loaded_a_model(tmp_path: Path) -> None:
    """In a process of its own: transformers wraps torch's constructors for good when it loads a model."""
    script = """
import sys, torch
for name in ("fla", "kernels", "mamba_ssm", "causal_conv1d"): sys.modules[name] = None
from transformers import GPT2Config, GPT2LMHeadModel
GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32)).save_pretrained(sys.argv[1])
GPT2LMHeadModel.from_pretrained(sys.argv[1])
from linstate import Decoder, ModelConfig, mixers
wrong = []
for name in mixers.names():
    with torch.device("meta"):
        model = Decoder(ModelConfig(vocab_size=32, d_model=64, pattern=(name,)))
    wrong += [f"{name}: {key}" for key, t in model.state_dict().items() if t.device.type != "meta"]
print("wrong:", wrong)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "wrong: []" in done.stdout
