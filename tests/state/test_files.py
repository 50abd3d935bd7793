"""The state file: what comes back, and what is refused."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from linstate import Decoder, LanguageModel, ModelConfig, State
from linstate.errors import StateError, StateFileError, StateMismatchError
from linstate.state import artifact
from linstate.state.precision import decode, encode
from small_models import TEXT, build, tokenizer


@pytest.fixture(scope="module")
def model():
    return build("delta")


@pytest.fixture(scope="module")
def state(model):
    return model.read(TEXT, model.empty_state(keep_tokens=True))


@pytest.fixture
def file(state, tmp_path):
    path = tmp_path / "a.state"
    state.save(path)
    return path


def rewrite(path: Path, change) -> None:
    """Change header and data of a safetensors file and write them back, offsets untouched."""
    blob = path.read_bytes()
    size = struct.unpack("<Q", blob[:8])[0]
    header, data = json.loads(blob[8 : 8 + size]), bytearray(blob[8 + size :])
    header, data = change(header, data) or (header, data)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(data))


def test_everything_comes_back(state, file, model):
    back = model.load_state(file)
    assert back.id == state.id
    assert back.info() == state.info()
    assert back.tokens == state.tokens == tuple(model.tokenizer.encode(TEXT).ids)
    for name, tensor in state.tensors.items():
        assert torch.equal(back.tensors[name], tensor), name


def test_size_does_not_grow_with_the_text(model, tmp_path):
    short, long = model.read(TEXT[:400]), model.read(TEXT * 20)
    assert long.position > 10 * short.position
    sizes = [s.save(tmp_path / "x.state", keep_tokens=False) for s in (short, long)]
    assert abs(sizes[0] - sizes[1]) <= 4 * model.grid + 256  # the tail and the digits of the position


def test_token_ids_are_left_out_when_asked(state, tmp_path):
    state.save(tmp_path / "x.state", keep_tokens=False)
    assert State.load(tmp_path / "x.state").tokens is None


def test_it_is_a_plain_safetensors_file(file, state):
    tensors = safetensors.torch.load_file(file)
    name = next(iter(state.tensors))
    assert torch.equal(tensors[f"state/{name}"], state.tensors[name])
    assert tensors["tail"].tolist() == list(state.tail)


@pytest.mark.parametrize("keep", [0, 7, 8, 200, -1, -5000])
def test_cut_short(file, keep):
    blob = file.read_bytes()
    file.write_bytes(blob[:keep])
    with pytest.raises(StateFileError, match=r"cut short|damaged|too few"):
        State.load(file)


def test_longer_than_it_says(file):
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(StateFileError, match="cut short or damaged"):
        State.load(file)


def test_one_bit_flipped_anywhere(file):
    blob = file.read_bytes()
    refused = 0
    places = [*range(0, len(blob), max(1, len(blob) // 150)), len(blob) - 1]
    for place in places:
        changed = bytearray(blob)
        changed[place] ^= 1 << (place % 8)
        file.write_bytes(changed)
        with pytest.raises(StateFileError):
            State.load(file)
        refused += 1
    assert refused == len(places) > 100


def test_foreign_model(file):
    with pytest.raises(StateMismatchError, match=r"'delta', whose config and weights differ"):
        build("rwkv").load_state(file)
    with pytest.raises(StateMismatchError, match="whose weights differ"):
        build("delta", seed=1).load_state(file)


def test_a_state_in_memory_of_a_foreign_model(state):
    with pytest.raises(StateMismatchError, match="weights differ"):
        build("delta", seed=1).generate("x", state)


@pytest.mark.parametrize(
    ("version", "says"), [("3", "update Linstate"), ("0", "not known"), ("one", "not known")]
)
def test_other_versions(file, version, says):
    def change(header, data):
        header["__metadata__"]["version"] = version

    rewrite(file, change)
    with pytest.raises(StateFileError, match=says):
        State.load(file)


def test_another_safetensors_file(tmp_path):
    safetensors.torch.save_file({"x": torch.zeros(3)}, tmp_path / "x.state")
    with pytest.raises(StateFileError, match="not a Linstate state"):
        State.load(tmp_path / "x.state")


def test_no_file(tmp_path):
    with pytest.raises(StateFileError, match="No such file"):
        State.load(tmp_path / "none.state")


def test_not_finite(state, tmp_path):
    for bad in (float("nan"), float("inf")):
        name = next(n for n in state.tensors if n.endswith(".S"))
        tensors = {n: t.clone() for n, t in state.tensors.items()}
        tensors[name][0, 0, 0, 0] = bad
        replace(state, tensors=tensors).save(tmp_path / "x.state")
        with pytest.raises(StateFileError, match="NaN or Inf"):
            State.load(tmp_path / "x.state")


def test_a_header_that_claims_ten_gigabytes(file):
    blob = file.read_bytes()
    file.write_bytes(struct.pack("<Q", 10 * 2**30) + blob[8:])
    with pytest.raises(StateFileError, match="claims 10,737,418,240 bytes"):
        State.load(file)


def test_a_tensor_that_claims_ten_gigabytes(file):
    def change(header, data):
        name = next(n for n in header if n.startswith("state/"))
        header[name]["shape"] = [10 * 2**30 // 4]
        begin = header[name]["data_offsets"][0]
        header[name]["data_offsets"] = [begin, begin + 10 * 2**30]

    rewrite(file, change)
    with pytest.raises(StateFileError, match=r"header cannot be read|damaged"):
        State.load(file)


@pytest.mark.parametrize("field", ["position", "grid", "model", "dtypes", "chain", "tail"])
def test_a_description_that_is_sealed_but_wrong(file, field):
    found = artifact.read(file)
    if field == "tail":
        found.tensors.pop("tail")
    else:
        found.metadata.pop(field)
    artifact.write(file, found.metadata, found.tensors)
    with pytest.raises(StateFileError, match="incomplete or wrong"):
        State.load(file)


def test_position_and_tail_must_fit(file):
    found = artifact.read(file)
    found.metadata["position"] = str(int(found.metadata["position"]) + 1)
    artifact.write(file, found.metadata, found.tensors)
    with pytest.raises(StateFileError, match="do not fit each other"):
        State.load(file)


def test_signature(state, tmp_path):
    path = tmp_path / "x.state"
    state.save(path, key=b"secret")
    assert State.load(path, key=b"secret").id == state.id
    with pytest.raises(StateFileError, match="not signed with this key"):
        State.load(path, key=b"other")
    state.save(path)
    with pytest.raises(StateFileError, match="not signed with this key"):
        State.load(path, key=b"secret")


@pytest.mark.parametrize(("precision", "bound", "share"), [("bf16", 4e-3, 0.55), ("int8", 2e-2, 0.32)])
def test_reduced_precision_states_its_error(state, tmp_path, precision, bound, share):
    exact = state.save(tmp_path / "x.state", keep_tokens=False)
    size = state.save(tmp_path / "y.state", precision=precision, keep_tokens=False)
    back = State.load(tmp_path / "y.state")
    off = sum(float((back.tensors[n] - t).double().square().sum()) for n, t in state.tensors.items())
    whole = sum(float(t.double().square().sum()) for t in state.tensors.values())
    assert 0 < back.precision_error < bound
    assert back.precision_error == pytest.approx((off / whole) ** 0.5, rel=1e-6)
    assert back.precision == precision
    assert (size - 3000) < share * exact


def test_the_error_stays_with_a_state_saved_again(state, tmp_path):
    state.save(tmp_path / "x.state", precision="int8")
    back = State.load(tmp_path / "x.state")
    back.save(tmp_path / "y.state")
    assert State.load(tmp_path / "y.state").precision_error == back.precision_error > 0


def test_unknown_precision(state, tmp_path):
    with pytest.raises(StateError, match="one of exact, bf16, int8"):
        state.save(tmp_path / "x.state", precision="fp4")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(state, tmp_path, monkeypatch):
    path = tmp_path / "x.state"
    state.save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        state.fork(title="new").save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.state"]


def test_a_stored_file_of_version_1_can_be_read():
    back = State.load(Path(__file__).with_name("version-1.state"))
    assert (back.position, back.grid, back.model_name) == (40, 16, "delta")
    assert back.notes["title"] == "a state of format 1"
    assert float(back.tensors["layers.0.mixer.S"].double().sum()) == pytest.approx(
        float(back.notes["sum"]), rel=1e-9
    )


def test_fork_shares_the_tensors_and_keeps_the_line(state):
    fork = state.fork(title="b")
    assert fork.lineage == (*state.lineage, state.id)
    assert fork.notes["title"] == "b" and "title" not in state.notes
    name = next(iter(state.tensors))
    assert fork.tensors[name] is state.tensors[name]
    assert fork.id == state.id


def test_nothing_is_pickled(file, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "evil"),))

    torch.save({"x": Evil()}, file)
    with pytest.raises(StateFileError):
        State.load(file)
    assert not (tmp_path / "evil").exists()


WINDOW = 600
"""Places of a window's tensors: enough to be worth leaving out."""


