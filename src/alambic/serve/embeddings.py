"""`POST /v1/embeddings`: the vectors of texts, from bundles in which an encoder answers."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from alambic.serve.batcher import Batcher
from alambic.serve.bodies import Body, json_kind, parse_body
from alambic.serve.classify import finished, timings_of
from alambic.serve.errors import CLIENT_GONE, ApiError, from_engine
from alambic.serve.limits import Limits

Vector = tuple[NDArray[np.float32], int]


class Embeds(Protocol):
    """The part of an engine that is used here."""

    @property
    def capabilities(self) -> frozenset[str]:
        """``embed``, and ``token_ids`` where tokens can be counted."""

    def embed(self, texts: Sequence[str], *, batch_size: int = 32) -> NDArray[np.float32]:
        """Return one row per text, [N, H]."""


class Embedder:
    """Makes an engine's vectors what the batcher batches: each of length 1, with the tokens of its text."""

    def __init__(self, engine: Embeds) -> None:
        self._engine = engine

    def predict(self, inputs: Sequence[str], *, batch_size: int = 32) -> list[Vector]:
        """Return one vector [H] and its tokens per text."""
        rows = np.asarray(self._engine.embed(inputs, batch_size=batch_size), dtype=np.float32)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        rows = (rows / np.where(lengths > 0, lengths, 1.0)).astype(np.float32, copy=False)
        counts = [0] * len(rows)
        token_ids = getattr(self._engine, "token_ids", None)
        if token_ids is not None and "token_ids" in self._engine.capabilities:
            counts = [len(ids) for ids in token_ids(inputs)]
        return list(zip(rows, counts, strict=True))


class EmbeddingBody(Body):
    """The body of a request for vectors."""

    input: Any
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    user: Any = None


async def answer(
    request: Request, body: bytes, *, models: Any, batchers: Mapping[str, Batcher[Vector]], limits: Limits
) -> Response:
    """Answer one request.

    Raises:
        ApiError: it is refused.
    """
    parsed = parse_body(EmbeddingBody, body)
    name, _ = models(parsed.model)
    texts = _texts(parsed.input, limits)
    job = batchers[name].submit(texts)
    if not await finished(request, batchers[name], job):
        return Response(status_code=CLIENT_GONE)
    vectors: list[Vector] = []
    for i in range(len(texts)):
        outcome = job.outcomes[i]
        if isinstance(outcome, BaseException):
            raise from_engine(outcome, param=f"input[{i}]" if isinstance(parsed.input, list) else "input")
        vectors.append(outcome)
    width = len(vectors[0][0])
    if parsed.dimensions is not None and parsed.dimensions != width:
        message = f"'dimensions' is {parsed.dimensions}; the vectors of this model have {width}, and are not cut"
        raise ApiError(400, "unsupported_parameter", message, param="dimensions")
    tokens = sum(count for _, count in vectors)
    return JSONResponse(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": i, "embedding": _encoded(vector, parsed.encoding_format)}
                for i, (vector, _) in enumerate(vectors)
            ],
            "model": name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "timings": timings_of(job, job.queued),
        }
    )


def _encoded(vector: NDArray[np.float32], form: str | None) -> Any:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if form == "base64" else vector.tolist()


def _texts(value: object, limits: Limits) -> list[str]:
    texts: list[Any] = value if isinstance(value, list) else [value]
    if not texts:
        raise ApiError(400, "empty_input", "'input' is an empty list; send at least one text", param="input")
    if len(texts) > limits.max_texts and not isinstance(texts[0], int):
        message = f"'input' holds {len(texts)} texts; at most {limits.max_texts} go in one request"
        raise ApiError(400, "too_many_texts", message, param="input")
    for i, text in enumerate(texts):
        param = f"input[{i}]" if isinstance(value, list) else "input"
        if isinstance(text, int | list) and not isinstance(text, bool):
            message = f"'{param}' holds token ids; this server reads texts, with the model's own tokenizer"
            raise ApiError(400, "unsupported_parameter", message, param=param)
        if not isinstance(text, str):
            message = f"'{param}' is {json_kind(text)}; it must be a text or a list of texts"
            raise ApiError(400, "wrong_type", message, param=param)
        if not text.strip():
            raise ApiError(400, "empty_text", f"'{param}': the text is empty", param=param)
    return texts
