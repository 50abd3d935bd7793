"""Where the bytes of states lie: each object under the SHA-256 of its content, in a folder or in object storage.

Objects are written once and never changed. A folder needs nothing that is not installed; it is written here and not by
obstore, because obstore's local store does not flush to disk, and an acknowledged state must outlive a power cut.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from linstate.errors import InputError, StateFileError
from linstate.files import write_atomically

_STALE = 3600.0  # seconds after which a temporary file is one that a killed process has left


def digest(blob: bytes) -> str:
    """The name of an object: SHA-256 of its bytes, hex."""
    return hashlib.sha256(blob).hexdigest()


class Objects(Protocol):
    """A place for objects. ``write`` returns when the object is there to stay; all names are digests."""

    def write(self, name: str, blob: bytes) -> None: ...
    def read(self, name: str) -> bytes: ...
    def exists(self, name: str) -> bool: ...
    def delete(self, name: str) -> None: ...
    def list(self) -> Iterator[tuple[str, int]]: ...
    def sweep(self) -> int: ...


def open_objects(where: str) -> Objects:
    """The objects at a URL (through obstore), or in a folder. Raises InputError."""
    return RemoteObjects(where) if "://" in where else FolderObjects(Path(where))


def checked(name: str, blob: bytes) -> bytes:
    """``blob``, if it is what its name says. Raises StateFileError."""
    if digest(blob) != name:
        raise StateFileError(
            f"the stored object {name[:16]}… is not what was written ({len(blob):,} bytes that hash to something else): it was "
            "altered or damaged in storage; restore it from a copy, or delete the states that 'linstate store verify' lists"
        )
    return blob


def _lost(name: str, where: str) -> StateFileError:
    return StateFileError(
        f"the stored object {name[:16]}… is missing from {where}: it was removed behind the store's back; restore it from a "
        "copy, or delete the states that 'linstate store verify' lists"
    )


class FolderObjects:
    """Objects as files ``ab/<digest>``, flushed to disk before they count."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "objects"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the store's folder {folder}: {error.strerror or error}") from error

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name

    def write(self, name: str, blob: bytes) -> None:
        path = self._path(name)
        if not path.parent.is_dir():
            path.parent.mkdir(exist_ok=True)
            _flush(self.folder)
        write_atomically(path, blob)
        _flush(path.parent)

    def read(self, name: str) -> bytes:
        try:
            return checked(name, self._path(name).read_bytes())
        except FileNotFoundError:
            raise _lost(name, str(self.folder)) from None

    def exists(self, name: str) -> bool:
        return self._path(name).is_file()

    def delete(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def list(self) -> Iterator[tuple[str, int]]:
        for path in self.folder.glob("??/*"):
            if len(path.name) == 64:
                try:
                    yield path.name, path.stat().st_size
                except FileNotFoundError:  # collected by another process in the meantime
                    continue

    def sweep(self) -> int:
        """Remove what writes that were killed have left; returns how many files."""
        stale, found = time.time() - _STALE, 0
        for path in self.folder.glob("??/.*"):
            try:
                if path.stat().st_mtime < stale:
                    path.unlink()
                    found += 1
            except FileNotFoundError:
                continue
        return found


def _flush(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class RemoteObjects:
    """Objects in S3, Google Cloud Storage, Azure or whatever obstore opens by URL; credentials come from the environment."""

    def __init__(self, url: str) -> None:
        try:
            import obstore
            import obstore.store
        except ImportError:
            raise InputError(
                f"{url}: object storage needs the package obstore: pip install 'linstate[store]', or name a folder"
            ) from None
        self._api: Any = obstore
        self.url = url
        try:
            options = {"mkdir": True} if url.startswith("file://") else {}
            self._store: Any = obstore.store.from_url(url, **options)
        except Exception as error:  # obstore's errors have no common root
            raise InputError(f"cannot open the object storage {url}: {error}") from error

    def _path(self, name: str) -> str:
        return f"objects/{name[:2]}/{name}"

    def write(self, name: str, blob: bytes) -> None:
        self._api.put(self._store, self._path(name), blob)

    def read(self, name: str) -> bytes:
        try:
            return checked(name, bytes(self._api.get(self._store, self._path(name)).bytes()))
        except FileNotFoundError:
            raise _lost(name, self.url) from None

    def exists(self, name: str) -> bool:
        try:
            self._api.head(self._store, self._path(name))
        except FileNotFoundError:
            return False
        return True

    def delete(self, name: str) -> None:
        try:
            self._api.delete(self._store, self._path(name))
        except FileNotFoundError:
            return

    def list(self) -> Iterator[tuple[str, int]]:
        for batch in self._api.list(self._store, prefix="objects"):
            for entry in batch:
                name = entry["path"].rsplit("/", 1)[-1]
                if len(name) == 64:
                    yield name, int(entry["size"])

    def sweep(self) -> int:
        """Object storage has no half-written objects."""
        return 0
