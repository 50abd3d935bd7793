"""What a request may cost: structure, connections, room; and what is answered where there is none."""

from __future__ import annotations

import json
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
from linstate.errors import QuotaError
from linstate.serve.bodies import check_structure
from linstate.serve.problems import Refused, of_error
from linstate.serve.records import Records
from linstate.serve.room import Reserve, no_room
from serve_server import Server

Start = Callable[..., Server]


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"{}," * 60_000 + b"{}]",
        b"[" * 60_000,
        b"[" + b"1," * (2**21 + 1) + b"1]",
        b'{"a": "' + b'\\"' * 1000 + b'", "b": [' + b"[]," * 60_000 + b"[]]}",
    ],
)
def test_a_body_of_too_many_values_is_refused_before_it_is_parsed(body: bytes) -> None:
    with pytest.raises(Refused, match="values"):
        check_structure(body)


def test_texts_may_hold_what_they_like() -> None:
    text = '{"x": [1, "\\"]}\\\\' * 60_000
    check_structure(json.dumps({"prompt": text, "n": 1}).encode())
    check_structure(json.dumps({"prompt": list(range(100_000))}).encode())


def test_nonsense_is_answered_at_once_and_cheaply(server: Server) -> None:
    for path, content in (
        ("/v1/completions", b'{"prompt": [' + b"{}," * 40_000 + b"{}]}"),
        ("/v1/chat/completions", b'{"messages": [' + b"1," * 4000 + b"1]}"),
        ("/v1/states", b'{"text": ' + b"[" * 90_000 + b"}"),
    ):
        answer = server.http.post(path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 413) and len(answer.content) < 2000


def test_half_requests_shut_nobody_out(start: Start) -> None:
    server = start(connections=40, idle=5.0)
    half = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(90)]
    for one in half:
        one.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
    assert server.http.get("/health").status_code == 200
    time.sleep(0.2)
    closed = sum(_closed(one) for one in half)
    assert closed >= 45
    assert server.http.get("/health").status_code == 200  # on the connection that is open, too


def test_a_body_that_does_not_come_is_waited_for_no_longer_than_said(start: Start) -> None:
    server = start(idle=0.5)
    with socket.create_connection(("127.0.0.1", server.port)) as one:
        one.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n{"
        )
        one.settimeout(20)
        assert b" 408 " in one.recv(4096).split(b"\r\n")[0]


def _closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    finally:
        connection.close()


def test_records_have_a_quota_and_expire(tmp_path: Path) -> None:
    records = Records(tmp_path / "r.sqlite", quota=5000)
    for number in range(4):
        records.put("a", "resp", f"resp_{number}", {"text": "x" * 900}, ttl=0.05 if number else None)
    with pytest.raises(QuotaError, match="5,000 bytes"):
        records.put("a", "resp", "resp_9", {"text": "x" * 3000})
    assert records.get("a", "resp", "resp_9") is None
    records.put("b", "resp", "resp_9", {"text": "x" * 3000})  # another tenant's
    time.sleep(0.06)
    records.put("a", "resp", "resp_9", {"text": "x" * 3000})  # what has expired makes room
    assert records.get("a", "resp", "resp_1") is None and records.get("a", "resp", "resp_0") is not None
    assert records.delete("a", "resp", "resp_9") is not None
    records.put("a", "resp", "resp_8", {"text": "x" * 3000})


def test_kinds_of_records_are_kept_apart(server: Server) -> None:
    conversation = server.http.post("/v1/conversations", json={}).json()["id"]
    response = server.http.post("/v1/responses", json={"input": "? a", "max_output_tokens": 1}).json()["id"]
    for wrong in (f"/v1/responses/{conversation}", f"/v1/conversations/{response}"):
        assert server.http.get(wrong).status_code == 404
        assert server.http.delete(wrong).status_code == 404
    assert server.http.get(f"/v1/conversations/{conversation}").status_code == 200
    assert server.http.get(f"/v1/responses/{response}").status_code == 200


