"""The page, ``/health``, ``/metrics``, ``/v1/models``, ``/v1/embeddings``."""

from __future__ import annotations

import asyncio
import base64
import hmac
import struct
from importlib import resources
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from linstate import __version__
from linstate.serve.access import tenant_of
from linstate.serve.bodies import BoundedRoute
from linstate.serve.problems import Refused
from linstate.serve.protocol import Embed
from linstate.serve.service import Service

_PAGE = {
    "": ("index.html", "text/html"),
    "page.js": ("page.js", "text/javascript"),
    "page.css": ("page.css", "text/css"),
}


def router(service: Service) -> APIRouter:
    """The routes."""
    made = APIRouter(route_class=BoundedRoute)

    def page(name: str) -> None:
        file, kind = _PAGE[name]

        @made.get(f"/{name}", include_in_schema=False)
        async def part() -> Response:
            content = resources.files("linstate.serve").joinpath("page", file).read_bytes()
            return Response(content, media_type=kind, headers={"cache-control": "no-cache"})

    for name in _PAGE:
        page(name)

    @made.get("/health")
    async def health() -> Response:
        """Whether it takes requests."""
        content = {"status": "stopping" if service.stopping else "ok", "version": __version__}
        return JSONResponse(content, 503 if service.stopping else 200)

    @made.get("/metrics", response_class=Response)
    async def metrics(request: Request) -> Response:
        """Prometheus' text format. With API keys: for keys of the tenant ``metrics`` only, as it sums up all tenants."""
        if not service.open and not hmac.compare_digest(tenant_of(request).encode(), b"metrics"):
            raise Refused(403, "metrics are for a key of the tenant 'metrics'")
        content = await asyncio.to_thread(service.metrics.text)
        return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")

    def model() -> dict[str, Any]:
        return {
            "id": service.model.name,
            "object": "model",
            "created": service.started,
            "owned_by": "linstate",
            "parameters": service.model.decoder.parameter_count(),
            "state_bytes": service.model.decoder.state_bytes(1),
            "fingerprint": service.model.fingerprint.weights[:16],
            "role": service.settings.role,
        }

    @made.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model()]}

    @made.get("/v1/models/{id}")
    async def one_model(id: str) -> dict[str, Any]:
        if id != service.model.name:
            raise Refused(
                404, f"there is no model {id!r} here, only {service.model.name!r}", code="model_not_found"
            )
        return model()

    @made.post("/v1/embeddings")
    async def embeddings(body: Embed) -> dict[str, Any]:
        """A vector of length 1 for each text, from the model's hidden states (``linstate.memory``)."""
        texts = [body.input] if isinstance(body.input, str) else body.input
        if body.dimensions is not None:
            raise Refused(400, "dimensions is not served", param="dimensions")
        data, count = [], 0
        for text in texts:
            ids = await service.encode(text, service.model.empty_state())
            if not ids:
                raise Refused(400, "input: a text is empty", param="input")
            count += len(ids)
        for index, vector in enumerate(await service.finder.embed(texts)):
            shown: Any = vector
            if body.encoding_format == "base64":
                shown = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
            data.append({"object": "embedding", "index": index, "embedding": shown})
        usage = {"prompt_tokens": count, "total_tokens": count}
        return {"object": "list", "data": data, "model": service.model.name, "usage": usage}

    return made
