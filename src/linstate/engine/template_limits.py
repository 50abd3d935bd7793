"""Jinja for templates that strangers wrote: sandboxed, and with an end: bounded loops, texts and time.

Jinja's own sandbox keeps a template from touching what it is given. It does not keep it from running for ever, or from
making a text larger than the memory: loops are counted here, and what multiplies texts is refused before it does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_STEPS = 200_000
"""Turns of loops in one rendering."""
MOST_CHARACTERS = 64 * 2**20
MOST_SECONDS = 10.0
_WIDE = 100_000
"""The largest whole number that a method or filter of texts may be given, or that may repeat one."""


class _Budget:
    """What one rendering may still do."""

    def __init__(self) -> None:
        self.steps, self.end = MOST_STEPS, time.monotonic() + MOST_SECONDS

    def take(self) -> None:
        self.steps -= 1
        if self.steps < 0 or (self.steps % 256 == 0 and time.monotonic() > self.end):
            raise TemplateError(f"it takes more than {MOST_STEPS:,} steps or {MOST_SECONDS:.0f} s")


_budget: ContextVar[_Budget | None] = ContextVar("budget", default=None)


@contextmanager
def limited() -> Iterator[None]:
    """Templates that are rendered inside share one budget."""
    token = _budget.set(_Budget())
    try:
        yield
    finally:
        _budget.reset(token)


class _Counted:
    """An iterable of a loop; each turn is counted."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        budget = _budget.get()
        for item in self.items:
            if budget is not None:
                budget.take()
            yield item

    def __len__(self) -> int:
        return len(self.items)  # type: ignore[arg-type]


def _counted(items: Any) -> Any:
    # What has no length is told apart by it (`loop.length`), so only what has one is wrapped with one.
    if hasattr(items, "__len__"):
        return _Counted(items)
    return iter(_Counted(items)) if hasattr(items, "__iter__") else items


class _Generation(Extension):
    """``{% generation %} ... {% endgeneration %}``: what an assistant said, marked for training; here just its text."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The environment that Hugging Face gives chat templates, with the limits of this module."""

    intercepted_binops = frozenset(["*", "**", "%", "+"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        self.counted = _counted
        for name, function in list(self.filters.items()):
            self.filters[name] = _of_bounded_width(function)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in template.find_all(nodes.For):
            counted = nodes.EnvironmentAttribute("counted", lineno=loop.lineno)
            loop.iter = nodes.Call(counted, [loop.iter], [], None, None, lineno=loop.lineno)
        template.set_environment(self)
        return template

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        long = [x for x in (left, right) if isinstance(x, str | list | tuple)]
        if operator == "*" and long:
            count = next((x for x in (left, right) if isinstance(x, int)), 0)
            if len(long[0]) * max(count, 0) > MOST_CHARACTERS:
                raise TemplateError("it makes a text that is too long")
        if operator == "**" or (operator == "%" and isinstance(left, str) and len(left) > 64):
            raise TemplateError(f"it uses {operator}, which is not served in templates")
        if operator == "%" and isinstance(left, str) and any(len(n) > 4 for n in _numbers(left)):
            raise TemplateError("it makes a text that is too long")
        if operator == "+" and len(long) == 2 and len(long[0]) + len(long[1]) > MOST_CHARACTERS:
            raise TemplateError("it makes a text that is too long")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        if (budget := _budget.get()) is not None:
            budget.take()
        if isinstance(getattr(called, "__self__", None), str):
            _check_width(args, kwargs)
            if called.__name__ in ("format", "format_map") and any(
                len(n) > 4 for n in _numbers(called.__self__)
            ):
                raise TemplateError("it makes a text that is too long")
        return super().call(context, called, *args, **kwargs)


def _numbers(text: str) -> list[str]:
    return "".join(c if c.isdigit() else " " for c in text).split()


def _check_width(args: Iterable[Any], kwargs: dict[str, Any]) -> None:
    for given in (*args, *kwargs.values()):
        if isinstance(given, int) and not isinstance(given, bool) and abs(given) > _WIDE:
            raise TemplateError(f"it gives a text the width {given}")


def _of_bounded_width(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is given no number beyond reason; marked as what it wraps is marked (a filter may want the environment)."""

    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check_width(args[1:], kwargs)
        return function(*args, **kwargs)

    bounded.__dict__.update(getattr(function, "__dict__", {}))
    bounded.__name__ = getattr(function, "__name__", "filter")
    return bounded
