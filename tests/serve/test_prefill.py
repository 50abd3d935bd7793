"""Prefill here, decode there: the same bits; cut connections, dying workers, damaged frames."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import small_models
from linstate import State
from linstate.engine.tokens import encode
from linstate.errors import StateError, StateFileError
from linstate.serve import frames
from linstate.state import precision
from linstate.state.store import model_key
from serve_server import Server

TEXT = small_models.TEXT * 2
Start = Callable[..., Server]


def ask(server: Server, text: str = TEXT) -> dict[str, Any]:
    answer = server.http.post("/v1/completions", json={"prompt": text, "max_tokens": 12})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def outcome(server: Server, name: str) -> float:
    with contextlib.suppress(AssertionError):
        return server.metric(f'linstate_prefills_sent_total{{outcome="{name}"}}')
    return 0.0


@pytest.fixture
def alone(start: Start, tmp_path) -> dict[str, Any]:  # type: ignore[no-untyped-def]
    return ask(start(folder=tmp_path / "alone"))


@pytest.mark.parametrize("pattern", ["delta", "hybrid", "experts"])
def test_a_shipped_state_is_the_state_that_is_read_here(start: Start, tmp_path, pattern: str) -> None:  # type: ignore[no-untyped-def]
    model = small_models.build(pattern)
    worker = start(folder=tmp_path / "w", role="prefill", model=model)
    decode = start(folder=tmp_path / "d", role="decode", workers=(worker.url,), offload=64, model=model)
    ids = tuple(encode(model.tokenizer, TEXT))
    shipped = asyncio.run_coroutine_threadsafe(decode.service.router.read(ids), decode.service._loop).result(
        60
    )
    assert shipped is not None and shipped.id == model.append(ids).id
    again = asyncio.run_coroutine_threadsafe(decode.service.router.read(ids), decode.service._loop).result(60)
    assert again is not None and again.id == shipped.id  # from the worker's memory
    assert worker.metric("linstate_prefix_hits_total") > 0
    assert decode.metric("linstate_shipped_bytes_total") > 2 * shipped.nbytes


@pytest.mark.parametrize("ship", ["exact", "int8"])
def test_a_window_that_is_not_full_is_shipped_as_far_as_it_is_used(  # type: ignore[no-untyped-def]
    start: Start, tmp_path, monkeypatch: pytest.MonkeyPatch, ship: str
) -> None:
    monkeypatch.setattr(precision, "_LEAST", 64)  # the windows of a small model are small
    model = small_models.build("keyed")
    worker = start(folder=tmp_path / "w", role="prefill", model=model)
    decode = start(
        folder=tmp_path / "d", role="decode", workers=(worker.url,), offload=8, model=model, ship=ship
    )
    ids = tuple(encode(model.tokenizer, TEXT[:70]))
    reading = decode.service.router.read(ids)
    shipped = asyncio.run_coroutine_threadsafe(reading, decode.service._loop).result(60)
    here = model.append(ids)
    assert shipped is not None and 0 < int(here.tensors["layers.0.mixer.length"]) < 30
    used = int(here.tensors["layers.0.mixer.length"])
    assert {n: t.shape for n, t in shipped.tensors.items()} == {n: t.shape for n, t in here.tensors.items()}
    assert not shipped.tensors["layers.0.mixer.k"][:, : 39 - used].any()
    assert (shipped.id == here.id) is (ship == "exact")


def test_two_servers_answer_as_one(start: Start, tmp_path, alone: dict[str, Any]) -> None:  # type: ignore[no-untyped-def]
    worker = start(folder=tmp_path / "w", role="prefill")
    decode = start(folder=tmp_path / "d", role="decode", workers=(worker.url,), offload=64)
    assert ask(decode)["choices"] == alone["choices"]
    assert outcome(decode, "done") == 1 and decode.metric("linstate_blocks_total") <= 1
    ask(decode, "entry")  # too short to be sent away
    ask(decode)  # known by now
    assert outcome(decode, "done") == 1
    assert worker.http.post("/v1/completions", json={"prompt": "x"}).status_code == 404


def test_int8_ships_less(start: Start, tmp_path) -> None:  # type: ignore[no-untyped-def]
    worker = start(folder=tmp_path / "w", role="prefill")
    sizes = {}
    for ship in ("exact", "int8"):
        decode = start(folder=tmp_path / ship, role="decode", workers=(worker.url,), offload=64, ship=ship)
        assert ask(decode)["choices"][0]["text"]
        sizes[ship] = decode.metric("linstate_shipped_bytes_total")
    assert sizes["int8"] < 0.6 * sizes["exact"]


def test_a_worker_that_is_gone_is_no_lost_request(start: Start, tmp_path, alone: dict[str, Any]) -> None:  # type: ignore[no-untyped-def]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{probe.getsockname()[1]}"
    worker = start(folder=tmp_path / "w", role="prefill")
    decode = start(folder=tmp_path / "d", role="decode", workers=(nobody, worker.url), offload=64)
    assert ask(decode)["choices"] == alone["choices"]
    assert outcome(decode, "failed") == 1 and outcome(decode, "done") == 1
    only = start(folder=tmp_path / "o", role="decode", workers=(nobody,), offload=64)
    assert ask(only)["choices"] == alone["choices"] and outcome(only, "local") == 1
    other = start(folder=tmp_path / "x", role="prefill", model=small_models.build("delta", seed=5))
    foreign = start(folder=tmp_path / "f", role="decode", workers=(other.url,), offload=64)
    assert ask(foreign)["choices"] == alone["choices"] and outcome(foreign, "local") == 1


class Cutting:
    """A proxy that cuts its first ``cuts`` answers after ``after`` bytes."""

    def __init__(self, port: int, cuts: int, after: int) -> None:
        self.port, self.cuts, self.after = port, cuts, after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._pass, args=(near,), daemon=True).start()

    def _pass(self, near: socket.socket) -> None:
        far = socket.create_connection(("127.0.0.1", self.port))

        def up() -> None:
            with contextlib.suppress(OSError):
                while data := near.recv(65536):
                    far.sendall(data)

        threading.Thread(target=up, daemon=True).start()
        cut, self.cuts = self.cuts > 0, self.cuts - 1
        sent = 0
        with contextlib.suppress(OSError):
            while data := far.recv(1024):
                near.sendall(data)
                sent += len(data)
                if cut and sent > self.after:
                    break
        for end in (near, far):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._listener.close()


@pytest.mark.parametrize(("cuts", "resumed", "here"), [(1, 1, 0), (2, 2, 0), (3, 2, 1)])
def test_a_cut_transfer_goes_on(  # type: ignore[no-untyped-def]
    start: Start, tmp_path, alone: dict[str, Any], cuts: int, resumed: int, here: int
) -> None:
    worker = start(folder=tmp_path / "w", role="prefill")
    proxy = Cutting(worker.port, cuts, 600)
    decode = start(folder=tmp_path / "d", role="decode", workers=(proxy.url,), offload=64)
    assert ask(decode)["choices"] == alone["choices"]
    assert (outcome(decode, "resumed"), outcome(decode, "local")) == (resumed, here)
    proxy.close()


def test_layers_leave_before_the_last_has_run(
    start: Start, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    worker = start(folder=tmp_path / "w", role="prefill")
    model = worker.service.model
    gate = threading.Event()
    last = model.decoder.blocks()[-1]
    forward, blocks = last.forward, (len(encode(model.tokenizer, TEXT)) - 1) // model.grid
    calls = 0

    def held(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == blocks:
            assert gate.wait(30)
        return forward(*args)

    monkeypatch.setattr(last, "forward", held)
    body = {"ids": encode(model.tokenizer, TEXT), "model": model_key(model.fingerprint)}
    reader, kinds = frames.FrameReader(1 << 24), list[frames.Kind]()
    with worker.http.stream("POST", "/v1/prefill", json=body) as answer:
        for data in answer.iter_raw():
            kinds += [frame.kind for frame in reader.feed(data)]
            if len(kinds) == 2:  # the first layer is here, and the last has not run
                gate.set()
    assert kinds == [frames.Kind.HEAD, frames.Kind.LAYER, frames.Kind.LAYER, frames.Kind.END]


@pytest.fixture(scope="module")
def stream() -> Iterator[tuple[bytes, State]]:
    model = small_models.build("delta")
    state = model.read(TEXT)
    parts = [frames.MAGIC, frames.head(0, frames=4)]
    for i in range(2):
        part = {n: t for n, t in state.tensors.items() if n.startswith(f"layers.{i}.")}
        parts.append(frames.layer(i + 1, part, "exact"))
    yield b"".join([*parts, frames.end(3, state, "exact")]), state


def whole(data: bytes, state: State, step: int = 997) -> State | None:
    reader, assembler = (
        frames.FrameReader(1 << 20),
        frames.Assembler(state.model, small_models.build("delta").decoder.state_table, 2),
    )
    for at in range(0, len(data), step):
        for frame in reader.feed(data[at : at + step]):
            assembler.add(frame)
    return assembler.state


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_streams_are_never_taken(stream: tuple[bytes, State], data: st.DataObject) -> None:
    good, state = stream
    found = whole(good, state)
    assert found is not None and found.id == state.id
    bad = bytearray(good)
    kind = data.draw(st.sampled_from(["flip", "cut", "drop", "repeat", "noise"]))
    at = data.draw(st.integers(0, len(good) - 2))
    if kind == "flip":
        bad[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del bad[at:]
    elif kind == "drop":
        del bad[at : at + data.draw(st.integers(1, 200))]
    elif kind == "repeat":
        bad[at:at] = bad[at : at + data.draw(st.integers(1, 200))]
    else:
        bad[at : at + 40] = data.draw(st.binary(min_size=40, max_size=40))
    if bytes(bad) == good:
        return
    try:
        found = whole(bytes(bad), state)
    except StateError:
        return
    assert found is None or (found.id == state.id and len(bad) >= len(good))


def test_lengths_are_bounded_before_anything_is_held(stream: tuple[bytes, State]) -> None:
    reader = frames.FrameReader(1000)
    huge = bytes([frames.Kind.LAYER]) + (0).to_bytes(4, "little") + (2**62).to_bytes(8, "little") + bytes(32)
    with pytest.raises(StateFileError, match="claims"):
        list(reader.feed(frames.MAGIC + huge))
