"""The state file: a ``safetensors`` file with string metadata, a checksum, and an optional signature.

Reading trusts nothing: the header is bounded and compared with the file's real size before anything is
allocated, then format, checksum and signature are checked, and only then tensors are made. No pickle.
The layout is described in ``docs/state-format.md``.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from linstate.errors import StateFileError, boundary
from linstate.files import replacing
from linstate.models.fingerprint import tensor_bytes
from linstate.state.packing import layout, pack_into, packed

FORMAT = "linstate-state"
VERSION = 2
"""Format 2 is format 1 with windows stored without the places that are not in use; a file that has none is one of format 1."""
_MAX_HEADER = 16 * 2**20
_ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
_SEALS = ("checksum", "signature")


@dataclass(frozen=True)
class Artifact:
    """What a state file holds: string metadata and named tensors."""

    metadata: dict[str, str]
    tensors: dict[str, Tensor]


def _digest(metadata: Mapping[str, str], table: Mapping[str, Any], *data: bytes | memoryview) -> bytes:
    """SHA-256 over metadata (without the seals), the table of tensors and their bytes."""
    plain = {name: value for name, value in metadata.items() if name not in _SEALS}
    digest = hashlib.sha256(json.dumps([plain, table], sort_keys=True, separators=(",", ":")).encode())
    for part in data:
        digest.update(part)
    return digest.digest()


def _split(blob: bytes | memoryview, name: str) -> tuple[dict[str, str], dict[str, Any], memoryview]:
    """Metadata, table of tensors and data of a safetensors blob, all bounds checked. Raises StateFileError."""
    view = memoryview(blob)
    if len(view) < 8:
        raise StateFileError(
            f"{name}: {len(view)} bytes are too few for a state file; it is cut short or no state at all"
        )
    size = int.from_bytes(view[:8], "little")
    if size > _MAX_HEADER or size > len(view) - 8:
        raise StateFileError(
            f"{name}: its header claims {size:,} bytes, the file has {len(view):,} (at most {_MAX_HEADER:,} are "
            "allowed); it is cut short or no state file"
        )
    with boundary(StateFileError, f"{name}: its header"):
        header = json.loads(bytes(view[8 : 8 + size]))
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("metadata is no mapping of strings")
        end = 0
        for entry in sorted(header.values(), key=lambda e: e["data_offsets"][0]):
            begin, stop = entry["data_offsets"]
            shape = entry["shape"]
            if any(type(n) is not int or n < 0 for n in (begin, stop, *shape)) or begin != end:
                raise ValueError("shapes or offsets are impossible")
            if stop - begin != math.prod(shape) * _ITEM_BYTES[entry["dtype"]]:
                raise ValueError("a tensor's size does not fit its shape")
            end = stop
    data = view[8 + size :]
    if metadata.get("format") != FORMAT:
        raise StateFileError(
            f"{name}: it is a safetensors file, but not a Linstate state (format {metadata.get('format')!r})"
        )
    version = metadata.get("version", "")
    number = int(version) if re.fullmatch("[0-9]{1,9}", version) else 0
    if not 1 <= number <= VERSION:
        newer = number > VERSION
        hint = "a newer Linstate wrote it; update Linstate" if newer else "this version is not known"
        raise StateFileError(
            f"{name}: state format {version!r}, this Linstate reads formats up to {VERSION}: {hint}"
        )
    if end != len(data):
        raise StateFileError(
            f"{name}: it should hold {end:,} bytes of tensors and holds {len(data):,}; it is cut short or damaged, "
            "take another copy"
        )
    return metadata, header, data


def _same(found: str, expected: str) -> bool:
    """Whether two seals are the same, in a time that does not tell where they differ."""
    return hmac.compare_digest(found.encode(errors="replace"), expected.encode())


def _stamped(
    metadata: Mapping[str, str], plain: Mapping[str, Tensor], table: Mapping[str, Any], key: bytes | None
) -> dict[str, str]:
    """The metadata with format, version and seals over it, the table and the bytes of the tensors where they lie."""
    version = VERSION if any(name.startswith("places/") for name in plain) else 1
    stamped = {**metadata, "format": FORMAT, "version": str(version)}
    digest = _digest(stamped, table, *(tensor_bytes(plain[name]) for name in table))
    stamped["checksum"] = digest.hex()
    if key is not None:
        stamped["signature"] = hmac.new(key, digest, hashlib.sha256).hexdigest()
    return stamped


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def pack(metadata: Mapping[str, str], tensors: Mapping[str, Tensor], *, key: bytes | None = None) -> bytes:
    """The bytes of a state file; sealed with a checksum, and with an HMAC when there is a key."""
    plain = _plain(tensors)
    table = layout(plain)
    blob = packed(plain, _stamped(metadata, plain, table, key))
    size = int.from_bytes(blob[:8], "little")
    if (other := _table(blob[8 : 8 + size])) != table:  # a library that lays tensors out otherwise
        blob = packed(plain, _stamped(metadata, plain, other, key))
    _split(blob, "new state")
    return blob


def _table(header: bytes) -> dict[str, Any]:
    """The table of tensors of a header that was just written, in the order of their bytes."""
    found = json.loads(header)
    found.pop("__metadata__", None)
    return dict(sorted(found.items(), key=lambda entry: entry[1]["data_offsets"]))


def write(
    path: str | Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor], *, key: bytes | None = None
) -> int:
    """Write a state file under a temporary name beside ``path``, then rename it; returns its bytes.

    Whatever happens, ``path`` holds either what it held before or the whole new file. The tensors are written from where they lie.
    """
    plain = _plain(tensors)
    table = layout(plain)
    with replacing(path) as temporary:
        pack_into(temporary, plain, _stamped(metadata, plain, table, key))
        with open(temporary, "rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
        if (other := _table(header)) != table:  # a library that lays tensors out otherwise
            pack_into(temporary, plain, _stamped(metadata, plain, other, key))
        size = temporary.stat().st_size
    return size


def unpack(blob: bytes, name: str, *, key: bytes | None = None) -> Artifact:
    """The content of a state file's bytes, everything checked first. Raises StateFileError saying what is wrong.

    Args:
        name: what to call it in errors.
        key: if given, the file must carry the signature made with this key.
    """
    metadata, table, data = _split(blob, name)
    digest = _digest(metadata, table, data)
    if not _same(metadata.get("checksum", ""), digest.hex()):
        raise StateFileError(
            f"{name}: the checksum does not fit; it was altered or damaged on the way, take another copy"
        )
    if key is not None:
        expected = hmac.new(key, digest, hashlib.sha256).hexdigest()
        if not _same(metadata.get("signature", ""), expected):
            raise StateFileError(
                f"{name}: it is not signed with this key; ask its sender, or load it without a key"
            )
    with boundary(StateFileError, name):
        tensors = safetensors.torch.load(blob)
    for tensor_name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise StateFileError(
                f"{name}: the tensor {tensor_name!r} holds NaN or Inf; it cannot be continued from"
            )
    return Artifact(metadata, tensors)


def read(path: str | Path, *, key: bytes | None = None) -> Artifact:
    """Read and check a state file. Raises StateFileError saying what is wrong and what to do."""
    try:
        blob = Path(path).read_bytes()
    except OSError as error:
        raise StateFileError(f"cannot read the state {path}: {error.strerror or error}") from error
    return unpack(blob, str(path), key=key)
