"""Sentences: where they end, how a passage is cut at one, and French typography."""

from __future__ import annotations

import re
import unicodedata

from instructions.row import tokens_about

_END = re.compile(r"""([.!?…][»"”')\]]*)\s+(?=["«“(\[—–-]?\s?[A-ZÀ-ÖØ-ÞŒ0-9])""")
# After these a full stop ends no sentence.
_SHORT = re.compile(
    r"(?:\b(?:M|Mme|MM|Mlle|Dr|Pr|St|Ste|av|apr|J|env|etc|cf|ex|vol|chap|art|no|n°|p|pp|Mr|Mrs|Ms|Prof|vs|Inc|Jr|Sr|No|"
    r"e\.g|i\.e|approx|c|ca|ch|éd|fig|op|trad)|\b[A-ZÀ-Þ])\.$"
)
_GLUED = re.compile(r"([a-zà-ÿ0-9»\"”][.!?…][»\"”]?)(?=[\"«]?\s?[A-ZÀ-ÖØ-ÞŒ][a-zà-ÿ'’ ])")
_OTHER = re.compile(r"[\W_]+")
NARROW, WIDE = "\u202f", "\u00a0"


def split(text: str) -> list[str]:
    """Return the sentences of `text`, each as it stands there; a line is never a part of one."""
    return [sentence for line in text.split("\n") for sentence in _of_line(line)]


def _of_line(text: str) -> list[str]:
    found, start = [], 0
    for match in _END.finditer(text):
        sentence = text[start : match.end(1)]
        if _SHORT.search(sentence) or sentence.count("«") > sentence.count("»"):
            continue
        found.append(sentence.strip())
        start = match.end()
    rest = text[start:].strip()
    return [s for s in (*found, rest) if s]


def unglue(text: str) -> str:
    """Put a space between sentences that lost theirs, and make every run of white space one space."""
    return re.sub(r"\s+", " ", _GLUED.sub(r"\1 ", text)).strip()


def shorten(text: str, most_tokens: int, *, keep: str = "") -> tuple[str, bool]:
    """Cut `text` at the end of a sentence so that it fits; sentences around `keep` stay, those far from it go.

    Returns:
        The text, and whether it was cut; empty when not even one sentence fits or `keep` is not inside.
    """
    sentences = split(text)
    # Where `keep` runs over what looks like two sentences, they stay together.
    first = last = 0
    if keep:
        at = [i for i, s in enumerate(sentences) if keep in s]
        if not at:
            return (text, False) if tokens_about([text]) <= most_tokens else ("", True)
        first = last = at[0]
    costs = [tokens_about([sentence]) for sentence in sentences]
    if not sentences or sum(costs[first : last + 1]) > most_tokens:
        return "", True
    grown = True
    while grown:
        grown = False
        for low, high in ((first, last + 1), (first - 1, last)):
            if low >= 0 and high < len(sentences) and sum(costs[low : high + 1]) <= most_tokens:
                first, last, grown = low, high, True
    return " ".join(sentences[first : last + 1]), last - first + 1 < len(sentences)


def sentence_of(sentences: list[str], part: str) -> int | None:
    """Return the number (from 0) of the first sentence that holds `part`."""
    return next((i for i, sentence in enumerate(sentences) if part in sentence), None)


def plain(text: str) -> str:
    """Return lower-case letters and digits only: what two texts are compared by."""
    return _OTHER.sub("", text.casefold())


def without_accents(text: str) -> str:
    """Return `text` without accents, cedillas and ligatures."""
    text = text.replace("œ", "oe").replace("Œ", "Oe").replace("æ", "ae").replace("Æ", "Ae")
    return "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))


def typeset(text: str) -> str:
    """Set French punctuation: apostrophes, quotes, no-break spaces before : ; ! ? and inside quotes, three points."""
    text = text.replace("'", "’").replace("...", "…")
    text = re.sub(r'"([^"]*)"', r"« \1 »", text)
    text = re.sub(r"«\s*", "«" + WIDE, text)
    text = re.sub(r"\s*»", WIDE + "»", text)
    text = re.sub(r"(?<=[\wÀ-ÿ)»%€…])\s*([;!?]+)", NARROW + r"\1", text)
    return re.sub(r"(?<=[\wÀ-ÿ)»%€])\s*:(?=\s|$)", WIDE + ":", text)
