"""How fast our decoder writes in 8 bits, one stream, two threads; and where the time of a token goes.

Set ALAMBIC_BENCH_BASE to the decoder's folder. The ceiling is what memory gives divided by the bytes of the weights,
all of which are read for a token. A model of this size may lie in the processor's cache, so the bandwidth is measured
twice: over as many bytes as the weights have, and over far more than any cache holds.

`stream` is the product: text in, text out, through `openvino-genai`. `graph` is the same graph with nothing around it:
a token in, the largest logit out, no rendering, no text, no paged cache. Both take turns with the bandwidth, in rounds.
`profile` asks OpenVINO for the time of every operation. ALAMBIC_BENCH_THREADS=1 times one thread.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from own_base import _base, _digest, bandwidth
from run import TINY, say

MINUTES = 2
WHAT = "Generation speed of our decoder in 8 bits, one stream, against memory bandwidth, and where a token's time goes"
_THREADS = int(os.environ.get("ALAMBIC_BENCH_THREADS", "2"))
_ROUNDS, _ANSWERS = (2, 2) if TINY else (6, 6)  # answers of a round, of each way of writing
_TOKENS = 16 if TINY else 128
_PROFILED = 16 if TINY else 96
_LARGE = 1 << 28  # bytes: over any cache of a processor
_KINDS = (
    ("products with the weights", ("FullyConnected", "MatMul")),
    ("attention", ("Attention",)),
    ("table of tokens", ("Gather",)),
    ("norms, positions, the rest", ("",)),
)

Floats = NDArray[np.float64]


def run(store: Any) -> str:
    """Pack, time, profile; each part is kept."""
    base = _base()
    mark = f"{_digest(base)}-{_THREADS}"
    packed = store.folder / f"packed-{_digest(base)}"
    part = store.part(f"pack-{_digest(base)}", partial(_pack, base, packed))
    rounds = [store.part(f"round-{mark}-{i}", partial(_round, part, packed, i)) for i in range(_ROUNDS)]
    found = store.part(f"profile-{mark}", partial(_profile, part, packed))
    return "\n".join([*_table(part, rounds), "", *_profile_lines(part, rounds, found)])


def _pack(base: Path, out: Path) -> dict[str, Any]:
    from dataclasses import asdict

    from alambic.events import drain
    from alambic.pack.writer_openvino import pack_openvino

    shutil.rmtree(out, ignore_errors=True)
    part = drain(pack_openvino(base, out, precision="int8"))
    return {"part": asdict(part), "weight_bytes": (out / "openvino_model.bin").stat().st_size}


def _round(part: dict[str, Any], folder: Path, number: int) -> dict[str, Any]:
    """Measure bandwidth, write with the product, write with the bare graph, measure bandwidth again."""
    size = part["weight_bytes"]
    before = bandwidth(size, threads=_THREADS), bandwidth(_LARGE, threads=_THREADS, repeats=10)
    stream = _stream(part, folder, number)
    graph = _graph(part, folder, number)
    after = bandwidth(size, threads=_THREADS), bandwidth(_LARGE, threads=_THREADS, repeats=10)
    return {"cached": [before[0], after[0]], "memory": [before[1], after[1]], "stream": stream, "graph": graph}


def _texts(number: int) -> list[str]:
    """Return beginnings to go on with, no two the same: engines keep prompts that they have read."""
    first = _ANSWERS * number
    return [f"Séance n° {first + i}. Le conseil municipal s'est réuni hier soir afin de" for i in range(_ANSWERS)]


def _stream(part: dict[str, Any], folder: Path, number: int) -> list[list[float]]:
    """Return tokens after the first and the seconds that they took, of each answer of the product."""
    from alambic.engines.bundle_writer import load_writer
    from alambic.kinds.generation import GenerationRequest, Sampling
    from alambic.manifest import PartSpec

    writer = load_writer(PartSpec(**part["part"]), folder, threads=_THREADS)
    sampling = Sampling(max_tokens=_TOKENS)
    found = []
    try:
        for i, text in enumerate(["Pour chauffer.", *_texts(number)]):
            first, usage = None, None
            for chunk in writer.stream(GenerationRequest(text=text, sampling=sampling)):
                first = perf_counter() if first is None else first
                usage = chunk.usage or usage
            assert first is not None and usage is not None, "a whole answer says its tokens"
            if i and usage.completion_tokens > 1:
                found.append([usage.completion_tokens - 1.0, perf_counter() - first])
    finally:
        writer.close()
    return found


def _graph(part: dict[str, Any], folder: Path, number: int) -> list[list[float]]:
    """Return the same of the bare graph, greedy, whatever it writes."""
    graphs = _graphs(part, folder)
    tokenizer = _tokenizer(folder)
    found = []
    for text in ["Pour chauffer.", *_texts(number)]:
        request = graphs.take()
        token, length = _read(graphs, request, tokenizer.encode(text).ids, 0)
        began = perf_counter()
        for _ in range(_TOKENS - 1):
            token, length = _read(graphs, request, [token], length)
        found.append([_TOKENS - 1.0, perf_counter() - began])
        graphs.take_back(request)
    return found[1:]


def _profile(part: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return milliseconds a token by operation of the graph, and of whole steps, from a graph that keeps its times."""
    graphs = _graphs(part, folder, PERF_COUNT=True)
    request = graphs.take()
    token, length = _read(graphs, request, _tokenizer(folder).encode(_texts(99)[0]).ids, 0)
    spent: dict[str, float] = defaultdict(float)
    whole = 0.0
    for _ in range(_PROFILED):
        began = perf_counter()
        token, length = _read(graphs, request, [token], length)
        whole += perf_counter() - began
        for info in request.get_profiling_info():
            spent[info.node_type] += info.real_time.total_seconds()
    each = {kind: 1000.0 * seconds / _PROFILED for kind, seconds in spent.items() if seconds}
    return {"ms": each, "step_ms": 1000.0 * whole / _PROFILED, "tokens": length}


