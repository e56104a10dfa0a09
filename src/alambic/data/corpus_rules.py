"""Which documents are worth learning: rules on words, lines and characters, each with its source.

- Gopher: Rae et al. 2021 (https://arxiv.org/abs/2112.11446), appendix A1: number and mean length of words, symbols,
  bullets, ellipses, words with a letter, stop words; repeated lines and n-grams.
- C4: Raffel et al. 2020 (https://arxiv.org/abs/1910.10683): "lorem ipsum" and notices of missing scripts.
- FineWeb: Penedo et al. 2024 (https://arxiv.org/abs/2406.17557): characters in duplicate lines.

The defaults are looser than for web pages, because curated text (documentation with tables and code, plays) looks odd
to rules made for articles; measure what each drops (the report gives examples) before tightening one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from alambic.data.corpus_words import DIGIT, SYMBOL, Hashes, Words, word_hash
from alambic.data.personal import find_personal

if TYPE_CHECKING:
    from alambic.pretrain_config import CleanSpec

STOP_WORDS = {
    "en": "the of and to in is that it was for with as his on be at by he this had not are but from or have an they "
    "which one you were all her she there would their we him been has when who will no more if out so what up",
    "fr": "de la le et les des en un une du que qui est dans il à pas pour sur par au ce plus ne se avec sont son elle "
    "nous vous ou mais cette aux ces leur été fait comme tout ont être lui même sans sa ses je était peut si",
}
_BULLETS = ("-", "*", "•", "‣", "–", "·", "o ")
_ELLIPSES = ("...", "…")
_MOJIBAKE = re.compile("[ÃÂ][\x80-\xbf\u0152-\u2122]|â€.|\ufffd")
_FILLER = ("lorem ipsum", "enable javascript", "activer javascript", "javascript is disabled")
_LINES = 6  # fewer lines say nothing of a layout
_FOREIGN_SHARE = 0.08  # of the words that are function words of the other language


def fault_of(text: str, words: Words, language: str, clean: CleanSpec) -> str | None:
    """Return the name of the first rule that a document breaks, None when it is kept.

    Args:
        text: of the document.
        words: the same, cut.
        language: that its source states; a language without stop words here is not checked.
        clean: thresholds.
    """
    if not len(words):
        return "empty"
    if clean.personal_data == "drop" and find_personal(text):
        return "personal_data"
    if not clean.filters:
        return None
    for rule in _RULES:
        fault = rule(text, words, clean)
        if fault is not None:
            return fault
    return _language_fault(words, language, clean)


def _length(text: str, words: Words, clean: CleanSpec) -> str | None:
    if len(words) < clean.min_words:
        return "min_words"
    mean = float(words.lengths.mean())
    return None if clean.mean_word_min <= mean <= clean.mean_word_max else "mean_word"


def _characters(text: str, words: Words, clean: CleanSpec) -> str | None:
    shares = words.kinds / words.characters
    if shares[SYMBOL] > clean.symbols:
        return "symbols"
    if shares[DIGIT] > clean.digits:
        return "digits"
    return "alphabetic_words" if float(words.has_letter.mean()) < clean.alphabetic_words else None


def _lines(text: str, words: Words, clean: CleanSpec) -> str | None:
    lines = [line.strip() for line in text.split("\n")]
    lines = [line for line in lines if line]
    if len(lines) < _LINES:
        return None
    if sum(line.startswith(_BULLETS) for line in lines) > clean.bullet_lines * len(lines):
        return "bullet_lines"
    if sum(line.endswith(_ELLIPSES) for line in lines) > clean.ellipsis_lines * len(lines):
        return "ellipsis_lines"
    seen: set[str] = set()
    repeated = 0
    for line in lines:
        repeated += len(line) if line in seen else 0
        seen.add(line)
    return "duplicate_lines" if repeated > clean.duplicate_lines * sum(map(len, lines)) else None


def _encoding(text: str, words: Words, clean: CleanSpec) -> str | None:
    if not any(sign in text for sign in ("Ã", "Â", "â€", "\ufffd")):
        return None
    return "mojibake" if len(_MOJIBAKE.findall(text)) > clean.mojibake * len(text) else None


def _filler(text: str, words: Words, clean: CleanSpec) -> str | None:
    if not clean.filler:
        return None
    head = text[:2000].lower()
    return "filler" if any(phrase in head for phrase in _FILLER) and len(words) < 400 else None


def _repeated(text: str, words: Words, clean: CleanSpec) -> str | None:
    for n, most in zip((2, 3, 4), clean.top_ngrams, strict=True):
        grams = words.ngrams(n)
        if len(grams) < 2:
            continue
        top = int(_counts(grams).max())
        if top > 3 and top * n > most * len(words):
            return "top_ngrams"
    for n, most in zip((5, 10), clean.duplicate_ngrams, strict=True):
        if _repeated_share(words, n) > most:
            return "duplicate_ngrams"
    return None


def _counts(grams: Hashes) -> NDArray[np.int64]:
    ordered = np.sort(grams)
    edges = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1], [True])))
    return np.diff(edges)


def _repeated_share(words: Words, n: int) -> float:
    """Return the share of words in n-grams that came before in the document."""
    grams = words.ngrams(n)
    if len(grams) < 2:
        return 0.0
    order = np.argsort(grams, kind="stable")
    ordered = grams[order]
    again = order[1:][ordered[1:] == ordered[:-1]]
    if not len(again):
        return 0.0
    steps = np.zeros(len(words) + 1, np.int64)
    np.add.at(steps, again, 1)
    np.add.at(steps, again + n, -1)
    return float((np.cumsum(steps[:-1]) > 0).mean())


def _language_fault(words: Words, language: str, clean: CleanSpec) -> str | None:
    shares = language_shares(words)
    if language not in shares:
        return None
    own, different = shares[language]
    others = max((share for name, (share, _) in shares.items() if name != language), default=0.0)
    if clean.language_check and others > _FOREIGN_SHARE and others > own:
        return "language"
    return "stop_words" if different < clean.stop_words else None


def language_shares(words: Words) -> dict[str, tuple[float, int]]:
    """Return by language the share of words that are its function words, and how many different ones there are."""
    known, masks = _stop_words()
    if not len(words):
        return {name: (0.0, 0) for name in masks}
    at = np.minimum(np.searchsorted(known, words.hashes), len(known) - 1)
    counts = np.bincount(at[known[at] == words.hashes], minlength=len(known))
    return {
        name: (float(counts[mask].sum()) / len(words), int(np.count_nonzero(counts[mask])))
        for name, mask in masks.items()
    }


@lru_cache(maxsize=1)
def _stop_words() -> tuple[Hashes, dict[str, NDArray[np.bool_]]]:
    by_language = {name: {word_hash(word) for word in text.split()} for name, text in STOP_WORDS.items()}
    known = np.array(sorted(set.union(*by_language.values())), dtype=np.uint64)
    masks = {name: np.array([int(h) in own for h in known]) for name, own in by_language.items()}
    return known, masks


_RULES: tuple[Callable[[str, Words, CleanSpec], str | None], ...] = (
    _length, _characters, _encoding, _filler, _lines, _repeated,
)  # fmt: skip
