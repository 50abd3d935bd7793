"""Text that any Python machine has: the standard library, licence texts, package documentation.

Three kinds of document, so that a mixture can weigh them:

==========  =========================================================================================
``python``  sources of the standard library, tests left out
``test``    its tests (many more bytes, much more alike: give them less weight)
``doc``     prose: the Python reference (``pydoc_data``), licences, Debian's ``/usr/share/doc``
==========  =========================================================================================

What an evaluation asks about is never gathered: nothing under ``/etc`` is opened, and tables of
ports, protocols, time zones, countries or capitals are left out by name and by content.

A part of ``python`` is **held out**. A module belongs to it by a hash of its dotted name, so the
same modules are held out on every machine and in every Python version; a training document that
repeats a good part of a held-out one is dropped.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

__all__ = ["Document", "Kind", "collect", "held_out_python", "is_held_out", "standard_library"]

Kind = Literal["python", "test", "doc"]

HELD_OUT_SHARE = 0.2  # of the modules; about 1.4 MB of the standard library of Python 3.11
_TEST_PARTS = {"test", "tests", "idle_test", "testmock", "testing"}
_SKIP_PARTS = {"site-packages", "dist-packages", "__pycache__", "lib-dynload", "pydoc_data", "_bundled"}
_DOC_NAME = re.compile(
    r"^(readme|news|copyright|changelog|changes|todo|faq|install|hacking|thanks|notice|license|licence|"
    r"contributing|bugs|about|manual|guide|tutorial|howto|introduction)\b", re.I
)  # fmt: skip
_DOC_SUFFIXES = {".md", ".rst", ".txt"}
_TABLE_NAME = re.compile(
    r"(^|[^a-z])(services|protocols|iso[-_]?3166|iso[-_]codes|netbase|tzdata|zoneinfo|countries|country|"
    r"capitals|zone1970|zone\.tab|iana|ports)([^a-z]|$)", re.I
)  # fmt: skip
_PORT_LINE = re.compile(r"\b\d{1,5}/(?:tcp|udp)\b")
_CAPITALS = re.compile(
    r"\b(Ouagadougou|Canberra|Tashkent|Reykjavik|Buenos Aires|Ulaanbaatar|Kathmandu|Montevideo|Antananarivo|"
    r"Tegucigalpa|Ljubljana|Bratislava|Nairobi|Kinshasa|Windhoek)\b"
)  # fmt: skip


@dataclass(frozen=True)
class Document:
    """One text. ``source`` is its path relative to its root, with ``/`` on every system."""

    source: str
    kind: Kind
    text: str


def standard_library() -> Path:
    """The folder that holds the standard library's sources on this machine."""
    return Path(sysconfig.get_paths()["stdlib"])


def collect(
    split: Literal["train", "held_out"],
    *,
    stdlib: Path | None = None,
    doc_roots: tuple[Path, ...] = (Path("/usr/share/common-licenses"), Path("/usr/share/doc")),
    file_cap: int = 64_000,
    doc_cap: int = 16_000_000,
) -> Iterator[Document]:
    """Every document of one split, in an order that depends only on the files.

    Args:
        split: ``held_out`` gives whole library modules only; ``train`` gives everything else.
        stdlib: root of the library; :func:`standard_library` by default.
        doc_roots: folders of licences and package documentation; a folder that is missing is skipped.
        file_cap: most characters taken from one file of ``doc_roots`` (a 32nd for change logs, news and
            copyright lists, which are many and alike).
        doc_cap: most characters taken from ``doc_roots`` in all.

    Raises:
        FileNotFoundError: the library has no Python source at all under ``stdlib``.
    """
    root = stdlib or standard_library()
    held = [document for document in _library(root) if _is_held_out_document(document)]
    if split == "held_out":
        yield from held
        return
    lines = {line for document in held for line in _long_lines(document.text)}
    seen: set[int] = set()
    for document in (*_library(root), *_topics(), *_documentation(doc_roots, file_cap, doc_cap)):
        if document.kind == "python" and is_held_out(document.source):
            continue
        mark = hash(document.text)
        if mark in seen or _repeats(document.text, lines):
            continue
        seen.add(mark)
        yield document


def held_out_python(total_bytes: int = 1_000_000, *, stdlib: Path | None = None) -> bytes:
    """The first ``total_bytes`` of the held-out modules, put one after another in hash order (UTF-8).

    Shorter than asked when the library is. The order mixes packages, as training windows do.
    """
    documents = sorted(collect("held_out", stdlib=stdlib), key=lambda d: _fraction("order:" + d.source))
    whole = "".join(document.text for document in documents).encode()
    return whole[:total_bytes]


