"""``linstate keys``: API keys of a server's tenants."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linstate.cli import common
from linstate.errors import InputError

EXAMPLES = (
    "linstate keys add ann --file keys.json",
    "linstate keys ls --file keys.json",
    "linstate keys rm 3f2a91c0 --file keys.json",
    "linstate serve --keys keys.json --host 0.0.0.0 --name brain.example.org",
)

app = typer.Typer(help="Make, list and revoke the API keys of a server's tenants.", no_args_is_help=True)

File = Annotated[
    Path, typer.Option("--file", "-f", metavar="FILE", help="The file of keys; it holds hashes only.")
]


@app.command()
def add(
    tenant: Annotated[str, typer.Argument(help="Whose key it is; a tenant sees its own states only.")],
    file: File = Path("keys.json"),
) -> None:
    """Make a key and print it, once.

    The file keeps its hash only: a key that is lost cannot be shown again, make another.
    """
    from linstate.serve.keys import Keys

    print(Keys(file).add(tenant))


@app.command()
def ls(file: File = Path("keys.json")) -> None:
    """List tenants and the hashes of their keys.

    The first digits of a hash are what 'linstate keys rm' takes.
    """
    from linstate.serve.keys import Keys

    for entry in Keys(file).entries:
        print(f"{entry['hash'][:12]}  {entry['created']}  {common.printable(entry['tenant'])}")


@app.command()
def rm(
    digits: Annotated[str, typer.Argument(metavar="HASH", help="First digits of a key's hash, 8 or more.")],
    file: File = Path("keys.json"),
) -> None:
    """Revoke keys.

    A running server learns of it when it is started anew.
    """
    from linstate.serve.keys import Keys

    gone = Keys(file).remove(digits)
    if not gone:
        raise InputError(f"no key in {file} has a hash that begins with {digits!r}")
    print(f"revoked {gone}")
