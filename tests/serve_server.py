"""A real server in a thread, for real clients."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

import small_models

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
import httpx
import uvicorn

from linstate import LanguageModel
from linstate.serve.app import create_app
from linstate.serve.connections import config_of
from linstate.serve.service import Service
from linstate.serve.settings import Settings


class Server:
    """``with Server(folder) as server``: listening at ``server.url``, its inside at ``server.service``."""

    def __init__(self, folder: Path, model: LanguageModel | None = None, **options: Any) -> None:
        self.settings = Settings(store=str(folder), port=0, log="off", **options)
        self.app = create_app(self.settings, model or small_models.build("delta"))
        self.service: Service = self.app.state.service
        config = config_of(
            self.app,
            self.app.state.service.settings,
            port=0,
            log_level="critical",
            timeout_graceful_shutdown=5,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        end = time.monotonic() + 60
        while not self._server.started:
            assert self._thread.is_alive() and time.monotonic() < end, "the server did not start"
            time.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive(), "the server did not stop"

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(f"{name} ") or line.startswith(f"{name}{{"):
                return float(line.split()[1])
        raise AssertionError(f"no metric {name}")
