"""``/v1/completions`` and ``/v1/chat/completions``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any, ClassVar

from fastapi import APIRouter, Request, Response

from linstate.engine.jobs import Finished, Token, held_back
from linstate.errors import InputError
from linstate.serve import dialogue, generating
from linstate.serve.access import tenant_of
from linstate.serve.bodies import BoundedRoute
from linstate.serve.generating import Generate, event
from linstate.serve.protocol import Chat, Completing, Completion
from linstate.serve.records import new_id
from linstate.serve.service import Service, noted
from linstate.serve.tools import Tools, style_of

FINISH = {"stop": "stop", "length": "length", "cancelled": "stop", "read": "length"}


def router(service: Service) -> APIRouter:
    """The routes."""
    made = APIRouter(route_class=BoundedRoute)

    @made.post("/v1/completions", response_model=None)
    async def completions(body: Completion, request: Request) -> Response | dict[str, Any]:
        """Text from a prompt, from a kept state, or from both."""
        tenant = tenant_of(request)
        state = await service.load(body.state, tenant)
        if isinstance(body.prompt, str):
            ids = await service.encode(body.prompt, state)
        else:
            ids = tuple(body.prompt)
            service.check_prompt(len(ids))
            if ids and max(ids) >= service.model.decoder.config.vocab_size:
                raise InputError(f"prompt: token ids lie below {service.model.decoder.config.vocab_size}")
        task = Generate(
            state,
            ids,
            service.check_tokens(body.max_tokens, 16),
            [body.sampling(i) for i in range(body.n or 1)],
            body.stops(),
            body.logprobs,
        )
        return await _answer(service, request, body, task, _Completions(service, body.logprobs))

    @made.post("/v1/chat/completions", response_model=None)
    async def chat(body: Chat, request: Request) -> Response | dict[str, Any]:
        """An answer to messages, behind a kept state if one is named."""
        tenant = tenant_of(request)
        state = await service.load(body.state, tenant)
        tools = body.tools if body.tool_choice != "none" else None
        said = dialogue.prompt(
            service.model,
            [m.plain() for m in body.messages],
            behind_answer=dialogue.TURN in state.notes,
            tools=tools,
        )
        ids = await service.encode(said.text, state, special=said.special)
        schema = body.schema_of()
        task = Generate(
            state,
            ids,
            service.check_tokens(body.max_completion_tokens or body.max_tokens, 512),
            [body.sampling(i) for i in range(body.n or 1)],
            (*body.stops(), *(said.stop if schema is None else ())),
            (body.top_logprobs or 0) if body.logprobs else None,
            None if schema is None else service.grammars.json(schema),
            said.strip,
            bool(body.store),
        )
        return await _answer(service, request, body, task, _Chats(service, tools))

    return made


async def _answer(
    service: Service, request: Request, body: Completing, task: Generate, form: _Completions | _Chats
) -> Response | dict[str, Any]:
    tenant = tenant_of(request)
    base = {"id": new_id(form.prefix), "created": int(time.time()), "model": service.model.name}

    async def kept() -> dict[str, Any]:
        if not body.store:
            return {}
        state = noted(task.done[0].state, **form.notes)
        handle = await service.keep(
            state,
            tenant,
            name=body.name,
            tags=body.tags,
            ttl=body.ttl or service.settings.keep,
            parent=body.state,
            ids=(*task.ids, *task.done[0].ids),
        )
        return {"state": handle.id}

    if not body.stream:
        tokens: dict[int, list[Token]] = {}
        task.told = task.logprobs is not None

        async def whole() -> dict[str, Any]:
            async for index, item in task.events(service, tenant):
                if isinstance(item, Token):
                    tokens.setdefault(index, []).append(item)
            more = await kept()
            choices = [
                form.whole(i, task.done[i], tokens.get(i, []), task) for i in range(len(task.samplings))
            ]
            return {**base, "object": form.object, "choices": choices, "usage": task.usage(), **more}

        return await generating.unless_gone(request, service, whole())

    async def chunks() -> AsyncGenerator[str]:
        chunk = {**base, "object": form.chunk}
        texts = [Shown(task.strip, form.mark) for _ in task.samplings]
        async with contextlib.aclosing(task.events(service, tenant)) as events:
            opened = False
            ends: list[dict[str, Any]] = []
            async for index, item in events:
                if not opened:  # not before: a refusal is to be an error response
                    opened = True
                    for i in range(len(task.samplings)):
                        if (opening := form.opening(i)) is not None:
                            yield event({**chunk, "choices": [opening]})
                if isinstance(item, Token):
                    text = texts[index].add(item.text)
                    if text or task.logprobs is not None:
                        yield event({**chunk, "choices": [form.part(index, text, item, task)]})
                else:
                    parts, reason = form.last(index, texts[index].add(item.rest), texts[index].held, item)
                    for part in parts:
                        yield event({**chunk, "choices": [part]})
                    ends.append(form.end(index, reason))
        more = await kept()  # before it is said to be finished: what is said to be kept is kept
        for end in ends:
            yield event({**chunk, "choices": [end], **more})
        if body.stream_options and body.stream_options.include_usage:
            yield event({**chunk, "choices": [], "usage": task.usage(), **more})
        yield event("[DONE]")

    return await generating.stream(service, chunks())


class Shown:
    """Text as it is shown while it comes: without blanks before it, if they are not part of it, and up to ``mark``, from which on
    it may be calls of tools: that is ``held``."""

    def __init__(self, strip: bool, mark: str = "") -> None:
        self._begun, self._mark = not strip, mark
        self.held = ""

    def add(self, text: str) -> str:
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        if not self._mark:
            return text
        text = self.held + text
        at = text.find(self._mark)
        sure = at if at >= 0 else len(text) - held_back(text, (self._mark,))
        self.held = text[sure:]
        return text[:sure]


class _Completions:
    prefix, object, chunk, mark = "cmpl", "text_completion", "text_completion", ""
    notes: ClassVar[dict[str, str]] = {}

    def __init__(self, service: Service, asked: int | None) -> None:
        self.tokenizer, self.asked = service.model.tokenizer, asked

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if self.asked is None:
            return None
        word = self.tokenizer.decode
        return {
            "tokens": [word([t.id], skip_special_tokens=False) for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [{word([i], skip_special_tokens=False): p for i, p in t.top} for t in tokens],
            "text_offset": [],
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def part(self, index: int, text: str, token: Token | None, task: Generate) -> dict[str, Any]:
        logprobs = self._logprobs([token]) if token else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def last(self, index: int, text: str, held: str, done: Finished) -> tuple[list[dict[str, Any]], str]:
        """What is left to say when an answer has ended, and why it has."""
        rest = {"index": index, "text": text, "logprobs": None, "finish_reason": None}
        return [rest] if text else [], FINISH[done.reason]

    def end(self, index: int, reason: str) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": reason}

    def whole(self, index: int, done: Finished, tokens: list[Token], task: Generate) -> dict[str, Any]:
        reason = FINISH[done.reason]
        return {
            "index": index,
            "text": done.text,
            "logprobs": self._logprobs(tokens),
            "finish_reason": reason,
        }


class _Chats:
    prefix, object, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"
    notes: ClassVar[dict[str, str]] = {dialogue.TURN: "answer"}

    def __init__(self, service: Service, known: Tools | None) -> None:
        self.tokenizer, self.known = service.model.tokenizer, known or ()
        self.style = style_of(service.model.chat_template) if known else None
        self.mark = self.style.begin if self.style else ""

    def _said(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """Text and calls of an answer."""
        text, calls = self.style.split(text, self.known) if self.style else (text, [])
        return text, [
            {
                "id": new_id("call"),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in calls
        ]

    def last(self, index: int, text: str, held: str, done: Finished) -> tuple[list[dict[str, Any]], str]:
        """As that of completions; ``held``: text that may be calls."""
        more, calls = self._said(held)
        deltas: list[dict[str, Any]] = [{"content": text + more}] if text + more.rstrip() else []
        if calls:
            deltas.append({"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]})
        parts = [{"index": index, "delta": d, "logprobs": None, "finish_reason": None} for d in deltas]
        return parts, "tool_calls" if calls and done.reason == "stop" else FINISH[done.reason]

    def _entry(self, id: int, logprob: float) -> dict[str, Any]:
        text = self.tokenizer.decode([id], skip_special_tokens=False)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _logprobs(self, tokens: list[Token], task: Generate) -> dict[str, Any] | None:
        if task.logprobs is None:
            return None
        content = [
            {**self._entry(t.id, t.logprob), "top_logprobs": [self._entry(*pair) for pair in t.top]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}

    def opening(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def part(self, index: int, text: str, token: Token | None, task: Generate) -> dict[str, Any]:
        logprobs = self._logprobs([token], task) if token else None
        return {"index": index, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": None}

    def end(self, index: int, reason: str) -> dict[str, Any]:
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": reason}

    def whole(self, index: int, done: Finished, tokens: list[Token], task: Generate) -> dict[str, Any]:
        text, calls = self._said(done.text.strip() if task.strip else done.text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text.rstrip() or None, "tool_calls": calls}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(tokens, task),
            "finish_reason": "tool_calls" if calls and done.reason == "stop" else FINISH[done.reason],
        }
