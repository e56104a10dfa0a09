"""Bits per byte of a Kneser-Ney 5-gram on the shards of a corpus: the reference that a small language model must beat.

    python benchmarks/kneser_ney.py SHARDS        prints bits per byte by source, as JSON

Modified interpolated Kneser-Ney (Chen and Goodman 1999, https://doi.org/10.1006/csla.1999.0128) as Heafield et al. 2013
(https://aclanthology.org/P13-2121) estimate it: nothing is pruned, unigrams are interpolated with the uniform
distribution over the vocabulary, three discounts for each order from the counts of counts, counts of left extensions
below the highest order except for n-grams that begin a document, which keep their own.

It reads the same ids as the model: the end token that closes a document is predicted like any other, and the one
before a document is the only context that a document begins with. An n-gram is a uint64: the rank of its first n - 1
tokens among the n-grams of that order, and its last token. Fitting takes at most about 150 bytes a token: 6 GB and two
minutes of one core for 40 million.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ORDER = 5
_FALLBACK = (0.5, 1.0, 1.5)  # discounts where the counts of counts give none, as KenLM's --discount_fallback
_TOKEN_BITS = np.uint64(16)
_AT_ONCE = 1_000_000  # tokens scored at once

Ids = NDArray[np.uint16]
Ranks = NDArray[np.int64]
Keys = NDArray[np.uint64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Level:
    """The n-grams of one order.

    Attributes:
        keys: rank of the first n - 1 tokens and last token of each n-gram, sorted; its place is its rank.
        share: what the n-gram's own discounted count gives to its last token's probability.
        left: by rank of the context: what is left for the order below.
    """

    keys: Keys
    share: Floats
    left: Floats


@dataclass(frozen=True)
class KneserNey:
    """A fitted model.

    Attributes:
        levels: orders 2 and up.
        unigram: probability of each token [V].
        end_id: closes a document, and stands before one.
    """

    levels: tuple[Level, ...]
    unigram: NDArray[np.float64]
    end_id: int

    def probabilities(self, ids: Ids) -> NDArray[np.float64]:
        """Return the probability of each token of `ids` [T], documents one after the other, each closed by its end."""
        stream, reach = _stream(ids, self.end_id, order=len(self.levels) + 1)
        words = stream[1:].astype(np.uint64)
        found = self.unigram[stream[1:]]
        ranks = stream[:-1].astype(np.int64)  # of the context: the token before, by its id
        for n, level in enumerate(self.levels, start=2):
            usable = (reach[1:] >= n) & (ranks >= 0)
            at = np.flatnonzero(usable)
            context = ranks[at]
            place = _lookup(level.keys, _keys(context, words[at]))
            share = np.where(place >= 0, level.share[np.maximum(place, 0)], 0.0)
            found[at] = share + level.left[context].astype(np.float64) * found[at]
            own = np.full(len(words), -1, dtype=np.int64)
            own[at] = place
            ranks = np.concatenate([[-1], own[:-1]])  # the context of the next token, one token longer
        return found


def fit(parts: Iterable[Ids], *, end_id: int, vocabulary: int, order: int = ORDER) -> KneserNey:
    """Fit on documents.

    Args:
        parts: ids [T] of documents one after the other, each closed by `end_id`.
        end_id: see above.
        vocabulary: ids are below it, and at most 65,536.
        order: longest n-gram, 2 or more.
    """
    if order < 2:
        raise ValueError("order: 2 or more")
    if not 0 < vocabulary <= 1 << 16:
        raise ValueError(f"a vocabulary of {vocabulary:,}: n-grams are kept for at most 65,536 ids")
    streams = [_stream(part, end_id, order=order) for part in parts if len(part)]
    if not streams:
        raise ValueError("there is no text to count")
    stream = np.concatenate([ids for ids, _ in streams])
    reach = np.concatenate([own for _, own in streams])
    ranks = stream.astype(np.int32)  # of the n-gram that ends here, n tokens long; -1: none
    sizes = vocabulary
    tops: list[tuple[Keys, NDArray[np.int64]]] = []
    counts: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
    unigram: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
    for n in range(2, order + 1):
        at = np.flatnonzero((reach >= n)[1:]) + 1
        keys, first, inverse, raw = _unique(_keys(ranks[at - 1], stream[at].astype(np.uint64)))
        # Adjusted counts of the order below: how many tokens were seen before it, or its own count where none can be.
        left = np.bincount(ranks[at[first]], minlength=sizes)
        if n == 2:
            unigram = left
        else:
            begins = left == 0
            tops[-1] = (tops[-1][0], np.where(begins, counts, left))
        tops.append((keys, raw))
        counts, sizes = raw, len(keys)
        ranks = np.full(len(stream), -1, dtype=np.int32)
        ranks[at] = inverse
    levels = []
    contexts = vocabulary
    for keys, adjusted in tops:
        levels.append(_level(keys, adjusted, contexts=contexts))
        contexts = len(keys)
    return KneserNey(tuple(levels), _unigram(unigram), end_id)


def bits_per_byte(shards_folder: Path, *, order: int = ORDER) -> dict[str, float]:
    """Fit on the training part of a folder of shards and return bits per byte of the held-out documents by source.

    The end of each document is predicted too, and counts for no byte. Sources without held-out text are left out;
    `all` stands for the sources together.
    """
    from alambic.data.shards import open_shards

    shards = open_shards(shards_folder)
    names = [source.name for source in shards.sources]
    vocabulary = shards.vocabulary
    model = fit((np.asarray(shards.tokens("train", name)) for name in names), end_id=shards.end_id,
                vocabulary=vocabulary, order=order)  # fmt: skip
    found: dict[str, float] = {}
    bits_of_all, bytes_of_all = 0.0, 0
    for source in shards.sources:
        if not source.valid.utf8_bytes:
            continue
        bits = _bits(model, shards.tokens("valid", source.name), shards.offsets("valid", source.name))
        found[source.name] = bits / source.valid.utf8_bytes
        bits_of_all, bytes_of_all = bits_of_all + bits, bytes_of_all + source.valid.utf8_bytes
    return {**found, "all": bits_of_all / bytes_of_all} if bytes_of_all else found


def _bits(model: KneserNey, ids: Ids, offsets: NDArray[np.int64]) -> float:
    """Return the bits of whole documents, about a million tokens at once."""
    total, start = 0.0, 0
    while start < len(offsets) - 1:
        stop = max(start + 1, int(np.searchsorted(offsets, offsets[start] + _AT_ONCE, side="right")) - 1)
        part = np.asarray(ids[offsets[start] : offsets[stop]])
        total -= float(np.log2(model.probabilities(part)).sum()) if len(part) else 0.0
        start = stop
    return total


def _stream(ids: Ids, end_id: int, *, order: int) -> tuple[Ids, NDArray[np.int8]]:
    """Put the end token before documents; return ids and the longest n-gram, up to `order`, that ends at each place.

    An n-gram begins with the end token before its document at the earliest. The token put in front ends none.
    """
    if len(ids) and ids[-1] != end_id:
        raise ValueError("the last document is not closed by the end token")
    stream = np.concatenate([np.array([end_id], dtype=np.uint16), ids.astype(np.uint16)])
    ends = stream == end_id
    places = np.arange(len(stream))
    begins = np.maximum.accumulate(np.where(ends, places, 0))
    before = np.concatenate([[0], begins[:-1]])  # the document's own beginning, also at its end token
    reach = np.minimum(places - before + 1, order)
    reach[0] = 0
    return stream, reach.astype(np.int8)


def _keys(context: NDArray[np.integer], words: Keys) -> Keys:
    return (context.astype(np.uint64) << _TOKEN_BITS) | words


def _unique(keys: Keys) -> tuple[Keys, Ranks, NDArray[np.int32], NDArray[np.int64]]:
    """Return the distinct keys sorted, where each is first found, the rank of every key, and the counts."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    new = np.concatenate([[True], keys[1:] != keys[:-1]])
    inverse = np.empty(len(keys), dtype=np.int32)
    inverse[order] = np.cumsum(new, dtype=np.int32) - 1
    places = np.flatnonzero(new)
    return keys[places], order[places], inverse, np.diff(np.append(places, len(keys)))


