"""`POST /v1/classify`: reads a request, waits for its predictions, writes the answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from alambic.errors import nearest
from alambic.kinds.classify import Prediction
from alambic.serve.batcher import Batcher, Job
from alambic.serve.bodies import json_kind
from alambic.serve.errors import CLIENT_GONE, ApiError, from_engine
from alambic.serve.limits import Limits, read_body
from alambic.serve.models import LoadedBundle

if TYPE_CHECKING:
    from alambic.engines.last_stage import LastStage

_KEYS = ("input", "model", "top_k", "why")
_MOST_REASONS = 50


@dataclass(frozen=True)
class Classify:
    """A request that was checked."""

    texts: tuple[str, ...]
    many: bool
    model: str
    top_k: int | None
    why: int | None = None

    def param(self, index: int) -> str:
        """Name the text `index` as the client wrote it."""
        return f"input[{index}]" if self.many else "input"


Choose = Callable[[str | None], tuple[str, LoadedBundle]]


async def answer(
    request: Request, *, models: Choose, batchers: Mapping[str, Batcher[Prediction]], limits: Limits
) -> Response:
    """Answer one request; `models` gives the model of a name, or the default one.

    Raises:
        ApiError: it is refused.
    """
    began = time.perf_counter()
    try:
        body = await read_body(request, limits)
    except ClientDisconnect:
        return Response(status_code=CLIENT_GONE)
    classify, model = parse(body, models=models, limits=limits)
    job = batchers[classify.model].submit([text for text in classify.texts if text.strip()])
    if not await finished(request, batchers[classify.model], job):
        return Response(status_code=CLIENT_GONE)
    if model.last is not None:  # outside the batch: a slow remote holds up nobody who is answered here
        await asyncio.to_thread(_settle, job, model.last)
    entries = _entries(classify, job, multi_label=model.multi_label)
    if classify.why is not None:
        await asyncio.to_thread(_add_reasons, entries, classify, model)
    return JSONResponse(
        {
            "object": "list",
            "model": classify.model,
            "data": entries,
            "usage": {"texts": len(classify.texts), "characters": sum(map(len, classify.texts))},
            "timings": timings_of(job, began),
        }
    )


def parse(body: bytes, *, models: Choose, limits: Limits) -> tuple[Classify, LoadedBundle]:
    """Read and check the body of a request, and find its model.

    Raises:
        ApiError: 400, or 404 for an unknown model; `param` names what is wrong.
    """
    data = _object(body)
    for key in data:
        if key not in _KEYS:
            shown = key[:80].encode(errors="replace").decode()
            message = f"unknown parameter {shown!r}; {nearest(shown, _KEYS)}"
            raise ApiError(400, "unknown_parameter", message, param=shown)
    if "input" not in data:
        raise ApiError(400, "missing_parameter", "'input' is missing: a text, or a list of texts", param="input")
    given = data["input"]
    texts = given if isinstance(given, list) else [given]
    for index, text in enumerate(texts):
        _check_text(text, f"input[{index}]" if isinstance(given, list) else "input")
    if not texts:
        raise ApiError(400, "empty_input", "'input' is an empty list; send at least one text", param="input")
    if len(texts) > limits.max_texts:
        message = f"'input' holds {len(texts)} texts; at most {limits.max_texts} go in one request"
        raise ApiError(400, "too_many_texts", message, param="input")
    asked = data.get("model")
    if not isinstance(asked, str | None):
        raise ApiError(400, "wrong_type", f"'model' is {json_kind(asked)}; it must be a text", param="model")
    name, model = models(asked)
    top_k, why = _whole(data, "top_k"), _whole(data, "why", most=_MOST_REASONS)
    if why is not None and not model.explains:
        message = f"'why': model {name!r} holds no index of training rows"
        raise ApiError(400, "no_reasons", message, param="why")
    return Classify(tuple(texts), isinstance(given, list), name, top_k, why), model


def _object(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else type(error).__name__
        message = f'the body is not JSON ({reason}); send {{"input": "a text"}}'
        raise ApiError(400, "invalid_json", message) from error
    if not isinstance(data, dict):
        message = f'the body is {json_kind(data)}, not an object; send {{"input": "a text"}}'
        raise ApiError(400, "wrong_type", message)
    return data


def _check_text(text: object, where: str) -> None:
    if not isinstance(text, str):
        wanted = "a text" if "[" in where else "a text or a list of texts"
        raise ApiError(400, "wrong_type", f"'{where}' is {json_kind(text)}; it must be {wanted}", param=where)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ApiError(400, "invalid_unicode", f"'{where}' holds half of a surrogate pair, not valid text", param=where)


def _whole(data: Mapping[str, Any], key: str, *, most: int | None = None) -> int | None:
    value = data.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or (most is not None and value > most):
        got = value if isinstance(value, int) and not isinstance(value, bool) else json_kind(value)
        allowed = "a whole number from 1" + (f" to {most}" if most is not None else "")
        raise ApiError(400, "wrong_type", f"'{key}' is {got}; it must be {allowed}", param=key)
    return value


def _settle(job: Job[Prediction], last: LastStage) -> None:
    """Ask the remote about the texts that were abstained from."""
    known = [(i, one) for i, one in sorted(job.outcomes.items()) if isinstance(one, Prediction)]
    said = last.settle([job.texts[i] for i, _ in known], [one for _, one in known])
    for (i, _), one in zip(known, said, strict=True):
        job.outcomes[i] = one


def _add_reasons(entries: list[dict[str, Any]], classify: Classify, model: LoadedBundle) -> None:
    """Put the nearest training rows into every entry that has a prediction."""
    answered = [entry for entry in entries if "error" not in entry]
    texts = [classify.texts[entry["index"]] for entry in answered]
    found = model.engine.reasons(texts, n=classify.why)  # type: ignore[attr-defined]  # `explains` was asked
    for entry, reasons in zip(answered, found, strict=True):
        rows = [vars(reason) for reason in reasons]
        entry["reasons"] = [{key: value for key, value in row.items() if value is not None} for row in rows]


async def finished(request: Request, batcher: Batcher[Any], job: Job[Any]) -> bool:
    """Wait for `job`; drop it and return False if the client goes away first."""
    if not job.texts:
        batcher.drop(job)
        return True
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({job.done, gone}, return_when=asyncio.FIRST_COMPLETED)
        if job.done.cancelled():
            raise ApiError(500, "internal_error", "the server failed; its log has the details")
        return job.done.done()
    finally:
        gone.cancel()
        if not job.done.done():
            batcher.drop(job)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _entries(classify: Classify, job: Job[Prediction], *, multi_label: bool) -> list[dict[str, Any]]:
    """Return `data`: one text that fails has its error there, but when all fail the first error is the answer."""
    predicted = iter(range(len(job.texts)))
    blank = ApiError(400, "empty_text", "the text is empty")
    errors: list[ApiError] = []
    entries: list[dict[str, Any]] = []
    for index, text in enumerate(classify.texts):
        outcome = job.outcomes[next(predicted)] if text.strip() else blank
        if isinstance(outcome, Prediction):
            ranked = sorted(outcome.scores.items(), key=lambda item: -item[1])
            labels = list(outcome.labels) if multi_label else outcome.label
            entry: dict[str, Any] = {"index": index, "prediction": labels, "confidence": outcome.confidence}
            entry |= {"abstained": outcome.abstained, "scores": dict(ranked[: classify.top_k])}
            if outcome.because is not None:
                entry["because"] = outcome.because
            if outcome.label_set is not None:
                entry["label_set"] = list(outcome.label_set)
            if outcome.answered_by is not None:
                entry["answered_by"] = outcome.answered_by
            entries.append(entry)
        else:
            errors.append(from_engine(outcome, param=classify.param(index)))
            entries.append({"index": index, "error": errors[-1].body()})
    if len(errors) == len(entries):
        raise errors[0]
    return entries


def timings_of(job: Job[Any], began: float) -> dict[str, float]:
    """Return `timings`: the wait of `job`, its time in the engine, and all since `began`."""
    total = time.perf_counter() - began
    queue = (job.started or job.queued) - job.queued
    seconds = {"queue_ms": queue, "engine_ms": job.engine_s, "total_ms": total}
    return {name: round(1000 * value, 3) for name, value in seconds.items()}
