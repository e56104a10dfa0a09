"""The Kneser-Ney reference against numbers worked out by hand, against a slow one, and against one."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import kneser_ney
from alambic.data.shards import PartCounts, Shards, ShardSource, write_index, write_part

END, A, B, C = 0, 1, 2, 3


def test_probabilities_are_those_worked_out_by_hand():
    # Documents "a b" and "a c". Counts of counts hold no 3 and 4, so discounts are 0.5, 1 and 1.5.
    model = kneser_ney.fit([_ids(A, B, END, A, C, END)], end_id=END, vocabulary=4, order=2)
    # Left extensions: a 1 (the end), b 1, c 1, end 2; 5 in all. 2.5 is given up, a quarter of it to each id.
    np.testing.assert_allclose(model.unigram, [1 / 5 + 0.125, 0.1 + 0.125, 0.1 + 0.125, 0.1 + 0.125])
    # (end, a) was seen twice, (a, b) once of two, (b, end) once of one.
    wanted = [1 / 2 + 1 / 2 * 0.225, 0.5 / 2 + 1 / 2 * 0.225, 0.5 + 0.5 * 0.325]
    np.testing.assert_allclose(model.probabilities(_ids(A, B, END)), wanted, rtol=1e-6)
    # c never follows b: what b leaves, times the unigram.
    np.testing.assert_allclose(model.probabilities(_ids(A, B, C, END))[2], 0.5 * 0.225, rtol=1e-6)


@pytest.mark.parametrize("order", [2, 3, 5])
def test_probabilities_equal_those_of_a_slow_program_and_add_up_to_one(order):
    rng = np.random.default_rng(order)
    texts = [rng.zipf(1.4, size=rng.integers(1, 40)).clip(1, 11).tolist() for _ in range(60)]
    train = _ids(*(i for text in texts for i in [*text, END]))
    # Two parts count as one: no n-gram crosses documents.
    cut = int(np.flatnonzero(train == END)[20]) + 1
    model = kneser_ney.fit([train[:cut], train[cut:]], end_id=END, vocabulary=12, order=order)
    slow = Slow([[*text, END] for text in texts], vocabulary=12, order=order)
    assert order == 2 or any(own != (0.5, 1.0, 1.5) for own in slow.discounts[1:])  # not the fallback alone
    for text in ([1, 2, 3, 1, 1, 4], [11, 10, 9, 8, 7, 11, 11, 2], texts[3], []):
        held = [*text, END]
        fast = model.probabilities(_ids(*held))
        np.testing.assert_allclose(fast, slow.probabilities(held), rtol=1e-5)
        for t in range(len(held)):
            whole = [model.probabilities(_ids(*held[:t], word, END))[t] for word in range(1, 12)]
            whole.append(model.probabilities(_ids(*held[:t], END))[t])
            assert sum(whole) == pytest.approx(1.0, abs=1e-5)


def test_bits_per_byte_are_those_of_each_source(tmp_path):
    parts = {}
    texts = {"fr": [[1, 2, 3], [1, 2, 4]], "en": [[5, 6, 7, 5, 6]]}
    for name, documents in texts.items():
        for part in ("train", "valid"):
            rows = [(ids, 4 * len(ids)) for ids in documents]
            parts[name, part] = write_part(tmp_path, part, name, rows, dtype="uint16", end_id=0)
    empty = {p: write_part(tmp_path, p, "bare", [([1, 2], 8)][: p == "train"], dtype="uint16", end_id=0)
             for p in ("train", "valid")}  # fmt: skip
    sources = [ShardSource(name, name, "CC0-1.0", 0.5, parts[name, "train"], parts[name, "valid"]) for name in texts]
    sources.append(ShardSource("bare", "en", "CC0-1.0", 0.0, empty["train"], PartCounts(0, 0, 0)))
    write_index(Shards(tmp_path, 8, "uint16", "none", 0, tuple(sources)))

    found = kneser_ney.bits_per_byte(tmp_path, order=3)

    assert set(found) == {"fr", "en", "all"}
    train = [_ids(*(i for text in documents for i in [*text, 0])) for documents in (*texts.values(), [[1, 2]])]
    model = kneser_ney.fit(train, end_id=0, vocabulary=8, order=3)
    french = -np.log2(model.probabilities(train[0])).sum()
    english = -np.log2(model.probabilities(train[1])).sum()
    assert found["fr"] == pytest.approx(french / 24) and found["en"] == pytest.approx(english / 20)
    assert found["all"] == pytest.approx((french + english) / 44)


def test_fit_refuses_what_it_cannot_count():
    with pytest.raises(ValueError, match="not closed"):
        kneser_ney.fit([_ids(A, B)], end_id=END, vocabulary=4)
    with pytest.raises(ValueError, match="65,536"):
        kneser_ney.fit([_ids(A, END)], end_id=END, vocabulary=100_000)
    with pytest.raises(ValueError, match="no text"):
        kneser_ney.fit([], end_id=END, vocabulary=4)


class Slow:
    """The same model by dictionaries, straight from the formulas."""

    def __init__(self, documents, *, vocabulary, order):
        self.order, self.vocabulary = order, vocabulary
        raw = [Counter() for _ in range(order + 1)]
        before = [defaultdict(set) for _ in range(order + 1)]
        for document in documents:
            words = [END, *document]
            for stop in range(1, len(words)):
                for n in range(1, min(order, stop + 1) + 1):
                    gram = tuple(words[stop - n + 1 : stop + 1])
                    raw[n][gram] += 1
                    if stop - n >= 0:
                        before[n][gram].add(words[stop - n])
        self.adjusted = [{}, *(
            {g: raw[n][g] if n == order or (n > 1 and g[0] == END) else len(before[n][g]) for g in raw[n]}
            for n in range(1, order + 1)
        )]  # fmt: skip
        self.discounts = [None, *(self._discounts(list(a.values())) for a in self.adjusted[1:])]

    @staticmethod
    def _discounts(counts):
        n = [None, *(counts.count(k) for k in (1, 2, 3, 4))]
        if not all(n[1:]):
            return (0.5, 1.0, 1.5)
        y = n[1] / (n[1] + 2 * n[2])
        found = tuple(k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3))
        return found if all(0 < d < k for k, d in enumerate(found, 1)) else (0.5, 1.0, 1.5)

    def probability(self, context, word, n):
        if n == 0:
            return 1 / self.vocabulary
        context = tuple(context[len(context) - n + 1 :]) if n > 1 else ()
        following = {g: c for g, c in self.adjusted[n].items() if g[:-1] == context}
        lower = self.probability(context, word, n - 1)
        if not following:
            return lower
        discounts = self.discounts[n]
        total = sum(following.values())
        own = following.get((*context, word), 0)
        given = sum(discounts[min(c, 3) - 1] for c in following.values())
        return max(own - (discounts[min(own, 3) - 1] if own else 0), 0) / total + given / total * lower

    def probabilities(self, held):
        words = [END, *held]
        return [self.probability(words[:t], words[t], min(self.order, t + 1)) for t in range(1, len(words))]


def _ids(*values):
    return np.array(values, dtype=np.uint16)
