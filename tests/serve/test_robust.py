"""Nonsense of every kind: no 500. A short soak. The examples. Search."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import small_models
from linstate import LanguageModel
from serve_server import Server

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
Start = Callable[..., Server]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_schemathesis_finds_no_server_error(start: Start) -> None:
    pytest.importorskip("schemathesis")
    server = start(max_tokens=8, max_prompt=2000)
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
    options = [
        "--checks",
        "not_a_server_error",
        "-n",
        "12",
        "--phases",
        "examples,coverage,fuzzing",
        "--request-timeout",
        "90",
        "--seed",
        "1",
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=ENV, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert server.http.get("/health").status_code == 200


@pytest.mark.slow
def test_a_short_soak_loses_nothing() -> None:
    command = [
        sys.executable,
        str(EXAMPLES / "measure_serving.py"),
        "soak",
        "--seconds",
        "10",
        "--clients",
        "12",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["soak"]
    assert found["lost"] == 0 and found["kept"] > 10 and found["counts"]["workers killed"] >= 1


@pytest.mark.slow
def test_the_example_runs_and_answers(start: Start) -> None:
    pytest.importorskip("openai")
    server = start(model=LanguageModel.from_pretrained("pocket"))
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "openai_client.py"), server.url],
        capture_output=True,
        text=True,
        env=ENV,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "captain: Ines Duarte" in done.stdout
        and "planet: Mars" in done.stdout
        and "door: green" in done.stdout
    )


def test_search_finds_what_was_read_and_only_ones_own(start: Start) -> None:
    pytest.importorskip("lancedb", reason="the extra `memory` is not installed")
    server = start()
    http = server.http
    for name, text in (
        ("lamps", small_models.TEXT),
        ("boats", "the ferry leaves the harbour at nine every morning\n" * 3),
    ):
        assert http.post("/v1/states", json={"text": text, "name": name}).status_code == 201
    found = http.post("/v1/states/search", json={"query": "harbour ferry"}).json()["data"]
    assert found[0]["state"]["name"] == "boats" and "ferry" in found[0]["passage"]
    said = http.post(
        "/v1/responses", json={"input": "the heron stands in the reeds", "max_output_tokens": 2}
    ).json()
    found = http.post("/v1/states/search", json={"query": "heron reeds"}).json()["data"]
    assert found[0]["state"]["tags"] == {"response": said["id"]}
