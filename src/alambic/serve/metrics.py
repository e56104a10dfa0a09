"""Counters of the server in Prometheus' text form. Written from the event loop only, so nothing is locked."""

from __future__ import annotations

import bisect
import time
from collections import Counter
from collections.abc import Callable, Iterator

from alambic.kinds.generation import Chunk

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ANSWER_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """Counts of values under fixed bounds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count `value`."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, labels: str = "") -> Iterator[str]:
        """Yield the samples, cumulative as Prometheus wants them."""
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            shown = bound if isinstance(bound, str) else f"{bound:g}"
            yield f'{name}_bucket{{{labels}{"," if labels else ""}le="{shown}"}} {total}'
        braces = f"{{{labels}}}" if labels else ""
        yield f"{name}_sum{braces} {self._sum:.9g}"
        yield f"{name}_count{braces} {total}"


class Metrics:
    """Everything `/metrics` tells."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._texts: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._latency = Histogram(_SECONDS)
        self._batches: dict[str, Histogram] = {}
        self._queues: dict[str, Callable[[], int]] = {}
        self._desks: dict[str, tuple[Callable[[], int], Callable[[], int]]] = {}
        self._streams: Counter[tuple[str, str]] = Counter()
        self._tokens: Counter[tuple[str, str]] = Counter()
        self._first: dict[str, Histogram] = {}

    @property
    def uptime_s(self) -> float:
        """Seconds since the server began."""
        return self._clock() - self._began

    def watch_queue(self, model: str, depth: Callable[[], int]) -> None:
        """Read the depth of the queue of `model` from `depth` when asked."""
        self._queues[model] = depth
        self._batches[model] = Histogram(_TEXTS)

    def watch_streams(self, model: str, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Read how many answers `model` writes, and how many wait, when asked."""
        self._desks[model] = running, waiting
        self._first[model] = Histogram(_ANSWER_SECONDS)

    def count_first(self, model: str, seconds: float) -> None:
        """Count the wait for the first piece of an answer, from its turn on."""
        self._first[model].add(seconds)

    def count_stream(self, model: str, how: str, last: Chunk | None) -> None:
        """Count an answer that ended: its finish reason, or ``cancelled`` or ``error``."""
        self._streams[model, how] += 1
        if last is not None and last.usage is not None:
            self._tokens[model, "prompt"] += last.usage.prompt_tokens
            if last.usage.cached_tokens is not None:
                self._tokens[model, "cached"] += last.usage.cached_tokens
            self._tokens[model, "generated"] += last.usage.completion_tokens

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Count an answered request; only `/v1/classify` enters the latency histogram."""
        self._requests[path, status] += 1
        if path == "/v1/classify":
            self._latency.add(seconds)

    def count_batch(self, model: str, texts: int, failed: int) -> None:
        """Count a batch that ran."""
        self._batches[model].add(texts)
        self._texts[model] += texts
        self._failed[model] += failed

    def render(self) -> str:
        """Return the page of `/metrics`."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        yield from _head("alambic_uptime_seconds", "gauge", "Seconds since the server began.")
        yield f"alambic_uptime_seconds {self.uptime_s:.3f}"
        yield from _head("alambic_requests_total", "counter", "Requests answered; 499: the client went away.")
        for (path, status), count in sorted(self._requests.items()):
            yield f'alambic_requests_total{{path="{path}",code="{status}"}} {count}'
        yield from _head("alambic_request_seconds", "histogram", "Time to answer POST /v1/classify.")
        yield from self._latency.lines("alambic_request_seconds")
        yield from _head("alambic_texts_total", "counter", "Texts given to the engine.")
        for model in self._queues:
            yield f"alambic_texts_total{{{_label(model)}}} {self._texts[model]}"
        yield from _head("alambic_texts_failed_total", "counter", "Texts on which the engine failed.")
        for model in self._queues:
            yield f"alambic_texts_failed_total{{{_label(model)}}} {self._failed[model]}"
        yield from _head("alambic_queue_texts", "gauge", "Texts waiting for the engine.")
        for model, depth in self._queues.items():
            yield f"alambic_queue_texts{{{_label(model)}}} {depth()}"
        yield from _head("alambic_batch_texts", "histogram", "Texts in a batch.")
        for model, histogram in self._batches.items():
            yield from histogram.lines("alambic_batch_texts", _label(model))
        yield from self._stream_lines()

    def _stream_lines(self) -> Iterator[str]:
        if not self._desks:
            return
        yield from _head("alambic_streams_running", "gauge", "Answers being written.")
        for model, (running, _) in self._desks.items():
            yield f"alambic_streams_running{{{_label(model)}}} {running()}"
        yield from _head("alambic_streams_waiting", "gauge", "Answers waiting for their turn.")
        for model, (_, waiting) in self._desks.items():
            yield f"alambic_streams_waiting{{{_label(model)}}} {waiting()}"
        yield from _head(
            "alambic_streams_total", "counter", "Answers ended, by reason; cancelled: the client went away."
        )
        for (model, how), count in sorted(self._streams.items()):
            yield f'alambic_streams_total{{{_label(model)},reason="{how}"}} {count}'
        yield from _head("alambic_tokens_total", "counter", "Tokens of whole answers; cached ones are of the prompt.")
        for model in self._desks:
            for kind in ("prompt", "cached", "generated"):
                yield f'alambic_tokens_total{{{_label(model)},kind="{kind}"}} {self._tokens[model, kind]}'
        yield from _head("alambic_first_token_seconds", "histogram", "From the turn of a request to its first token.")
        for model, histogram in self._first.items():
            yield from histogram.lines("alambic_first_token_seconds", _label(model))


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"


def _label(model: str) -> str:
    escaped = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'model="{escaped}"'
