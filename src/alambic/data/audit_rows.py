"""The rows to review, first those whose reading is expected to bring most, with a suggested label and the reasons."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic.data.audit import Floats, doubt, doubt_each
from alambic.data.dataset import Dataset, Example
from alambic.data.duplicates import Duplicates, exact_key, find_duplicates

LEAST = 0.1  # a row is listed from this probability of a wrong label
_NEAREST = 10
_SHOWN = 60


@dataclass(frozen=True)
class Suspect:
    """One text with one label that may be wrong; equal rows are one suspect.

    Attributes:
        row: identity, from the text alone, so that it survives a change of order and of labels.
        labels: what it is labelled.
        suggested: what it is likelier to be.
        wrong: probability that the label is wrong.
        gain: wrong labels that reading it is expected to put right, weighted by what the task is judged by.
        rows: how many rows of the data it stands for.
        where: the first of them.
        text: the text.
        why: reasons, in words.
    """

    row: str
    labels: tuple[str, ...]
    suggested: tuple[str, ...]
    wrong: float
    gain: float
    rows: int
    where: str
    text: str
    why: tuple[str, ...]


@dataclass(frozen=True)
class Ranking:
    """All rows of the audit by expected gain.

    Attributes:
        suspects: first the one to review first; every distinct row, however little doubted.
        share: of all labels, how many look wrong.
        counted: the same by confident learning's count alone.
        rows: rows audited.
        contradictions: texts that stand under several labels, exactly (`exact`) or nearly (`near` pairs).
    """

    suspects: tuple[Suspect, ...]
    share: float
    counted: float
    rows: int
    contradictions: dict[str, int]

    @property
    def listed(self) -> tuple[Suspect, ...]:
        """Those that are doubted enough to be shown."""
        return tuple(s for s in self.suspects if s.wrong >= LEAST)

    def price(self) -> list[dict[str, float]]:
        """Return what reading the first 10, 20, 50 ... listed rows should bring: `read`, `found`, and `last` a row."""
        return price([s.wrong * s.rows for s in self.listed])

    def to_dict(self, *, most: int | None = None) -> dict[str, Any]:
        """Return plain values, with the first `most` listed rows."""
        suspects = [{**asdict(s), "why": list(s.why)} for s in self.listed[:most]]
        return {
            "rows": self.rows, "share": round(self.share, 4), "counted": round(self.counted, 4),
            "listed": len(self.listed), "contradictions": self.contradictions, "price": self.price(),
            "suspects": suspects,
        }  # fmt: skip


def price(expected: Sequence[float]) -> list[dict[str, float]]:
    """Return the expected finds after reading so many rows of a list, and of the last row read."""
    steps = [10, 20, 50, 100, 200, 500, 1000, 2000, 5000]
    total = np.cumsum(expected) if len(expected) else np.zeros(0)
    reads = [step for step in steps if step < len(expected)] + ([len(expected)] if len(expected) else [])
    return [
        {"read": r, "found": round(float(total[r - 1]), 1), "last": round(float(expected[r - 1]), 3)} for r in reads
    ]


def row_id(text: str) -> str:
    """Return the identity of a text in an audit file: a letter first, so that no spreadsheet takes it for a number."""
    return "r" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def rank(
    rows: Dataset,
    probabilities: Floats,
    *,
    said_by: Sequence[str],
    macro: bool = False,
    vectors: NDArray[np.float32] | None = None,
    seed: int = 0,
) -> Ranking:
    """Rank the rows by what reading them is expected to bring.

    Args:
        rows: what to audit.
        probabilities: of each label [N, L], out of fold.
        said_by: names of the candidates that gave them, for the reasons.
        macro: the task is judged by a mean over labels, so that a row of a rare label weighs more.
        vectors: [N, H], to name the nearest texts; None does without.
        seed: of the imagined wrong labels.

    Raises:
        MissingExtra: rensa or scipy is not installed.
    """
    judged = _judge(rows, probabilities, seed)
    alike = find_duplicates(rows.texts)
    twins = _twins(rows, alike)
    wrong = _contradicted(rows, probabilities, judged, twins)
    reasons = _Reasons(rows, probabilities, said_by, twins, vectors)
    members: dict[tuple[str, tuple[str, ...]], list[int]] = defaultdict(list)
    for i, example in enumerate(rows):
        members[row_id(example.text), example.labels].append(i)
    weights = _weights(rows, judged.suggested) if macro else np.ones(len(rows))
    found: list[tuple[Suspect, float]] = []
    for (row, labels), places in members.items():
        # Copies of a text may be in one fold only when they are equal: their doubts are, but for rounding, the same.
        i = max(places, key=lambda place: wrong[place])
        gain = float(wrong[i] * weights[i] * len(places))
        why = reasons.of(i, judged.suggested[i]) if wrong[i] >= LEAST else ()
        first = rows.examples[places[0]]
        p = round(float(wrong[i]), 4)
        suspect = Suspect(
            row, labels, judged.suggested[i], p, round(gain, 4), len(places), first.where, first.text, why
        )
        found.append((suspect, float(judged.score[i])))
    found.sort(key=lambda pair: (-pair[0].gain, -pair[1], pair[0].row))
    same = {exact_key(rows.examples[i].text) for i in twins if any(likeness == 1.0 for _, likeness in twins[i])}
    near = sum(likeness < 1.0 for i in twins for j, likeness in twins[i] if i < j)
    contradictions = {"exact": len(same), "near": near}
    return Ranking(tuple(s for s, _ in found), judged.share, judged.counted, len(rows), contradictions)


@dataclass(frozen=True)
class _Judged:
    """Of each row: probability of a wrong label, log-odds against it, suggested labels; of all, the shares."""

    wrong: Floats
    score: Floats
    suggested: list[tuple[str, ...]]
    share: float
    counted: float


def _judge(rows: Dataset, probabilities: Floats, seed: int) -> _Judged:
    rng = np.random.default_rng(seed)
    if not rows.multi_label:
        given = np.array([target[0] for target in rows.targets()], dtype=np.intp)
        d = doubt(probabilities, given, rng=rng)
        return _Judged(d.wrong, d.score, [(rows.labels[i],) for i in d.suggested], d.share, d.counted)
    matrix = np.zeros((len(rows), len(rows.labels)), dtype=bool)
    for i, target in enumerate(rows.targets()):
        matrix[i, target] = True
    doubts = doubt_each(probabilities, matrix, rng=rng)
    wrong = np.stack([d.wrong for d in doubts], axis=1)  # N, L
    score = np.stack([d.score for d in doubts], axis=1)
    worst = (wrong + 1e-9 * score).argmax(axis=1)
    suggested = []
    for example, label in zip(rows, worst, strict=True):
        suggested.append(tuple(sorted({*example.labels} ^ {rows.labels[label]})))
    at = np.arange(len(rows))
    share, counted = (float(np.mean([getattr(d, k) for d in doubts])) for k in ("share", "counted"))
    return _Judged(wrong[at, worst], score[at, worst], suggested, share, counted)


Twins = dict[int, list[tuple[int, float]]]


def _twins(rows: Dataset, alike: Duplicates) -> Twins:
    """Return for each row the equal and nearly equal texts that have other labels, with their likeness."""
    copies = {group[0]: group for group in alike.exact}
    twins: Twins = defaultdict(list)

    def tie(a: int, b: int, similarity: float) -> None:
        if rows.examples[a].labels != rows.examples[b].labels:
            twins[a].append((b, similarity))
            twins[b].append((a, similarity))

    for group in alike.exact:
        for k, a in enumerate(group):
            for b in group[:k]:
                tie(a, b, 1.0)
    for pair in alike.near:
        for a in copies.get(pair.first, (pair.first,)):
            for b in copies.get(pair.second, (pair.second,)):
                tie(a, b, min(pair.similarity, 0.9999))
    return twins


def _contradicted(rows: Dataset, probabilities: Floats, judged: _Judged, twins: Twins) -> Floats:
    """Raise the doubt of rows whose text stands elsewhere under another label.

    Of two labels of one text one is wrong, the less likely one; of two nearly equal texts they may both be right, and
    even odds are taken.
    """
    wrong = judged.wrong.copy()
    index = {label: i for i, label in enumerate(rows.labels)}
    for i, others in twins.items():
        own = _likelihood(probabilities[i], rows.examples[i], index)
        for j, similarity in others:
            other = _likelihood(probabilities[i], rows.examples[j], index)
            odds = other / max(own + other, 1e-12)
            wrong[i] = max(wrong[i], odds * (1.0 if similarity == 1.0 else 0.5 * similarity))
    return wrong


def _likelihood(p: Floats, example: Example, index: dict[str, int]) -> float:
    return float(np.mean([p[index[label]] for label in example.labels])) if example.labels else 1e-6


def _weights(rows: Dataset, suggested: Sequence[tuple[str, ...]]) -> Floats:
    """Return what a wrong label costs a mean over labels, 1 on average over rows: the rarer the label, the more."""
    counts = rows.counts
    of_label = {label: len(rows) / (len(rows.labels) * max(1, counts[label])) for label in rows.labels}
    both = [(*e.labels, *s) for e, s in zip(rows, suggested, strict=True)]
    return np.array([np.mean([of_label[label] for label in names]) if names else 1.0 for names in both])


class _Reasons:
    """Says why a row is doubted."""

    def __init__(
        self,
        rows: Dataset,
        probabilities: Floats,
        said_by: Sequence[str],
        twins: Twins,
        vectors: NDArray[np.float32] | None,
    ) -> None:
        self.rows, self.p, self.said_by, self.twins = rows, probabilities, said_by, twins
        self.index = {label: i for i, label in enumerate(rows.labels)}
        if vectors is not None:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        self.vectors = vectors

    def of(self, i: int, suggested: tuple[str, ...]) -> tuple[str, ...]:
        """Return the reasons to doubt row `i`."""
        given = self.rows.examples[i].labels
        moved = sorted({*given} ^ {*suggested}, key=lambda label: -self.p[i, self.index[label]])
        likely = ", ".join(f"{label} {self.p[i, self.index[label]]:.2f}" for label in moved)
        reasons = [f"probability of {likely} (out of fold, {' and '.join(self.said_by)})"]
        for j, similarity in sorted(self.twins.get(i, ()), key=lambda pair: -pair[1])[:3]:
            other = self.rows.examples[j]
            what = "the same text" if similarity == 1.0 else f"nearly the same text ({similarity:.0%})"
            reasons.append(f"{what} is {labels_cell(other.labels, False)} at {other.where}")
        if self.vectors is not None:
            reasons.append(self._near(i, given, suggested))
        return tuple(reasons)

    def _near(self, i: int, given: tuple[str, ...], suggested: tuple[str, ...]) -> str:
        assert self.vectors is not None
        likeness = self.vectors @ self.vectors[i]
        likeness[i] = -np.inf
        near = np.argsort(-likeness, kind="stable")[: min(_NEAREST, len(self.rows) - 1)]
        held = [self.rows.examples[j] for j in near]
        counts = [sum(e.labels == labels for e in held) for labels in (suggested, given)]
        text = held[0].text if len(held[0].text) <= _SHOWN else held[0].text[: _SHOWN - 1] + "…"
        names = [labels_cell(labels, False) for labels in (suggested, given, held[0].labels)]
        return (
            f"of its {len(held)} nearest texts {counts[0]} are {names[0]} and {counts[1]} {names[1]}; "
            f"the nearest, {names[2]}: {' '.join(text.split())!r} ({held[0].where})"
        )


def labels_cell(labels: Sequence[str], multi_label: bool) -> str:
    """Write labels in one cell: the only one as it is, several as a JSON list."""
    if multi_label:
        return json.dumps(list(labels), ensure_ascii=False)
    return ", ".join(labels) or "no label"