def _graphs(part: dict[str, Any], folder: Path, **more: Any) -> Any:
    from alambic.engines.graph_core import Graphs, GraphSpec

    properties = {**part["part"]["params"]["properties"], "INFERENCE_NUM_THREADS": _THREADS, **more}
    return Graphs(GraphSpec(folder, properties))


def _read(graphs: Any, request: Any, ids: Sequence[int], length: int) -> tuple[int, int]:
    """Read `ids` after `length` tokens; return the likeliest next one and how many were read in all."""
    total = length + len(ids)
    inputs = {
        "input_ids": np.array([ids], dtype=np.int64),
        "attention_mask": np.ones((1, total), dtype=np.int64),
        "position_ids": np.arange(length, total, dtype=np.int64)[None],
        "beam_idx": np.zeros(1, dtype=np.int32),
    }
    return int(graphs.decode(request, inputs, rows=1)[0].argmax()), total


def _tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _table(part: dict[str, Any], rounds: Sequence[dict[str, Any]]) -> list[str]:
    size = part["weight_bytes"]
    bounds = {key: np.array([max(one[key]) for one in rounds]) * 1e9 / size for key in ("cached", "memory")}
    rates = {key: _rate([pair for one in rounds for pair in one[key]]) for key in ("stream", "graph")}
    n = sum(len(one["stream"]) for one in rounds)
    lines = [
        f"{part['part']['params']['parameters']:,} parameters, {size / 1e6:.2f} MB of weights in 8 bits, {_THREADS} "
        f"thread(s), one stream, {n} answers of {_TOKENS} tokens each way, in {len(rounds)} rounds.",
        "",
        "| what | tokens/s [95 %] | ms a token | of the ceiling, size of the weights | of the ceiling, 256 MB |",
        "|---|---|---|---|---|",
    ]
    for name, key in (("the product, text to text", "stream"), ("the graph alone, greedy", "graph")):
        value, low, high = rates[key]
        shares = " | ".join(f"{value / np.median(bounds[kind]):.0%}" for kind in ("cached", "memory"))
        lines.append(f"| {name} | {value:,.0f} [{low:,.0f}, {high:,.0f}] | {1000 / value:.3f} | {shares} |")
    for name, kind in (("ceiling: memory of the size of the weights", "cached"), ("ceiling: 256 MB", "memory")):
        bound = bounds[kind]
        lines.append(f"| {name}, median [least, most] of rounds | {np.median(bound):,.0f} [{bound.min():,.0f}, "
                     f"{bound.max():,.0f}] | {1000 / np.median(bound):.3f} | | |")  # fmt: skip
    cached, memory = (np.median(bounds[kind]) * size / 1e9 for kind in ("cached", "memory"))
    gigabytes = f"{cached:.1f} GB/s at the size of the weights, {memory:.1f} GB/s over 256 MB"
    return [*lines, "", f"Bandwidth: {gigabytes} (a sum of 64-bit integers, {_THREADS} thread(s), best of each round)."]


def _profile_lines(part: dict[str, Any], rounds: Sequence[dict[str, Any]], found: dict[str, Any]) -> list[str]:
    stream, graph = (1000 / _rate([pair for one in rounds for pair in one[key]])[0] for key in ("stream", "graph"))
    by_kind = kinds(found["ms"])
    inside = sum(by_kind.values())
    rows = [(name, ms) for name, ms in by_kind.items() if ms]
    rows.append(("between the operations of the graph, and choosing a token", found["step_ms"] - inside))
    # Less than nothing where the product's engine, which rewrites attention to a paged one, gains more than it costs.
    rows.append(("product less graph alone: paged attention, scheduling, text", stream - graph))
    weights = by_kind[_KINDS[0][0]]
    reached = part["weight_bytes"] / weights / 1e6 if weights else 0.0
    most = sorted(found["ms"].items(), key=lambda item: -item[1])[:6]
    return [
        "| where the time of a token goes | ms |",
        "|---|---|",
        *(f"| {name} | {ms:.3f} |" for name, ms in rows),
        "",
        f"Times of operations are OpenVINO's own, means of {_PROFILED} tokens up to the {found['tokens']}th, with its "
        f"clocks on (a step then takes {found['step_ms']:.3f} ms, {graph:.3f} without). Products with the weights read "
        f"{reached:.1f} GB/s. The longest: {', '.join(f'{kind} {ms:.3f} ms' for kind, ms in most)}.",
    ]


def kinds(milliseconds: dict[str, float]) -> dict[str, float]:
    """Add up times of operations by what they do."""
    sums = dict.fromkeys((name for name, _ in _KINDS), 0.0)
    for kind, value in milliseconds.items():
        sums[next(name for name, parts in _KINDS if any(part in kind for part in parts))] += value
    return sums


def _rate(pairs: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Return tokens a second over answers of (tokens, seconds), with the 95 % bootstrap interval over answers."""
    if not pairs:
        say("no answer had two tokens: the model ends its text at once")
        return float("nan"), float("nan"), float("nan")
    tokens, seconds = np.array(pairs, dtype=np.float64).T
    drawn = np.random.default_rng(0).integers(len(tokens), size=(2000, len(tokens)))
    low, high = np.percentile(tokens[drawn].sum(1) / seconds[drawn].sum(1), [2.5, 97.5])
    return float(tokens.sum() / seconds.sum()), float(low), float(high)
