"""As a new user: a checkpoint that transformers saved, with its tokenizer, read, asked and talked to on the command line.

What comes out is held against transformers' own model on all tokens at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints
from cli.conftest import prose
from linstate import LanguageModel
from linstate.ops import native
from oracles.oracle import hf_module, randomise
from small_models import tokenizer

pytestmark = pytest.mark.oracle

QUESTION, LIMIT = "which lamp?", 12


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """The folder, its library's model and tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        hf_module("qwen3_5", patch)
        import transformers

        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(**checkpoints.CONFIG)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        randomise(model)
        model.generation_config.eos_token_id = [0, 299]
        model.save_pretrained(folder, max_shard_size="20KB")
        tokens = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer(), eos_token="<|end|>")
        tokens.chat_template = checkpoints.TEMPLATE
        tokens.save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder, model, tokens


@torch.no_grad()
def continued(model: Any, ids: list[int]) -> list[int]:
    """The likeliest tokens behind ``ids``, the whole text anew for each."""
    made: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        hf_module("qwen3_5", patch)
        while len(made) < LIMIT:
            token = int(model(torch.tensor([ids + made]), use_cache=False).logits[0, -1].argmax())
            if token in (0, 299):
                break
            made.append(token)
    return made


def test_read_ask_chat_and_info(cli, saved, environment) -> None:
    folder, theirs, tokens = saved
    book = prose(700)
    Path("book.txt").write_text(book)
    line = [sys.executable, "-m", "linstate", "read", "--model", str(folder), "book.txt", "-o", "book.state"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    asked = [{"role": "user", "content": QUESTION}]
    read = tokens(book, add_special_tokens=False).input_ids
    prompt = tokens.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    ids = read + tokens(prompt, add_special_tokens=False).input_ids
    answer = tokens.decode(continued(theirs, ids)).strip()
    said = cli("ask", "book.state", QUESTION, "--max-tokens", LIMIT, "--model", folder, model=None)
    assert said.out == f"{answer}\n" and answer

    talk = cli(
        "chat", "book.state", "-o", "talk.state", "--max-tokens", LIMIT, "--model", folder,
        model=None, stdin=f"{QUESTION}\nand which chair?\n/undo\n/info\n",
    )  # fmt: skip
    assert talk.out.startswith(answer) and talk.code == 0
    model = LanguageModel.from_pretrained(folder)
    assert model.load_state("talk.state").position == len(ids) + len(continued(theirs, ids))

    info = cli("info", "book.state", "--model", folder, "--json", model=None).json
    assert info["position"] == len(read) and info["kv_cache_bytes"]
    about = cli("info", folder, "--json", model=None).json
    assert about["layers"] == ["gated_deltanet", "attention"]
    assert about["parameters"] == sum(p.numel() for p in theirs.parameters())
    go_on = cli("generate", "x", "--state", "book.state", "--model", folder, "--max-tokens", 3, model=None)
    assert go_on.code == 0


@pytest.mark.skipif(not native.available, reason="no native extension")
def test_packed_weights_and_what_they_read(cli) -> None:
    checkpoints.write(Path("m"))
    Path("book.txt").write_text(prose(300))
    packed = ("--weights", "int4", "--dtype", "float32", "--model", "m")
    assert cli("read", "book.txt", "-o", "a.state", *packed, model=None).code == 0
    assert cli("ask", "a.state", QUESTION, *packed, model=None).code == 0
    assert cli("generate", "--state", "a.state", "--max-tokens", 3, *packed, model=None).code == 0
    assert cli("chat", "a.state", *packed, model=None, stdin="/info\n").out.startswith(
        "model m (int4, float32)"
    )
    # The numbers that read a text are the numbers that go on from it.
    for other in ((), ("--weights", "int8"), ("--weights", "int4"), ("--dtype", "bfloat16")):
        said = cli("ask", "a.state", QUESTION, "--model", "m", *other, model=None).error
        assert "made by the model 'm (int4, float32)', whose weights differ" in said, other
    # bf16 weights are the same numbers, packed or not.
    assert (
        cli("read", "book.txt", "-o", "b.state", "--dtype", "bfloat16", "--model", "m", model=None).code == 0
    )
    assert cli("ask", "b.state", QUESTION, "--weights", "bf16", "--model", "m", model=None).code == 0


def test_models_lists_the_families(cli) -> None:
    found = cli("models", "--json", model=None).json["families"]
    types = {name for row in found for name in row["model_types"]}
    assert {"qwen3_5_text", "mamba2", "kimi_linear"} <= types and "linstate" not in types
    assert all(row["checked"] and row["mixers"] for row in found)
    shown = cli("models", model=None).out
    assert all(
        name in shown.replace("\n", "") for name in ("qwen3_next", "gated_deltanet", "held to the library")
    )


def test_what_is_wrong_with_a_folder_is_one_line(cli) -> None:
    Path("book.txt").write_text(prose(100))

    def error() -> str:
        found: str = cli("read", "book.txt", "--model", "m", model=None).error
        return found

    shard = Path("m/model-00002-of-00002.safetensors")
    checkpoints.write(Path("m"), shards=2)
    shard.write_bytes(shard.read_bytes()[:-100])
    assert f"{shard} cannot be read" in error()
    checkpoints.write(Path("m"), shards=2)
    Path("m/tokenizer.json").unlink()
    assert "has no tokenizer.json" in error()
    Path("m/config.json").write_text("{")
    Path("m/tokenizer.json").write_text(tokenizer().to_str())
    assert "is no JSON object" in error()
    for config, says in (
        ({**checkpoints.CONFIG, "model_type": "gpt2"}, "'gpt2' cannot be read; Linstate reads: "),
        ({**checkpoints.CONFIG, "hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({**checkpoints.CONFIG, "quantization_config": {"quant_method": "gptq"}}, "quantised (gptq)"),
        ({**checkpoints.CONFIG, "hidden_size": 64}, "expected [300, 64]"),
    ):
        Path("m/config.json").write_text(json.dumps(config))
        assert says in error()
