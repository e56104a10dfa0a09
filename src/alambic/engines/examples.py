"""The nearest training rows of a text, from an index that lies in the bundle beside the model.

Two ways to be near: ``vectors``, by the vector that the bundle's own encoder gives (8-bit); and ``words``, for bundles
whose model gives no vectors: by hashed words and runs of characters, weighted by rarity. Words are hashed to 65,536
places, so that the index holds none of them. The texts of the rows are there only when the task asked for it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic.data.clean import clean_text
from alambic.engines.heads import normalised
from alambic.engines.parts import Array, check_keys, read_array
from alambic.engines.tfidf_features import char_ngrams, normalise, word_ngrams
from alambic.errors import EngineError
from alambic.kinds.classify import Reason

NAME = "examples"
MOST_NEAR = 2000  # rows that `closeness` looks at: 0.1 ms a text at 384 dimensions; all of them, where there are fewer
ROWS = "rows.jsonl"
HASHING = "words-chars-crc32.v1"
_PLACES = 1 << 16

Embed = Callable[[Sequence[str]], Array]


class Examples:
    """An index of training rows, open.

    Files: rows.jsonl; for ``vectors`` vectors.npy, int8 [M, H]; for ``words`` starts.npy [M + 1], places.npy and
    weights.npy [K], and rarity.npy [65536].
    """

    def __init__(self, folder: Path, params: Mapping[str, Any], *, threads: int | None, cache_dir: Path | None) -> None:
        check_keys(params, ("how", "texts", "hashing"), folder)
        self._how = params.get("how")
        if self._how not in ("vectors", "words"):
            raise EngineError(f"{folder}: how is {self._how!r}; this version knows 'vectors' and 'words'")
        if self._how == "words" and params.get("hashing") != HASHING:
            raise EngineError(f"{folder}: hashing {params.get('hashing')!r}; this version knows {HASHING!r}")
        self._rows = _read_rows(folder / ROWS)
        self._standing: dict[str | None, NDArray[np.float32]] = {}  # [H, M], by the label left out
        if self._how == "vectors":
            self._vectors = read_array(folder / "vectors.npy", dims=2)
            count = len(self._vectors)
        else:
            self._starts = read_array(folder / "starts.npy", dims=1).astype(np.int64)
            self._places = read_array(folder / "places.npy", dims=1)
            self._weights = read_array(folder / "weights.npy", dims=1).astype(np.float32)
            self._rarity = read_array(folder / "rarity.npy", dims=1).astype(np.float32)
            count = len(self._starts) - 1
            if not self._fits():
                raise EngineError(f"{folder}: the arrays of the index do not fit each other")
        if count != len(self._rows):
            raise EngineError(f"{folder}: {len(self._rows)} rows and an index of {count}")

    def closeness(self, vectors: Array, *, without: str | None = None) -> NDArray[np.float64]:
        """Return the cosine of each vector [N, H] with the nearest row, [N]: low for texts unlike all rows.

        The score of Sun et al. 2022 (https://arxiv.org/abs/2204.06507), which finds that a sample of the rows does: at
        most `MOST_NEAR` stand for all, as many of each label as there are, or the same number.

        Args:
            vectors: what the bundle's encoder gives.
            without: label whose rows are left out: that of texts of no other label.

        Raises:
            EngineError: this index holds no vectors of other rows.
        """
        kept = self._standing.get(without)
        if kept is None:
            places = [] if self._how != "vectors" else standing(self._rows, without, MOST_NEAR)
            if not places:
                raise EngineError(f"the index holds no vectors of rows that are not {without!r}")
            kept = self._standing[without] = np.ascontiguousarray(self._vectors[places].astype(np.float32).T / 127.0)
        return np.asarray((normalised(vectors) @ kept).max(axis=1), dtype=np.float64)

    def _fits(self) -> bool:
        starts, held = self._starts, len(self._places)
        ordered = len(starts) > 0 and starts[0] == 0 and starts[-1] == held and bool((np.diff(starts) >= 0).all())
        return (
            ordered and self._places.dtype == np.uint16 and held == len(self._weights) and len(self._rarity) == _PLACES
        )

    def nearest(self, texts: Sequence[str], *, n: int, embed: Embed) -> list[tuple[Reason, ...]]:
        """Return the `n` nearest rows of each text, nearest first; `embed` gives vectors [N, H]."""
        if self._how == "vectors":
            unit = normalised(embed(texts)) if len(texts) else np.zeros((0, self._vectors.shape[1]))
            similar = (self._by_vector(row) for row in unit)
        else:
            similar = (self._by_words(clean_text(text).text) for text in texts)
        return [self._best(values, n) for values in similar]

    def _by_vector(self, unit: Array) -> NDArray[np.float32]:
        return np.asarray(self._vectors.astype(np.float32) @ unit / np.float32(127.0), dtype=np.float32)

    def _by_words(self, text: str) -> NDArray[np.float32]:
        query = np.zeros(_PLACES, dtype=np.float32)
        places = places_of(text)
        query[places] = self._rarity[places]
        query /= max(float(np.linalg.norm(query)), 1e-9)
        products = np.concatenate(([0.0], np.cumsum(query[self._places] * self._weights, dtype=np.float64)))
        return np.asarray(products[self._starts[1:]] - products[self._starts[:-1]], dtype=np.float32)

    def _best(self, similar: NDArray[np.float32], n: int) -> tuple[Reason, ...]:
        order = np.argsort(-similar, kind="stable")[:n]
        return tuple(_reason(self._rows[i], float(similar[i])) for i in order)

    def describe(self) -> dict[str, Any]:
        """Return what this index is."""
        return {"engine": NAME, "version": np.__version__, "how": self._how, "rows": len(self._rows)}


def standing(rows: Sequence[Mapping[str, Any]], without: str | None, most: int) -> list[int]:
    """Return the places of at most `most` rows that have not the label `without`, in turn one of each label."""
    seen: dict[tuple[str, ...], int] = {}
    turns = []
    for place, row in enumerate(rows):
        labels = tuple(row["labels"])
        if without not in labels:
            turns.append((seen.get(labels, 0), place))
            seen[labels] = seen.get(labels, 0) + 1
    return sorted(place for _, place in sorted(turns)[:most])


def places_of(text: str) -> NDArray[np.int64]:
    """Return the places of a text's words, pairs of words and runs of 3 and 4 characters, each once."""
    plain = normalise(text)
    hashed = (zlib.crc32(gram.encode("utf-8", "surrogatepass")) % _PLACES for gram in _grams(plain))
    return np.unique(np.fromiter(hashed, np.int64))


def _grams(text: str) -> Iterator[str]:
    yield from word_ngrams(text, 1, 2)
    for word in text.split():
        yield from char_ngrams(word, 3, 4)


def write_index(
    folder: Path, rows: Sequence[Mapping[str, Any]], texts: Sequence[str], vectors: Array | None
) -> dict[str, Any]:
    """Write an index into `folder` and return its parameters.

    Args:
        folder: an absent folder.
        rows: of each row `labels`, `where`, `digest`, and `text` where it is kept.
        texts: of the same rows, to index; they are not written.
        vectors: of the same rows [M, H]; None indexes their words.
    """
    folder.mkdir(parents=True)
    with (folder / ROWS).open("w", encoding="utf-8", newline="\n") as out:
        out.writelines(json.dumps(dict(row), ensure_ascii=True) + "\n" for row in rows)
    kept = {"texts": any("text" in row for row in rows)}
    if vectors is not None:
        _save(folder / "vectors.npy", np.round(normalised(vectors) * 127.0).astype(np.int8))
        return {"how": "vectors", **kept}
    places = [places_of(text) for text in texts]
    starts = np.concatenate(([0], np.cumsum([len(p) for p in places]))).astype(np.int64)
    flat = np.concatenate(places) if places else np.zeros(0, dtype=np.int64)
    seen = np.bincount(flat, minlength=_PLACES)
    rarity = (np.log((1.0 + len(texts)) / (1.0 + seen)) + 1.0).astype(np.float16)
    weights = rarity.astype(np.float32)[flat]
    lengths = np.sqrt(np.maximum(np.add.reduceat(weights**2, starts[:-1]), 1e-9)) if len(flat) else np.ones(0)
    _save(folder / "starts.npy", starts)
    _save(folder / "places.npy", flat.astype(np.uint16))
    _save(folder / "weights.npy", (weights / np.repeat(lengths, np.diff(starts))).astype(np.float16))
    _save(folder / "rarity.npy", rarity)
    return {"how": "words", "hashing": HASHING, **kept}


def _save(path: Path, values: Array) -> None:
    np.save(path, values, allow_pickle=False)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as handle:
            rows = [json.loads(line) for line in handle]
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError(f"{path}: cannot be read: {error}") from error
    if not all(isinstance(row, dict) and {"labels", "where", "digest"} <= set(row) for row in rows):
        raise EngineError(f"{path}: not the rows of an index")
    return rows


def _reason(row: Mapping[str, Any], similarity: float) -> Reason:
    return Reason(tuple(row["labels"]), similarity, row["where"], row["digest"], row.get("text"))
