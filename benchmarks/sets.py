"""The public data sets of the benchmarks as Datasets; files are JSON Lines, plain or xz, with `text` and `label`."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

from alambic.data.clean import clean_text
from alambic.data.dataset import Dataset, Example

# name -> folder, train part, dev part (None: a tenth of train, stratified), test part
SETS = {
    "banking77": ("banking77", "train", None, "test"),
    "banking77-10shot": ("banking77", "train_10shot", None, "test"),
    "hwu64": ("hwu64", "train", "dev", "test"),
    "snips": ("snips", "train", "dev", "test"),
    "trec": ("trec", "train", None, "test"),
    "sst2": ("sst2", "train", "dev", "test"),
}


def load(folder: Path, name: str) -> tuple[Dataset, Dataset | None, Dataset]:
    """Return train, dev (or None) and test of one set."""
    where, train, dev, test = SETS[name]
    parts = [None if part is None else rows(folder / where, part) for part in (train, dev, test)]
    labels = tuple(sorted({label for _, label in parts[0] or []}))
    sets = [None if part is None else dataset(part, labels) for part in parts]
    assert sets[0] is not None and sets[2] is not None
    return sets[0], sets[1], sets[2]


def rows(folder: Path, part: str) -> list[tuple[str, str]]:
    """Return text and label of each row of one part."""
    plain, packed = folder / f"{part}.jsonl", folder / f"{part}.jsonl.xz"
    with plain.open(encoding="utf-8") if plain.exists() else lzma.open(packed, "rt", encoding="utf-8") as handle:
        read = [json.loads(line) for line in handle]
    return [(r["text"] if "text" in r else " ".join(r["tokens"]), str(r["label"])) for r in read]


def dataset(rows: list[tuple[str, str]], labels: tuple[str, ...]) -> Dataset:
    """Return cleaned rows as a Dataset over `labels`."""
    examples = [Example(clean_text(text).text, (label,), where=f"row {i}") for i, (text, label) in enumerate(rows, 1)]
    unknown = {label for _, label in rows} - set(labels)
    if unknown:
        raise SystemExit(f"labels that train does not have: {sorted(unknown)}")
    return Dataset(tuple(examples), labels)
