"""Predict a file into a file: one JSON object a line, in order, resumable, a bad row never stops the good ones.

Answers go to `OUTPUT.part` and the finished file is renamed to `OUTPUT`. When an earlier run of the same bundle on
the same input was interrupted, its complete lines are kept and the rest is computed. Light: no torch, no scikit-learn.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from alambic.data.clean import clean_text
from alambic.data.read import Row, cell_text, iter_rows
from alambic.errors import DataError, EngineError, WorkspaceError
from alambic.events import Note, Progress, Work
from alambic.kinds.classify import Prediction, Reason
from alambic.kinds.generation import Reply
from alambic.workspace import on_disk

if TYPE_CHECKING:
    from alambic.engines import ClassifyEngine
    from alambic.engines.bundle_writer import BundleWriter
    from alambic.task import DataSpec

# Texts to the public JSON of their predictions, in order.
Predict = Callable[[Sequence[str]], list[dict[str, Any]]]

_BATCH = 256
_WRITTEN_BATCH = 16  # writing is slow: an interrupted run loses at most this many rows
# What we write; a column of the input by one of these names would be taken for our answer.
_OURS = (
    "prediction", "confidence", "abstained", "because", "label_set", "answered_by", "scores", "reasons",
    "finish_reason", "tool_calls", "error",
)  # fmt: skip
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class FileResult:
    """How a file was predicted: rows written, rows in error, rows kept from an interrupted run."""

    rows: int
    errors: int
    resumed: int
    seconds: float


def to_json(prediction: Prediction, *, multi_label: bool, top_k: int | None = None) -> dict[str, Any]:
    """Return the public JSON form of a prediction; `top_k` adds that many labels' probabilities."""
    value: Any = list(prediction.labels) if multi_label else prediction.label
    answer: dict[str, Any] = {"prediction": value, "confidence": round(prediction.confidence, 6)}
    answer["abstained"] = prediction.abstained
    if prediction.because is not None:
        answer["because"] = prediction.because
    if prediction.label_set is not None:
        answer["label_set"] = list(prediction.label_set)
    if prediction.answered_by is not None:
        answer["answered_by"] = prediction.answered_by
    if top_k:
        best = sorted(prediction.scores.items(), key=lambda item: -item[1])[:top_k]
        answer["scores"] = {name: round(p, 6) for name, p in best}
    return answer


def reply_to_json(reply: Reply) -> dict[str, Any]:
    """Return the public JSON form of a written answer; `finish_reason` tells one that was cut off."""
    answer: dict[str, Any] = {"prediction": reply.content, "finish_reason": reply.finish_reason}
    if reply.tool_calls:
        answer["tool_calls"] = [call.to_dict() for call in reply.tool_calls]
    return answer


def reason_to_json(reason: Reason) -> dict[str, Any]:
    """Return the public JSON form of a training row near a text."""
    row = {"labels": list(reason.labels), "similarity": round(reason.similarity, 4), "where": reason.where}
    return {**row, **({"digest": reason.digest} if reason.text is None else {"text": reason.text})}


def predicting(engine: ClassifyEngine | BundleWriter, *, top_k: int | None = None, why: int | None = None) -> Predict:
    """Return what turns texts into the JSON of their predictions, whatever the kind of the bundle.

    Args:
        engine: what predicts.
        top_k: classify: also the probabilities of that many labels.
        why: classify: also that many training rows near the text, under `reasons`.

    Raises:
        EngineError: `why` is asked of a bundle that holds no index of examples.
    """
    from alambic.engines import ClassifyEngine

    if isinstance(engine, ClassifyEngine):
        one = partial(to_json, multi_label=engine.multi_label, top_k=top_k)
        if why is None:
            return lambda texts: [one(prediction) for prediction in engine.predict(texts)]
        engine.reasons([], n=why)  # refused before the first text
        return lambda texts: [
            {**one(prediction), "reasons": [reason_to_json(reason) for reason in reasons]}
            for prediction, reasons in zip(engine.predict(texts), engine.reasons(texts, n=why), strict=True)
        ]
    if why is not None:
        raise EngineError(f"{engine.bundle.source}: reasons are given by classifiers, and this bundle writes")
    return lambda texts: [reply_to_json(reply) for reply in engine.predict(texts)]


