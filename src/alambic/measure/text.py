"""Scores of what a model wrote: one table of metrics, each with direction, range, unit, signature and interval.

A metric turns every row into a few counts whose sums give the score (matched n-grams for BLEU, hits for F1), so a
resample of the rows is one matrix product, and corpus scores get an honest interval in a fraction of a second. How the
counts are made is in text_overlap.py (texts) and text_structured.py (JSON, spans, tool calls). Code is run by
text_code.py, likelihoods are in text_likelihood.py. Nothing here asks a model: written.py does.

    score_texts("chrf", ["Un chat dort."], [["Le chat dort."]], rng=np.random.default_rng(0)).interval.value
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic.errors import AlambicError, nearest
from alambic.measure import text_overlap as overlap
from alambic.measure import text_structured as structured
from alambic.measure.metrics import Interval, Paired

Floats = NDArray[np.float64]
Rows = Callable[[Sequence[Any], Sequence[Sequence[Any]]], Floats]
Finish = Callable[[Floats, int], Floats]
_DRAWS_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class TextMetric:
    """A named score of predictions against references.

    Attributes:
        name: the key in task files, measurements and reports.
        title: how a report writes it.
        unit: ``share`` (0..1; BLEU, chrF and ROUGE are usually printed times 100) or ``bits/byte``.
        low: smallest value there is.
        high: largest value there is, may be infinite.
        higher_is_better: its direction.
        signature: exactly how it is computed, versions of libraries included; kept with every result.
        rows: counts [N, M] of N predictions, each with its list of accepted references.
        finish: scores [R] from sums [R, M] of those counts over `n` rows.
    """

    name: str
    title: str
    unit: str
    low: float
    high: float
    higher_is_better: bool
    signature: Callable[[], str]
    rows: Rows
    finish: Finish


@dataclass(frozen=True)
class TextScore:
    """One score with everything needed to quote it."""

    name: str
    interval: Interval
    unit: str
    low: float
    high: float
    higher_is_better: bool
    signature: str

    def to_dict(self) -> dict[str, Any]:
        """Return value, interval and n under the contract's names, and what they mean."""
        described = {
            "unit": self.unit,
            "range": [self.low, self.high if np.isfinite(self.high) else None],
            "higher_is_better": self.higher_is_better,
            "signature": self.signature,
        }
        return {**self.interval.to_dict(), **described}


def _share(name: str, title: str, signature: str, rows: Rows, finish: Finish = overlap.mean) -> TextMetric:
    return TextMetric(name, title, "share", 0.0, 1.0, True, lambda: signature, rows, finish)


def _signed(name: str, title: str, source: Any, finish: Finish) -> TextMetric:
    return TextMetric(name, title, "share", 0.0, 1.0, True, source.signature, source.rows, finish)


def _rouge(kind: str, title: str) -> Iterator[TextMetric]:
    name = "rouge_" + kind.removeprefix("rouge").lower()
    yield _signed(name, title, overlap.Rouge(kind, "unicode"), overlap.mean)
    yield _signed(f"{name}_ascii", f"{title} (ASCII tokens)", overlap.Rouge(kind, "ascii"), overlap.mean)


TEXT_METRICS: dict[str, TextMetric] = {
    metric.name: metric
    for metric in (
        _share("exact_match", "exact match", "equal in NFC, white space folded; best reference", overlap.exact_rows),
        _share("squad_em", "exact match (SQuAD)", overlap.SQUAD_SIGNATURE, overlap.squad_exact_rows),
        _share("token_f1", "token F1", overlap.SQUAD_SIGNATURE, overlap.token_f1_rows),
        _signed("bleu", "BLEU", overlap.Bleu(), overlap.finish_bleu),
        _signed("bleu_moses_en", "BLEU (lower-cased, Moses en)", overlap.MosesBleu("en"), overlap.finish_bleu),
        _signed("bleu_moses_fr", "BLEU (lower-cased, Moses fr)", overlap.MosesBleu("fr"), overlap.finish_bleu),
        _signed("chrf", "chrF", overlap.Chrf(), overlap.finish_chrf),
        *_rouge("rouge1", "ROUGE-1"),
        *_rouge("rouge2", "ROUGE-2"),
        *_rouge("rougeL", "ROUGE-L"),
        _share("json_valid", "valid JSON", structured.JSON_SIGNATURE, structured.json_rows),
        _share("field_f1", "field F1 (micro)", structured.FIELD_SIGNATURE, structured.field_rows, structured.micro_f1),
        _share("field_macro_f1", "field F1 (macro)", structured.FIELD_SIGNATURE, structured.field_macro_rows,
               structured.macro_f1),
        _share("span_f1", "span F1", structured.SPAN_SIGNATURE, structured.span_rows, structured.micro_f1),
        _share("span_macro_f1", "span F1 (macro)", structured.SPAN_SIGNATURE, structured.span_macro_rows,
               structured.macro_f1),
        _share("tool_names", "tool names", structured.TOOL_SIGNATURE, structured.tool_name_rows),
        _share("tool_calls", "tool calls", structured.TOOL_SIGNATURE, structured.tool_rows),
    )
}  # fmt: skip