def is_held_out(source: str) -> bool:
    """Whether the library module at this relative path (``json/decoder.py``) is held out.

    Decided by the dotted name, so ``pathlib.py`` and ``pathlib/__init__.py`` fall the same way.

    >>> is_held_out("pathlib.py") == is_held_out("pathlib/__init__.py")
    True
    """
    name = source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return _fraction(name) < HELD_OUT_SHARE


def _is_held_out_document(document: Document) -> bool:
    return document.kind == "python" and is_held_out(document.source)


def _fraction(name: str) -> float:
    """A number in [0, 1) that depends only on ``name``."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2.0**64


@lru_cache(maxsize=2)
def _library(root: Path) -> tuple[Document, ...]:
    """Sources and tests of the standard library; the codec tables are thinned out."""
    found: list[Document] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _SKIP_PARTS.intersection(parts) or parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        source = "/".join(parts)
        text = _read(path)
        if not text or len(text) < 64 or _is_asked_about(text):
            continue
        is_test = bool(_TEST_PARTS.intersection(parts[:-1])) or parts[-1].startswith("test_")
        if parts[0] == "encodings":  # nearly all alike: a few of them, and none held out
            if _fraction("few:" + source) < 0.2:
                found.append(Document(source, "test", text))
            continue
        found.append(Document(source, "test" if is_test else "python", text))
    if not found:
        raise FileNotFoundError(f"{root}: no Python source found; give the folder of the standard library")
    return tuple(found)


def _topics() -> Iterator[Document]:
    """The chapters of the Python reference that ``help()`` prints: prose, with examples."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name in sorted(topics):
        text = topics[name]
        if not _is_asked_about(text):
            yield Document(f"pydoc_data/{name}", "doc", text)


def _documentation(roots: tuple[Path, ...], file_cap: int, doc_cap: int) -> Iterator[Document]:
    """Plain text under ``roots``; a paragraph that several files share is kept once."""
    paragraphs: set[int] = set()
    left = doc_cap
    for root in roots:
        if not root.is_dir():
            continue
        for path in sorted(root.rglob("*")):
            name = path.name.lower()
            relative = path.relative_to(root).as_posix()
            wanted = (
                root.name == "common-licenses" or _DOC_NAME.match(name) or Path(name).suffix in _DOC_SUFFIXES
            )
            if not wanted or _TABLE_NAME.search(relative) or path.is_symlink() or not path.is_file():
                continue
            if Path(name).suffix in {".html", ".htm", ".css", ".js", ".png", ".svg", ".pdf", ".ps"}:
                continue
            text = _read(path)
            if not text or _is_asked_about(text):
                continue
            fresh: list[str] = []
            logbook = name.startswith(("change", "news", "copyright")) or "relnotes" in relative.lower()
            for paragraph in text[: file_cap // 32 if logbook else file_cap].split("\n\n"):
                mark = hash(" ".join(paragraph.split()))
                if len(paragraph) < 80 or mark not in paragraphs:
                    fresh.append(paragraph)
                    paragraphs.add(mark)
            kept = "\n\n".join(fresh).strip("\n")
            if len(kept) < 200:
                continue
            left -= len(kept)
            if left < 0:
                return
            yield Document(f"{root.name}/{relative}", "doc", kept + "\n")


def _read(path: Path) -> str | None:
    """The text of a file, unpacked if it ends in ``.gz``; None if it cannot be read or is not UTF-8 text."""
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        text = raw.decode("utf-8")
    except (OSError, EOFError, ValueError, gzip.BadGzipFile):
        return None
    if "\0" in text[:4096]:
        return None
    return text.replace("\r\n", "\n").expandtabs(8) if path.suffix == ".py" else text.replace("\r\n", "\n")


def _is_asked_about(text: str) -> bool:
    """Whether a text holds a table that the evaluation asks about: ports, or capitals of countries."""
    ports = sum(1 for _ in zip(_PORT_LINE.finditer(text), range(4), strict=False))
    return ports >= 4 or len(set(_CAPITALS.findall(text))) >= 3


def _long_lines(text: str) -> set[str]:
    """The lines that say something: 30 characters or more after stripping."""
    return {line for raw in text.split("\n") if len(line := raw.strip()) >= 30}


def _repeats(text: str, held_out_lines: set[str]) -> bool:
    """Whether more than a third of a text's long lines stand in the held-out modules."""
    lines = _long_lines(text)
    return len(lines) >= 10 and 3 * len(lines & held_out_lines) > len(lines)
