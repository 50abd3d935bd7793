"""What a server is started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from linstate.errors import InputError

Role = Literal["both", "prefill", "decode"]
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Settings:
    """What a server is started with; the command line has an option for each.

    Attributes:
        model: model folder, or "pocket". store: folder or URL of the states; catalogue: its catalogue, for a URL.
        host, port: where it listens. names: further names under which browsers may reach it.
        keys: file of API keys; without one, everybody who can reach the server is the tenant "default", so it must be
            loopback.
        role: "both"; "prefill" only reads for others; "decode" sends long readings to ``workers``.
        workers: addresses of prefill workers. worker_key: the API key to show them. offload: uncached tokens from which
            on a reading is sent away. ship: precision of a state on the way.
        slots, waiting, memory: of the scheduler; per_tenant: jobs that one tenant may have under way or waiting.
        max_body: bytes of a request. max_prompt: tokens that one request may bring. max_tokens: tokens that one request
            may generate. max_states, max_bytes: quota of a tenant's states; max_records: bytes of its responses and conversations.
        connections: open at once, of all clients; of one address at most a quarter of them may be without a whole request.
        idle: seconds that a connection may take to send a request's head, or be open without one.
        keep: seconds that states of responses and conversations live; 0: until they are deleted.
        prefix_bytes: memory for the beginnings of texts that are sent again (``serve/prefix.py``).
        drain: seconds that a stopping server gives to what is under way.
        threads: torch threads. log: "json", "text" or "off". log_contents: write prompts and answers into the log.
    """

    model: str = "pocket"
    store: str = "linstate-store"
    catalogue: str | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    names: tuple[str, ...] = ()
    keys: Path | None = None
    role: Role = "both"
    workers: tuple[str, ...] = ()
    worker_key: str | None = None
    offload: int = 2048
    ship: Literal["exact", "bf16", "int8"] = "exact"
    slots: int = 32
    waiting: int = 128
    per_tenant: int = 96
    memory: int = 4 * 2**30
    max_body: int = 64 * 2**20
    max_prompt: int = 1_000_000
    max_tokens: int = 4096
    max_states: int = 10_000
    max_bytes: int | None = None
    max_records: int = 256 * 2**20
    connections: int = 1024
    idle: float = 75.0
    keep: float = 30 * 86400
    prefix_bytes: int = 256 * 2**20
    drain: float = 30.0
    threads: int | None = None
    log: Literal["json", "text", "off"] = "json"
    log_contents: bool = False
    extra: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.keys is None and self.host not in LOOPBACK:
            raise InputError(
                f"without API keys the server listens on loopback only, not on {self.host}: make keys with 'linstate keys add' "
                "and give --keys, or use --host 127.0.0.1"
            )
        if self.role == "prefill" and self.workers:
            raise InputError("--role prefill reads itself; it takes no --worker")