def text_metric(name: str) -> TextMetric:
    """Return the metric called `name`.

    Raises:
        AlambicError: there is none; the nearest name is given.
    """
    if name not in TEXT_METRICS:
        raise AlambicError(f"unknown metric {name!r}", hint=nearest(name, TEXT_METRICS))
    return TEXT_METRICS[name]


def score_texts(
    name: str,
    predictions: Sequence[Any],
    references: Sequence[Sequence[Any]],
    *,
    n: int = 1000,
    level: float = 0.95,
    rng: np.random.Generator,
) -> TextScore:
    """Score predictions against references, with a percentile interval from `n` resamples of the rows.

    Args:
        name: of `TEXT_METRICS`.
        predictions: one a row: a text, or what the metric reads (spans, tool calls).
        references: accepted answers of each row, at least one.
        n: resamples.
        level: probability that the interval covers.
        rng: of the resampling.

    Raises:
        AlambicError: the metric is unknown, there is no row, or a row has no reference.
        MissingExtra: a library that the metric needs is not installed.
    """
    metric = text_metric(name)
    _check(predictions, references)
    return score_counts(metric, metric.rows(predictions, references), n=n, level=level, rng=rng)


def score_counts(
    metric: TextMetric, counts: Floats, *, n: int = 1000, level: float = 0.95, rng: np.random.Generator
) -> TextScore:
    """Score rows whose counts [N, M] are known already; see `score_texts`."""
    rows = len(counts)
    value = float(metric.finish(counts.sum(axis=0, keepdims=True), rows)[0])
    samples = np.concatenate([metric.finish(sums, rows) for sums in resampled(counts, n, rng)])
    interval = Interval.of(value, samples, n=rows, level=level)
    return TextScore(
        metric.name, interval, metric.unit, metric.low, metric.high, metric.higher_is_better, metric.signature()
    )


def row_scores(name: str, predictions: Sequence[Any], references: Sequence[Sequence[Any]]) -> Floats:
    """Return the score of each row by itself [N]: what the worst rows are chosen by.

    Raises:
        AlambicError: as `score_texts`.
    """
    metric = text_metric(name)
    _check(predictions, references)
    return metric.finish(metric.rows(predictions, references), 1)


def compare_texts(
    name: str,
    references: Sequence[Sequence[Any]],
    first: Sequence[Any],
    second: Sequence[Any],
    *,
    n: int = 1000,
    rng: np.random.Generator,
) -> Paired:
    """Compare two systems on the same rows: `first` minus `second`, resampled together (95% interval).

    Paired bootstrap resampling (Koehn 2004, https://aclanthology.org/W04-3250).

    Raises:
        AlambicError: as `score_texts`.
    """
    metric = text_metric(name)
    _check(first, references)
    _check(second, references)
    # Counted together, because the columns of macro scores are the fields or labels of all rows given.
    counts = metric.rows([*first, *second], [*references, *references])
    rows = len(references)
    return compare_counts(metric, counts[:rows], counts[rows:], n=n, rng=rng)


def compare_counts(
    metric: TextMetric, left: Floats, right: Floats, *, n: int = 1000, rng: np.random.Generator
) -> Paired:
    """Compare two systems whose counts [N, M] of the same rows are known; see `compare_texts`."""
    rows, width = left.shape
    both = np.concatenate([left, right], axis=1)

    def difference(sums: Floats) -> Floats:
        return metric.finish(sums[:, :width], rows) - metric.finish(sums[:, width:], rows)

    samples = np.concatenate([difference(sums) for sums in resampled(both, n, rng)])
    value = float(difference(both.sum(axis=0, keepdims=True))[0])
    tail = min(float((samples <= 0.0).mean()), float((samples >= 0.0).mean()))
    return Paired(Interval.of(value, samples, n=rows), min(1.0, 2.0 * max(tail, 1.0 / n)))


def resampled(counts: Floats, n: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Yield sums [r, M] of `counts` [N, M] over resampled rows, `n` in all, a bounded number at a time."""
    rows = len(counts)
    step = max(1, _DRAWS_AT_ONCE // rows)
    for start in range(0, n, step):
        r = min(step, n - start)
        drawn = rng.integers(rows, size=(r, rows)) + np.arange(r)[:, None] * rows
        weights = np.bincount(drawn.reshape(-1), minlength=r * rows).reshape(r, rows)
        yield weights.astype(np.float64) @ counts


def meets(score: TextScore | Mapping[str, Any], bound: float) -> bool:
    """Tell whether the point estimate is on the right side of `bound`, whatever the metric's direction."""
    data = score.to_dict() if isinstance(score, TextScore) else score
    return bool(data["value"] >= bound if data["higher_is_better"] else data["value"] <= bound)


def _check(predictions: Sequence[Any], references: Sequence[Sequence[Any]]) -> None:
    if len(predictions) != len(references):
        raise AlambicError(f"{len(predictions)} predictions for {len(references)} rows of references")
    if not len(references):
        raise AlambicError("no row to score", hint="give a data set with at least one usable row")
    for i, accepted in enumerate(references):
        if isinstance(accepted, str) or not len(accepted):
            raise AlambicError(f"row {i}: needs a list of at least one reference, got {accepted!r}")
