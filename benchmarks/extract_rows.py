"""The public data sets of `extract.py` as texts with marked spans, the JSON they ask for, and its schema."""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alambic.data.clean import clean_text
from alambic.engines.tag_fields import Fields, fields_of, locate
from alambic.engines.tagging import Span
from alambic.kinds.spans import Marked, answer_of, from_spans, from_tags

SROIE_FIELDS = ("company", "date", "address", "total")
FOLDS = 5


@dataclass(frozen=True)
class Rows:
    """Texts of one part with what a model should say of them.

    Attributes:
        texts: as they are asked.
        answers: JSON of each.
        spans: where values stand in each text.
        choices: number of the chosen value of each chosen field.
    """

    texts: list[str]
    answers: list[dict[str, Any]]
    spans: list[tuple[Span, ...]]
    choices: list[dict[str, int]]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Extraction:
    """One task: its parts, the schema of its answers, and labels and choices in the order of the tagger."""

    train: Rows
    dev: Rows
    test: Rows
    schema: dict[str, Any]
    labels: tuple[str, ...]
    choices: dict[str, tuple[Any, ...]]


def read(folder: Path, part: str) -> list[dict[str, Any]]:
    """Return the rows of `part`.jsonl, plain or xz."""
    plain, packed = folder / f"{part}.jsonl", folder / f"{part}.jsonl.xz"
    with plain.open(encoding="utf-8") if plain.exists() else lzma.open(packed, "rt", encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def load(data: Path, name: str) -> Extraction:
    """Return `snips`, `presidio_pii`, or a fold of `sroie` (``sroie-0`` to ``sroie-4``)."""
    if name == "snips":
        return _snips(data / "snips")
    return _presidio(data / "presidio_pii") if name == "presidio_pii" else _sroie(data / "sroie", int(name[-1]))


def _snips(folder: Path) -> Extraction:
    parts = {part: read(folder, part) for part in ("train", "dev", "test")}
    intents = tuple(sorted({row["label"] for row in parts["train"]}))
    marked = {part: [_with_intent(row) for row in rows] for part, rows in parts.items()}
    labels = _labels(marked["train"])
    schema = _object({"intent": {"enum": list(intents)}, **{label: _LIST for label in labels}}, required=["intent"])
    return Extraction(
        *(_rows(marked[part], schema, {"intent": intents}) for part in parts), schema, labels, {"intent": intents}
    )


def _with_intent(row: dict[str, Any]) -> Marked:
    marked = from_tags(row["tokens"], row["tags"])
    return Marked(marked.text, marked.spans, {"intent": row["label"]})


def _presidio(folder: Path) -> Extraction:
    marked = {
        part: [from_spans(row["text"], row["spans"]) for row in read(folder, part)] for part in ("train", "dev", "test")
    }
    labels = _labels(marked["train"])
    schema = _object({label: _LIST for label in labels})
    return Extraction(*(_rows(rows, schema, {}) for rows in marked.values()), schema, labels, {})


def _sroie(folder: Path, fold: int) -> Extraction:
    """Split the receipts by the digest of their number: one fold is test, an eighth of the others is dev."""
    schema = _object({name: {"type": "string"} for name in SROIE_FIELDS}, required=SROIE_FIELDS)
    fields = fields_of(schema)
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "dev": [], "test": []}
    for row in read(folder, "test"):
        number = int(hashlib.sha256(row["id"].encode()).hexdigest()[:8], 16)
        part = "test" if number % FOLDS == fold else "dev" if number // FOLDS % 8 == 0 else "train"
        parts[part].append(row)
    rows = [_receipts(parts[part], fields) for part in ("train", "dev", "test")]
    return Extraction(*rows, schema, SROIE_FIELDS, {})


def _receipts(rows: Sequence[dict[str, Any]], fields: Fields) -> Rows:
    texts = [clean_text(row["text"]).text for row in rows]
    answers = [{name: row[name] for name in SROIE_FIELDS if row.get(name)} for row in rows]
    found = [locate(text, answer, fields).spans for text, answer in zip(texts, answers, strict=True)]
    return Rows(texts, answers, found, [{} for _ in rows])


_LIST = {"type": "array", "items": {"type": "string"}}


def _object(properties: dict[str, Any], *, required: Sequence[str] = ()) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(required), "additionalProperties": False,
    }  # fmt: skip


def _labels(rows: Sequence[Marked]) -> tuple[str, ...]:
    return tuple(sorted({label for row in rows for _, _, label in row.spans}))


def _rows(marked: Sequence[Marked], schema: dict[str, Any], choices: dict[str, tuple[Any, ...]]) -> Rows:
    """Labels of spans that train does not have are kept: the model cannot find them, and they count as missed."""
    known = set(schema["properties"])
    answers = []
    for row in marked:
        extra = {label: _LIST for _, _, label in row.spans if label not in known}
        answers.append(answer_of(row, {**schema, "properties": {**schema["properties"], **extra}}))
    return Rows(
        [row.text for row in marked],
        answers,
        [tuple(Span(*span) for span in row.spans) for row in marked],
        [{name: values.index(row.values[name]) for name, values in choices.items()} for row in marked],
    )
