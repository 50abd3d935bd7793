"""States as a resource: read, kept over a restart, forked, exported, imported; and who may do what."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

import small_models
from linstate.engine.tokens import encode
from linstate.serve.keys import Keys
from serve_server import Server

TEXT = small_models.TEXT
Start = Callable[..., Server]


def ask(server: Server, state: str, **more: object) -> dict:
    body = {"prompt": "\n? lamp:", "state": state, "max_tokens": 12, **more}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: dict = answer.json()
    return found


def test_read_ask_restart_and_go_on(start: Start, tmp_path: Path) -> None:
    first = start()
    made = first.http.post("/v1/states", json={"text": TEXT, "name": "entries", "tags": {"kind": "test"}})
    assert made.status_code == 201
    state = made.json()
    model = first.service.model
    assert state["position"] == len(encode(model.tokenizer, TEXT)) and state["name"] == "entries"
    assert state["bytes"] == model.empty_state().nbytes < state["kv_cache_bytes"]
    said = ask(first, "entries", store=True)
    first.__exit__()
    second = start()
    assert ask(second, state["id"])["choices"] == said["choices"]
    on = ask(second, said["state"], prompt="")  # a generation that was under way goes on to the bit
    whole = ask(second, "entries", max_tokens=24)
    assert whole["choices"][0]["text"] == said["choices"][0]["text"] + on["choices"][0]["text"]


def test_progress_comes_as_events(start: Start) -> None:
    server = start()
    with server.http.stream("POST", "/v1/states", json={"text": TEXT, "stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    events = [json.loads(line[6:]) for line in lines]
    done = [e["done"] for e in events[:-1]]
    assert (
        len(done) > 5 and done == sorted(done) and all(e["total"] == events[0]["total"] for e in events[:-1])
    )
    assert events[-1]["object"] == "state" and events[-1]["position"] == events[0]["total"]


def test_a_file_and_a_text_give_the_same_state(start: Start) -> None:
    server = start()
    one = server.http.post("/v1/states", json={"text": TEXT}).json()
    two = server.http.post(
        "/v1/states", files={"file": ("x.txt", TEXT.encode())}, data={"name": "from a file"}
    ).json()
    assert two["name"] == "from a file" and two["read"]["cached_tokens"] > 0
    assert ask(server, one["id"])["choices"] == ask(server, two["id"])["choices"]
    assert server.http.post("/v1/states", files={"file": ("x", b"\0\1")}).status_code == 415


def test_metrics_have_the_numbers_of_each_tier(start: Start) -> None:
    server = start()
    state = server.http.post("/v1/states", json={"text": TEXT}).json()
    ask(server, state["id"])
    names = [
        f'linstate_store_tier_{name}{{tier="{tier}"}}'
        for tier, name in (
            ("memory", "bytes"),
            ("memory", "states"),
            ("memory", "hits_total"),
            ("storage", "objects"),
            ("storage", "bytes"),
        )
    ]
    lines = dict(
        line.rsplit(" ", 1) for line in server.http.get("/metrics").text.splitlines() if line[0] != "#"
    )
    assert all(float(lines[name]) > 0 for name in names), [lines[name] for name in names]
    if sys.platform.startswith("linux"):
        assert 50e6 < float(lines["linstate_resident_bytes"]) < 50e9
    assert (
        float(lines["linstate_store_puts_total"]) == 1
        and float(lines['linstate_store_tier_misses_total{tier="memory"}']) == 0
    )


def test_fork_change_list_delete(start: Start) -> None:
    server = start()
    state = server.http.post("/v1/states", json={"text": TEXT[:300], "name": "a"}).json()
    fork = server.http.post(f"/v1/states/{state['id']}/fork", json={"name": "b"})
    assert fork.status_code == 201 and fork.json()["parent"] == state["id"]
    assert ask(server, "a")["choices"] == ask(server, "b")["choices"]
    changed = server.http.patch("/v1/states/b", json={"name": "c", "tags": {"x": "y"}, "ttl": 60}).json()
    assert changed["name"] == "c" and changed["tags"] == {"x": "y"} and changed["expires"] > time.time()
    assert server.http.patch("/v1/states/c", json={"name": "a"}).status_code == 409
    assert [s["name"] for s in server.http.get("/v1/states").json()["data"]] == ["c", "a"]
    assert server.http.delete("/v1/states/a").json()["deleted"]
    assert server.http.get("/v1/states/a").status_code == 404
    assert ask(server, "c")["choices"]


def test_an_exported_state_goes_on_elsewhere_and_an_altered_one_does_not(
    start: Start, tmp_path: Path
) -> None:
    one = start(folder=tmp_path / "one")
    state = one.http.post("/v1/states", json={"text": TEXT}).json()
    blob = one.http.get(f"/v1/states/{state['id']}/export").content
    back = one.http.post("/v1/states/import", content=blob, params={"name": "back"})
    assert back.status_code == 201
    assert ask(one, "back")["choices"] == ask(one, state["id"])["choices"]
    other = start(folder=tmp_path / "other")
    assert other.http.post("/v1/states/import", content=blob).status_code == 422  # signed by another server
    (tmp_path / "one" / "signing.key").rename(tmp_path / "signing.key")
    (tmp_path / "third").mkdir()
    (tmp_path / "signing.key").rename(tmp_path / "third" / "signing.key")
    third = start(folder=tmp_path / "third")
    assert (
        ask(third, third.http.post("/v1/states/import", content=blob).json()["id"])["choices"]
        == ask(one, "back")["choices"]
    )
    for at in (3, 9, len(blob) // 3, len(blob) // 2, len(blob) - 2):
        bad = bytearray(blob)
        bad[at] ^= 1
        assert one.http.post("/v1/states/import", content=bytes(bad)).status_code == 422
    assert one.http.post("/v1/states/import", content=blob[:-7]).status_code == 422
    foreign = small_models.build("delta", seed=3)
    foreign.read(TEXT[:200]).save(tmp_path / "foreign.state")
    answer = one.http.post("/v1/states/import", content=(tmp_path / "foreign.state").read_bytes())
    assert answer.status_code == 409 and "differ" in answer.json()["error"]["message"]


def test_a_file_of_the_command_line_is_taken_where_there_are_no_keys(start: Start, tmp_path: Path) -> None:
    server = start()
    state = server.service.model.read(TEXT[:200])
    state.save(tmp_path / "a.state")
    blob = (tmp_path / "a.state").read_bytes()
    assert server.http.post("/v1/states/import", content=blob).status_code == 201
    keys = Keys(tmp_path / "keys.json")
    ann = {"authorization": f"Bearer {keys.add('ann')}"}
    closed = start(folder=tmp_path / "closed", keys=tmp_path / "keys.json")
    assert closed.http.post("/v1/states/import", content=blob, headers=ann).status_code == 422


def test_tenants_see_nothing_of_each_other(start: Start, tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    ann, bob = ({"authorization": f"Bearer {keys.add(name)}"} for name in ("ann", "bob"))
    assert (
        keys.entries[0]["hash"] not in ann["authorization"]
        and "ls-" not in (tmp_path / "keys.json").read_text()
    )
    server = start(keys=tmp_path / "keys.json")
    http = server.http
    assert http.get("/v1/states").status_code == 401
    assert http.get("/v1/states", headers={"authorization": "Bearer ls-wrong"}).status_code == 401
    assert http.get("/health").status_code == 200 and http.get("/metrics", headers=ann).status_code == 403
    state = http.post("/v1/states", json={"text": TEXT, "name": "mine"}, headers=ann).json()
    answer = http.post("/v1/responses", json={"input": "lamp", "state": state["id"]}, headers=ann).json()
    talk = http.post("/v1/conversations", json={}, headers=ann).json()
    missing = "0" * 32
    for method, path, body in (
        ("GET", "/v1/states/{}", None),
        ("PATCH", "/v1/states/{}", {"name": "x"}),
        ("DELETE", "/v1/states/{}", None),
        ("POST", "/v1/states/{}/fork", {}),
        ("GET", "/v1/states/{}/export", None),
    ):
        said = [
            http.request(method, path.format(id), json=body, headers=bob) for id in (state["id"], missing)
        ]
        assert [s.status_code for s in said] == [404, 404]
        assert said[0].text.replace(state["id"], missing) == said[1].text
    assert http.get("/v1/states/mine", headers=bob).status_code == 404
    body = {"prompt": "x", "state": state["id"], "max_tokens": 1}
    assert http.post("/v1/completions", json=body, headers=bob).status_code == 404
    body = {"input": "x", "previous_response_id": answer["id"]}
    assert http.post("/v1/responses", json=body, headers=bob).status_code == 404
    assert http.get(f"/v1/responses/{answer['id']}", headers=bob).status_code == 404
    assert http.get(f"/v1/conversations/{talk['id']}", headers=bob).status_code == 404
    assert http.get("/v1/states", headers=bob).json()["data"] == []
    blob = http.get(f"/v1/states/{state['id']}/export", headers=ann).content
    assert http.post("/v1/states/import", content=blob, headers=bob).status_code == 422
    assert http.post("/v1/states/import", content=blob, headers=ann).status_code == 201
    # What ann has read makes nothing of bob's quicker, in memory or in the store.
    for headers, cached in ((bob, False), (ann, True), (bob, True)):
        usage = http.post("/v1/states", json={"text": TEXT}, headers=headers).json()["read"]
        assert (usage["cached_tokens"] > 0) is cached


def test_what_is_too_much_is_refused(start: Start) -> None:
    server = start(max_body=20_000, max_prompt=500, max_states=2, waiting=1, slots=1, max_tokens=100_000)
    http = server.http
    assert http.post("/v1/states", json={"text": "x" * 30_000}).status_code == 413
    chunks = (b"x" * 5000 for _ in range(10))
    assert http.post("/v1/states/import", content=chunks).status_code == 413
    assert http.post("/v1/states", json={"text": TEXT[:100] * 40}).status_code == 413
    for _ in range(2):
        assert http.post("/v1/states", json={"text": "entry"}).status_code == 201
    assert http.post("/v1/states", json={"text": "entry"}).status_code == 403
    url = f"{server.url}/v1/completions"
    body = {"prompt": "entry", "max_tokens": 100_000, "stream": True}
    with httpx.Client(trust_env=False, timeout=60) as other:
        with other.stream("POST", url, json=body) as one:
            lines = one.iter_lines()  # held: a stream whose lines nobody wants is closed
            next(lines)
            codes = []
            import threading

            def more() -> None:
                with httpx.Client(trust_env=False, timeout=60) as client:
                    answer = client.post(url, json={"prompt": "entry", "max_tokens": 1})
                    codes.append((answer.status_code, answer.headers.get("retry-after")))

            threads = [threading.Thread(target=more) for _ in range(4)]
            for thread in threads:
                thread.start()
            end = time.monotonic() + 30
            while len(codes) < 3 and time.monotonic() < end:
                time.sleep(0.01)
        for thread in threads:  # the client has left: its slot is free, and the one that waited is served
            thread.join(60)
    assert sorted(c for c, _ in codes) == [200, 429, 429, 429]
    assert all(int(after or 0) >= 1 for c, after in codes if c == 429)


def test_pages_of_other_sites_may_do_nothing(start: Start) -> None:
    http = start().http
    for host in (
        "evil.example",
        "localhost:1/health?",
        "evil]",
        "localhost:x@evil.com",
        "localhost:80:80",
        "",
    ):
        assert http.get("/v1/states", headers={"host": host}).status_code == 403, host
    assert (
        http.post("/v1/states", json={"text": "x"}, headers={"origin": "https://evil.example"}).status_code
        == 403
    )
    same = {"origin": str(http.base_url).rstrip("/")}
    assert http.post("/v1/states", json={"text": "x"}, headers=same).status_code == 201
    page = http.get("/")
    assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]


def test_the_command_stops_gracefully_and_loses_nothing(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "linstate",
        "serve",
        "--port",
        "0",
        "--store",
        str(tmp_path / "s"),
        "--log",
        "json",
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        assert process.stderr is not None
        url = next(line.split()[-1] for line in process.stderr if line.startswith("listening"))
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
            secret = "a very private sentence"
            kept = http.post("/v1/states", json={"text": f"{secret}\n" * 20, "name": "kept"})
            assert kept.status_code == 201
            body = {"prompt": "x", "max_tokens": 60, "stream": True, "store": True, "name": "later"}
            with http.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                rest = list(lines)
            assert rest[-2] == "data: [DONE]" or rest[-1] == "data: [DONE]"
        log = process.stderr.read()
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.communicate()
    entries = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert {e["route"] for e in entries} >= {"/v1/states", "/v1/completions"} and secret not in log
    again = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        assert again.stderr is not None
        url = next(line.split()[-1] for line in again.stderr if line.startswith("listening"))
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
            assert {s["name"] for s in http.get("/v1/states").json()["data"]} == {"kept", "later"}
    finally:
        again.kill()
        again.communicate()


def test_keys_are_refused_off_loopback(tmp_path: Path) -> None:
    from linstate.errors import InputError
    from linstate.serve.settings import Settings

    with pytest.raises(InputError, match="API keys"):
        Settings(host="0.0.0.0")
