"""OpenVINO graphs that write, run token by token through `openvino.Core`: what paged attention cannot express.

The same seam as `alambic.engines.genai_core`: requests in, ids out, step by step, owned by one thread. Each running
request has its own state; a step writes one token of each.

Encoder-decoders write one answer after the other: OpenVINO 2026.4 mixes up the states of a decoder's requests that
run in turn and attend to texts of different lengths (a shape error in float32, a corrupted heap in bf16).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic import _extras
from alambic.engines.genai_core import Ask, End, News, first_line
from alambic.errors import EngineError

MODEL, ENCODER, DECODER = "openvino_model.xml", "openvino_encoder_model.xml", "openvino_decoder_model.xml"
Logits = NDArray[np.float32]
_KEPT = 4  # idle requests: each keeps the memory of the longest answer it wrote


@dataclass(frozen=True)
class GraphSpec:
    """What to open.

    Attributes:
        folder: of the part.
        properties: of the engine, threads and cache folder included.
        start_id: of an encoder-decoder: what its decoder begins with; None: a decoder alone.
        first_id: of an encoder-decoder: the first token of every answer (BART); None: any.
    """

    folder: Path
    properties: Mapping[str, str | int | bool]
    start_id: int | None = None
    first_id: int | None = None


class Graphs:
    """The compiled graphs of a part; any thread may read with them, one at a time.

    An infer request is native memory, tensors and states, that a thread must not touch while another one runs it, and
    all requests of a graph share its buffers. So one lock covers every run, and what leaves it is copied. Some requests
    are kept and their states reset, as OpenVINO means them to be used, rather than one made and freed for each answer.

    Attributes:
        spec: what was opened.
        paired: an encoder-decoder, whose `turn` a reading holds from its first logits to its end.
        inputs: names of what the decoder takes.
    """

    def __init__(self, spec: GraphSpec) -> None:
        """Compile them.

        Raises:
            EngineError: one is missing or cannot be compiled.
        """
        self.spec = spec
        self.paired = spec.start_id is not None
        self.turn = threading.Lock()
        self._decoder = self._compile(DECODER if self.paired else MODEL)
        self._encoder = self._compile(ENCODER).create_infer_request() if self.paired else None
        self.inputs = frozenset(name for port in self._decoder.inputs for name in port.get_names())
        self._lock = threading.Lock()
        self._free: list[Any] = []  # requests of the decoder that nobody reads with; their states are reset

    def reading(self, prompt: Sequence[int]) -> Reading:
        """Start to read: of an encoder-decoder, `prompt` is what is encoded. Close it when done."""
        return Reading(self, prompt, self.encode(prompt))

    def take(self) -> Any:
        """Return a request of the decoder; of an encoder-decoder, once the reading before has ended."""
        if self.paired:
            self.turn.acquire()
        try:
            with self._lock:
                return self._free.pop() if self._free else self._decoder.create_infer_request()
        except BaseException:
            if self.paired:
                self.turn.release()
            raise

    def encode(self, ids: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Return what the decoder of an encoder-decoder attends to; nothing for a decoder alone."""
        if self._encoder is None:
            return {}
        row = np.array([list(ids)], dtype=np.int64)
        inputs = {"input_ids": row, "attention_mask": np.ones_like(row)}
        states = self._run(self._encoder, inputs, "last_hidden_state", ...)
        return {"encoder_hidden_states": states, "encoder_attention_mask": np.ones_like(row)}

    def decode(self, request: Any, inputs: Mapping[str, NDArray[Any]], *, rows: int) -> Logits:
        """Return the logits [rows, V] after the last `rows` tokens of `inputs`."""
        known = {name: value for name, value in inputs.items() if name in self.inputs}
        return self._run(request, known, "logits", (0, slice(-rows, None)))

    def take_back(self, request: Any) -> None:
        """Keep a request of the decoder for a later reading, while few are kept."""
        with self._lock:
            if len(self._free) < _KEPT:
                request.reset_state()
                self._free.append(request)
        if self.paired:
            self.turn.release()

    def _run(self, request: Any, inputs: Mapping[str, NDArray[Any]], output: str, part: Any) -> NDArray[Any]:
        with self._lock:
            request.infer(inputs, share_outputs=True)  # else every output is copied whole, and not wanted
            found: NDArray[Any] = request.get_tensor(output).data[part].copy()
        return found

    def _compile(self, name: str) -> Any:
        path = self.spec.folder / name
        if not path.is_file():
            raise EngineError(f"{path}: missing")
        try:
            return _extras.load("openvino").Core().compile_model(str(path), "CPU", dict(self.spec.properties))
        except RuntimeError as error:
            raise EngineError(f"{path}: OpenVINO cannot load this model: {first_line(error)}") from error


