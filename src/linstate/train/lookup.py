"""Lookup documents: facts in a format people use, filler between them, and questions on the facts.

:func:`make_lookup` draws a document; everything in it comes from the random generator given, so the
same generator state gives the same document. :func:`ask` words the questions. A document drawn with
``unseen=True`` has only keys and values (of four characters or more) that training never draws.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from linstate.engine.asking import answer_text, question_prompt
from linstate.errors import ArgumentError
from linstate.train.formats import FORMATS, Fact, Layout
from linstate.train.names import KEY_FORMS, VALUE_FORMS, Names, pseudo_word

__all__ = ["QUESTIONS", "STYLES", "Lookup", "as_text", "ask", "filler_chunks", "make_lookup", "real_words"]

STYLES: tuple[str, ...] = (*FORMATS, "mixed")
QUESTIONS = (
    "What is {}?",
    "{}?",
    "What is the value of {}?",
    "Which value has {}?",
    "Value of {}?",
    "What does {} have?",
)
_STYLE_WEIGHTS = [weight for weight, _ in FORMATS.values()] + [1.2]
_KEY_WEIGHTS = {
    "word": 3.0,
    "names": 2.5,
    "snake": 2.0,
    "letters": 1.5,
    "code": 1.5,
    "kebab": 1.5,
    "numbered": 1.5,
}
_VALUE_WEIGHTS = {
    "integer": 2.5,
    "suffixed": 2.0,
    "names": 2.5,
    "mixed": 1.5,
    "code": 1.5,
    "long": 0.4,
    "switch": 0.3,
}
_QUESTION_LIKE = re.compile(r"^\? ", re.MULTILINE)
_FACT_LIKE = re.compile(r"([\w./-]+)[\"'`*]*(?:[ ]?[:=,|]|\t|  | is | has | -+>)")


@dataclass(frozen=True)
class Lookup:
    """A document and what can be asked of it.

    ``facts``: key and value of every fact, in the order of the text; keys differ (case aside).
    ``asked``: further questions with their answers, such as ``("What is the port of X?", "23")``.
    """

    text: str
    facts: list[Fact]
    style: str
    asked: list[Fact] = field(default_factory=list)


def make_lookup(
    rng: random.Random,
    *,
    facts: int,
    length: int | None = None,
    style: str | None = None,
    value_length: tuple[int, int] = (1, 12),
    filler: Sequence[str] = (),
    words: Sequence[str] = (),
    unseen: bool = False,
    seen: frozenset[str] = frozenset(),
) -> Lookup:
    """Draws one lookup document.

    Args:
        rng: the only source of chance.
        facts: how many facts, 1 or more.
        length: characters to reach with filler (met within a few percent, or exceeded when the facts
            alone are longer); None leaves it to chance, from no filler to twice the facts.
        style: one of ``STYLES``; None draws one.
        value_length: shortest and longest value in characters.
        filler: pieces of real text (:func:`filler_chunks`); made-up prose is used beside it.
        words: real words for keys and values (:func:`real_words`); ignored when ``unseen``.
        unseen: draw only what training never draws.
        seen: further strings, in lower case, that an unseen key or value must not equal.

    Raises:
        ArgumentError: ``facts`` below 1, or a style that does not exist.

    >>> document = make_lookup(random.Random(3), facts=4, style="colon")
    >>> all(f"{key}" in document.text and value in document.text for key, value in document.facts)
    True
    """
    if facts < 1:
        raise ArgumentError(f"facts: expected 1 or more, got {facts}")
    if style is not None and style not in STYLES:
        raise ArgumentError(f"style: expected one of {', '.join(STYLES)}; got {style!r}")
    chosen = style or rng.choices(STYLES, _STYLE_WEIGHTS)[0]
    names = Names(rng, words=words, unseen=unseen, seen=seen)
    kept = _Filler(rng, filler)
    # Filler is fetched first, so that no key is drawn that the filler seems to state a fact about.
    room = (length or 0) if length is not None else rng.choice((0, 0, 0, 15, 30, 60)) * facts
    pool = kept.lines(room)
    taken = {match.casefold() for match in _FACT_LIKE.findall(pool)}
    drawn = _draw_facts(rng, names, facts, chosen, value_length, taken)
    parts = _layouts(rng, names, drawn, chosen)
    asked = [pair for part in parts for pair in part.asked]
    base = sum(len(p.head) + len(p.tail) + sum(map(len, p.items)) for p in parts)
    budget = room if length is None else max(0, length - base)
    text = _assemble(rng, parts, pool, budget)
    return Lookup(text, drawn, chosen, asked)


def ask(rng: random.Random, lookup: Lookup, *, bare: float = 0.8, most: int | None = None) -> list[Fact]:
    """Questions on a document with their answers, in random order, each fact once.

    Args:
        bare: share of questions that are the key alone; the others take a wording of ``QUESTIONS``.
        most: at most so many; None asks every fact.
    """
    extra = {answer_key: value for answer_key, value in lookup.asked}
    pairs = [(k if rng.random() < bare else rng.choice(QUESTIONS).format(k), v) for k, v in lookup.facts]
    if extra and rng.random() < 0.5:
        pairs += rng.sample(sorted(extra.items()), min(len(extra), max(1, len(pairs) // 4)))
    rng.shuffle(pairs)
    return pairs if most is None else pairs[:most]


def as_text(pairs: Iterable[Fact]) -> str:
    """Questions and answers in the wording of :mod:`linstate.engine.asking`, one after another."""
    return "".join(question_prompt(question) + answer_text(value) for question, value in pairs)


def filler_chunks(texts: Iterable[str], *, longest: int = 600) -> list[str]:
    """Cuts texts into pieces of whole lines, at most ``longest`` characters, with something to say."""
    chunks: list[str] = []
    for text in texts:
        lines: list[str] = []
        size = 0
        for line in text.split("\n"):
            line = line.rstrip()[:160]
            if size + len(line) > longest or (not line and size > longest // 3):
                chunks.append("\n".join(lines))
                lines, size = [], 0
            if line or lines:
                lines.append(line)
                size += len(line) + 1
        if lines:
            chunks.append("\n".join(lines))
    return [chunk.strip("\n") for chunk in chunks if len(chunk) >= 30 and not _QUESTION_LIKE.search(chunk)]


def real_words(texts: Iterable[str], *, shortest: int = 2, longest: int = 14) -> list[str]:
    """The words of texts in lower case, each once, sorted; ASCII letters only."""
    found: set[str] = set()
    for text in texts:
        found.update(re.findall(rf"\b[a-z]{{{shortest},{longest}}}\b", text))
    return sorted(found)


class _Filler:
    """Running text in whole lines: pieces of real text, or made-up prose, or both."""

    def __init__(self, rng: random.Random, chunks: Sequence[str]) -> None:
        self.rng, self.chunks = rng, chunks
        self.real = rng.choice((1.0, 1.0, 0.7, 0.0)) if chunks else 0.0

    def lines(self, size: int) -> str:
        parts: list[str] = []
        while size > 0:
            part = self.rng.choice(self.chunks) if self.rng.random() < self.real else self._made_up()
            parts.append(part)
            size -= len(part) + 1
        return "\n".join(parts)

    def _made_up(self) -> str:
        rng = self.rng
        sentences = []
        for _ in range(rng.randint(1, 4)):
            words = [
                rng.choice(_COMMON) if rng.random() < 0.6 else pseudo_word(rng)
                for _ in range(rng.randint(4, 14))
            ]
            sentences.append(" ".join(words).capitalize() + rng.choice("....!?"))
        return rng.choice(("\n", " ")).join(sentences)


_COMMON: list[str] = str.split(
    "the of and to in a that it was for on with as at by this from but not are or have an they which you were "
    "all her she there would their we him been has when who will more no if out so said what up its about into "
    "than them can only other new some time could these two may then do first any my now such like our over man "
    "even most made after also did many before must through back years where much your way well down should "
    "because each just those people how too little state good very make world still see own work long here"
)


def _draw_facts(
    rng: random.Random, names: Names, count: int, style: str, value_length: tuple[int, int], taken: set[str]
) -> list[Fact]:
    """Facts with different keys; in some documents keys and values are near duplicates of each other."""
    shortest, longest = value_length
    key_forms = _some(rng, list(KEY_FORMS), _KEY_WEIGHTS, rng.choice((1, 1, 2, 3)))
    if style == "environment":
        key_forms = ["constant", "snake"][: rng.randint(1, 2)]
    value_forms = _some(rng, list(VALUE_FORMS), _VALUE_WEIGHTS, rng.choice((1, 1, 2, 4, 8)))
    alike_keys, alike_values = rng.choice((0.0, 0.0, 0.15, 0.4)), rng.choice((0.0, 0.0, 0.2))
    facts: list[Fact] = []
    used = set(taken)
    misses = 0
    while len(facts) < count:
        if facts and rng.random() < alike_keys:
            key = names.twist(rng.choice(facts)[0])
        else:
            key = names.key(rng.choice(key_forms) if misses < 20 else "mixed")
        folded = key.casefold()
        if folded in used or not 2 <= len(key) <= 20 or key != key.strip() or not names.allowed(key):
            misses += 1
            continue
        value = names.twist(rng.choice(facts)[1]) if facts and rng.random() < alike_values else ""
        if not shortest <= len(value) <= longest or value != value.strip() or not names.allowed(value):
            value = names.value(rng.choice(value_forms), shortest=shortest, longest=longest)
        used.add(folded)
        misses = 0
        facts.append((key, value))
    return facts


def _some(rng: random.Random, pool: list[str], weights: dict[str, float], count: int) -> list[str]:
    return rng.choices(pool, [weights.get(name, 1.0) for name in pool], k=count)


def _layouts(rng: random.Random, names: Names, facts: list[Fact], style: str) -> list[Layout]:
    """One layout, or for ``mixed`` two to four in a row with a heading each."""
    if style != "mixed" or len(facts) < 2:
        pick = style if style != "mixed" else "colon"
        return [FORMATS[pick][1](rng, facts, names)]
    cuts = sorted(rng.sample(range(1, len(facts)), min(len(facts) - 1, rng.choice((1, 1, 2, 3)))))
    layouts = []
    for begin, end in zip([0, *cuts], [*cuts, len(facts)], strict=True):
        layout = rng.choice(list(FORMATS.values()))[1](rng, facts[begin:end], names)
        title = names.word().capitalize()
        layout.head = (
            rng.choice(("", f"\n{title}\n", f"\n# {title}\n", f"\n{title}:\n\n", "\n")) + layout.head
        )
        layouts.append(layout)
    return layouts


def _cut(text: str, size: int) -> str:
    """At most ``size`` characters, ending with a line if one ends in the second half, else with a word."""
    if len(text) >= size:
        text = text[:size]
        line, word = text.rfind("\n"), text.rfind(" ")
        text = text[:line] if line > size // 2 else text[:word] if word > size // 2 else text
    return text.strip("\n").rstrip()


def _one_line_end(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"


def _assemble(rng: random.Random, parts: list[Layout], pool: str, budget: int) -> str:
    """Puts the pieces together with about ``budget`` characters of the pool spread over random gaps."""
    slots = [(at, item) for at, part in enumerate(parts) for item in range(len(part.items)) if part.dress]
    slots += [(at, -1) for at in range(len(parts))] + [(len(parts), -1)]
    chosen = rng.sample(slots, min(len(slots), rng.choice((1, 2, 3, 1 + len(slots) // 2, len(slots)))))
    shares = [rng.expovariate(1.0) + 0.05 for _ in chosen]
    scale = budget / sum(shares)
    sizes = {slot: int(share * scale) for slot, share in zip(chosen, shares, strict=True)}
    position = 0
    owed = 0
    out: list[str] = []

    def fill(slot: tuple[int, int], layout: Layout | None) -> None:
        nonlocal position, owed
        size = sizes.get(slot, 0) + (owed if slot in sizes else 0)
        if size < 8:
            owed += size if slot in sizes else 0
            return
        dress = layout.dress if layout and layout.dress else _one_line_end
        text = _cut(pool[position : position + size], size)
        dressed = dress(text)
        if len(dressed) > 1.1 * size + 20:  # dressing costs too much here: use less of the pool
            text = _cut(text, int(len(text) * size / len(dressed)))
            dressed = dress(text)
        position += len(text) + 1
        owed = size - len(dressed)
        if dressed:
            out.append(_one_line_end(dressed))

    for at, part in enumerate(parts):
        fill((at, -1), None)
        out.append(part.head)
        for number, item in enumerate(part.items):
            fill((at, number), part)
            out.append(item)
        out.append(part.tail)
    fill((len(parts), -1), None)
    return "".join(out)