def _lookup(table: Keys, keys: Keys) -> Ranks:
    """Return the place of each key in the sorted `table`, -1 where it is not there."""
    if not len(table):
        return np.full(len(keys), -1, dtype=np.int64)
    place = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return np.where(table[place] == keys, place, -1)


def _discounts(adjusted: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return what n-grams with a count of 0, 1, 2, and 3 or more give up (Chen and Goodman 1999, equation 26)."""
    n1, n2, n3, n4 = (int((adjusted == k).sum()) for k in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):
        return np.array([0.0, *_FALLBACK])
    y = n1 / (n1 + 2 * n2)
    wanted = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    if not all(0 < d < k for k, d in enumerate(wanted, start=1)):
        return np.array([0.0, *_FALLBACK])
    return np.array([0.0, *wanted])


def _level(keys: Keys, adjusted: NDArray[np.int64], *, contexts: int) -> Level:
    """Return the shares of the n-grams of one order, and what each context leaves to the order below."""
    discount = _discounts(adjusted)[np.minimum(adjusted, 3)]
    context = (keys >> _TOKEN_BITS).astype(np.int64)
    sums = np.bincount(context, weights=adjusted, minlength=contexts)
    held = np.bincount(context, weights=discount, minlength=contexts)
    # A context that nothing follows leaves everything to the order below.
    left = np.divide(held, sums, out=np.ones(contexts), where=sums > 0)
    share = (adjusted - discount) / sums[context]
    return Level(keys, share.astype(np.float32), left.astype(np.float32))


def _unigram(adjusted: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the probability of each token: every id of the vocabulary may come."""
    discount = _discounts(adjusted[adjusted > 0])[np.minimum(adjusted, 3)]
    total = adjusted.sum()
    return (adjusted - discount) / total + discount.sum() / total / len(adjusted)


def main(arguments: Sequence[str]) -> None:
    """Print bits per byte by source."""
    if len(arguments) != 1:
        sys.exit("usage: python benchmarks/kneser_ney.py SHARDS")
    print(json.dumps(bits_per_byte(Path(arguments[0])), indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
