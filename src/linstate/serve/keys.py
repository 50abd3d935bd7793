"""API keys and their tenants. A key is 256 random bits, shown once; only its SHA-256 is kept.

A slow hash would protect keys that people think up. These are random, so nobody finds one from its hash, and one SHA-256 a
request costs nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from linstate.errors import InputError
from linstate.files import write_atomically
from linstate.state.store.checks import check_name

PREFIX = "ls-"


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class Keys:
    """The keys in a file, ``{"keys": [{"tenant", "hash", "created"}]}``.

    Raises:
        InputError: the file cannot be read, or is none of keys.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = self._load()

    def _load(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        try:
            entries = json.loads(self.path.read_text("utf-8"))["keys"]
            return [{name: str(e[name]) for name in ("tenant", "hash", "created")} for e in entries]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path}: expected a file made by 'linstate keys add' ({error})") from error

    def add(self, tenant: str) -> str:
        """A new key of a tenant; the file keeps its hash. Raises ArgumentError for a name that is none."""
        check_name(tenant, "tenant")
        key = PREFIX + secrets.token_urlsafe(32)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        self._save([*self.entries, {"tenant": tenant, "hash": _hash(key), "created": created}])
        return key

    def remove(self, start: str) -> int:
        """Revoke the keys whose hash begins with ``start`` (8 digits or more); returns how many."""
        if len(start) < 8:
            raise InputError(f"give at least 8 digits of a key's hash, got {start!r}")
        kept = [e for e in self.entries if not e["hash"].startswith(start)]
        gone = len(self.entries) - len(kept)
        self._save(kept)
        return gone

    def _save(self, entries: list[dict[str, str]]) -> None:
        write_atomically(self.path, json.dumps({"keys": entries}, indent=1).encode())
        os.chmod(self.path, 0o600)
        self.entries = entries

    def tenant(self, key: str) -> str | None:
        """Whose key it is; every entry is compared, in constant time each."""
        given, found = _hash(key), None
        for entry in self.entries:
            if hmac.compare_digest(entry["hash"], given):
                found = entry["tenant"]
        return found


def bearer(headers: Mapping[str, str]) -> str | None:
    """The key in an ``Authorization: Bearer`` header."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" and key.strip() else None
