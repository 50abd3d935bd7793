"""Messages to the text that the model reads, and the text behind a state to go on from.

A model whose makers give a chat template is talked to with it. One without reads and is asked as everywhere in
Linstate (``engine/asking.py``): the last line of a user's message is the question, lines before it and system messages are
texts to read, and an answer is one line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from linstate.engine.asking import answer_text, question_prompt
from linstate.engine.language_model import LanguageModel
from linstate.errors import InputError

_MARK = "\u2063linstate-answer\u2063"
TURN = "turn"
"""Note of a state that ends with an answer: ``answer``."""


@dataclass(frozen=True)
class Prompt:
    """``text`` to read before the model answers. ``special``: special tokens in it count as such. ``stop``: where an answer
    ends. ``strip``: blanks around an answer are not part of it."""

    text: str
    special: bool
    stop: tuple[str, ...]
    strip: bool


def prompt(
    model: LanguageModel,
    messages: Sequence[dict[str, Any]],
    *,
    behind_answer: bool,
    tools: Sequence[dict[str, Any]] | None = None,
) -> Prompt:
    """What to read so that the model answers ``messages``.

    Args:
        behind_answer: the state to go on from ends with an answer.

    Raises:
        InputError: the template refuses them, or there are tools and no template that knows any.
    """
    template = model.chat_template
    if template is None:
        if tools:
            raise InputError(f"tools: the model {model.name!r} has no chat template, so it knows no tools")
        return Prompt("".join(_plain(m) for m in messages), False, ("\n",), True)
    if tools and "tools" not in template.source:
        raise InputError(f"tools: the chat template of the model {model.name!r} knows no tools")
    options = {"tools": list(tools)} if tools else {}
    if not behind_answer:
        return Prompt(template.render(messages, answer=True, **options), True, (), False)
    before = [{"role": "user", "content": "."}, {"role": "assistant", "content": _MARK}]
    parts = template.render([*before, *messages], answer=True, **options).split(_MARK)
    if len(parts) != 2:
        raise InputError(
            "the model's chat template does not write an answer down once, so nothing can follow a kept one"
        )
    return Prompt(parts[1], True, (), False)


def reading(model: LanguageModel, messages: Sequence[dict[str, Any]]) -> Prompt:
    """Messages to be read, not answered yet. Raises as :func:`prompt`."""
    template = model.chat_template
    if template is None:
        return Prompt("".join(_plain(m) for m in messages), False, (), True)
    if messages[-1]["role"] != "assistant":
        return Prompt(template.render(messages, answer=False), True, (), False)
    marked = [*messages[:-1], {"role": "assistant", "content": messages[-1]["content"] + _MARK}]
    return Prompt(template.render(marked, answer=False).split(_MARK)[0], True, (), False)


def _plain(message: dict[str, Any]) -> str:
    role, content = message["role"], message["content"] or ""
    if role in ("system", "developer"):
        return f"{content}\n"
    if role == "assistant":
        return answer_text(content)
    if role == "user":
        *read, question = content.rstrip("\n").split("\n")
        return "".join(f"{line}\n" for line in read) + question_prompt(question)
    raise InputError(f"messages: the model knows the roles system, user and assistant, got {role!r}")
