"""Packed models: they answer as the weights they stand for, their single tokens are those of the layers, their states hold."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from linstate import Decoder, LanguageModel, ModelConfig
from linstate.errors import ArgumentError
from linstate.models.packed import PackedEmbedding, PackedLinear, pack, weights_of
from linstate.ops import native
from linstate.ops.native import linear as native_linear
from linstate.ops.native.linear import BITS, FORMATS, Format
from linstate.types import LayerState
from small_models import PATTERNS, TEXT, build, tokenizer

pytestmark = pytest.mark.skipif(not native.available, reason="no native extension")
NATIVE = {"gated_deltanet": {"num_heads": 2, "head_dim": 16}, "mamba2": {"head_dim": 16, "state_size": 16}}


def decoder(*pattern: str, seed: int = 0, **fields: object) -> Decoder:
    torch.manual_seed(seed)
    options = {name: NATIVE[name] for name in set(pattern) & set(NATIVE)}
    fields = {"tie_embeddings": False, **fields}
    config = ModelConfig(vocab_size=64, d_model=32, pattern=pattern, options=options, d_ff=64, **fields)  # type: ignore[arg-type]
    made = Decoder(config).eval()
    for p in made.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.15)
    return made.to(torch.bfloat16)


def by_layers(model: Decoder, tokens: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
    """As if there were no static step."""
    step, model.step = model.step, None
    try:
        found: tuple[Tensor, LayerState] = model(tokens, state)
        return found
    finally:
        model.step = step


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("pattern", [("gated_deltanet", "attention"), ("mamba2",), ("rwkv7", "rwkv7")])
@torch.no_grad()
def test_a_packed_model_answers_as_its_weights_do(pattern: tuple[str, ...], format: Format) -> None:
    model = decoder(*pattern)
    plain = copy.deepcopy(model)
    pack(model, format)
    plain.load_state_dict(model.state_dict())  # the weights that the packed ones stand for
    tokens = torch.randint(64, (1, 20), generator=torch.Generator().manual_seed(1))
    expected, state = plain.double()(tokens)
    found, packed_state = model(tokens)
    size = expected.abs().max()
    assert (found.double() - expected).abs().max() < 4e-2 * size
    for t in (tokens[:, :1], tokens[:, 1:2]):
        expected, state = plain(t, state)
        found, packed_state = model(t, packed_state)
        assert (found.double() - expected).abs().max() < 4e-2 * size


@torch.no_grad()
def test_quantised_weights_cost_what_their_bits_say() -> None:
    model = decoder("gated_deltanet", "mamba2")
    tokens = torch.randint(64, (1, 40), generator=torch.Generator().manual_seed(1))
    exact, off = copy.deepcopy(model).double()(tokens)[0], {}
    for format in FORMATS:
        packed = copy.deepcopy(model)
        pack(packed, format)
        off[format] = float((packed(tokens)[0].double() - exact).norm() / exact.norm())
    assert off["bf16"] < 0.02
    assert off["int8"] < 0.04
    # A step of int4 is 127 / 8 = 16 times one of int8, and bf16 activations are in both.
    assert off["int8"] < off["int4"] < 20 * off["int8"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "pattern",
    [
        ("gated_deltanet", "mamba2"),
        ("rwkv7", "gated_deltanet", "rwkv7"),
        ("rwkv7+attention", "rwkv7"),
        ("mamba2", "attention", "mamba2"),
        ("mamba2", "sliding_window", "mamba2"),
    ],
)
@torch.no_grad()
def test_static_steps_are_the_layers_to_the_bit(
    pattern: tuple[str, ...], rows: int, wide: bool, format: Format
) -> None:
    model = decoder(*pattern, residual_in_fp32=wide)
    pack(model, format)
    tokens = torch.randint(64, (rows, 6), generator=torch.Generator().manual_seed(1))
    _, state = model(tokens)
    mine, other, earlier = state, state, {name: t.clone() for name, t in state.items()}
    for t in tokens.split(1, dim=1):
        found, mine = model(t, mine)
        expected, other = by_layers(model, t, other)
        assert torch.equal(found, expected)
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert all(torch.equal(state[name], t) for name, t in earlier.items())  # nothing was mutated


@pytest.mark.parametrize("isa", native.isas(emulated=True))
@torch.no_grad()
def test_states_past_the_caches_and_any_threads_are_the_same_bits(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads that share a key, heads that do not, and RWKV's; sizes that several threads share."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=64,
        d_model=64,
        pattern=("mamba2", "gated_deltanet", "rwkv7"),
        options={
            "mamba2": {"num_heads": 17, "head_dim": 64, "state_size": 64},
            "gated_deltanet": {"num_heads": 5, "head_dim": 64, "v_head_dim": 200},
            "rwkv7": {"head_dim": 32},
        },
        d_ff=64,
        residual_in_fp32=True,
    )
    model = Decoder(config).eval().to(torch.bfloat16)
    pack(model)
    tokens = torch.randint(64, (1, 4), generator=torch.Generator().manual_seed(1))
    threads, found = torch.get_num_threads(), []
    try:
        with native.using(isa):
            for used, cache in ((1, 1 << 40), (1, 0), (3, 1 << 40), (3, 0)):
                monkeypatch.setattr("linstate.ops.native.program._CACHE", cache)
                torch.set_num_threads(used)
                state, all_logits = model.init_state(1), []
                for t in tokens.split(1, dim=1):
                    logits, state = model(t, state)
                    all_logits.append(logits)
                found.append([*all_logits, *(state[name] for name in sorted(state))])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@torch.no_grad()
def test_what_is_native_is_recorded_and_the_rest_is_called() -> None:
    rwkv = decoder("rwkv7", "rwkv7", feed_forward="rwkv7_channel_mix", norm="layernorm")
    whole, mixed = decoder("gated_deltanet", "mamba2"), decoder("mamba2", "sliding_window", "mamba2")
    # The first layer of the last is called, so that the values that the others mix in stand nowhere.
    handed = decoder("rwkv7+sliding_window", "rwkv7", feed_forward="none")
    wide = decoder("gated_deltanet", "mamba2", residual_in_fp32=True)
    for model, expected in ((whole, 1), (wide, 1), (rwkv, 1), (mixed, 3), (handed, 3)):
        pack(model)
        with torch.inference_mode() if model is whole else torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.int64))
        assert model.step is not None
        step = model.step._steps[1]
        assert step is not None
        assert len(step.parts) == expected
        assert step.recorded_head


@torch.no_grad()
def test_a_recorded_step_that_differed_would_be_seen() -> None:
    """Broken on purpose: a branch that does not do the same twice cannot be recorded, or is found out."""
    from linstate.errors import StateMismatchError

    model = decoder("gated_deltanet")
    pack(model)
    block = model.blocks()[0]
    assert block.ff is not None
    forward, calls = block.ff.forward, []

    def unsteady(x: Tensor, state: LayerState | None = None, **more: object) -> tuple[Tensor, LayerState]:
        calls.append(1)
        y, after = forward(x if len(calls) < 2 else x[..., :].flip(-1).contiguous(), state)
        return y, after

    block.ff.forward = unsteady  # type: ignore[method-assign]
    with pytest.raises(StateMismatchError, match="recorded"):
        model(torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("pattern", ["delta", "hybrid"])
def test_restored_is_uninterrupted(pattern: str, format: Format, tmp_path: Path) -> None:
    def made() -> LanguageModel:
        model = build(pattern)
        model.decoder.to(torch.bfloat16)
        pack(model.decoder, format)
        return model

    assert pattern in PATTERNS
    model = made()
    state = model.read(TEXT[:200])
    first = model.generate("", state, max_tokens=5)
    first.state.save(tmp_path / "a.state")
    uninterrupted = model.generate("", first.state, max_tokens=20)
    again = made()
    restored = again.generate("", again.load_state(tmp_path / "a.state"), max_tokens=20)
    assert restored.ids == uninterrupted.ids
    for name, t in uninterrupted.state.tensors.items():
        assert torch.equal(t, restored.state.tensors[name]), name


def test_a_fingerprint_is_that_of_the_weights_it_computes_with() -> None:
    found = {}
    for format in (None, *FORMATS):
        model = build("delta")
        model.decoder.to(torch.bfloat16)
        if format is not None:
            pack(model.decoder, format)
        found[format] = model.fingerprint.weights
    assert found[None] == found["bf16"]
    assert len(set(found.values())) == 3


@pytest.mark.parametrize("format", FORMATS)
@torch.no_grad()
def test_a_tied_head_and_its_embedding_are_one_packed_weight(format: Format) -> None:
    model = decoder("mamba2", tie_embeddings=True)
    count, names, plain = model.parameter_count(), list(model.state_dict()), copy.deepcopy(model)
    pack(model, "int8")
    pack(model, format)  # anew, and still tied
    model = copy.deepcopy(model)
    head, embedding = model.head, model.embedding
    assert isinstance(head, PackedLinear) and isinstance(embedding, PackedEmbedding)
    assert embedding.packed is head.packed
    assert model.parameter_count() == count and list(model.state_dict()) == names
    ids = torch.tensor([[0, 31, 32, 63], [7, 7, 1, 33]])
    assert torch.equal(embedding(ids), head.unpacked()[ids])
    plain.load_state_dict(model.state_dict())
    found, expected = model(ids)[0], plain(ids)[0]
    assert (found - expected).abs().max() < 4e-2 * expected.abs().max()


@pytest.mark.parametrize("shape", [(70, 33), (32, 64), (5, 20000)])
@pytest.mark.parametrize("format", FORMATS)
def test_rows_and_parts_are_those_of_the_whole(shape: tuple[int, int], format: Format) -> None:
    packed = native_linear.pack(torch.randn(shape, generator=torch.Generator().manual_seed(0)), format)
    whole = native_linear.unpack(packed)
    assert whole.shape == shape
    assert torch.equal(torch.cat(list(native_linear.unpacked_parts(packed))), whole)
    ids = torch.tensor([[0, shape[0] - 1], [3, 4]])
    assert torch.equal(native_linear.rows(packed, ids), whole[ids])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_fingerprint_looks_at_all_weights(pattern: str) -> None:
    model = build(pattern).decoder
    found = weights_of(model)
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], t) for name, t in model.state_dict().items())  # type: ignore[arg-type]


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("format", ["bf16", "int4"])
@torch.no_grad()
def test_loading_and_packing_hold_no_second_copy(format: Format, tmp_path: Path) -> None:
    marks = Path("/proc/self/clear_refs")
    try:
        marks.write_text("5")  # the peak begins anew
    except OSError:
        pytest.skip("there is no measure of peak memory that begins anew")
    for entries, width in ((300, 64), (20_000, 768)):  # the first is for whatever is loaded only once
        config = ModelConfig(entries, width, pattern=("mamba2",), num_layers=6, feed_forward="none")
        big = LanguageModel(Decoder(config).to(torch.bfloat16), tokenizer(), name="big")
        big.save_pretrained(tmp_path)
        del big
        gc.collect()
        before = resident("VmRSS")
        marks.write_text("5")
        made = LanguageModel.from_pretrained(tmp_path, dtype=torch.bfloat16, weights=format)
        assert made.fingerprint
    size = (tmp_path / "model.safetensors").stat().st_size
    # The packed weights, the largest of the file's beside, and what packing and the allocator need for a while.
    head = 2 * 20_000 * 768
    share = BITS[format] / 16 + (0 if format == "bf16" else 1 / 32)
    assert resident("VmHWM") - before < share * size + head + 16e6


def test_weights_are_there_for_those_who_ask_but_not_their_numbers() -> None:
    model = decoder("gated_deltanet")
    count, names = model.parameter_count(), list(model.state_dict())
    kept = model.head.weight.detach().clone()
    pack(model)
    assert isinstance(model.head, PackedLinear)
    assert model.parameter_count() == count
    assert list(model.state_dict()) == names
    assert model.head.weight.shape == kept.shape
    assert model.head.weight.isnan().all()
    assert torch.equal(model.head.unpacked(), kept)
    assert torch.equal(model.state_dict()["head.weight"], kept)
    assert model.head.weight.untyped_storage().nbytes() == 2


def test_a_packed_model_is_packed_anew_and_moves_nowhere() -> None:
    model = decoder("gated_deltanet")
    both = [pack(model, "int8"), pack(model, "int4")]
    assert both[0] > both[1]
    with pytest.raises(ArgumentError, match="packed weights stay"):
        model.to(torch.float32)
    with pytest.raises(ArgumentError, match="loads no weights"):
        model.load_state_dict(model.state_dict())
    with pytest.raises(ArgumentError, match="bf16, int8, int4"):
        pack(model, "int2")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="float64"):
        pack(decoder("mamba2").double())
