"""Ray Serve on this machine: the pools answer as one server does."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx
import pytest

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytest.importorskip("ray.serve")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_the_pools_answer_as_one_server_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import serve

    from linstate import LanguageModel
    from linstate.serve.cluster import build
    from linstate.serve.settings import Settings

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    text = "".join(f"entry {i}: number {i * 7919 % 1000}\n" for i in range(400))
    model = LanguageModel.from_pretrained("pocket")
    expected = model.read(text)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_agent_register_timeout_ms", "100000")
    try:
        ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
    except (
        Exception
    ) as error:  # its own processes wait for each other for 30 s, too short on a machine that is very busy
        ray.shutdown()
        pytest.skip(f"Ray did not start on this machine: {error}")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        settings = Settings(store=str(tmp_path / "store"), offload=512, log="off", threads=1)
        serve.run(build(settings, prefill=1, cpus=0.2), route_prefix="/")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=120) as http:
            body = {"prompt": text, "max_tokens": 0, "store": True}
            made = http.post("/v1/completions", json=body)
            assert made.status_code == 200, made.text
            sent = [
                line
                for line in http.get("/metrics").text.splitlines()
                if line.startswith("linstate_prefills_sent_total")
            ]
            assert sent == ['linstate_prefills_sent_total{outcome="done"} 1.0']
            blob = http.get(f"/v1/states/{made.json()['state']}/export").content
        (tmp_path / "x.state").write_bytes(blob)
        assert model.load_state(tmp_path / "x.state").id == expected.id
    finally:
        serve.shutdown()
        ray.shutdown()
