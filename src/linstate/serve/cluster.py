"""The same server across a cluster, on Ray Serve (extra ``ray``): a pool that reads, a pool that answers, both growing with load.

    serve run 'linstate.serve.cluster:application' store=/shared/states

Prefill replicas keep nothing and may run anywhere. Decode replicas share the store: its objects may lie in object storage
(``store=s3://...``), its catalogue is a SQLite file, so they run where that file is (``decode_resource`` names a Ray resource
that only this machine has). Replicas pass frames (``serve/frames.py``) and JSON to each other, in Ray's own transport,
which trusts the cluster: keep its ports to yourself.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from linstate.serve.app import create_app
from linstate.serve.prefill import Prefills
from linstate.serve.protocol import Prefill
from linstate.serve.service import Service
from linstate.serve.settings import Settings
from linstate.state.store.store import DEFAULT


class PrefillReplica:
    """One that reads. It keeps nothing but the beginnings of texts in memory."""

    def __init__(self, settings: Settings) -> None:
        folder = tempfile.mkdtemp(prefix="linstate-prefill-")
        self.service = Service(replace(settings, role="prefill", store=folder, catalogue=None))
        self.prefills: Prefills | None = None

    async def read(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        """The stream of ``/v1/prefill`` for its body."""
        if self.prefills is None:
            self.service.start()
            self.prefills = Prefills(self.service)
        _, transfer = self.prefills.begin(Prefill.model_validate(body), DEFAULT)
        await transfer.ready()
        async for part in transfer.stream(0):
            yield part

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.service.scheduler.close()


def application(arguments: dict[str, str]) -> Application:
    """What ``serve run`` calls; ``arguments``: settings by name, and ``prefill`` and ``decode``, the most replicas of each."""
    known = {
        name: arguments.pop(name) for name in ("prefill", "decode", "decode_resource") if name in arguments
    }
    types = {name: type(getattr(Settings(), name)) for name in arguments}
    settings = Settings(**{name: types[name](value) for name, value in arguments.items()})
    return build(
        settings,
        prefill=int(known.get("prefill", 4)),
        decode=int(known.get("decode", 1)),
        decode_resource=known.get("decode_resource"),
    )


def build(
    settings: Settings,
    *,
    prefill: int = 4,
    decode: int = 1,
    decode_resource: str | None = None,
    cpus: float = 1.0,
) -> Application:
    """The application: decode replicas in front, prefill replicas behind.

    Args:
        settings: of the decode replicas; ``workers`` are not used. prefill, decode: most replicas of each pool.
        decode_resource: a Ray resource that only the machine with the catalogue has. cpus: that a replica takes.
    """

    def scaling(most: int) -> dict[str, Any]:
        return {"min_replicas": 1, "max_replicas": most, "target_ongoing_requests": 4}

    reading = serve.deployment(
        name="prefill", autoscaling_config=scaling(prefill), ray_actor_options={"num_cpus": cpus}
    )(PrefillReplica)

    def app() -> FastAPI:
        readers = serve.get_deployment_handle("prefill", serve.get_replica_context().app_name)

        async def pool(body: dict[str, Any]) -> AsyncIterator[bytes]:
            async for part in readers.options(stream=True).read.remote(body):
                yield part
                await asyncio.sleep(0)

        return create_app(replace(settings, role="decode"), pool=pool)

    resources = {} if decode_resource is None else {decode_resource: 0.001}
    answering = serve.deployment(
        name="decode",
        autoscaling_config={**scaling(decode), "target_ongoing_requests": settings.slots},
        max_ongoing_requests=settings.slots + settings.waiting,
        ray_actor_options={"num_cpus": cpus, "resources": resources},
    )(serve.ingress(app)())
    made: Application = answering.bind(reading.bind(settings))
    return made
