"""Draws the keys and values of lookup documents: broad in form, and split so that tests are unseen.

Training and test never share a key or value of four characters or more: a string whose checksum falls
into one class of eight is **reserved** for tests (:func:`is_reserved`), whatever the seeds. Shorter
strings cannot all be new (there are ten one-digit numbers); there the pair of key and value is new.
"""

from __future__ import annotations

import random
import string
import zlib
from collections.abc import Callable, Sequence

__all__ = ["KEY_FORMS", "VALUE_FORMS", "Names", "is_reserved", "pseudo_word"]

_SIMPLE = [*"bcdfghjklmnprstvwz", *"bdklmnprst", ""]
_ONSETS = _SIMPLE * 3 + str.split(
    "bl br ch cl cr dr fl fr gl gr gu kh kl kr pl pr qu sh sk sl sp st str th tr tw"
)
_VOWELS = [*"aaaaeeeeiiioooouuy", *str.split("ai au ea ee ei ia io oo ou ue")]
_CODAS = [*[""] * 40, *"nnnrrllsstmdkpx", *str.split("nd nt rk st ng sh th ck rd ll ss")]
_ACCENTED = str.maketrans("aeioucn", "áéíóúçñ")
_LOWER, _UPPER, _DIGITS = string.ascii_lowercase, string.ascii_uppercase, string.digits
_ALNUM = _LOWER + _UPPER + _DIGITS
_ENDINGS = str.split(
    "in out max min start end old new 1 2 3 a b id name size count time path url left right local remote "
    "src dst read write low high first last x y main backup test"
)
_UNITS = str.split("ms s min h kB MB GB % px em kg km m cm C V W Hz kHz dB pt k x")
_SWITCHES = str.split("yes no on off true false none auto default enabled disabled low medium high")


def is_reserved(text: str) -> bool:
    """Whether a key or value may stand in test documents only (one string in eight, from 4 characters on).

    >>> is_reserved("abc")
    False
    """
    return len(text) >= 4 and zlib.crc32(text.casefold().encode()) % 8 == 0


def pseudo_word(rng: random.Random, syllables: int | None = None) -> str:
    """A made-up lower-case word of one to four syllables, such as ``trovanik``."""
    count = syllables or rng.choice((1, 2, 2, 2, 3, 3, 4))
    choice = rng.choice
    return "".join(choice(_ONSETS) + choice(_VOWELS) + choice(_CODAS) for _ in range(count))


