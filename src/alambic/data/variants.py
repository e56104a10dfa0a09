"""Other wordings of a text that leave its meaning: a word less, a slip of the keyboard.

A teacher answers each variant as it stands, so a variant that did change the meaning gets the answer to what it says. A
variant depends on the text, the seed and its number alone: what a teacher answered to it is found again next time.
"""

from __future__ import annotations

import hashlib
import random
import re

_WORD = re.compile(r"\w{4,}")
_DROPPED = 0.15  # share of the words that go
_LEAST_WORDS = 4  # a shorter text loses no word: too much of it would go


def variants(text: str, *, copies: int, seed: int) -> tuple[str, ...]:
    """Return up to `copies` variants of `text`, all different from it and from each other."""
    found: dict[str, None] = {}
    for number in range(copies):
        digest = hashlib.sha256(f"{seed}\x1f{number}\x1f{text}".encode("utf-8", "surrogatepass")).digest()
        rng = random.Random(int.from_bytes(digest[:8], "big"))
        made = _without_words(text, rng) if number % 2 == 0 else _with_slip(text, rng)
        if made != text:
            found[made] = None
    return tuple(found)


def _without_words(text: str, rng: random.Random) -> str:
    words = text.split()
    if len(words) < _LEAST_WORDS:
        return _with_slip(text, rng)
    gone = set(rng.sample(range(len(words)), max(1, round(_DROPPED * len(words)))))
    return " ".join(word for i, word in enumerate(words) if i not in gone)


def _with_slip(text: str, rng: random.Random) -> str:
    """Swap, leave out or double one letter inside one word of four letters or more."""
    places = [found.span() for found in _WORD.finditer(text)]
    if not places:
        return text
    start, end = rng.choice(places)
    at = rng.randrange(start + 1, end - 1)
    here, after = text[at], text[at + 1]
    slip = rng.choice((after + here, after, here + here + after))
    return text[:at] + slip + text[at + 2 :]
