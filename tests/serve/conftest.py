"""Servers for the tests of a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
from serve_server import Server


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers on one store; they are stopped in the end."""
    running: list[Server] = []

    def begin(**options: Any) -> Server:
        folder = options.pop("folder", tmp_path / "store")
        running.append(Server(folder, **options).__enter__())
        return running[-1]

    yield begin
    for server in running:
        server.__exit__()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that the tests of a file share."""
    with Server(tmp_path_factory.mktemp("store")) as running:
        yield running