class Names:
    """A source of keys and values for one document.

    Args:
        rng: every draw comes from it.
        words: real words to mix with made-up ones (training); empty for made-up words alone.
        unseen: draw only what training never draws; see :func:`is_reserved`.
        seen: further strings that an unseen draw must not equal (words of the training text).
    """

    def __init__(
        self,
        rng: random.Random,
        *,
        words: Sequence[str] = (),
        unseen: bool = False,
        seen: frozenset[str] = frozenset(),
    ) -> None:
        self.rng, self.words, self.unseen, self.seen = rng, words, unseen, seen
        self.real_share = rng.choice((0.0, 0.3, 0.7, 0.95)) if words and not unseen else 0.0
        self.suffixes = [self._short() for _ in range(rng.choice((1, 2, 2, 3)))]
        self.separator = rng.choice("__-..:")

    def key(self, form: str, *, longest: int = 20) -> str:
        """A key of one of ``KEY_FORMS``, 2 to ``longest`` characters."""
        return self._accepted(KEY_FORMS[form], 2, longest)

    def value(self, form: str, *, shortest: int = 1, longest: int = 12) -> str:
        """A value of one of ``VALUE_FORMS`` within the given lengths in characters.

        ``switch`` values (``true``, ``auto``) are few and common: training has all, tests have none.
        """
        if form == "switch":
            fitting = [text for text in _SWITCHES if shortest <= len(text) <= longest]
            if fitting and not self.unseen:
                return self.rng.choice(fitting)
            form = "word"
        return self._accepted(VALUE_FORMS[form], shortest, longest)

    def twist(self, text: str) -> str:
        """A near duplicate of a key or value: another ending, another beginning, one character changed."""
        rng = self.rng
        if rng.random() < 0.4 and any(c in text for c in "_-. "):
            mark = next(c for c in "_-. " if c in text)
            parts = text.split(mark)
            parts[rng.randrange(len(parts))] = rng.choice(_ENDINGS)
            return mark.join(parts)
        if rng.random() < 0.4:
            return text + rng.choice(("_", "-", "")) + rng.choice(_ENDINGS)
        at = rng.randrange(len(text))
        old = text[at]
        pool = _DIGITS if old.isdigit() else _UPPER if old.isupper() else _LOWER if old.islower() else old
        return text[:at] + rng.choice(pool) + text[at + 1 :]

    def allowed(self, text: str) -> bool:
        """Whether a string belongs to this side of the split between training and test."""
        if len(text) < 4:
            return True
        return is_reserved(text) == self.unseen and text.casefold() not in self.seen

    def word(self) -> str:
        """A lower-case word, real or made up."""
        if self.real_share and self.rng.random() < self.real_share:
            return self.rng.choice(self.words)
        return pseudo_word(self.rng)

    def _accepted(self, draw: Callable[[Names], str], shortest: int, longest: int) -> str:
        for _ in range(400):
            text = draw(self)
            if shortest <= len(text) <= longest and text == text.strip() and self.allowed(text):
                return text
        while True:  # a form that cannot be so short or long: any characters do
            text = _random_string(self.rng, _ALNUM, shortest, longest)
            if self.allowed(text):
                return text

    def _short(self) -> str:
        return self.rng.choice((pseudo_word(self.rng, 1), _random_string(self.rng, _LOWER, 2, 4)))


def _random_string(rng: random.Random, alphabet: str, shortest: int, longest: int) -> str:
    return "".join(rng.choices(alphabet, k=rng.randint(shortest, max(shortest, longest))))


def _joined(names: Names, mark: str) -> str:
    words = [names.word() for _ in range(names.rng.choice((2, 2, 2, 3)))]
    if names.rng.random() < 0.35:
        words[-1] = names.rng.choice(_ENDINGS)
    return mark.join(words)


def _camel(names: Names) -> str:
    first, *rest = (names.word() for _ in range(names.rng.choice((2, 2, 3))))
    return (first if names.rng.random() < 0.7 else first.capitalize()) + "".join(w.capitalize() for w in rest)


def _title(names: Names, count: int) -> str:
    words = [names.word().capitalize() for _ in range(count)]
    if names.rng.random() < 0.04:
        at = names.rng.randrange(len(words[0]))
        words[0] = words[0][:at] + words[0][at:].translate(_ACCENTED)
    if names.rng.random() < 0.02:
        words[0] = words[0][:1] + "'" + words[0]
    if count > 1 and names.rng.random() < 0.15:
        words.insert(1, names.rng.choice(("of", "and", "de", "la", "van", "&")))
    return names.rng.choice((" ", " ", " ", "-")).join(words)


def _numbered(names: Names) -> str:
    rng = names.rng
    mark = rng.choice(("", "", "-", "_"))
    return (
        names.word()
        + mark
        + str(rng.choice((rng.randint(0, 9), rng.randint(0, 99), f"0{rng.randint(1, 9)}")))
    )


def _host(names: Names) -> str:
    return ".".join([names.word(), names.word(), names._short()][names.rng.randint(0, 1) :])


def _integer(names: Names) -> str:
    rng = names.rng
    return str(rng.randrange(10 ** rng.choice((1, 2, 2, 3, 3, 4, 4, 5, 6))))


def _clock(names: Names) -> str:
    rng = names.rng
    hour, minute, second = rng.randrange(24), rng.randrange(60), rng.randrange(60)
    day = f"{rng.randint(1950, 2049)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    return rng.choice(
        (f"{hour:02}:{minute:02}", f"{hour}:{minute:02}", f"{hour:02}:{minute:02}:{second:02}", day)
    )