def predict_file(
    engine: ClassifyEngine | BundleWriter,
    source: Path,
    target: Path,
    *,
    spec: DataSpec,
    bundle_seal: str,
    top_k: int | None = None,
    why: int | None = None,
) -> Work[FileResult]:
    """Predict every row of `source` into `target`.

    Raises:
        DataError: `source` is missing or unusable as a whole.
        WorkspaceError: `target` cannot be written; what was computed stays in `TARGET.part`.
    """
    began = time.perf_counter()
    predict, size = (
        predicting(engine, top_k=top_k, why=why),
        _WRITTEN_BATCH if engine.bundle.manifest.writer else _BATCH,
    )
    part = target.with_name(target.name + ".part")
    how = [bundle_seal, top_k, why, spec.text, spec.encoding, spec.separator]
    stamp = _stamp(source, [*how, "remote"] if getattr(engine, "last", None) is not None else how)
    with on_disk(target):
        resumed, errors = _resume(part, stamp)
        if resumed:
            yield Note(f"{part.name}: {resumed:,} rows were there, going on from row {resumed + 1:,}")
        rows = islice(iter_rows(source, spec), resumed, None)
        done, replaced = resumed, set[str]()
        with open(part, "a", encoding="utf-8", newline="\n") as out:
            for batch in _batches(rows, size):
                replaced.update(name for row in batch for name in _OURS if name in row.fields)
                errors += _answer(predict, batch, spec, out)
                done += len(batch)
                elapsed = time.perf_counter() - began
                yield Progress("predict", done, 0, {"rows/s": (done - resumed) / elapsed, "errors": float(errors)})
            out.flush()
            os.fsync(out.fileno())
        if replaced:
            yield Note(f"{source.name}: columns replaced in the output: {', '.join(sorted(replaced))}", "warning")
        part.replace(target)
        _stamp_file(part).unlink(missing_ok=True)
    return FileResult(done, errors, resumed, time.perf_counter() - began)


def _batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    while batch := list(islice(rows, size)):
        yield batch


def _answer(predict: Predict, rows: list[Row], spec: DataSpec, out: TextIO) -> int:
    """Write one line per row; return how many are errors."""
    column = spec.text or "text"
    texts: list[tuple[int, str]] = []
    answers: list[dict[str, Any]] = []
    for i, row in enumerate(rows):
        answer = {name: _plain(value) for name, value in row.fields.items() if name not in _OURS}
        text = row.fields.get(column)
        if row.error is not None:
            answer["error"] = f"{row.where}: {row.error}"
        elif isinstance(text, dict | list) or not clean_text(cell_text(text)).text:
            answer["error"] = f"{row.where}: no text in column {column!r}"
        else:
            texts.append((i, cell_text(text)))
        answers.append(answer)
    for (i, _), result in zip(texts, _predictions(predict, [t for _, t in texts]), strict=True):
        if "error" in result:
            result = {"error": f"{rows[i].where}: {result['error']}"}
        answers[i].update(result)
    out.writelines(_line(answer) + "\n" for answer in answers)
    return sum("error" in answer for answer in answers)


def _plain(value: object) -> object:
    """JSON has no NaN: an empty cell of Parquet is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(answer: dict[str, Any]) -> str:
    text = json.dumps(answer, ensure_ascii=False, default=str)
    # A lone surrogate of the input cannot be written as UTF-8; escaped, it comes back as it was.
    return text if _SURROGATE.search(text) is None else json.dumps(answer, default=str)


def _predictions(predict: Predict, texts: list[str]) -> list[dict[str, Any]]:
    try:
        return predict(texts)
    except EngineError:
        return [_one(predict, text) for text in texts]


def _one(predict: Predict, text: str) -> dict[str, Any]:
    try:
        return predict([text])[0]
    except EngineError as error:
        return {"error": error.message}


def _stamp(source: Path, how: list[Any]) -> str:
    try:
        state = source.stat()
    except OSError as error:
        raise DataError(f"{source}: {error.strerror}") from error
    identity = [str(source.resolve()), state.st_size, state.st_mtime_ns, *how]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _stamp_file(part: Path) -> Path:
    return part.with_name(part.name + ".stamp")


def _resume(part: Path, stamp: str) -> tuple[int, int]:
    """Keep the complete lines of an interrupted run of the same work; return how many, and how many are errors."""
    mark = _stamp_file(part)
    if not part.exists() or not mark.exists() or mark.read_text("utf-8") != stamp:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(b"")
        mark.write_text(stamp, "utf-8")
        return 0, 0
    lines = errors = whole = 0
    with open(part, "rb") as handle:
        for line in handle:
            try:
                answer = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                break
            if not isinstance(answer, dict):
                break
            whole += len(line)
            lines += 1
            errors += "error" in answer
    os.truncate(part, whole)
    return lines, errors


def refuse_existing(target: Path, *, force: bool) -> None:
    """Refuse to overwrite `target` unless `force`.

    Raises:
        WorkspaceError: the file exists, or is a folder.
    """
    if target.is_dir():
        raise WorkspaceError(f"{target}: is a folder", hint="name a file with --output")
    if target.exists() and not force:
        raise WorkspaceError(f"{target}: exists already", hint="add --force to overwrite it")
