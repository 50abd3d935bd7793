"""``linstate serve``: the server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linstate.cli import common
from linstate.errors import InputError

EXAMPLES = (
    "linstate serve",
    "linstate serve --store library --port 8000",
    "linstate serve --role prefill --port 8081",
    "linstate serve --role decode --worker http://127.0.0.1:8081",
)


def serve(
    model: common.Model = common.POCKET,
    weights: common.Weights = None,
    dtype: common.Dtype = None,
    store: Annotated[
        str,
        typer.Option(
            "--store",
            "-s",
            metavar="FOLDER",
            help="Where states are kept: a folder, or a URL of object storage.",
        ),
    ] = "linstate-store",
    catalogue: Annotated[
        str | None, typer.Option(metavar="FILE", help="The catalogue's file, where --store is a URL.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; other than loopback needs --keys.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any that is free.")
    ] = 8080,
    name: Annotated[
        list[str] | None, typer.Option(metavar="HOST", help="A further host name under which it is reached.")
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help="API keys, as made by 'linstate keys add'.")
    ] = None,
    role: Annotated[
        str,
        typer.Option(
            help="both: read and answer; prefill: read for others; decode: have --worker read what is long."
        ),
    ] = "both",
    worker: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="A prefill server; may be given several times.")
    ] = None,
    offload: Annotated[
        int, typer.Option(min=1, help="Tokens that no state holds yet, from which on a worker reads them.")
    ] = 2048,
    ship: Annotated[
        str, typer.Option(help="Precision of states from workers: exact, bf16 or int8.")
    ] = "exact",
    slots: Annotated[int, typer.Option(min=1, max=256, help="Requests under way at once.")] = 32,
    waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait for a slot.")] = 128,
    memory: Annotated[
        int, typer.Option(min=1, help="MB that the states of requests under way may take.")
    ] = 4096,
    max_body: Annotated[int, typer.Option(min=1, help="MB of a request.")] = 64,
    max_prompt: Annotated[int, typer.Option(min=1, help="Tokens that a request may bring.")] = 1_000_000,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens that a request may generate.")] = 4096,
    max_states: Annotated[int, typer.Option(min=1, help="States that a tenant may keep.")] = 10_000,
    keep_days: Annotated[
        float, typer.Option(min=0, help="Days that responses and conversations are kept; 0: for ever.")
    ] = 30.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the model.")] = None,
    log: Annotated[
        str, typer.Option(help="The log on standard error: json, text or off. It has no contents.")
    ] = "text",
) -> None:
    """Serve the model over HTTP: OpenAI's interface, states that are kept, and a page.

    Open http://127.0.0.1:8080/ in a browser, or point an OpenAI client at http://127.0.0.1:8080/v1. What was read and
    answered is kept in --store, and there the next day. Ctrl-C ends it: answers under way are finished first.
    """
    try:
        from linstate.serve.app import create_app
        from linstate.serve.connections import config_of
    except ImportError as error:
        raise InputError(
            f"the server needs more packages ({error.name}): pip install 'linstate[serve]'"
        ) from error
    from linstate.serve.access import log_to_stderr
    from linstate.serve.settings import Settings

    for option, value, known in (
        ("--role", role, ("both", "prefill", "decode")),
        ("--ship", ship, ("exact", "bf16", "int8")),
        ("--log", log, ("json", "text", "off")),
    ):
        if value not in known:
            raise typer.BadParameter(f"must be one of {', '.join(known)}, got {value!r}", param_hint=option)
    if role == "decode" and not worker:
        raise InputError("--role decode needs at least one --worker, the address of a prefill server")
    settings = Settings(
        model=model,
        store=store,
        catalogue=catalogue,
        host=host,
        port=port,
        names=tuple(name or ()),
        keys=keys,
        role=role,  # type: ignore[arg-type]
        workers=tuple(worker or ()),
        offload=offload,
        ship=ship,  # type: ignore[arg-type]
        slots=slots,
        waiting=waiting,
        memory=memory * 1_000_000,
        max_body=max_body * 1_000_000,
        max_prompt=max_prompt,
        max_tokens=max_tokens,
        max_states=max_states,
        keep=keep_days * 86400,
        threads=threads,
    )
    log_to_stderr(log)
    app = create_app(settings, common.load_model(model, weights, dtype))
    _server()(config_of(app, settings)).run()


def _server() -> type:
    import uvicorn

    class Server(uvicorn.Server):
        """Says where it listens, once it does."""

        async def startup(self, sockets: object = None) -> None:
            await super().startup(sockets)  # type: ignore[arg-type]
            if self.started:
                port = self.servers[0].sockets[0].getsockname()[1]
                host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
                common.messages().print(f"listening on http://{host}:{port}/", markup=False)

    return Server