def _version(names: Names) -> str:
    rng = names.rng
    return ".".join(str(rng.randrange(10 ** rng.choice((1, 1, 2)))) for _ in range(rng.choice((2, 3, 3, 4))))


def _hexadecimal(names: Names) -> str:
    rng = names.rng
    text = _random_string(rng, "0123456789abcdef", 2, 8)
    return rng.choice(("0x", "#", "", "")) + (text.upper() if rng.random() < 0.25 else text)


def _decimal(names: Names) -> str:
    rng = names.rng
    sign = "-" if rng.random() < 0.2 else ""
    return f"{sign}{rng.randrange(10 ** rng.randint(1, 4))}.{rng.randrange(10 ** rng.randint(1, 3))}"


def _quantity(names: Names) -> str:
    rng = names.rng
    return str(rng.randrange(10 ** rng.randint(1, 4))) + rng.choice(("", "", " ")) + rng.choice(_UNITS)


def _path(names: Names) -> str:
    rng = names.rng
    parts = [names.word() for _ in range(rng.choice((1, 2, 2, 3)))]
    return (
        rng.choice(("/", "/", "./", "~/", ""))
        + "/".join(parts)
        + rng.choice(("", "", ".txt", ".so", ".conf", "/"))
    )


def _address(names: Names) -> str:
    rng = names.rng
    if rng.random() < 0.3:
        return f"{names.word()}@{names.word()}.{names._short()}"
    return ".".join(str(rng.randrange(256)) for _ in range(4))


KEY_FORMS: dict[str, Callable[[Names], str]] = {
    "word": lambda n: n.word(),
    "snake": lambda n: _joined(n, "_"),
    "kebab": lambda n: _joined(n, "-"),
    "dotted": lambda n: _joined(n, "."),
    "constant": lambda n: _joined(n, "_").upper(),
    "camel": _camel,
    "numbered": _numbered,
    "name": lambda n: _title(n, 1),
    "names": lambda n: _title(n, n.rng.choice((1, 2, 2, 3))),
    "phrase": lambda n: _joined(n, " "),
    "acronym": lambda n: _random_string(n.rng, _UPPER, 2, 5),
    "letters": lambda n: _random_string(n.rng, _LOWER, 2, 8),
    "code": lambda n: _random_string(n.rng, _LOWER + _DIGITS, 2, 9),
    "mixed": lambda n: _random_string(n.rng, _ALNUM, 3, 12),
    "number": lambda n: str(n.rng.randrange(10, 10 ** n.rng.randint(2, 6))),
    "host": _host,
}
VALUE_FORMS: dict[str, Callable[[Names], str]] = {
    "integer": _integer,
    "suffixed": lambda n: f"{_integer(n)}{n.rng.choice('//////:-@')}{n.rng.choice(n.suffixes)}",
    "version": _version,
    "hexadecimal": _hexadecimal,
    "decimal": _decimal,
    "quantity": _quantity,
    "word": lambda n: n.word(),
    "name": lambda n: _title(n, 1),
    "names": lambda n: _title(n, n.rng.choice((1, 1, 2, 2, 3))),
    "phrase": lambda n: " ".join(n.word() for _ in range(n.rng.choice((2, 2, 3)))),
    "snake": lambda n: _joined(n, n.separator),
    "path": _path,
    "clock": _clock,
    "address": _address,
    "letters": lambda n: _random_string(n.rng, _LOWER, 1, 10),
    "capitals": lambda n: _random_string(n.rng, _UPPER, 1, 6),
    "code": lambda n: _random_string(n.rng, _LOWER + _DIGITS, 1, 12),
    "mixed": lambda n: _random_string(n.rng, _ALNUM, 1, 12),
    "long": lambda n: _random_string(n.rng, _ALNUM + "-_/.+", 10, 24),
    "switch": lambda n: n.rng.choice(_SWITCHES),  # drawn in `Names.value`
}
