"""Text to n-grams, exactly as scikit-learn's `word` and `char_wb` analysers cut them, without scikit-learn.

Training hands `normalise` to scikit-learn as its preprocessor, so both sides see the same characters. The name
`NORMALISATION` is written into the part: change it whenever `normalise` changes what it returns.
"""

from __future__ import annotations

import re
import unicodedata

NORMALISATION = "lower-nfc.v1"
TOKEN_PATTERN = r"(?u)\b\w+\b"
_WORD = re.compile(r"\w+")  # what TOKEN_PATTERN finds, without its two useless boundary checks


def normalise(text: str) -> str:
    """Lower-case `text` and compose its accents, which are kept."""
    return unicodedata.normalize("NFC", text.lower())


def word_ngrams(text: str, low: int, high: int) -> list[str]:
    """Return the runs of `low` to `high` words of a normalised `text`, joined by one space, with repeats."""
    words = _WORD.findall(text)
    grams = list(words) if low == 1 else []
    for n in range(max(low, 2), high + 1):
        grams.extend(map(" ".join, zip(*(words[i:] for i in range(n)), strict=False)))
    return grams


def char_ngrams(word: str, low: int, high: int) -> list[str]:
    """Return the runs of `low` to `high` characters of one white-space separated `word`, padded by a space each side.

    A word shorter than a run counts whole, once.
    """
    padded = f" {word} "
    size = len(padded)
    grams: list[str] = []
    for n in range(low, high + 1):
        if n >= size:
            grams.append(padded)
            break
        grams.extend([padded[i : i + n] for i in range(size - n + 1)])
    return grams
