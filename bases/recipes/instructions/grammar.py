"""A small grammar: patterns whose <names> are replaced by one of the words of that name, drawn with a generator.

<ville>      a word of the list `ville`, itself a pattern
<2-48>       a whole number from 2 to 48
<02-48>      the same with two digits
{date}       a value that the caller has drawn already
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

_HOLE = re.compile(r"<([\w-]+)>")
_RANGE = re.compile(r"(\d+)-(\d+)$")
_DEEPEST = 12
_DE, _ELIDED = re.compile(r"\b([dD])e (?=[aeiouyàâéèêîôAEIOUYÀÂÉÈÊÎÔ])"), r"\1'"
HERE = Path(__file__).parent


class Grammar:
    """The words of one language."""

    def __init__(self, words: Mapping[str, Sequence[str]], language: str) -> None:
        self.words, self.language = words, language

    def fill(self, rng: random.Random, pattern: str, values: Mapping[str, str] | None = None, *, depth: int = 0) -> str:
        """Return `pattern` with every hole filled; French `de` is elided before a vowel."""
        if depth > _DEEPEST:
            raise ValueError(f"pattern {pattern!r} goes round in circles")

        def word(match: re.Match[str]) -> str:
            name = match[1]
            numbers = _RANGE.match(name)
            if numbers:
                drawn = str(rng.randint(int(numbers[1]), int(numbers[2])))
                return drawn.zfill(len(numbers[1])) if numbers[1].startswith("0") and len(numbers[1]) > 1 else drawn
            if name not in self.words:
                raise ValueError(f"pattern {pattern!r}: no words {name!r}")
            return self.fill(rng, rng.choice(self.words[name]), depth=depth + 1)

        text = _HOLE.sub(word, pattern)
        for name, value in (values or {}).items():
            text = text.replace("{" + name + "}", value)
        return _DE.sub(_ELIDED, text) if self.language == "fr" else text


@cache
def book(language: str) -> tuple[Grammar, Mapping[str, Any]]:
    """Return the grammar of a language and everything written for it."""
    text = {}
    words: dict[str, list[str]] = {}
    for path in sorted((HERE / "text").glob(f"{language}-*.toml")):
        data = tomllib.loads(path.read_text("utf-8"))
        words |= data.pop("words", {})
        for name, value in data.items():
            text[name] = [*text.get(name, []), *value] if isinstance(value, list) else {**text.get(name, {}), **value}
    return Grammar(words, language), text


def pick(rng: random.Random, options: Sequence[Any]) -> Any:
    """Draw one of `options`."""
    return options[rng.randrange(len(options))]


def capital(text: str) -> str:
    """Return `text` with a capital first letter."""
    return text[:1].upper() + text[1:]
