"""The models of ``linstate bench model`` are what their files say, and other programs read the same model from them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from linstate.bench import llama_cpp
from linstate.bench.model_cases import CASES, random_decoder, write_checkpoint
from linstate.bench.model_peers import in_child
from linstate.bench.peer_task import Task
from linstate.errors import BackendError
from linstate.models.checkpoint import load_decoder, read_settings
from small_models import small_case

SOURCE = os.environ.get("LINSTATE_LLAMA_CPP", "")


def task(peer: str, folder: Path, source: str = "") -> Task:
    return Task(peer, str(folder), (64, 80), 2, 1, 1, "perf_counter", source)


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_a_case_is_the_same_model(name: str, tmp_path: Path) -> None:
    case = small_case(name)
    made = random_decoder(case.config)
    write_checkpoint(case, made, tmp_path)
    found = load_decoder(tmp_path, read_settings(tmp_path), dtype=torch.bfloat16)
    assert found.config == made.config
    for name, t in made.state_dict().items():
        assert torch.equal(found.state_dict()[name], t), name


def test_sizes_are_those_of_the_real_models() -> None:
    with torch.device("meta"):
        from linstate import Decoder

        sizes = {name: Decoder(case.config).parameter_count() / 1e6 for name, case in CASES.items()}
    assert {name: round(size) for name, size in sizes.items()} == {
        "mamba2-370m": 368,
        "qwen3.5-0.8b": 752,
        "rwkv7-0.4b": 451,
    }


def test_without_a_converter_llama_cpp_is_left_out_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="--llama-cpp"):
        llama_cpp.llama_cpp(task("llama.cpp", tmp_path))


@pytest.mark.slow
def test_transformers_beside(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    case = small_case("mamba2-370m")
    write_checkpoint(case, random_decoder(case.config), tmp_path)
    found = in_child(task("transformers", tmp_path), 300)
    assert set(found["prefill"]["bf16"]) == {"64", "80"} and found["decode"]["bf16"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not SOURCE, reason="LINSTATE_LLAMA_CPP names no source of llama.cpp")
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_the_same_model(name: str, tmp_path: Path) -> None:
    library = pytest.importorskip("llama_cpp.llama_cpp", reason="extra 'bench-model' is not installed")
    np = pytest.importorskip("numpy")
    source = llama_cpp.converter_in(Path(SOURCE))
    case = small_case(name)
    decoder = random_decoder(case.config)
    with torch.no_grad():
        for p in decoder.parameters():
            if p.dim() > 1:
                p *= 5  # so that what is read counts
    write_checkpoint(case, decoder, tmp_path)
    llama_cpp.convert(tmp_path, source, tmp_path / "bf16.gguf")
    with llama_cpp.Model(library, tmp_path / "bf16.gguf", task("llama.cpp", tmp_path)) as model:
        ids = model.random_ids(40)
        model.clear()
        model.run(ids)
        logits = library.llama_get_logits_ith(model.context, -1)
        found = torch.from_numpy(np.ctypeslib.as_array(logits, (model.vocabulary,)).copy())
    expected = decoder.float()(torch.tensor([ids]))[0][0, -1].detach()
    assert (found - expected).abs().max() < 2e-2 * expected.abs().max()
