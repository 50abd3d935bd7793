"""Calls of tools in what a model has written, by the way in which its chat template has it write them.

What cannot be read as calls stays text: nothing that the model said is lost.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from linstate.engine.chat_template import ChatTemplate

Tools = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Call:
    """A call of the tool ``name``; ``arguments`` is JSON text, as OpenAI's interface has it."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Style:
    """How calls are written: between ``begin`` and ``end``; ``sign`` is what the template of such a model holds."""

    sign: str
    begin: str
    end: str
    read: Callable[[str, Tools], list[Call]]

    def split(self, text: str, tools: Tools) -> tuple[str, list[Call]]:
        """The text without the calls, and the calls; all of the text and none if one of them cannot be read."""
        outside, calls, at = "", list[Call](), 0
        while (start := text.find(self.begin, at)) >= 0:
            outside += text[at:start]
            stop = text.find(self.end, start)
            at = (
                len(text) if stop < 0 else stop + len(self.end)
            )  # the end may be the token that ends the answer
            try:
                calls += self.read(text[start + len(self.begin) : stop if stop >= 0 else len(text)], tools)
            except (ValueError, KeyError, TypeError, SyntaxError, RecursionError):
                return text, []
        return (outside + text[at:], calls) if calls else (text, [])


def style_of(template: ChatTemplate | None) -> Style | None:
    """The style of a template that knows tools; None if it is none of those known here."""
    source = "" if template is None else template.source
    return next((style for style in STYLES if style.sign in source), None)


def nested(tools: Tools | None) -> list[dict[str, Any]] | None:
    """Tools as chat templates take them: those of ``/v1/responses`` have name and parameters at the top."""
    if tools is None:
        return None
    inner = ("name", "description", "parameters", "strict")
    return [
        tool
        if "function" in tool or "name" not in tool
        else {"type": "function", "function": {key: tool[key] for key in inner if key in tool}}
        for tool in tools
    ]


def _call(name: Any, arguments: Any) -> Call:
    if not isinstance(name, str) or not name:
        raise ValueError("a call without a name")
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("arguments are no object")
    return Call(name, json.dumps(arguments, ensure_ascii=False))


def _json(block: str, _: Tools) -> list[Call]:
    """``{"name": "f", "arguments": {...}}``, one or a list."""
    found = json.loads(block)
    return [
        _call(entry["name"], entry.get("arguments", entry.get("parameters", {})))
        for entry in (found if isinstance(found, list) else [found])
    ]


def _tags(block: str, tools: Tools) -> list[Call]:
    """``<function=f><parameter=x>text</parameter></function>``; what is no text by the tool's schema is JSON."""
    calls = []
    for name, body in re.findall(r"<function=([^>]+)>(.*?)(?:</function>|\Z)", block, re.DOTALL):
        known: dict[str, Any] = next(
            (t["function"] for t in nested(tools) or () if t.get("function", {}).get("name") == name), {}
        )
        schema = (known.get("parameters") or {}).get("properties") or {}
        arguments: dict[str, Any] = {}
        for key, value in re.findall(r"<parameter=([^>]+)>\n?(.*?)\n?</parameter>", body, re.DOTALL):
            kind = (schema.get(key) or {}).get("type", "string")
            arguments[key] = value if kind == "string" else json.loads(value)
        calls.append(_call(name, arguments))
    if not calls:
        raise ValueError("no function")
    return calls


def _kimi(block: str, _: Tools) -> list[Call]:
    """``functions.f:0<|tool_call_argument_begin|>{...}`` between marks of their own."""
    found = re.findall(
        r"<\|tool_call_begin\|>\s*(\S+?)\s*<\|tool_call_argument_begin\|>(.*?)<\|tool_call_end\|>",
        block,
        re.DOTALL,
    )
    if not found:
        raise ValueError("no call")
    return [
        _call(re.sub(r":\d+$", "", name).removeprefix("functions."), arguments) for name, arguments in found
    ]


def _python(block: str, _: Tools) -> list[Call]:
    """``[f(x="text", n=3)]``: read as literals, nothing is run."""
    calls = []
    for node in getattr(ast.parse(block.strip(), mode="eval").body, "elts", []):
        if not isinstance(node, ast.Call) or node.args:
            raise ValueError("no call with named arguments")
        arguments = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
        calls.append(_call(ast.unparse(node.func), arguments))
    return calls


STYLES = (
    Style(
        "<|tool_calls_section_begin|>", "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", _kimi
    ),
    Style("<|tool_call_start|>", "<|tool_call_start|>", "<|tool_call_end|>", _python),
    Style("<TOOLCALL>", "<TOOLCALL>", "</TOOLCALL>", _json),
    Style("<function=", "<tool_call>", "</tool_call>", _tags),
    Style("<tool_call>", "<tool_call>", "</tool_call>", _json),
)
"""Kimi; LFM2; Nemotron-H; Qwen3.5 and Qwen3-Coder; Qwen2.5, Qwen3, Granite, Hermes. The first whose sign stands in the template."""
