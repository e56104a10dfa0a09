"""Fit the writer `nearest`: BM25 postings of the known inputs, and their answers. Numpy only."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from alambic.engines.nearest_answer import last_said, terms_of
from alambic.engines.tfidf_features import NORMALISATION
from alambic.errors import TrainError
from alambic.kinds.chat import Chat, Message
from alambic.manifest import PartSpec

_K1, _B = 1.2, 0.75  # Robertson and Zaragoza 2009, section 3.5: what is usual
_EXTENSION = "surrogatepass"


def fit_nearest(chats: Sequence[Chat], out: Path) -> PartSpec:
    """Write the part that answers each input with the answer of the known input nearest to it.

    Args:
        chats: each ends with an answer of the assistant.
        out: folder to write.

    Raises:
        TrainError: there is no conversation with an answer.
    """
    known = [(last_said(chat), _stored(chat.completion)) for chat in chats if chat.completion is not None]
    if not known:
        raise TrainError("no conversation ends with an answer of the assistant: there is nothing to look up")
    counts = [Counter(terms_of(query)) for query, _ in known]
    lengths = np.array([sum(count.values()) for count in counts], dtype=np.float64)
    mean = lengths.mean() or 1.0
    postings: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row, count in enumerate(counts):
        norm = _K1 * (1 - _B + _B * lengths[row] / mean)
        for term, n in count.items():
            postings[term].append((row, n * (_K1 + 1) / (n + norm)))
    terms = sorted(postings)
    weights = [np.array([w for _, w in postings[t]]) * _idf(len(known), len(postings[t])) for t in terms]
    out.mkdir(parents=True, exist_ok=True)
    (out / "words.txt").write_bytes("".join(f"{term}\n" for term in terms).encode("utf-8", _EXTENSION))
    np.save(out / "starts.npy", np.cumsum([0, *map(len, weights)]).astype(np.int64))
    np.save(out / "rows.npy", np.array([row for t in terms for row, _ in postings[t]], dtype=np.int32))
    np.save(out / "weights.npy", np.concatenate(weights or [np.zeros(0)]).astype(np.float16))
    lines = "".join(f"{answer}\n" for _, answer in known)
    (out / "answers.jsonl").write_text(lines, "utf-8")
    # An input without any known word gets the most frequent answer.
    common = Counter(answer for _, answer in known).most_common(1)[0][0]
    fallback = next(row for row, (_, answer) in enumerate(known) if answer == common)
    calls = any(chat.completion is not None and chat.completion.tool_calls for chat in chats)
    params = {"normalisation": NORMALISATION, "fallback": fallback, "calls": calls}
    return PartSpec("writer", "nearest", out.name, params)


def _stored(answer: Message) -> str:
    """Return an answer as a line of JSON: a text, or the whole message when it calls tools."""
    return json.dumps(answer.to_dict() if answer.tool_calls else answer.content)


def _idf(n: int, found: int) -> float:
    return float(np.log(1 + (n - found + 0.5) / (found + 0.5)))
