"""What a caller may give: names, tags, times to live, quotas."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from collections.abc import Mapping

from linstate.errors import ArgumentError


def over_quota(usage: Mapping[str, int | None], size: int, handles: int = 0) -> str | None:
    """What is wrong if a tenant that uses this takes ``size`` bytes and so many ``handles`` more, or None."""
    for what, more in (("states", handles), ("bytes", size)):
        have, bound = (usage[what] or 0) + more, usage[f"max_{what}"]
        if bound is not None and have > bound:
            return (
                f"its quota is {bound:,} {what}, and this would make it {have:,}; delete states, let some expire, or raise "
                "the quota"
            )
    return None


def bound_key(key: bytes | None, tenant: str) -> bytes | None:
    """The key with which this tenant's states are signed."""
    return (
        None
        if key is None
        else hmac.new(key, b"linstate tenant\0" + tenant.encode(), hashlib.sha256).digest()
    )


def expiry(ttl: float | None, now: float) -> float | None:
    if ttl is None:
        return None
    if not math.isfinite(ttl) or ttl <= 0:
        raise ArgumentError(f"ttl: expected a number of seconds above 0, got {ttl!r}")
    return now + ttl


def tags_json(tags: Mapping[str, str] | None) -> str:
    if any(not isinstance(x, str) for pair in (tags or {}).items() for x in pair):
        raise ArgumentError("tags: expected texts by name, both str")
    return json.dumps(dict(tags or {}), ensure_ascii=False)


def check_name(name: str, what: str) -> None:
    if (
        not isinstance(name, str)
        or not 0 < len(name) <= 200
        or not name.isprintable()
        or name != name.strip()
    ):
        raise ArgumentError(
            f"{what}: expected 1 to 200 printable characters without spaces at the ends, got {name!r:.80}"
        )
