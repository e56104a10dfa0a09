"""How often a bundle finds the better answer of a pair likelier than the worse one, through the engine that ships.

This is the ranking accuracy of Chen et al. 2024 (https://arxiv.org/abs/2405.19534): it needs no reference model, so the
base, the fine-tuned and the preferred model stand on one scale. A whole answer is the less likely the longer it is;
`per_byte` therefore compares means over the bytes of each answer too. The end of an answer is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from alambic.engines.writer import Writer
from alambic.errors import AlambicError, EngineError, InputTooLong
from alambic.kinds.chat import Chat, Message
from alambic.kinds.generation import GenerationRequest
from alambic.measure.metrics import Interval

_BATCH = 16
_RESAMPLES = 1000
_Row = tuple[float, float, int, int]  # log-likelihood of the better and of the worse answer, bytes of both


class Preferred(Protocol):
    """A prompt and two answers, as `alambic.data.pairs.PreferenceExample` has them."""

    @property
    def prompt(self) -> Chat:
        """The conversation that waits for the assistant."""

    @property
    def chosen(self) -> Message:
        """The better answer."""

    @property
    def rejected(self) -> Message:
        """The worse one."""


@dataclass(frozen=True)
class PreferenceScore:
    """How well pairs are told apart.

    Attributes:
        accuracy: share of the pairs whose better answer is likelier as a whole; ties count as halves.
        per_byte: the same by the mean over the bytes of each answer.
        margin: log-likelihood of the better answer minus that of the worse one, in nats, on average.
        n: pairs that were scored.
        left_out: pairs with tool calls or too long for the model, which were not.
        margins: of each pair, in order; None where it was left out.
    """

    accuracy: Interval
    per_byte: Interval
    margin: Interval
    n: int
    left_out: int
    margins: tuple[float | None, ...]

    def to_dict(self, *, rows: bool = False) -> dict[str, Any]:
        """Return the figures, ready for JSON; with `rows`, the margins too."""
        intervals = {name: getattr(self, name).to_dict() for name in ("accuracy", "per_byte", "margin")}
        figures = {**intervals, "n": self.n, "left_out": self.left_out}
        return {**figures, "margins": list(self.margins)} if rows else figures


def measure_preference(writer: Writer, pairs: Sequence[Preferred], *, seed: int = 0) -> PreferenceScore:
    """Score both answers of each pair, given its prompt, through `writer`.

    Raises:
        EngineError: the engine gives no log-probabilities of given texts.
        AlambicError: there is no pair of texts.
    """
    if "score" not in writer.capabilities:
        raise EngineError("this engine gives no log-probabilities of given texts", hint="use the openvino engine")
    found: list[_Row | None] = []
    for start in range(0, len(pairs), _BATCH):
        found += _batch(writer, pairs[start : start + _BATCH])
    rows = np.array([row for row in found if row is not None], dtype=np.float64).reshape(-1, 4)
    if not len(rows):
        raise AlambicError("there is no pair of texts to score")
    whole = rows[:, 0] - rows[:, 1]
    mean = rows[:, 0] / rows[:, 2] - rows[:, 1] / rows[:, 3]
    rng = np.random.default_rng(seed)
    return PreferenceScore(
        accuracy=_interval(_wins(whole), rng),
        per_byte=_interval(_wins(mean), rng),
        margin=_interval(whole, rng),
        n=len(rows),
        left_out=len(pairs) - len(rows),
        margins=tuple(None if row is None else row[0] - row[1] for row in found),
    )


def gained(after: Sequence[float | None], before: Sequence[float | None], *, seed: int = 0) -> Interval | None:
    """Return the share of pairs whose better answer gained on the worse one from a model to another; None: no pair.

    This is the accuracy of the rewards that DPO is implicitly about (Rafailov et al. 2023, section 4), with the model
    before as its reference.

    Args:
        after: margins of the model that has learnt the preferences.
        before: margins of the one that it began from, on the same pairs.
        seed: of the resampling.
    """
    both = [(a, b) for a, b in zip(after, before, strict=True) if a is not None and b is not None]
    if not both:
        return None
    return _interval(_wins(np.array([a - b for a, b in both])), np.random.default_rng(seed))


def _batch(writer: Writer, pairs: Sequence[Preferred]) -> list[_Row | None]:
    """Score pairs together; None for those with tool calls and for those that the model cannot read."""
    texts = [pair for pair in pairs if not (pair.chosen.tool_calls or pair.rejected.tool_calls)]
    if len(texts) < len(pairs):
        scored = iter(_batch(writer, texts) if texts else [])
        return [None if pair.chosen.tool_calls or pair.rejected.tool_calls else next(scored) for pair in pairs]
    prompts = [GenerationRequest(chat=pair.prompt) for pair in pairs for _ in range(2)]
    answers = [answer.content for pair in pairs for answer in (pair.chosen, pair.rejected)]
    try:
        sums = [sum(values) for values in writer.score(prompts, answers)]
    except InputTooLong:
        return [None] if len(pairs) == 1 else [row for pair in pairs for row in _batch(writer, [pair])]
    sizes = [len(answer.encode("utf-8", "surrogatepass")) for answer in answers]
    return [(sums[i], sums[i + 1], sizes[i], sizes[i + 1]) for i in range(0, len(sums), 2)]


def _wins(margins: Any) -> Any:
    return (margins > 0) + 0.5 * (margins == 0)


def _interval(values: Any, rng: np.random.Generator) -> Interval:
    """Return the mean with its bootstrap interval over pairs."""
    drawn = rng.integers(0, len(values), (_RESAMPLES, len(values)))
    return Interval.of(float(values.mean()), values[drawn].mean(axis=1), n=len(values))
