"""Shards: the tokens of a corpus as flat binary files, opened without reading them.

    shards.json                what is in the folder; written last
    {train,valid}/SOURCE.bin       token ids, little-endian, documents one after the other, each with the end token
    {train,valid}/SOURCE.idx.npy   int64 offsets of the documents in the .bin, n + 1 of them

Ids take two bytes where the vocabulary allows it. The files are mapped into memory, so opening costs nothing and a
corpus may be larger than the memory. Writing streams: one source and one part at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from alambic.errors import DataError

Part = Literal["train", "valid"]
Tokens = NDArray[np.uint16] | NDArray[np.uint32]
FORMAT = 1
PARTS: tuple[Part, ...] = ("train", "valid")


@dataclass(frozen=True)
class PartCounts:
    """How much there is of one source in one part: tokens with the end tokens, UTF-8 bytes without them."""

    documents: int
    tokens: int
    utf8_bytes: int


@dataclass(frozen=True)
class ShardSource:
    """One source of the corpus.

    Attributes:
        name: of the source, and of its files.
        language: two-letter code.
        licence: SPDX name or words.
        weight: share of the training tokens that are to be drawn from it; they add up to 1 over the sources.
        train: what is learnt from.
        valid: what is held out.
    """

    name: str
    language: str
    licence: str
    weight: float
    train: PartCounts
    valid: PartCounts

    def counts(self, part: Part) -> PartCounts:
        """Return the counts of `part`."""
        return self.train if part == "train" else self.valid


@dataclass(frozen=True)
class Shards:
    """An opened folder of shards.

    Attributes:
        folder: where it is.
        vocabulary: rows that an embedding of these ids needs at least.
        dtype: ``uint16`` or ``uint32``.
        tokenizer_digest: SHA-256 (hex) of the tokenizer.json that made the ids.
        end_id: id that ends each document.
        sources: in the order of the configuration.
    """

    folder: Path
    vocabulary: int
    dtype: str
    tokenizer_digest: str
    end_id: int
    sources: tuple[ShardSource, ...]

    def source(self, name: str) -> ShardSource:
        """Return the source `name`.

        Raises:
            DataError: there is none of that name.
        """
        for source in self.sources:
            if source.name == name:
                return source
        raise DataError(f"{self.folder}: no source {name!r}; known: {', '.join(s.name for s in self.sources)}")

    def tokens(self, part: Part, name: str) -> Tokens:
        """Map the ids of source `name`, [tokens], into memory; an empty part gives an empty array."""
        count = self.source(name).counts(part).tokens
        if count == 0:
            return np.zeros(0, dtype=self.dtype)
        ids: Tokens = np.memmap(self.folder / part / f"{name}.bin", dtype=_little(self.dtype), mode="r", shape=(count,))
        return ids

    def offsets(self, part: Part, name: str) -> NDArray[np.int64]:
        """Map where the documents of source `name` begin, and where the last one ends, [documents + 1]."""
        self.source(name)
        offsets: NDArray[np.int64] = np.load(self.folder / part / f"{name}.idx.npy", mmap_mode="r")
        return offsets

    def total(self, part: Part) -> PartCounts:
        """Return the counts of all sources together."""
        counts = [source.counts(part) for source in self.sources]
        return PartCounts(
            sum(c.documents for c in counts), sum(c.tokens for c in counts), sum(c.utf8_bytes for c in counts)
        )


def open_shards(folder: Path) -> Shards:
    """Open a folder of shards and check that every file is as long as it must be.

    Raises:
        DataError: it is no folder of shards, was made by a newer version, or a file is missing or cut short.
    """
    try:
        record = json.loads((folder / "shards.json").read_text("utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{folder}: no shards.json", hint="alambic pretrain CONFIG --only shards makes it") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / 'shards.json'}: cannot be read ({error})") from error
    if record.get("format") != FORMAT:
        raise DataError(f"{folder}: shards of format {record.get('format')!r}; this version reads {FORMAT}")
    sources = tuple(
        ShardSource(**{**entry, "train": PartCounts(**entry["train"]), "valid": PartCounts(**entry["valid"])})
        for entry in record["sources"]
    )
    shards = Shards(
        folder, record["vocabulary"], record["dtype"], record["tokenizer_digest"], record["end_id"], sources
    )
    _check_files(shards)
    return shards


def write_part(
    folder: Path, part: Part, name: str, documents: Iterable[tuple[Sequence[int], int]], *, dtype: str, end_id: int
) -> PartCounts:
    """Write one part of one source, and return its counts; what an interrupted run wrote whole is not written again.

    Args:
        folder: of the shards.
        part: which half of the split.
        name: of the source.
        documents: ids without the end token, and UTF-8 bytes, of each document; read once.
        dtype: see `dtype_for`.
        end_id: appended to each document.
    """
    (folder / part).mkdir(parents=True, exist_ok=True)
    done = folder / part / f"{name}.done"  # written last, so that it speaks for the files beside it
    if done.is_file():
        return PartCounts(**json.loads(done.read_text("utf-8")))
    offsets, utf8_bytes, total = [0], 0, 0
    with open(folder / part / f"{name}.bin", "wb") as out:
        for ids, size in documents:
            line = np.empty(len(ids) + 1, dtype=_little(dtype))
            line[:-1] = ids
            line[-1] = end_id
            out.write(line.tobytes())
            total += len(line)
            utf8_bytes += size
            offsets.append(total)
    np.save(folder / part / f"{name}.idx.npy", np.array(offsets, dtype=np.int64))
    counts = PartCounts(len(offsets) - 1, total, utf8_bytes)
    beside = done.with_suffix(".part")
    beside.write_text(json.dumps(asdict(counts)), encoding="utf-8")
    beside.replace(done)
    return counts


def write_index(shards: Shards) -> None:
    """Write shards.json, which makes the folder whole, and take away the marks of `write_part`.

    Raises:
        DataError: the shares of the sources do not add up to 1.
    """
    weights = sum(source.weight for source in shards.sources)
    if abs(weights - 1.0) > 1e-6:
        raise DataError(f"{shards.folder}: the weights of the sources add up to {weights:g}, not to 1")
    record: Mapping[str, Any] = {
        "format": FORMAT, "vocabulary": shards.vocabulary, "dtype": shards.dtype,
        "tokenizer_digest": shards.tokenizer_digest, "end_id": shards.end_id,
        "sources": [asdict(source) for source in shards.sources],
    }  # fmt: skip
    (shards.folder / "shards.json").write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")
    for part, source in _each(shards):
        (shards.folder / part / f"{source.name}.done").unlink(missing_ok=True)


def dtype_for(vocabulary: int) -> str:
    """Return the smallest type that holds every id below `vocabulary`."""
    return "uint16" if vocabulary <= 1 << 16 else "uint32"


def _little(dtype: str) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")


def _check_files(shards: Shards) -> None:
    for part, source in _each(shards):
        counts = source.counts(part)
        path = shards.folder / part / f"{source.name}.bin"
        wanted = counts.tokens * np.dtype(shards.dtype).itemsize
        size = path.stat().st_size if path.is_file() else None
        if size != wanted:
            got = "is missing" if size is None else f"has {size:,} bytes"
            raise DataError(f"{path}: {got}; shards.json says {wanted:,}", hint="make the shards again")
        offsets = shards.offsets(part, source.name)
        if len(offsets) != counts.documents + 1 or offsets[-1] != counts.tokens:
            raise DataError(f"{path.with_suffix('.idx.npy')}: does not agree with shards.json")


def _each(shards: Shards) -> Iterator[tuple[Part, ShardSource]]:
    for part in PARTS:
        for source in shards.sources:
            yield part, source


def describe(shards: Shards) -> dict[str, Any]:
    """Return the counts of shards as plain data: by source, by language, and bytes per token."""
    sources: dict[str, dict[str, Any]] = {}
    for source in shards.sources:
        found: dict[str, Any] = {"language": source.language, "licence": source.licence}
        found |= {"weight": round(source.weight, 6), "bytes_per_token": _bytes_per_token([source.train])}
        sources[source.name] = {**found, "train": asdict(source.train), "valid": asdict(source.valid)}
    languages: dict[str, Any] = {}
    for language in sorted({source.language for source in shards.sources}):
        own = [source for source in shards.sources if source.language == language]
        languages[language] = {
            "tokens": sum(source.train.tokens for source in own), "weight": round(sum(s.weight for s in own), 6),
            "bytes_per_token": _bytes_per_token([source.train for source in own]),
        }  # fmt: skip
    total: dict[str, Any] = {part: asdict(shards.total(part)) for part in PARTS}
    return {"vocabulary": shards.vocabulary, "sources": sources, "languages": languages, **total}


def _bytes_per_token(counts: Sequence[PartCounts]) -> float:
    return round(sum(c.utf8_bytes for c in counts) / max(1, sum(c.tokens for c in counts)), 3)