def test_turns_and_metadata_lose_nothing_of_each_other(server: Server) -> None:
    id = server.http.post("/v1/conversations", json={}).json()["id"]
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            server.http.post(f"/v1/conversations/{id}", json={"metadata": {"a": "b"}})

    busy = threading.Thread(target=change)
    busy.start()
    try:
        for _ in range(6):
            body = {"input": "? a", "max_output_tokens": 1, "conversation": id}
            assert server.http.post("/v1/responses", json=body).status_code == 200
    finally:
        stop.set()
        busy.join()
    assert len(server.http.get(f"/v1/conversations/{id}/items").json()["data"]) == 12
    assert server.http.get(f"/v1/conversations/{id}").json()["metadata"] == {"a": "b"}


def test_records_of_before_kinds_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    with sqlite3.connect(path) as old:
        old.execute(
            "CREATE TABLE records (tenant TEXT NOT NULL, id TEXT NOT NULL, created REAL NOT NULL, expires REAL, "
            "body TEXT NOT NULL, PRIMARY KEY (tenant, id)) WITHOUT ROWID"
        )
        old.execute("INSERT INTO records VALUES ('a', 'conv_1', 1.0, NULL, '{\"x\": 1}')")
    old.close()
    records = Records(path, quota=600)
    assert records.get("a", "conv", "conv_1") == {"x": 1} and records.get("a", "resp", "conv_1") is None
    with pytest.raises(QuotaError):
        records.put("a", "conv", "conv_2", {})


@pytest.mark.parametrize(
    "content", [b"no database at all, but long enough to be one" * 100, b"SQLite format 3\0" + b"x" * 5000]
)
def test_a_damaged_file_of_records_is_set_aside(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.sqlite"
    path.write_bytes(content)
    records = Records(path)
    records.put("a", "conv", "conv_1", {"x": 1})
    assert records.get("a", "conv", "conv_1") == {"x": 1}
    aside = [p for p in tmp_path.iterdir() if "damaged" in p.name]
    assert len(aside) == 1 and aside[0].read_bytes() == content


def test_a_full_disk_is_507_and_things_can_be_deleted_then(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    kept = server.http.post("/v1/states", json={"text": "colour: green\n", "name": "a"}).json()["id"]
    service, full = server.service, True

    def write(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(service.store.objects, "write", write)
        answer = server.http.post("/v1/states", json={"text": "colour: red\n"})
        assert answer.status_code == 507 and "delete states" in answer.json()["error"]["message"]
        with server.http.stream("POST", "/v1/states", json={"text": "b: c\n", "stream": True}) as stream:
            told = "".join(stream.iter_text())
        assert stream.status_code == 507 or "insufficient_storage" in told
    delete = service.store.delete

    def tight(*arguments: Any, **options: Any) -> Any:
        nonlocal full
        if full and service.reserve.path.exists():
            full = False
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        return delete(*arguments, **options)

    monkeypatch.setattr(service.store, "delete", tight)
    assert server.http.delete(f"/v1/states/{kept}").status_code == 200
    assert not service.reserve.path.exists() and not full


def test_what_a_full_disk_is() -> None:
    wrapped = RuntimeError("x")
    wrapped.__cause__ = OSError(28, "No space left on device")
    assert no_room(wrapped) and not no_room(OSError(2, "none")) and of_error(wrapped)[0] == 507


def test_the_reserve_is_taken_again(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path / "reserve")
    assert reserve.path.stat().st_size == 4 * 2**20
    reserve.release()
    assert not reserve.path.exists()
    reserve.refill()
    assert reserve.path.exists()


@pytest.mark.parametrize("place", ["instructions", "input"])
def test_half_a_character_is_refused_in_a_sentence(server: Server, place: str) -> None:
    content = b'{"input": "x", "%s": "\\ud800 a"}' % place.encode()
    answer = server.http.post("/v1/responses", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
