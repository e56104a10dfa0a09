"""How well a writer predicts given texts: bits per byte, comparable across tokenizers, and perplexity per token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alambic.engines.writer import Writer
from alambic.errors import AlambicError, EngineError
from alambic.kinds.generation import GenerationRequest
from alambic.measure.metrics import Interval
from alambic.measure.text import TextMetric, TextScore, resampled, score_counts

BITS_SIGNATURE = "sum of -log2 p over the tokens of the answers, divided by their UTF-8 bytes; prompts are not counted"


@dataclass(frozen=True)
class Likelihood:
    """How well given answers are predicted.

    Attributes:
        bits_per_byte: corpus score, lower is better; its interval resamples rows.
        perplexity: per token, lower is better; comparable only between models of one tokenizer.
        tokens: in all answers.
        bytes: in all answers.
        per_row: bits per byte of each row.
    """

    bits_per_byte: TextScore
    perplexity: Interval
    tokens: int
    bytes: int
    per_row: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures, ready for JSON; rows are left out."""
        return {
            "bits_per_byte": self.bits_per_byte.to_dict(),
            "perplexity_per_token": self.perplexity.to_dict(),
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


def measure_likelihood(
    writer: Writer, prompts: Sequence[GenerationRequest], answers: Sequence[str], *, batch: int = 16, seed: int = 0
) -> Likelihood:
    """Score `answers`, each given its prompt, through the writer (bits per byte as in Gao et al. 2020, the Pile).

    Raises:
        EngineError: the writer gives no scores.
        AlambicError: there is no row, or the answers are empty.
    """
    if "score" not in writer.capabilities:
        raise EngineError("this engine gives no log-probabilities of given texts", hint="use the openvino engine")
    if not answers or len(prompts) != len(answers):
        raise AlambicError(f"{len(answers)} answers for {len(prompts)} prompts: nothing to score")
    logprobs: list[list[float]] = []
    for i in range(0, len(answers), batch):
        logprobs += writer.score(prompts[i : i + batch], answers[i : i + batch])
    sizes = [len(answer.encode("utf-8", "surrogatepass")) for answer in answers]
    bits = [-sum(row) / math.log(2.0) for row in logprobs]
    counts = np.array([bits, sizes, [len(row) for row in logprobs]], dtype=np.float64).T  # N, 3
    if not counts[:, 1].sum():
        raise AlambicError("every answer is empty: nothing to score")
    score = score_counts(_BITS, counts, rng=np.random.default_rng(seed))
    return Likelihood(
        bits_per_byte=score,
        perplexity=_perplexity(counts, np.random.default_rng(seed)),
        tokens=int(counts[:, 2].sum()),
        bytes=sum(sizes),
        per_row=tuple(float(b / max(1, size)) for b, size in zip(bits, sizes, strict=True)),
    )


def _ratio(sums: Any, n: int) -> Any:
    return sums[:, 0] / np.maximum(sums[:, 1], 1.0)


def _perplexity(counts: Any, rng: np.random.Generator) -> Interval:
    samples = np.concatenate(
        [2.0 ** (sums[:, 0] / np.maximum(sums[:, 2], 1.0)) for sums in resampled(counts, 1000, rng)]
    )
    total = counts.sum(axis=0)
    return Interval.of(2.0 ** (total[0] / max(1.0, total[2])), samples, n=len(counts))


def _no_rows(predictions: Sequence[Any], references: Sequence[Sequence[Any]]) -> Any:
    raise AlambicError("bits per byte are measured by measure_likelihood, from a writer's scores")


_BITS = TextMetric(
    "bits_per_byte", "bits per byte", "bits/byte", 0.0, math.inf, False, lambda: BITS_SIGNATURE, _no_rows, _ratio
)
