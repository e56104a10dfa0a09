r"""Make text safe for everything downstream, and change nothing that carries meaning.

Unicode is composed (NFC), line ends become ``\n``, and what no tokenizer should see is removed: NUL and other control
characters, byte order marks, lone surrogates. Non-breaking spaces, joiners, direction marks and emoji stay: French
typography, Persian and family emoji need them. Only the ends are stripped, and not even those of a text to be written.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

_LINE_END = re.compile("\r\n?|\x85|\u2028|\u2029")
_UNWANTED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff\ud800-\udfff]")
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Cleaned:
    """A cleaned text, and how many characters had to be removed from it."""

    text: str
    removed: int


def clean_text(text: str) -> Cleaned:
    """Return `text` in NFC with plain line ends and without control characters, and count those removed."""
    cleaned = clean_exact(text)
    return Cleaned(cleaned.text.strip(), cleaned.removed)


def clean_exact(text: str) -> Cleaned:
    """Return `text` cleaned, white space as it stands at both ends: the first line of code may be indented."""
    if text.isascii() and text.isprintable():
        return Cleaned(text, 0)
    plain, removed = _UNWANTED.subn("", _LINE_END.sub("\n", text))
    return Cleaned(unicodedata.normalize("NFC", plain), removed)


def clean_name(name: str) -> str:
    """Return a label or a column name on one line, every run of white space (non-breaking too) as one space."""
    return _SPACE.sub(" ", clean_text(name).text)
