"""``linstate store``: the library of states."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linstate.cli import common

if TYPE_CHECKING:
    from linstate.state.store import Handle, StateStore

app = typer.Typer(help="The library of states: list, fork, move, clean up.", no_args_is_help=True)
EXAMPLES = [
    "linstate store add notes.txt --name notes",
    "linstate store ls",
    "linstate store fork notes --name 'what if'",
    "linstate store export notes -o notes.state",
]

Ref = Annotated[
    str,
    typer.Argument(
        metavar="STATE", help="Name or id of a stored state; the first 8 digits of an id are enough."
    ),
]
Name = Annotated[
    str | None, typer.Option("--name", "-n", metavar="NAME", help="What to call it; names are unique.")
]


@app.callback()
def store() -> None:
    """The library of states: list, fork, move, clean up."""


@app.command()
def ls(
    where: common.Store = None,
    catalogue: common.Catalogue = None,
    tenant: common.Tenant = "default",
    tag: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Only with this tag.")] = None,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Also what was kept on the way through long texts.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest.")] = 50,
    json: common.Json = False,
) -> None:
    """List the stored states, the newest first.

    Checkpoints that were kept on the way through long texts are left out unless asked for.
    """
    from rich.table import Table

    with common.open_store(where, catalogue) as opened:
        tags = _pairs(tag) if tag else None
        kind = None if checkpoints else "state"
        found = list(opened.list(tenant=tenant, kind=kind, tags=tags, limit=limit))
        usage = opened.usage(tenant)
    if json:
        common.print_json({"states": [handle.info() for handle in found], "usage": usage})
        return
    table = Table(box=None, padding=(0, 2))
    for name in ("id", "name", "model"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens", "stored", "age", "expires in"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("tags")
    for handle in found:
        table.add_row(*map(common.printable, _line(handle)))
    common.results().print(table)
    common.messages().print(
        f"{usage['states']:,} states and checkpoints, {common.size(usage['bytes'] or 0)} in all"
    )


@app.command()
def show(
    state: Ref,
    where: common.Store = None,
    catalogue: common.Catalogue = None,
    tenant: common.Tenant = "default",
    json: common.Json = False,
) -> None:
    """Show what there is to say about a stored state.

    The states that it came from are named too, the newest first.
    """
    with common.open_store(where, catalogue) as opened:
        handle = opened.get(state, tenant=tenant)
        content = opened.load(handle.id, tenant=tenant, tokens=False)
        line = _ancestors(opened, handle)
    if json:
        common.print_json({**handle.info(), "ancestors": line, "state": content.info()})
        return
    rows = [
        ("id", handle.id),
        ("name", handle.name or "-"),
        ("model", handle.model_name),
        ("position", f"{handle.position:,} tokens"),
        ("in memory", common.size(handle.nbytes)),
        ("stored", f"{common.size(handle.stored_bytes)}, {content.precision}"),
        ("object", handle.digest),
        ("token ids", "kept" if handle.ids_kept else "not kept"),
        ("created", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(handle.created))),
        ("expires", "never" if handle.expires is None else f"in {_span(handle.expires - time.time())}"),
        ("tags", ", ".join(f"{k}={v}" for k, v in handle.tags.items()) or "-"),
        ("came from", " < ".join(line) or "-"),
        ("composition", content.composition or "-"),
    ]
    common.facts(rows)


@app.command()
def add(
    sources: Annotated[list[str], typer.Argument(metavar="FILE", help="Text files; '-' is standard input.")],
    name: Name = None,
    tag: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="A tag, to find it by.")] = None,
    days: Annotated[float | None, typer.Option(help="Days until it expires; without it never.")] = None,
    model: common.Model = common.POCKET,
    weights: common.Weights = None,
    dtype: common.Dtype = None,
    where: common.Store = None,
    catalogue: common.Catalogue = None,
    tenant: common.Tenant = "default",
    json: common.Json = False,
) -> None:
    """Read texts into the library, a state each; what was read before is not read again.

    Token ids are kept, so that 'linstate find' can tell the passages.
    """
    from linstate.errors import InputError
    from linstate.memory import Library

    if name is not None and len(sources) > 1:
        raise InputError("--name is for one source; without it each state is called after its file")
    made = common.load_model(model, weights, dtype)
    with common.open_store(where, catalogue) as opened:
        library = Library(opened, made, tenant=tenant)
        for source in sources:
            called = name or ("stdin" if source == "-" else Path(source).name)
            tags = {"source": source, **_pairs(tag)}
            added = library.add(
                common.text_of(source), name=called, tags=tags, ttl=None if days is None else days * 86400
            )
            if json:
                common.print_line({**added.handle.info(), "new_tokens": added.new, "reason": added.reason})
            else:
                common.messages().print(
                    f"{called}: {added.handle.id[:12]}, position {added.handle.position:,}; read {added.new:,} tokens, "
                    f"{added.handle.position - added.new:,} were read before",
                    markup=False,
                )


@app.command()
def fork(
    state: Ref,
    name: Name = None,
    where: common.Store = None,
    catalogue: common.Catalogue = None,
    tenant: common.Tenant = "default",
    json: common.Json = False,
) -> None:
    """Make a second handle of a state.

    No byte is copied, however large the state; from then on the two know nothing of each other.
    """
    with common.open_store(where, catalogue) as opened:
        handle = opened.fork(state, tenant=tenant, name=name)
    _say(handle, f"a fork of {state}", json)


@app.command()
def rm(
    states: Annotated[list[str], typer.Argument(metavar="STATE", help="Names or ids of stored states.")],
    where: common.Store = None,
    catalogue: common.Catalogue = None,
    tenant: common.Tenant = "default",
    json: common.Json = False,
) -> None:
    """Delete handles of states.

    The bytes that no other handle needs are freed at once.
    """
    with common.open_store(where, catalogue) as opened:
        for state in states:
            _say(opened.delete(state, tenant=tenant), "deleted", json)


@app.command()
def gc(where: common.Store = None, catalogue: common.Catalogue = None, json: common.Json = False) -> None:
    """Delete what has expired, and the bytes that no state needs.

    Others may use the store meanwhile.
    """
    with common.open_store(where, catalogue) as opened:
        found = opened.gc()
    if json:
        common.print_json(vars(found))
    else:
        common.messages().print(
            f"{found.states:,} expired states and {found.objects:,} objects deleted, {common.size(found.bytes)} freed"
        )


@app.command()
def export(
    state: Ref,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="State file to write.")],
    key: common.Key = None,
    where: common.Store = None,
    catalogue: common.Catalogue = None,
    tenant: common.Tenant = "default",
    force: common.Force = False,
    json: common.Json = False,
) -> None:
    """Write a stored state to a file that any Linstate reads.

    With --key it is signed, bound to the tenant: only 'linstate store import' with the same key and tenant takes it.
    """
    common.check_output(out, force=force)
    with common.open_store(where, catalogue) as opened:
        written = opened.export(state, out, tenant=tenant, key=common.read_key(key))
    if json:
        common.print_json({"state": str(out), "file_bytes": written})
    else:
        common.messages().print(f"{out}: {common.size(written)}", markup=False)


@app.command(name="import")
def import_(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="State files.")],
    name: Name = None,
    key: common.Key = None,
    where: common.Store = None,
    catalogue: common.Catalogue = None,
    tenant: common.Tenant = "default",
    json: common.Json = False,
) -> None:
    """Put state files into the store.

    Each is checked whole first; with --key it must carry the signature of that key for this tenant.
    """
    from linstate.errors import InputError

    if name is not None and len(files) > 1:
        raise InputError("--name is for one file")
    with common.open_store(where, catalogue) as opened:
        for file in files:
            _say(opened.import_(file, tenant=tenant, key=common.read_key(key), name=name), str(file), json)


@app.command()
def verify(where: common.Store = None, catalogue: common.Catalogue = None, json: common.Json = False) -> None:
    """Read everything that is stored and say what is wrong.

    Nothing is changed. The exit code is 1 if anything is wrong.
    """
    with common.open_store(where, catalogue) as opened:
        found = opened.verify()
    if json:
        common.print_json({**vars(found), "problems": list(found.problems)})
    else:
        for problem in found.problems:
            common.messages().print(problem, markup=False)
        common.messages().print(
            f"{found.states:,} states, {found.objects:,} objects, {common.size(found.bytes)}: "
            + (f"{len(found.problems)} problems" if found.problems else "all whole")
        )
    if found.problems:
        raise typer.Exit(1)


def _line(handle: Handle) -> list[str]:
    now = time.time()
    return [
        handle.id[:12],
        handle.name or ("(checkpoint)" if handle.kind == "checkpoint" else "-"),
        handle.model_name,
        f"{handle.position:,}",
        common.size(handle.stored_bytes),
        _span(now - handle.created),
        "-" if handle.expires is None else _span(handle.expires - now),
        ", ".join(f"{k}={v}" for k, v in handle.tags.items()),
    ]


def _span(seconds: float) -> str:
    """A time span for people: '3 h'."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _ancestors(opened: StateStore, handle: Handle) -> list[str]:
    """Names or ids of the states that it came from, the newest first, as far as they still exist."""
    from linstate.errors import StateNotFoundError

    line: list[str] = []
    while (parent := handle.parent) is not None and len(line) < 100:
        try:
            handle = opened.get(parent, tenant=handle.tenant)
        except StateNotFoundError:
            line.append(f"{parent[:12]} (deleted)")
            break
        line.append(handle.name or handle.id[:12])
    return line


def _pairs(given: list[str] | None) -> dict[str, str]:
    for pair in given or []:
        if "=" not in pair:
            raise typer.BadParameter(f"expected NAME=VALUE, got {pair!r}", param_hint="--tag")
    return dict(pair.split("=", 1) for pair in given or [])


def _say(handle: Handle, what: str, json: bool) -> None:
    if json:
        common.print_line(handle.info())
    else:
        named = f"{handle.name}: " if handle.name else ""
        common.messages().print(
            f"{named}{handle.id[:12]}, {what}, position {handle.position:,}", markup=False
        )
