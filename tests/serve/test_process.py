"""The server's process: the model as the command line names it, and memory that goes back to the system."""

from __future__ import annotations

import asyncio
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from linstate.cli import main
from linstate.serve import memory


def test_the_command_line_packs_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import uvicorn

    monkeypatch.chdir(tmp_path)
    seen: list[Any] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self: seen.append(self.config.app.state.service.model))
    for options in ([], ["--weights", "int8"], ["--dtype", "bfloat16"]):
        with pytest.raises(SystemExit) as ended:
            main(["serve", "--log", "off", *options])
        assert not ended.value.code
    plain, packed, narrow = seen
    assert plain.decoder.embedding.weight.dtype is torch.float32 and not plain.variant
    assert packed.variant == "int8, bfloat16"
    assert narrow.decoder.embedding.weight.dtype is torch.bfloat16


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap is trimmed")
def test_what_was_freed_between_pieces_that_live_goes_back() -> None:
    """Every second of two thousand pieces of 100 kB is freed: the holes are the heap's until it is trimmed."""
    held = [bytes(100_000) + bytes([n % 256]) for n in range(2000)]
    full = memory.resident()
    del held[::2]
    assert memory.trim()
    after = memory.resident()
    assert full is not None and after is not None and full - after > 70e6


def test_it_trims_until_it_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(memory, "EVERY", 0.001)
    monkeypatch.setattr(memory, "_malloc_trim", lambda: lambda pad: calls.append(pad) or 1)

    async def some() -> None:
        task = asyncio.create_task(memory.keep_trimmed())
        while len(calls) < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(some(), 20))
    monkeypatch.setattr(memory, "_malloc_trim", lambda: None)
    assert not memory.trim()
    asyncio.run(asyncio.wait_for(memory.keep_trimmed(), 20))  # ends at once
