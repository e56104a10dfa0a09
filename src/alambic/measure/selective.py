"""Thresholds that keep a promise on texts not seen yet: selective prediction, conformal label sets, scope.

Each function takes rows that were used for nothing else and says what they support; none of them reads a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

CONFIDENCE = 0.95  # of the bound on the error
_STEPS = 100  # thresholds tried, at the shares of answered texts 1 %, 2 % ... 100 % of the tuning rows


@dataclass(frozen=True)
class Selected:
    """The threshold found for a promised precision.

    Attributes:
        threshold: the least confidence that is answered.
        precision: what was promised.
        confidence: of the bound.
        kept: whether the rows support the promise; when not, the threshold is the one that came nearest.
        bound: Clopper-Pearson upper bound on the share of wrong answers at that threshold.
        n: rows that tested it.
        answered: of those, the rows answered.
        errors: of those, the wrong ones.
        tried: thresholds tested, in the order that the tuning rows decided.
    """

    threshold: float
    precision: float
    confidence: float
    kept: bool
    bound: float
    n: int
    answered: int
    errors: int
    tried: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)


def binomial_tail(errors: int, n: int, share: float) -> float:
    """Return the probability of at most `errors` among `n` when each is one with probability `share`."""
    if errors >= n or share <= 0.0:
        return 1.0
    if share >= 1.0:
        return 0.0
    k = np.arange(errors + 1)
    factorials = _log_factorials(1 << n.bit_length())
    choose = factorials[n] - factorials[k] - factorials[n - k]
    logs = choose + k * math.log(share) + (n - k) * math.log1p(-share)
    top = float(logs.max())
    return min(1.0, math.exp(top) * float(np.exp(logs - top).sum()))


@lru_cache(maxsize=8)
def _log_factorials(most: int) -> Floats:
    """Return the logarithms of 0!, 1! ... up to `most`!."""
    return np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, most + 1)))))


def upper_bound(errors: int, n: int, *, confidence: float = CONFIDENCE) -> float:
    """Return the Clopper-Pearson upper bound on a share of which `errors` of `n` were seen; 1 without any row."""
    if errors >= n:
        return 1.0
    low, high = errors / n, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if binomial_tail(errors, n, middle) > 1.0 - confidence else (low, middle)
    return high


def rows_needed(precision: float, *, confidence: float = CONFIDENCE) -> int:
    """Return the fewest answered rows that can support `precision`: none of them may then be wrong."""
    return math.ceil(math.log(1.0 - confidence) / math.log(precision))


def select(
    tuning: tuple[Floats, Bools], rows: tuple[Floats, Bools], *, precision: float, confidence: float = CONFIDENCE
) -> Selected:
    """Find the threshold that answers most texts while wrong answers are at most 1 - `precision` of those given.

    Learn then Test (Angelopoulos, Bates, Candes, Jordan and Lei 2021, arXiv:2110.01052) with a fixed sequence: the
    tuning rows decide which thresholds are tested and in which order, from the one they find safest towards more
    answers; the other rows test each in turn by the exact binomial bound (Clopper and Pearson 1934), as in selective
    prediction (Geifman and El-Yaniv 2017, arXiv:1705.08500), and the first that fails ends it. Testing in an order
    fixed beforehand costs no correction, so each bound is at the full `confidence`.

    Args:
        tuning: confidence [M] (minus infinity: never answered) and whether right [M]; may have fitted anything.
        rows: the same of rows [N] used for nothing else.
        precision: share of the answers given that must be right.
        confidence: probability, over the draw of `rows`, that the promise holds.
    """
    wrong = 1.0 - precision
    sequence = _sequence(tuning, len(rows[0]), wrong)
    kept, tried = -1, 0
    for tried, threshold in enumerate(sequence, 1):
        n, errors = _answered(rows, threshold)
        if not n or binomial_tail(errors, n, wrong) > 1.0 - confidence:
            break
        kept = tried - 1
    chosen = sequence[max(kept, 0)]
    n, errors = _answered(rows, chosen)
    bound = upper_bound(errors, n, confidence=confidence)
    return Selected(chosen, precision, confidence, kept >= 0, bound, len(rows[0]), n, errors, tried)


def _answered(rows: tuple[Floats, Bools], threshold: float) -> tuple[int, int]:
    """Return how many rows are answered, and how many of those answers are wrong."""
    answered = rows[0] >= threshold
    return int(answered.sum()), int((answered & ~rows[1]).sum())


def _sequence(tuning: tuple[Floats, Bools], n: int, wrong: float) -> list[float]:
    """Return thresholds, highest first, from the one that the tuning rows find safest for a test on `n` rows.

    Rounded, so that what is written to a manifest is what was tested.
    """
    scores, right = tuning
    known = np.sort(scores[np.isfinite(scores)])[::-1]
    if not len(known):
        return [0.0]
    at = {known[min(len(known) - 1, math.ceil(len(known) * step / _STEPS) - 1)] for step in range(1, _STEPS + 1)}
    grid = sorted({math.floor(float(t) * 1e6) / 1e6 for t in at} | {0.0}, reverse=True)
    hopes = []
    for threshold in grid:
        answered = scores >= threshold
        # Half an error and one row more keep a few lucky rows from looking safe.
        rate = (float((answered & ~right).sum()) + 0.5) / (float(answered.sum()) + 1.0)
        expected = round(n * float(answered.mean()))
        hopes.append(binomial_tail(round(rate * expected), expected, wrong) if expected else 1.0)
    return grid[int(np.argmin(hopes)) :]


def set_threshold(truth: Floats, coverage: float) -> float | None:
    """Return the least probability of a label of the label set, so that the truth is in it with probability `coverage`.

    Split conformal prediction with least ambiguous sets (Sadinle, Lei and Wasserman 2019, arXiv:1609.00451): of all
    rules with that marginal coverage, it gives the smallest sets on average. None when there are too few rows.

    Args:
        truth: probability of the true label of each row [N], on rows that fitted nothing.
        coverage: share of texts whose truth must be in their set.
    """
    place = math.floor((len(truth) + 1) * (1.0 - coverage) + 1e-9)
    return math.floor(float(np.sort(truth)[place - 1]) * 1e6) / 1e6 if place >= 1 else None


def set_rows_needed(coverage: float) -> int:
    """Return the fewest rows that can support label sets of this coverage."""
    return math.ceil(1.0 / (1.0 - coverage) - 1e-9) - 1


def scope_threshold(inside: Floats, share: float) -> float | None:
    """Return the least score taken for a text of the task, so that `share` of the task's texts have it or more.

    A conformal quantile (Bates and others 2023, arXiv:2104.08279). None when there are too few rows.
    """
    place = math.floor((len(inside) + 1) * (1.0 - share) + 1e-9)
    return float(np.sort(inside)[place - 1]) if place >= 1 else None


def choose_scope(inside: Mapping[str, Floats], outside: Mapping[str, Floats], share: float) -> tuple[str, float]:
    """Return the score that catches most texts of `outside` while `share` of those inside pass, with that share caught.

    Ties go to the first. Both map the name of a score to its values.
    """
    caught = {}
    for name, values in inside.items():
        least = scope_threshold(values, share)
        caught[name] = float((outside[name] < least).mean()) if least is not None else 0.0
    best = max(caught, key=lambda name: caught[name])
    return best, caught[best]


def auroc(inside: Floats, outside: Floats) -> float:
    """Return the probability that a text inside scores higher than one outside; a tie counts half."""
    order = np.sort(outside)
    below, upto = np.searchsorted(order, inside, "left"), np.searchsorted(order, inside, "right")
    return float((below + upto).mean() / (2 * len(outside)))