@pytest.fixture(scope="module")
def windowed():
    """A state whose windows are mostly empty."""
    config = ModelConfig(
        vocab_size=300,
        d_model=32,
        pattern=("keyed_window",),
        options={"keyed_window": {"num_heads": 2, "head_dim": 16, "window": WINDOW + 1}},
    )
    torch.manual_seed(0)
    model = LanguageModel(Decoder(config), tokenizer(), name="keyed", end=None, grid=16)
    return model, model.read(TEXT[:500])


@pytest.mark.parametrize("precision", ["exact", "int8"])
def test_places_that_are_not_in_use_are_not_stored(windowed, tmp_path, precision):
    model, state = windowed
    size = state.save(tmp_path / "x.state", precision=precision)
    used = int(state.tensors["layers.0.mixer.length"])
    assert 0 < used < WINDOW and size < state.nbytes * used / WINDOW + 8000
    back = model.load_state(tmp_path / "x.state")
    assert {n: t.shape for n, t in back.tensors.items()} == {n: t.shape for n, t in state.tensors.items()}
    if precision == "exact":
        assert back.id == state.id and all(torch.equal(back.tensors[n], t) for n, t in state.tensors.items())
    else:
        assert (
            0 < back.precision_error < 2e-2 and not back.tensors["layers.0.mixer.k"][:, : WINDOW - used].any()
        )


def test_a_full_window_is_a_file_of_format_1(windowed, tmp_path):
    model, _ = windowed
    for name, text, version in (("short", TEXT[:500], "2"), ("long", TEXT, "1")):
        state = model.read(text)
        assert (int(state.tensors["layers.0.mixer.length"]) == WINDOW) is (version == "1")
        state.save(tmp_path / name)
        with safetensors.safe_open(tmp_path / name, "pt") as file:
            assert file.metadata()["version"] == version


@pytest.mark.parametrize("places", [-1, 0, 10, 2**40])
def test_places_that_cannot_be(windowed, places):
    stored, _ = encode(windowed[1].tensors, "exact")
    name = "layers.0.mixer.k"
    assert stored[f"state/{name}"].shape[1] > 10
    stored[f"places/{name}"] = torch.tensor([places])
    with pytest.raises(StateFileError, match=r"cannot have .* places"):
        decode(stored, {name: torch.float32})
