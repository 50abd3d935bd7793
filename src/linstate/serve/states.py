"""``/v1/states``: kept states as a resource. Read, list, change, fork, delete, export, import."""

from __future__ import annotations

import asyncio
import contextlib
import io
import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import UploadFile

from linstate.engine.jobs import Finished
from linstate.serve import generating
from linstate.serve.access import tenant_of
from linstate.serve.bodies import BoundedRoute, check_structure
from linstate.serve.generating import event
from linstate.serve.problems import Refused
from linstate.serve.protocol import Fork, Name, StateChange, StateNew
from linstate.serve.service import Service

_NAME: TypeAdapter[str | None] = TypeAdapter(Name | None)
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": StateNew.model_json_schema(by_alias=True)},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "name": {"type": "string", "minLength": 1, "maxLength": 200},
                        "from": {"type": "string", "minLength": 1, "maxLength": 200},
                        "stream": {"type": "boolean"},
                    },
                }
            },
        },
    }
}
_FILE = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


def router(service: Service) -> APIRouter:
    """The routes."""
    made = APIRouter(route_class=BoundedRoute)
    store = service.store

    @made.post("/v1/states", openapi_extra=_BODY)
    async def read(request: Request) -> Response:
        """Read a text, or an uploaded file, and keep the state. With ``stream`` progress comes as server-sent events."""
        tenant = tenant_of(request)
        body = await _asked(request)
        origin = await service.load(body.from_, tenant)
        ids = await service.encode(body.text, origin)
        text, body.text = len(body.text), ""
        began = time.perf_counter()
        state, rest, cached = await service.begin(origin, ids, tenant)

        async def steps() -> AsyncGenerator[dict[str, Any]]:
            skipped = len(ids) - len(rest)
            async with contextlib.aclosing(service.read(state, rest, tenant)) as events:
                async for item in events:
                    if isinstance(item, Finished):
                        service.prefix.add(item.state, tenant)
                        service.metrics.cached.inc(cached)
                        handle = await service.keep(
                            item.state,
                            tenant,
                            name=body.name,
                            tags=body.tags,
                            ttl=body.ttl,
                            parent=body.from_,
                            ids=ids,
                        )
                        seconds = time.perf_counter() - began
                        yield {
                            **service.describe(handle),
                            "read": {
                                "characters": text,
                                "tokens": len(ids),
                                "cached_tokens": skipped,
                                "seconds": round(seconds, 4),
                            },
                        }
                    else:
                        seconds = time.perf_counter() - began
                        done = min(skipped + item.done, len(ids))
                        yield {
                            "object": "state.progress",
                            "done": done,
                            "total": len(ids),
                            "tokens_per_second": round(item.done / seconds),
                        }

        if body.stream:

            async def chunks() -> AsyncGenerator[str]:
                async with contextlib.aclosing(steps()) as open_steps:
                    async for step in open_steps:
                        yield event(step, step["object"])

            return await generating.stream(service, chunks(), named=True)

        async def last() -> dict[str, Any]:
            async for step in steps():
                found = step
            return found

        return _json(await generating.unless_gone(request, service, last()), 201)

    @made.get("/v1/states")
    async def list_states(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        before: Annotated[float | None, Query(ge=0, le=1e11)] = None,
    ) -> dict[str, Any]:
        """The newest states; ``before`` (seconds since 1970) goes on behind them."""
        found = await asyncio.to_thread(
            lambda: list(store.list(tenant=tenant_of(request), limit=limit + 1, before=before))
        )
        shown = found[:limit]
        return {
            "object": "list",
            "data": [service.describe(h) for h in shown],
            "has_more": len(found) > limit,
        }

    @made.post("/v1/states/import", openapi_extra=_FILE, status_code=201)
    async def import_state(
        request: Request, name: Annotated[str | None, Query(min_length=1, max_length=200)] = None
    ) -> dict[str, Any]:
        """Keep the state of a file. It must be whole, of this model, and signed by this server for this tenant; a server without API
        keys also takes files without a signature, as ``linstate read`` writes them."""
        blob = await request.body()
        handle = await asyncio.to_thread(service.take_in, blob, tenant_of(request), name)
        return service.describe(handle)

    @made.get("/v1/states/{id}")
    async def get_state(id: str, request: Request) -> dict[str, Any]:
        """A state by id or name."""
        return service.describe(await asyncio.to_thread(store.get, id, tenant=tenant_of(request)))

    @made.patch("/v1/states/{id}")
    async def change(id: str, body: StateChange, request: Request) -> dict[str, Any]:
        """Another name, other tags, another time to live."""
        changes = body.changes()
        return service.describe(
            await asyncio.to_thread(lambda: store.update(id, tenant=tenant_of(request), **changes))
        )

    @made.delete("/v1/states/{id}")
    async def delete(id: str, request: Request) -> dict[str, Any]:
        """Delete the handle; the bytes go when no other needs them."""
        tenant = tenant_of(request)
        gone = await service.freeing(lambda: store.delete(id, tenant=tenant))
        return {"id": gone.id, "object": "state.deleted", "deleted": True}

    @made.post("/v1/states/{id}/fork", status_code=201)
    async def fork(id: str, request: Request, body: Fork | None = None) -> dict[str, Any]:
        """A second handle of the same state; costs nothing, whatever it has read."""
        asked = body or Fork()
        made = await asyncio.to_thread(
            lambda: store.fork(id, tenant=tenant_of(request), name=asked.name, ttl=asked.ttl)
        )
        return service.describe(made)

    @made.get("/v1/states/{id}/export", response_class=Response)
    async def export(id: str, request: Request) -> Response:
        """The state as a file, signed for this tenant."""
        out, tenant = io.BytesIO(), tenant_of(request)
        handle = await asyncio.to_thread(store.get, id, tenant=tenant)
        await asyncio.to_thread(lambda: store.export(handle.id, out, tenant=tenant, key=service.secret))
        headers = {"content-disposition": f'attachment; filename="{handle.id}.state"'}
        return Response(out.getvalue(), media_type="application/octet-stream", headers=headers)

    return made


async def _asked(request: Request) -> StateNew:
    """The body, JSON or an uploaded file. Raises RequestValidationError, Refused."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    try:
        if kind == "multipart/form-data":
            async with request.form(max_files=1, max_fields=8) as form:
                file = form.get("file")
                if not isinstance(file, UploadFile):
                    raise Refused(400, "file: expected an uploaded file", param="file")
                blob = await file.read()
                fields = {key: value for key, value in form.items() if isinstance(value, str)}
            if b"\0" in blob[:4096]:
                raise Refused(415, "file: it is no text", param="file")
            return StateNew.model_validate({**fields, "text": blob.decode("utf-8", errors="replace")})
        if kind != "application/json":
            raise Refused(415, "send application/json or multipart/form-data")
        body = await request.body()
        await asyncio.to_thread(check_structure, body)
        return StateNew.model_validate_json(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def _json(content: dict[str, Any], status: int) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(content, status)
