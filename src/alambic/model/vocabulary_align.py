"""Which words translate which, counted in parallel text.

IBM Model 1 (Brown et al. 1993, https://aclanthology.org/J93-2003) in both directions; a link counts as much as the
geometric mean of the two, which leaves little to the rare words that each direction alone fills with leftovers
(agreement: Liang et al. 2006, https://aclanthology.org/N06-1014).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

_LONGEST = 40  # words a side; longer pairs say little on which word goes with which
_ROUNDS = 5
_KEPT = 6  # translations of a word
_LEAST = 0.05  # share of a word's links below which a translation is dropped

Lexicon = dict[str, list[tuple[str, float]]]


def align_words(known: Sequence[Sequence[str]], new: Sequence[Sequence[str]]) -> Lexicon:
    """Return, for each word of `new`, the words of `known` that translate it and their shares, best first.

    Args:
        known: words of each sentence in the one language.
        new: words of the same sentences in the other.
    """
    k_ids, k_words = _number(known)
    n_ids, n_words = _number(new)
    usable = [i for i in range(len(known)) if 0 < len(k_ids[i]) <= _LONGEST and 0 < len(n_ids[i]) <= _LONGEST]
    if not usable:
        return {}
    ks, ns, k_slots, n_slots = _links([k_ids[i] for i in usable], [n_ids[i] for i in usable])
    joint = ks.astype(np.int64) * len(n_words) + ns
    unique, link = np.unique(joint, return_inverse=True)
    of_known, of_new = unique // len(n_words), unique % len(n_words)
    towards_new = _expected(link, n_slots, of_known, len(unique))
    towards_known = _expected(link, k_slots, of_new, len(unique))
    weight = np.sqrt(towards_new * towards_known)
    return _best(weight, of_known, of_new, k_words, n_words)


def _number(sentences: Sequence[Sequence[str]]) -> tuple[list[NDArray[np.int32]], list[str]]:
    table: dict[str, int] = {}
    ids = [np.array([table.setdefault(w, len(table)) for w in dict.fromkeys(s)], dtype=np.int32) for s in sentences]
    return ids, list(table)


def _links(known: list[NDArray[np.int32]], new: list[NDArray[np.int32]]) -> tuple[NDArray[np.int32], ...]:
    """Return every possible link: its two words, and the numbers of the two places in the text that it joins."""
    ks, ns, k_slots, n_slots = [], [], [], []
    k_at = n_at = 0
    for k, n in zip(known, new, strict=True):
        ks.append(np.repeat(k, len(n)))
        ns.append(np.tile(n, len(k)))
        k_slots.append(np.repeat(np.arange(k_at, k_at + len(k), dtype=np.int32), len(n)))
        n_slots.append(np.tile(np.arange(n_at, n_at + len(n), dtype=np.int32), len(k)))
        k_at, n_at = k_at + len(k), n_at + len(n)
    return np.concatenate(ks), np.concatenate(ns), np.concatenate(k_slots), np.concatenate(n_slots)


def _expected(
    link: NDArray[np.int64], slots: NDArray[np.int32], given: NDArray[np.int64], unique: int
) -> NDArray[np.float64]:
    """Return the expected count of each link after the rounds of EM, each place explained by one word of the other."""
    share = counts = np.ones(unique)
    for _ in range(_ROUNDS):
        held = share[link]
        held /= np.bincount(slots, held)[slots]
        counts = np.bincount(link, held, minlength=unique).astype(np.float64)
        share = counts / np.bincount(given, counts)[given]
    return counts


def _best(
    weight: NDArray[np.float64], of_known: NDArray[np.int64], of_new: NDArray[np.int64], k_words: list[str],
    n_words: list[str],
) -> Lexicon:  # fmt: skip
    share = weight / np.bincount(of_new, weight)[of_new]
    order = np.lexsort((-share, of_new))
    lexicon: Lexicon = {}
    for i in order[share[order] >= _LEAST]:
        found = lexicon.setdefault(n_words[of_new[i]], [])
        if len(found) < _KEPT:
            found.append((k_words[of_known[i]], float(share[i])))
    return lexicon


def coverage(lexicon: Lexicon, counts: Mapping[str, int]) -> float:
    """Return the share of the running words of `counts` that have a translation."""
    total = sum(counts.values())
    return sum(n for word, n in counts.items() if word.lower() in lexicon) / max(1, total)
