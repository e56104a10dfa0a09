"""Time several ways of writing the same answers, in turn; keep another than the usual where it is surely faster.

Both choices that a build makes by time work so: the engine's arithmetic and the guessing of tokens. The first way is
the usual one, which the others are compared with and which stays where there is doubt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from alambic.engines.writer import Writer
from alambic.kinds.generation import Chunk, GenerationRequest
from alambic.measure.generation_speed import MIN_REPEATS, Timed, compare_generation_speed

Figures = Mapping[str, Mapping[str, Any]]  # by way, the usual one first: what `compare_ways` returns


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        repeats: answers of each way at most.
        seconds: of each way, after which only `least` answers are still written.
        least: answers of each way, however long they take.
        warmup: answers of each way before the clock starts.
    """

    repeats: int = 40
    seconds: float = 15.0
    least: int = MIN_REPEATS
    warmup: int = 3

    def seconds_of(self, ways: int, answer_s: float) -> float:
        """Predict the seconds that it takes to time `ways`, from those of an answer."""
        rounds = min(self.repeats, max(self.least, self.seconds / max(answer_s, 1e-9)))
        return ways * answer_s * (rounds + self.warmup)


class Heard:
    """A writer that guesses so many tokens from the prompt, and what it said."""

    def __init__(self, writer: Writer, lookup_tokens: int = 0) -> None:
        self._writer = writer
        self._lookup_tokens = lookup_tokens
        self.said: dict[int, str] = {}

    def stream(self, request: GenerationRequest) -> Iterator[Chunk]:
        """Write one answer."""
        pieces = []
        sampling = replace(request.sampling, lookup_tokens=self._lookup_tokens)
        for chunk in self._writer.stream(replace(request, sampling=sampling)):
            pieces.append(chunk.text)
            yield chunk
        self.said[id(request)] = "".join(pieces)


def compare_ways(
    heard: Mapping[str, Heard], requests: Sequence[GenerationRequest], *, effort: Effort, seed: int
) -> dict[str, dict[str, Any]]:
    """Time the same answers in every way, interleaved, and compare what they say with what the first way says.

    Returns:
        By way: median milliseconds of an answer, n, the share of the first way's time (`share_of`), how many answers
        were compared and how many are the same.
    """
    writers = {name: cast(Writer, each) for name, each in heard.items()}
    speeds = compare_generation_speed(
        writers, requests, repeats=effort.repeats, warmup=effort.warmup, seconds=effort.seconds, least=effort.least,
        seed=seed,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    usual = next(iter(heard))
    said = heard[usual].said
    return {
        name: {
            "p50_ms": speed.p50_ms.to_dict(),
            "n": speed.n,
            "share": share_of(speed.timed, speeds[usual].timed, rng),
            "answers": len(said),
            "same_answers": sum(text == said.get(key) for key, text in heard[name].said.items()),
        }
        for name, speed in speeds.items()
    }


def share_of(timed: Sequence[Timed], usual: Sequence[Timed], rng: np.random.Generator) -> dict[str, float]:
    """Return the time of all answers as a share of the usual way's, with a 90% interval over answers."""
    mine, theirs = (np.array([one.total_ms for one in times]) for times in (timed, usual))
    draws = rng.integers(len(mine), size=(1000, len(mine)))
    shares = mine[draws].sum(axis=1) / theirs[draws].sum(axis=1)
    low, high = np.quantile(shares, (0.05, 0.95))
    return {"value": float(mine.sum() / theirs.sum()), "low": float(low), "high": float(high)}


def fastest(found: Figures) -> str:
    """Return the way that took the least time among those surely faster than the first; the first where none is."""
    usual, *others = found
    sure = [name for name in others if found[name]["share"]["high"] < 1]
    return min(sure, key=lambda name: float(found[name]["share"]["value"]), default=usual)


def told(name: str, found: Figures, chosen: str, *, than: str) -> Iterator[str]:
    """Say of candidate `name` what each way but the first brought; `than` names the time of the first."""
    for way, figures in list(found.items())[1:]:
        share = figures["share"]
        kept = "kept" if way == chosen else "not kept"
        other = figures["answers"] - figures["same_answers"]
        differing = f"; {other} of {figures['answers']} answers differ" if other else ""
        yield (
            f"{name}: {way} takes {share['value']:.2f} [{share['low']:.2f}, {share['high']:.2f}] of the time {than} "
            f"(n = {figures['n']} answers){differing}: {kept}"
        )