class Reading:
    """One sequence on its way through the decoder, by one thread at a time."""

    def __init__(self, graphs: Graphs, prompt: Sequence[int], encoded: Mapping[str, NDArray[Any]]) -> None:
        start = graphs.spec.start_id
        self._graphs = graphs
        self._request: Any = None
        self._others = encoded
        self._unread = list(prompt) if start is None else [start]
        self._length = 0

    def logits(self, ids: Sequence[int] = (), *, rows: int = 1) -> Logits:
        """Read what is unread and `ids` behind it; return the logits [rows, V] after the last `rows` of them."""
        ids, self._unread = [*self._unread, *ids], []
        total = self._length + len(ids)
        known: dict[str, NDArray[Any]] = {
            "input_ids": np.array([ids], dtype=np.int64),
            "attention_mask": np.ones((1, total), dtype=np.int64),
            "position_ids": np.arange(self._length, total, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
            **self._others,
        }
        if self._request is None:
            self._request = self._graphs.take()
        found = self._graphs.decode(self._request, known, rows=rows)
        self._length = total
        return found

    def close(self) -> None:
        """Give its request back; nothing can be read any more. Do not, when the engine failed on it: `drop` it."""
        request, self._request = self._request, None
        if request is not None:
            self._graphs.take_back(request)

    def drop(self) -> None:
        """End without keeping the request, which may be in any state; the next reading gets its turn."""
        request, self._request = self._request, None
        if request is not None and self._graphs.paired:
            self._graphs.turn.release()


@dataclass
class _Running:
    ask: Ask
    reading: Reading
    rng: np.random.Generator
    written: list[int] = field(default_factory=list)
    cancelled: bool = False


class GraphCore:
    """Runs requests; see `alambic.engines.genai_loop.Steps`."""

    def __init__(self, graphs: Graphs) -> None:
        self._graphs = graphs
        self._running: dict[int, _Running] = {}

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self._running)

    def add(self, ask: Ask) -> News | None:
        """Take a request; return news when it was refused."""
        if ask.grammar is not None:
            return News(ask.id, error="this engine follows no grammar")
        try:
            reading = self._graphs.reading(ask.ids)
        except RuntimeError as error:
            return News(ask.id, error=first_line(error))
        self._running[ask.id] = _Running(ask, reading, np.random.default_rng(ask.settings.get("rng_seed", 0)))
        return None

    def cancel(self, id: int) -> None:
        """Stop a request; the news of its end come with the next step."""
        if id in self._running:
            self._running[id].cancelled = True

    def step(self) -> list[News]:
        """Write one token of each request, of the first one alone where answers take turns.

        Raises:
            RuntimeError: the engine failed.
        """
        running = list(self._running.values())
        if self._graphs.paired:
            # A cancelled one may hold the turn: it ends before another begins.
            running = [one for one in running if one.cancelled] or running[:1]
        news = [self._advance(one) for one in running]
        for item in news:
            if item.end is not None:
                self._running.pop(item.id).reading.close()
        return news

    def close(self) -> None:
        """Drop what runs."""
        for running in self._running.values():
            running.reading.drop()
        self._running.clear()

    def _advance(self, running: _Running) -> News:
        ask = running.ask
        if running.cancelled:
            return News(ask.id, end="cancelled")
        logits = running.reading.logits(running.written[-1:])[0]
        first = self._graphs.spec.first_id
        if first is not None and not running.written:
            token = first
        else:
            # What an encoder-decoder has read is in no way what it must not repeat.
            before = ask.ids if self._graphs.spec.start_id is None else ()
            token = choose(logits, before, running.written, ask.settings, running.rng)
        running.written.append(token)
        end: End | None = None
        if token in ask.settings.get("stop_token_ids", ()):
            end = "stop"
        elif len(running.written) >= int(ask.settings["max_new_tokens"]):
            end = "length"
        return News(ask.id, [token], [log_probability(logits, token)], end)


def choose(
    logits: Logits,
    before: Sequence[int],
    written: Sequence[int],
    settings: Mapping[str, Any],
    rng: np.random.Generator,
) -> int:
    """Return the next token: penalties, then greedy or temperature, top-k and top-p, as OpenVINO GenAI does it.

    Args:
        logits: [V].
        before: ids of the prompt; only the repetition penalty looks at them.
        written: ids of the answer so far.
        settings: fields of a GenerationConfig.
        rng: draws when `do_sample` is set.
    """
    scores = _penalised(logits.astype(np.float64), before, written, settings)
    if not settings.get("do_sample", False):
        return int(scores.argmax())
    scores /= settings["temperature"]
    order = np.argsort(-scores, kind="stable")[: settings.get("top_k")]
    shares = np.exp(scores[order] - scores[order[0]])
    shares /= shares.sum()
    # The smallest set that reaches top_p: a token is in it when those before it do not reach it yet.
    kept = int((np.cumsum(shares) - shares < settings.get("top_p", 1.0)).sum())
    order, shares = order[:kept], shares[:kept] / shares[:kept].sum()
    return int(order[rng.choice(kept, p=shares)])


def log_probability(logits: Logits, token: int) -> float:
    """Return the natural logarithm of softmax(logits [V])[token]."""
    values = logits.astype(np.float64)
    top = values.max()
    return float(values[token] - top - np.log(np.exp(values - top).sum()))


def _penalised(
    scores: NDArray[np.float64], before: Sequence[int], written: Sequence[int], settings: Mapping[str, Any]
) -> NDArray[np.float64]:
    penalty = float(settings.get("repetition_penalty", 1.0))
    if penalty != 1.0 and (seen := np.unique([*before, *written]).astype(np.int64)).size:
        old = scores[seen]
        scores[seen] = np.where(old > 0, old / penalty, old * penalty)
    presence, frequency = (float(settings.get(f"{name}_penalty", 0.0)) for name in ("presence", "frequency"))
    if written and (presence or frequency):
        own, counts = np.unique(np.array(written, dtype=np.int64), return_counts=True)
        scores[own] -= presence + frequency * counts
    return scores
