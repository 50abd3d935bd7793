"""The formats of lookup documents: how people write down that a key has a value.

A format turns facts into a :class:`Layout`: pieces between which filler may stand. Which facts there
are and how much filler is not its business (:mod:`linstate.train.lookup`).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from linstate.train.names import Names

__all__ = ["ATTRIBUTES", "FORMATS", "Fact", "Layout"]

Fact = tuple[str, str]
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?$")
ATTRIBUTES: list[str] = str.split(
    "code number value owner color price port level room phone size version city type status limit address "
    "key place name id rank speed weight label unit date team group mode target label symbol pin seat score "
    "director president host model brand origin language role title grade channel password token"
)


@dataclass
class Layout:
    """A document in pieces: ``head``, one item for each fact, ``tail``; every piece ends its own line.

    ``dress`` turns plain filler lines into something that may stand before any item (a comment, a
    paragraph); None where the format allows nothing there, so filler goes before and after the whole.
    ``asked`` holds further questions with their answers, beyond the bare keys.
    """

    items: list[str]
    head: str = ""
    tail: str = ""
    dress: Callable[[str], str] | None = None
    asked: list[Fact] = field(default_factory=list)


def _comment(mark: str) -> Callable[[str], str]:
    return lambda text: "".join(f"{mark} {line}".rstrip() + "\n" for line in text.splitlines())


def _plain(text: str) -> str:
    return text


def _paragraph(text: str) -> str:
    return f"\n{text}\n"


def _tail_comment(rng: random.Random, names: Names, share: float, mark: str = "#") -> str:
    if rng.random() >= share:
        return ""
    words = " ".join(names.word() for _ in range(rng.randint(1, 5)))
    return (
        rng.choice(("  ", " ", "\t", "\t\t"))
        + mark
        + " "
        + (words.capitalize() if rng.random() < 0.5 else words)
    )


def _quoted(text: str, mark: str = '"') -> str:
    return mark + text + mark


def _is_number(value: str) -> bool:
    return bool(_NUMBER.match(value))


def colon(rng: random.Random, facts: list[Fact], names: Names) -> Layout:
    """``key: value``, bare or as a list."""
    bullet, mark = rng.choice(("", "", "", "- ", "* ", "  ")), rng.choice((":", ":", ":", " :"))
    dress = rng.choice((_plain, _plain, _paragraph, _comment("#")))
    return Layout([f"{bullet}{k}{mark} {v}\n" for k, v in facts], dress=dress)


def spaced_equals(rng: random.Random, facts: list[Fact], names: Names) -> Layout:
    """``key = value``, sometimes aligned, sometimes with a comment after it."""
    width = max(len(k) for k, _ in facts) if rng.random() < 0.3 else 0
    share = rng.choice((0.0, 0.0, 0.3))
    items = [f"{k:<{width}} = {v}{_tail_comment(rng, names, share)}\n" for k, v in facts]
    return Layout(items, dress=rng.choice((_plain, _paragraph, _comment("#"), _comment("//"))))


def equals(rng: random.Random, facts: list[Fact], names: Names) -> Layout:
    """``key=value``."""
    return Layout([f"{k}={v}\n" for k, v in facts], dress=rng.choice((_plain, _comment("#"), _comment("#"))))


def arrows(rng: random.Random, facts: list[Fact], names: Names) -> Layout:
    """``key -> value`` and its relatives."""
    mark = rng.choice((" -> ", " => ", " - ", " -- ", " → ", " | ", " ... ", "\t=> ", " := "))
    bullet = rng.choice(("", "", "- ", "* ", "+ "))
    return Layout([f"{bullet}{k}{mark}{v}\n" for k, v in facts], dress=rng.choice((_plain, _paragraph)))


def _columns(
    rng: random.Random, facts: list[Fact], names: Names
) -> tuple[list[str], list[list[str]], list[Fact]]:
    """Header, rows of two to five columns (key, value, more), and questions on the further columns."""
    extra = rng.choice((0, 0, 0, 1, 1, 2, 3))
    header = rng.sample(ATTRIBUTES, 2 + extra)
    if rng.random() < 0.3:
        header = [name.capitalize() for name in header]
    forms = [rng.choice(("integer", "word", "name", "decimal", "code", "switch")) for _ in range(extra)]
    rows = [[k, v, *(names.value(form) for form in forms)] for k, v in facts]
    asked = [
        (f"{header[c]} of {row[0]}", row[c])
        for row in rows
        for c in range(2, 2 + extra)
        if rng.random() < 0.1
    ]
    return header, rows, asked


def csv(rng: random.Random, facts: list[Fact], names: Names) -> Layout:
    """Comma or semicolon separated, two to five columns, with or without header, quoted or not."""
    header, rows, asked = _columns(rng, facts, names)
    mark = rng.choice((",", ",", ",", ",", ";", ", ", "|"))
    quote = rng.choice(("none", "none", "none", "all", "text"))

    def cell(text: str) -> str:
        return _quoted(text) if quote == "all" or (quote == "text" and not _is_number(text)) else text

    has_header = rng.random() < 0.55
    return Layout(
        [mark.join(cell(c) for c in row) + "\n" for row in rows],
        head=mark.join(cell(h) for h in header) + "\n" if has_header else "",
        dress=rng.choice((None, None, _comment("#"))),
        asked=asked if has_header else [],
    )


def tabs(rng: random.Random, facts: list[Fact], names: Names) -> Layout:
    """Tab separated; aligned with several tabs, alias columns, comments at the end."""
    aligned, alias, share = rng.random() < 0.6, rng.choice((0.0, 0.3, 0.7)), rng.choice((0.0, 0.3, 0.8))
    stop = (max(len(k) for k, _ in facts) // 8 + 1) if aligned else 0
    items = []
    for k, v in facts:
        line = k + "\t" * max(1, stop - len(k) // 8) + v
        if rng.random() < alias:
            line += "\t" * (max(1, 2 - len(v) // 8) if aligned else 1)
            line += " ".join(
                rng.choice((k.upper(), names.word(), names.word())) for _ in range(rng.choice((1, 1, 2)))
            )
        items.append(line + _tail_comment(rng, names, share) + "\n")
    return Layout(items, dress=rng.choice((_comment("#"), _comment("#"), None)))


def table(rng: random.Random, facts: list[Fact], names: Names) -> Layout:
    """Columns aligned by spaces; a single space where no key has one."""
    header, rows, _ = _columns(rng, facts, names)
    gap, share = rng.choice((2, 2, 3, 4)), rng.choice((0.0, 0.0, 0.5))
    if rng.random() < 0.3 and not any(" " in k or " " in v for k, v in facts):
        lines = [" ".join(row) for row in rows]
    else:
        cells = [header, *rows]
        widths = [max(len(row[c]) for row in cells) + gap for c in range(len(header))]
        lines = [
            "".join(f"{text:<{w}}" for text, w in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        head = lines.pop(0) + "\n"
        if rng.random() < 0.5:
            return Layout([line + "\n" for line in lines], head=head, dress=rng.choice((None, _comment("#"))))
    return Layout(
        [line + _tail_comment(rng, names, share) + "\n" for line in lines],
        dress=rng.choice((None, _comment("#"))),
    )


def ini(rng: random.Random, facts: list[Fact], names: Names) -> Layout:
    """Sections in brackets, keys with ``=`` or ``:``, values bare or (as in TOML) quoted."""
    mark, note = rng.choice((" = ", " = ", "=", ": ")), rng.choice((";", "#"))
    quote = rng.random() < 0.25
    every = rng.randint(2, 10)
    items = []
    for at, (k, v) in enumerate(facts):
        section = f"[{names.word()}]\n" if at % every == 0 else ""
        gap = "\n" if section and at else ""
        items.append(f"{gap}{section}{k}{mark}{_quoted(v) if quote and not _is_number(v) else v}\n")
    return Layout(items, dress=_comment(note))


def _json_value(value: str, numbers: bool) -> str:
    return value if numbers and _is_number(value) else json.dumps(value, ensure_ascii=False)


def json_object(rng: random.Random, facts: list[Fact], names: Names) -> Layout:
    """A JSON object, flat or nested one level, numbers bare; filler becomes entries of long text."""
    indent, numbers = " " * rng.choice((2, 2, 4, 4, 0)), rng.random() < 0.8
    nested, every = rng.random() < 0.3, rng.randint(3, 8)
    lines: list[str] = []
    for at, (k, v) in enumerate(facts):
        last = at == len(facts) - 1
        closes = nested and (last or (at + 1) % every == 0)
        opens = f"{indent}{_quoted(names.word())}: {{\n" if nested and at % every == 0 else ""
        pad = indent * 2 if nested else indent
        entry = f"{pad}{json.dumps(k, ensure_ascii=False)}: {_json_value(v, numbers)}"
        end = f"\n{indent}}}" if closes else ""
        lines.append(f"{opens}{entry}{end}{'' if last else ','}\n")

    def dress(text: str) -> str:
        return "".join(
            f"{indent}{_quoted(names.word())}: {json.dumps(line.strip(), ensure_ascii=False)},\n"
            for line in text.splitlines()
            if line.strip()
        )

    return Layout(lines, head="{\n", tail="}\n", dress=None if nested else dress)


def records(rng: random.Random, facts: list[Fact], names: Names) -> Layout:
    """Records of two fields, as JSON or YAML lists write them; the second field is the value."""
    first, second, third = rng.sample(ATTRIBUTES, 3)
    more = rng.random() < 0.3
    if rng.random() < 0.5:
        rest = [
            f", {_quoted(third)}: {_json_value(names.value('word'), True)}" if more else "" for _ in facts
        ]
        lines = [
            f"  {{{_quoted(first)}: {json.dumps(k, ensure_ascii=False)}, {_quoted(second)}: {_json_value(v, True)}{r}}}"
            for (k, v), r in zip(facts, rest, strict=True)
        ]
        return Layout([line + ",\n" for line in lines[:-1]] + [lines[-1] + "\n"], head="[\n", tail="]\n")
    rest = [f"  {third}: {names.value('word')}\n" if more else "" for _ in facts]
    items = [f"- {first}: {k}\n  {second}: {v}\n{r}" for (k, v), r in zip(facts, rest, strict=True)]
    return Layout(items, dress=_comment("#"))


def yaml(rng: random.Random, facts: list[Fact], names: Names) -> Layout:
    """YAML: one or two levels, sometimes quoted."""
    every, quote = rng.choice((0, 0, 3, 5, 8)), rng.choice(("", "", '"', "'"))
    items = []
    for at, (k, v) in enumerate(facts):
        parent = f"{names.word()}:\n" if every and at % every == 0 else ""
        text = v if not quote or _is_number(v) else _quoted(v, quote)
        items.append(f"{parent}{'  ' if every else ''}{k}: {text}\n")
    return Layout(items, dress=_comment("#"))


def python(rng: random.Random, facts: list[Fact], names: Names) -> Layout:
    """A dict literal, or assignments where every key is a name."""
    mark = rng.choice(("'", '"', '"'))

    def literal(text: str) -> str:
        return text if _is_number(text) else _quoted(text, mark)

    if rng.random() < 0.4 and all(k.isidentifier() for k, _ in facts):
        return Layout([f"{k} = {literal(v)}\n" for k, v in facts], dress=_comment("#"))
    name = rng.choice(("TABLE", "data", "config", "DEFAULTS", "mapping", names.word()))
    items = [f"    {_quoted(k, mark)}: {literal(v)},\n" for k, v in facts]
    return Layout(items, head=f"{name} = {{\n", tail="}\n", dress=_comment("    #"))


def environment(rng: random.Random, facts: list[Fact], names: Names) -> Layout:
    """Shell assignments: ``export KEY="value"``."""
    word, mark = rng.choice(("export ", "export ", "", "set ", "ENV ")), rng.choice(('"', '"', "'", ""))
    return Layout([f"{word}{k}={_quoted(v, mark)}\n" for k, v in facts], dress=_comment("#"))


def markdown(rng: random.Random, facts: list[Fact], names: Names) -> Layout:
    """A Markdown table, or a list with the key in bold or as code."""
    if rng.random() < 0.35:
        mark = rng.choice(("**", "`", "_"))
        return Layout([f"- {mark}{k}{mark}: {v}\n" for k, v in facts], dress=_paragraph)
    header, rows, asked = _columns(rng, facts, names)
    head = f"| {' | '.join(header)} |\n|{'|'.join(['---'] * len(header))}|\n"
    return Layout([f"| {' | '.join(row)} |\n" for row in rows], head=head, asked=asked)


def tags(rng: random.Random, facts: list[Fact], names: Names) -> Layout:
    """XML-like elements with the key as an attribute."""
    tag, name = rng.choice(("item", "entry", "property", "option")), rng.choice(("name", "key", "id"))
    if rng.random() < 0.5:
        return Layout(
            [f'  <{tag} {name}="{k}">{v}</{tag}>\n' for k, v in facts], head="<list>\n", tail="</list>\n"
        )
    return Layout([f'<{tag} {name}="{k}" value="{v}"/>\n' for k, v in facts], dress=_plain)


_SENTENCES = (
    "The {a} of {k} is {v}.", "The {a} of {k} is {v}.", "{k} has {v} as its {a}.", "{k}'s {a} is {v}.",
    "For {k}, the {a} is {v}.", "{k} uses {a} {v}.", "The {a} for {k} is {v}.", "{k} was given the {a} {v}.",
    "We set the {a} of {k} to {v}.", "Remember that the {a} of {k} is {v}.", "{k} is at {v}.", "{k}: {a} {v}.",
    "The {a} of {k} was changed to {v}.", "In the case of {k} the {a} equals {v}.", "{k} comes with {a} {v}.",
    "{k} means {v}.", "As for {k}, its {a} is {v}.", "{v} is the {a} of {k}.", "Use {v} as the {a} of {k}.",
)  # fmt: skip


def sentences(rng: random.Random, facts: list[Fact], names: Names) -> Layout:
    """Statements in English, one to a line or running on; one attribute throughout or one for each."""
    one, template = rng.choice(ATTRIBUTES), rng.choice(_SENTENCES)
    same, fixed, end = rng.random() < 0.5, rng.random() < 0.3, rng.choice(("\n", "\n", " "))
    items, asked = [], []
    for k, v in facts:
        attribute = one if same else rng.choice(ATTRIBUTES)
        chosen = template if fixed else rng.choice(_SENTENCES)
        items.append(chosen.format(a=attribute, k=k, v=v) + end)
        if "{a}" in chosen and rng.random() < 0.5:
            asked.append((f"What is the {attribute} of {k}?", v))
    return Layout(
        items, tail="\n" if end == " " else "", dress=_plain if end == "\n" else _paragraph, asked=asked
    )


FORMATS: dict[str, tuple[float, Callable[[random.Random, list[Fact], Names], Layout]]] = {
    "colon": (2.0, colon),
    "spaced_equals": (1.5, spaced_equals),
    "equals": (1.0, equals),
    "csv": (2.0, csv),
    "tabs": (2.0, tabs),
    "table": (1.5, table),
    "ini": (1.5, ini),
    "json": (2.0, json_object),
    "records": (0.6, records),
    "yaml": (1.0, yaml),
    "python": (1.0, python),
    "environment": (0.7, environment),
    "markdown": (1.0, markdown),
    "arrows": (0.7, arrows),
    "tags": (0.4, tags),
    "sentences": (2.0, sentences),
}
