"""Chat templates: how a model's makers write a conversation down, as Jinja in the model's folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from linstate.engine.template_limits import MOST_CHARACTERS, LimitedEnvironment, limited
from linstate.errors import CheckpointError, InputError
from linstate.models.checkpoint import read_json

Message = Mapping[str, Any]
"""``{"role": "user", "content": "..."}``; a template may know more keys."""


class ChatTemplate:
    """A template, in the environment that Hugging Face's tokenizers give it: sandboxed, it cannot change what it is given,
    and what it does has an end (:mod:`linstate.engine.template_limits`).

    One that cannot be parsed stops no model from loading: only :meth:`render` refuses.

    Args:
        special: the special tokens that it may name (``bos_token``, ...).
    """

    def __init__(self, source: str, special: Mapping[str, str], where: str = "the chat template") -> None:
        self.source, self.special, self.where = source, dict(special), where
        environment = LimitedEnvironment()
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._template, self.error = None, ""
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # a template is a program: its parser may fail on it in any way
            self.error = f"{where} is no Jinja template: {error}"

    @property
    def knows_developer(self) -> bool:
        """Whether it has a place for messages of the role ``developer``; else they are those of ``system``."""
        return "developer" in self.source

    def render(self, messages: Sequence[Message], *, answer: bool = True, **options: Any) -> str:
        """A conversation as the text that the model reads.

        Args:
            answer: end where the model's answer begins. options: what else the template knows (``tools``, ...).

        Raises:
            InputError: the template refuses these messages.
        """
        if self._template is None:
            raise InputError(self.error)
        given = {"tools": None, "documents": None, **self.special, **options}
        if not self.knows_developer:
            messages = [{**m, "role": "system"} if m.get("role") == "developer" else m for m in messages]
        try:
            with limited():
                text = "".join(self._pieces(messages=messages, add_generation_prompt=answer, **given))
        except Exception as error:  # a template is a program: it may fail in any way
            said = " ".join(str(error).split())[:300]
            name = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            raise InputError(
                f"the model's chat template cannot write these messages down: {name}{said}"
            ) from error
        return text

    def _pieces(self, **given: Any) -> Iterator[str]:
        """The text as it is made. Raises TemplateError where it does not end."""
        assert self._template is not None
        total = 0
        for piece in self._template.generate(**given):
            total += len(piece)
            if total > MOST_CHARACTERS:
                raise TemplateError(f"it writes more than {MOST_CHARACTERS:,} characters")
            yield piece


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """The template of a model folder: ``chat_template.jinja``, else that of ``tokenizer_config.json``; None without one.

    Raises:
        CheckpointError: a file cannot be read, or what it calls a template is no text.
    """
    path, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    raw = read_json(config) if config.is_file() else {}
    source, where = raw.get("chat_template"), config
    if isinstance(source, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if path.is_file():
        source, where = path.read_text("utf-8"), path
    if source is None:
        return None
    if not isinstance(source, str):
        raise CheckpointError(f"{where}: chat_template must be text, found {type(source).__name__}")
    return ChatTemplate(source, special_tokens(raw), str(where))


def special_tokens(raw: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a ``tokenizer_config.json`` names."""
    found = {}
    for name, value in raw.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            found[name] = content
    return found


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
