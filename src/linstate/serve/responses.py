"""``/v1/responses`` and ``/v1/conversations``: turns that rest on a kept state, so that nothing is sent or read twice."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from linstate.engine.jobs import Finished, Token
from linstate.errors import QuotaError, StateNotFoundError
from linstate.serve import dialogue, generating
from linstate.serve.access import tenant_of
from linstate.serve.bodies import BoundedRoute
from linstate.serve.completions import Shown
from linstate.serve.generating import Generate, event
from linstate.serve.problems import Refused
from linstate.serve.protocol import (
    AnyItem,
    ConversationChange,
    ConversationNew,
    ConversationRef,
    Item,
    Message,
    Respond,
    messages_of,
)
from linstate.serve.records import new_id
from linstate.serve.service import Service, noted
from linstate.serve.tools import Style, Tools, nested, style_of
from linstate.state.state import State

KIND = {"response": "resp", "conversation": "conv"}
"""Kinds of records, as their ids begin: the one is never found, changed or deleted as the other."""


def router(service: Service) -> APIRouter:
    """The routes."""
    made = APIRouter(route_class=BoundedRoute)
    busy: dict[tuple[str, str], asyncio.Lock] = {}

    def there(found: dict[str, Any] | None, id: str, what: str) -> dict[str, Any]:
        if found is None:
            raise Refused(404, f"there is no {what} {id!r} (or it has expired)", code="not_found")
        return found

    async def record(tenant: str, id: str, what: str) -> dict[str, Any]:
        return there(await asyncio.to_thread(service.records.get, tenant, KIND[what], id), id, what)

    async def write(tenant: str, id: str, what: str, content: dict[str, Any]) -> None:
        await asyncio.to_thread(
            service.records.put, tenant, KIND[what], id, content, ttl=service.settings.keep
        )

    async def change(tenant: str, id: str, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        found = await asyncio.to_thread(
            service.records.change, tenant, KIND["conversation"], id, change, ttl=service.settings.keep
        )
        return there(found, id, "conversation")

    async def forget(tenant: str, content: dict[str, Any]) -> None:
        if content.get("state") is not None:
            with contextlib.suppress(StateNotFoundError):
                await service.freeing(lambda: service.store.delete(content["state"], tenant=tenant))

    @made.post("/v1/responses", response_model=None)
    async def respond(body: Respond, request: Request) -> Response | dict[str, Any]:
        """One turn. With ``previous_response_id`` or ``conversation`` only the new input is sent and read."""
        tenant = tenant_of(request)
        conversation = (
            body.conversation.id if isinstance(body.conversation, ConversationRef) else body.conversation
        )
        if conversation is None:
            return await turn(body, request, None)
        await record(tenant, conversation, "conversation")
        lock = busy.setdefault((tenant, conversation), asyncio.Lock())
        if lock.locked():
            raise Refused(409, "another turn of this conversation is under way", code="conversation_locked")
        await lock.acquire()
        try:
            answer = await turn(body, request, conversation, lock)
        except BaseException:
            _release(busy, (tenant, conversation), lock)
            raise
        if not body.stream:
            _release(busy, (tenant, conversation), lock)
        return answer

    async def turn(
        body: Respond, request: Request, conversation: str | None, lock: asyncio.Lock | None = None
    ) -> Response | dict[str, Any]:
        tenant = tenant_of(request)
        before = body.state
        if body.previous_response_id is not None:
            before = (await record(tenant, body.previous_response_id, "response"))["state"]
            if before is None:
                raise Refused(
                    400,
                    "that response was not stored, so nothing can rest on it",
                    param="previous_response_id",
                )
        elif conversation is not None:
            before = (await record(tenant, conversation, "conversation"))["state"]
        state = await service.load(before, tenant)
        schema = _schema(body)
        tools = nested(body.tools) if body.tool_choice != "none" else None
        said = dialogue.prompt(
            service.model, body.messages(), behind_answer=dialogue.TURN in state.notes, tools=tools
        )
        ids = await service.encode(said.text, state, special=said.special)
        task = Generate(
            state,
            ids,
            service.check_tokens(body.max_output_tokens, 512),
            [body.sampling()],
            said.stop if schema is None else (),
            None,
            None if schema is None else service.grammars.json(schema),
            said.strip,
            body.store is not False or conversation is not None,
        )
        style = style_of(service.model.chat_template) if tools else None
        answer = _Answer(service, body, conversation, style, tools or ())

        async def finished() -> dict[str, Any]:
            whole = answer.finished(task)
            kept = body.store is not False or conversation is not None
            if kept:
                end = noted(task.done[0].state, **{dialogue.TURN: "answer"})
                content: dict[str, Any] = {"response": whole, "state": None, "conversation": conversation}
                content["state"] = await keep(
                    end, tenant, before, answer.id, content, (*task.ids, *task.done[0].ids)
                )
                if conversation is not None:
                    await advance(tenant, conversation, content["state"], body, whole)
            return whole

        if not body.stream:
            task.told = False

            async def quiet() -> dict[str, Any]:
                async for _ in task.events(service, tenant):
                    pass
                return await finished()

            return await generating.unless_gone(request, service, quiet())

        async def chunks() -> AsyncGenerator[str]:
            try:
                shown = Shown(task.strip, style.begin if style else "")
                async with contextlib.aclosing(task.events(service, tenant)) as events:
                    async for _, item in events:
                        if answer.number < 0:  # not before: a refusal is to be an error response
                            for opening in answer.opening():
                                yield opening
                        if piece := shown.add(item.text if isinstance(item, Token) else item.rest):
                            for part in answer.delta(piece):
                                yield part
                whole = await finished()
                for closing in answer.closing(whole):
                    yield closing
            finally:
                if lock is not None and conversation is not None:
                    _release(busy, (tenant, conversation), lock)

        return await generating.stream(service, chunks(), named=True)

    async def keep(
        state: State, tenant: str, parent: str | None, id: str, content: dict[str, Any], ids: tuple[int, ...]
    ) -> str:
        handle = await service.keep(
            state, tenant, tags={"response": id}, ttl=service.settings.keep, parent=parent, ids=ids
        )
        content["state"] = handle.id
        try:
            await write(tenant, id, "response", content)
        except QuotaError:
            await forget(tenant, content)
            raise
        return handle.id

    async def advance(tenant: str, id: str, state: str, body: Respond, whole: dict[str, Any]) -> None:
        def turn(found: dict[str, Any]) -> None:
            found["state"] = state
            found["items"] += _items(body) + whole["output"]

        await change(tenant, id, turn)

    @made.get("/v1/responses/{id}")
    async def get_response(id: str, request: Request) -> dict[str, Any]:
        found: dict[str, Any] = (await record(tenant_of(request), id, "response"))["response"]
        return found

    @made.delete("/v1/responses/{id}")
    async def delete_response(id: str, request: Request) -> dict[str, Any]:
        tenant = tenant_of(request)
        content = there(
            await service.freeing(lambda: service.records.delete(tenant, "resp", id)), id, "response"
        )
        if content.get("conversation") is None:
            await forget(tenant, content)
        return {"id": id, "object": "response", "deleted": True}

    @made.post("/v1/conversations")
    async def new_conversation(request: Request, body: ConversationNew | None = None) -> dict[str, Any]:
        """A conversation; its ``items`` are read at once."""
        tenant, asked = tenant_of(request), body or ConversationNew()
        content = {
            "created_at": int(time.time()),
            "metadata": asked.metadata or {},
            "state": None,
            "items": [],
        }
        id = new_id("conv")
        if asked.items:
            messages = messages_of(asked.items)
            said = dialogue.reading(service.model, messages)
            state = service.model.empty_state()
            ids = await service.encode(said.text, state, special=said.special)
            async for step in service.read(state, ids, tenant):
                state = step.state if isinstance(step, Finished) else state
            if messages[-1]["role"] == "assistant":
                state = noted(state, **{dialogue.TURN: "answer"})
            handle = await service.keep(
                state, tenant, tags={"conversation": id}, ttl=service.settings.keep, ids=ids
            )
            content["state"] = handle.id
            content["items"] = [_item(i) for i in asked.items]
        try:
            await write(tenant, id, "conversation", content)
        except QuotaError:
            await forget(tenant, content)
            raise
        return _conversation(id, content)

    @made.get("/v1/conversations/{id}")
    async def get_conversation(id: str, request: Request) -> dict[str, Any]:
        return _conversation(id, await record(tenant_of(request), id, "conversation"))

    @made.post("/v1/conversations/{id}")
    async def change_conversation(id: str, body: ConversationChange, request: Request) -> dict[str, Any]:
        def set_metadata(found: dict[str, Any]) -> None:
            found["metadata"] = body.metadata or {}

        return _conversation(id, await change(tenant_of(request), id, set_metadata))

    @made.get("/v1/conversations/{id}/items")
    async def items(id: str, request: Request) -> dict[str, Any]:
        found = (await record(tenant_of(request), id, "conversation"))["items"]
        ends = (
            {"first_id": found[0]["id"], "last_id": found[-1]["id"]}
            if found
            else {"first_id": None, "last_id": None}
        )
        return {"object": "list", "data": found, "has_more": False, **ends}

    @made.delete("/v1/conversations/{id}")
    async def delete_conversation(id: str, request: Request) -> dict[str, Any]:
        tenant = tenant_of(request)
        content = there(
            await service.freeing(lambda: service.records.delete(tenant, "conv", id)), id, "conversation"
        )
        await forget(tenant, content)
        return {"id": id, "object": "conversation.deleted", "deleted": True}

    return made


def _release(busy: dict[tuple[str, str], asyncio.Lock], key: tuple[str, str], lock: asyncio.Lock) -> None:
    if lock.locked():
        lock.release()
    busy.pop(key, None)


def _schema(body: Respond) -> dict[str, Any] | None:
    asked = body.text.format if body.text else None
    if asked is None or asked.type == "text":
        return None
    return {"type": "object"} if asked.type == "json_object" else asked.schema_ or {}


def _item(item: AnyItem) -> dict[str, Any]:
    if not isinstance(item, Item):
        return {**item.model_dump(exclude_none=True), "id": new_id("fc"), "status": "completed"}
    kind = "output_text" if item.role == "assistant" else "input_text"
    text = Message(role=item.role, content=item.content).plain()["content"]
    part: dict[str, Any] = {"type": kind, "text": text}
    if kind == "output_text":
        part["annotations"] = []
    return {
        "type": "message",
        "id": new_id("msg"),
        "role": item.role,
        "status": "completed",
        "content": [part],
    }


def _items(body: Respond) -> list[dict[str, Any]]:
    return [_item(i) for i in body.items()]


def _conversation(id: str, content: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": id,
        "object": "conversation",
        "created_at": content["created_at"],
        "metadata": content["metadata"],
        "state": content["state"],
    }


class _Answer:
    """A response and its events."""

    def __init__(
        self, service: Service, body: Respond, conversation: str | None, style: Style | None, tools: Tools
    ) -> None:
        self.id, self.item, self.number = new_id("resp"), new_id("msg"), -1
        self.style, self.tools, self.opened = style, tools, False
        self.base: dict[str, Any] = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": service.model.name,
            "output": [],
            "parallel_tool_calls": False,
            "previous_response_id": body.previous_response_id,
            "conversation": None if conversation is None else {"id": conversation},
            "reasoning": {"effort": None, "summary": None},
            "store": body.store is not False or conversation is not None,
            "temperature": body.temperature or 0.0,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": body.tools or [],
            "top_p": body.top_p or 1.0,
            "truncation": "disabled",
            "usage": None,
            "metadata": body.metadata or {},
        }

    def _event(self, kind: str, **content: Any) -> str:
        self.number += 1
        return event({"type": kind, "sequence_number": self.number, **content}, kind)

    def _message(self, text: str, status: str) -> dict[str, Any]:
        return {
            "type": "message",
            "id": self.item,
            "role": "assistant",
            "status": status,
            "content": [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}],
        }

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.item, "output_index": 0, "content_index": 0}

    def opening(self) -> list[str]:
        kinds = ("response.created", "response.in_progress")
        return [self._event(kind, response=self.base) for kind in kinds]

    def _open(self) -> list[str]:
        """The message begins, if it has not: an answer may be calls of tools and no message."""
        if self.opened:
            return []
        self.opened = True
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        empty = {**self._message("", "in_progress"), "content": []}
        return [
            self._event("response.output_item.added", output_index=0, item=empty),
            self._event("response.content_part.added", **self._place(), part=part),
        ]

    def delta(self, text: str) -> list[str]:
        place = self._place()
        return [
            *self._open(),
            self._event("response.output_text.delta", **place, delta=text, logprobs=[]),
        ]

    def finished(self, task: Generate) -> dict[str, Any]:
        done = task.done[0]
        text = done.text.strip() if task.strip else done.text
        text, calls = self.style.split(text, self.tools) if self.style else (text, [])
        short = done.reason == "length"
        status = "incomplete" if short else "completed"
        made = len(done.ids)
        return {
            **self.base,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if short else None,
            "output": [
                *([self._message(text, status)] if text.strip() or self.opened or not calls else []),
                *(
                    {
                        "type": "function_call",
                        "id": new_id("fc"),
                        "call_id": new_id("call"),
                        "name": call.name,
                        "arguments": call.arguments,
                        "status": "completed",
                    }
                    for call in calls
                ),
            ],
            "usage": {
                "input_tokens": task.context,
                "input_tokens_details": {"cached_tokens": task.cached},
                "output_tokens": made,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": task.context + made,
            },
        }

    def closing(self, whole: dict[str, Any]) -> list[str]:
        events = []
        for index, item in enumerate(whole["output"]):
            if item["type"] == "message":
                part = item["content"][0]
                events += [
                    *self._open(),
                    self._event("response.output_text.done", **self._place(), text=part["text"], logprobs=[]),
                    self._event("response.content_part.done", **self._place(), part=part),
                ]
            else:
                place = {"item_id": item["id"], "output_index": index}
                begun, said = {**item, "arguments": "", "status": "in_progress"}, item["arguments"]
                kind = "response.function_call_arguments"
                events += [
                    self._event("response.output_item.added", output_index=index, item=begun),
                    self._event(f"{kind}.delta", **place, delta=said),
                    self._event(f"{kind}.done", **place, name=item["name"], arguments=said),
                ]
            events.append(self._event("response.output_item.done", output_index=index, item=item))
        return [*events, self._event(f"response.{whole['status']}", response=whole)]
