"""Requests as they come: checked shapes, bounds on everything. Field names are OpenAI's; ``state``, ``store`` and what
belongs to ``/v1/states`` are ours.

What is known and has no effect here is taken (``user``, ``metadata``, ...); what would change the answer and is not served
is refused, never dropped in silence; what is unknown is refused by name.
"""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from linstate.engine.generation import Sampling

Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Ref = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Tags = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
    Field(max_length=16),
]
Ttl = Annotated[float, Field(gt=0, le=10 * 365 * 86400)]
Id = Annotated[int, Field(ge=0, lt=2**31)]


class Body(BaseModel):
    """A request's JSON."""

    model_config = ConfigDict(extra="forbid")


class Options(Body):
    """What every generation takes."""

    model: Annotated[str, Field(max_length=200)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    user: str | None = None
    metadata: Tags | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def sampling(self, index: int = 0) -> Sampling:
        """How tokens are chosen: the likeliest, unless a temperature is given; without a seed another choice each time."""
        seed = secrets.randbits(31) if self.seed is None else self.seed % 2**31
        return Sampling(self.temperature or 0.0, self.top_k or 0, self.top_p or 1.0, seed + index)


class StreamOptions(BaseModel):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Completing(Options):
    """What completions and chat share. ``state``: a kept state to go on from; ``store``: keep the state behind the answer."""

    n: Annotated[int, Field(ge=1, le=8)] | None = None
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=8)] | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    state: Ref | None = None
    store: bool | None = None
    name: Name | None = None
    tags: Tags | None = None
    ttl: Ttl | None = None

    @model_validator(mode="after")
    def _served(self) -> Completing:
        for name in ("presence_penalty", "frequency_penalty", "logit_bias"):
            if getattr(self, name):
                raise ValueError(f"{name} is not served")
        if self.store and (self.n or 1) > 1:
            raise ValueError("store keeps the state of one answer: use n = 1")
        return self

    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class Completion(Completing):
    prompt: (
        Annotated[str, Field(max_length=2**26)] | Annotated[list[Id], Field(fail_fast=True, max_length=2**24)]
    ) = ""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _refused(self) -> Completion:
        if self.echo or self.suffix or (self.best_of or 1) > 1:
            raise ValueError("echo, suffix and best_of are not served")
        return self


class Part(BaseModel):
    type: Literal["text", "input_text", "output_text"]
    text: str | None = None


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def plain(self) -> dict[str, Any]:
        """As a chat template takes it."""
        content = self.content
        text = "".join(p.text or "" for p in content) if isinstance(content, list) else content or ""
        found: dict[str, Any] = {"role": self.role, "content": text}
        for key in ("tool_call_id", "name"):
            if getattr(self, key) is not None:
                found[key] = getattr(self, key)
        if self.tool_calls is not None:
            found["tool_calls"] = [_with_objects(call) for call in self.tool_calls]
        return found


def _with_objects(call: dict[str, Any]) -> dict[str, Any]:
    """A call whose arguments are an object: OpenAI's interface has them as text, templates as what they are."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


class Schema(BaseModel):
    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None
    description: str | None = None


class Format(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None


class Chat(Completing):
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Format | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=128)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None

    def schema_of(self) -> dict[str, Any] | None:
        """The JSON schema that the answer must follow, if one is asked for."""
        return schema_of(self.response_format)


def schema_of(asked: Format | None) -> dict[str, Any] | None:
    """The JSON schema that ``response_format`` asks for."""
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return {"type": "object"}
    return (asked.json_schema.schema_ if asked.json_schema else None) or {}


class TextFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None
    description: str | None = None


class Text(BaseModel):
    format: TextFormat | None = None
    verbosity: str | None = None


class Item(BaseModel):
    type: str | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    id: str | None = None
    status: str | None = None


class FunctionCall(BaseModel):
    """A call that the model made, sent back."""

    type: Literal["function_call"]
    call_id: Annotated[str, Field(max_length=200)]
    name: Annotated[str, Field(max_length=200)]
    arguments: str
    id: str | None = None
    status: str | None = None


class FunctionOutput(BaseModel):
    """What a called function said."""

    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(max_length=200)]
    output: str | list[Part]
    id: str | None = None
    status: str | None = None


AnyItem = Item | FunctionCall | FunctionOutput


def messages_of(items: list[AnyItem]) -> list[dict[str, Any]]:
    """Items as messages; calls that stand one behind the other are one message's."""
    found: list[dict[str, Any]] = []
    for item in items:
        if isinstance(item, Item):
            found.append(Message(role=item.role, content=item.content).plain())
        elif isinstance(item, FunctionOutput):
            found.append(Message(role="tool", content=item.output, tool_call_id=item.call_id).plain())
        else:
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            made = Message(role="assistant", content="", tool_calls=[call]).plain()
            if found and found[-1]["role"] == "assistant":
                found[-1].setdefault("tool_calls", []).extend(made["tool_calls"])
            else:
                found.append(made)
    return found


class ConversationRef(BaseModel):
    id: Ref


class Respond(Options):
    """``/v1/responses``."""

    input: (
        Annotated[str, Field(max_length=2**26)]
        | Annotated[list[AnyItem], Field(fail_fast=True, max_length=4096)]
    ) = ""
    instructions: str | None = None
    previous_response_id: Ref | None = None
    conversation: Ref | ConversationRef | None = None
    state: Ref | None = None
    store: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    text: Text | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=128)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: list[str] | None = None
    background: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _served(self) -> Respond:
        if self.background:
            raise ValueError("background is not served")
        if sum(x is not None for x in (self.previous_response_id, self.conversation, self.state)) > 1:
            raise ValueError("give one of previous_response_id, conversation and state")
        return self

    def messages(self) -> list[dict[str, Any]]:
        """The input as messages, the instructions first."""
        found = messages_of(self.items())
        return ([{"role": "system", "content": self.instructions}] if self.instructions else []) + found

    def items(self) -> list[AnyItem]:
        """The input as items."""
        return [Item(role="user", content=self.input)] if isinstance(self.input, str) else self.input


class ConversationNew(Body):
    items: Annotated[list[AnyItem], Field(fail_fast=True, max_length=64)] | None = None
    metadata: Tags | None = None


class ConversationChange(Body):
    metadata: Tags | None = None


class Embed(Body):
    input: str | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=256)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None


class StateNew(Body):
    """``POST /v1/states``: read ``text`` from nothing, or from the kept state ``from``."""

    text: Annotated[str, Field(max_length=2**26)]
    from_: Ref | None = Field(default=None, alias="from")
    name: Name | None = None
    tags: Tags | None = None
    ttl: Ttl | None = None
    stream: bool | None = None


class StateChange(Body):
    name: Name | None = None
    tags: Tags | None = None
    ttl: Ttl | None = None

    def changes(self) -> dict[str, Any]:
        """What was given; a null takes the name or the time to live away."""
        return {
            key: getattr(self, key) for key in self.model_fields_set if key != "tags" or self.tags is not None
        }


class Fork(Body):
    name: Name | None = None
    ttl: Ttl | None = None


class Search(Body):
    query: Annotated[str, Field(min_length=1, max_length=2000)]
    limit: Annotated[int, Field(ge=1, le=50)] = 10


class Prefill(Body):
    """``POST /v1/prefill``, between our servers: read ``ids`` from nothing, or from what the worker has in memory of them."""

    ids: Annotated[list[Id], Field(fail_fast=True, min_length=1, max_length=2**24)]
    precision: Literal["exact", "bf16", "int8"] = "exact"
    model: Annotated[str, Field(max_length=64)]
