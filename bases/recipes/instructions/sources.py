"""The data sets that rows are derived from: training parts only, of sets whose trained weights may be shipped."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Source:
    """One file that may be learnt from."""

    licence: str
    origin: str
    part: str = "train"
    share_alike: bool = False


SOURCES = {
    "piaf": Source("Licence Ouverte 2.0", "psorianom/piaf-combo-huggingface"),
    "cnil_faq": Source("Licence Ouverte 2.0", "etalab-ia/piaf-ml", "documents"),
    "orangesum": Source("CC-BY-SA-4.0", "Tixierae/OrangeSum", share_alike=True),
    "ha_intents_fr": Source("CC-BY-4.0", "OHF-Voice/intents"),
    "ha_intents_en": Source("CC-BY-4.0", "OHF-Voice/intents"),
    "clinc150": Source("CC-BY-3.0", "clinc/oos-eval"),
    "banking77": Source("CC-BY-4.0", "PolyAI-LDN/task-specific-datasets"),
    "hwu64": Source("CC-BY-4.0", "jianguoz/Few-Shot-Intent-Detection"),
    "snips": Source("CC0-1.0", "MiuLab/SlotGated-SLU"),
    "bitext_intents": Source(
        "CDLA-Sharing-1.0", "bitext/customer-support-intent-detection-training-dataset", share_alike=True
    ),
    "sms_spam": Source("CC-BY-4.0", "UCI SMS Spam Collection"),
    "presidio_pii": Source("MIT", "microsoft/presidio-research"),
    "nl2bash": Source("MIT", "TellinaTool/nl2bash"),
    "wikisql": Source("BSD-3-Clause", "jkkummerfeld/text2sql-data"),
}
CORPUS = {
    "fr_chat": Source("Apache-2.0", "bofenghuang/vigogne (OpenAssistant)", "jsonl"),
    "en_prompts": Source("Apache-2.0", "yizhongw/self-instruct (P3)", "jsonl"),
    "parallel_fr_en": Source("CC-BY-2.0-FR", "Tatoeba", "jsonl"),
    "fr_sentences": Source("CC0-1.0", "mozilla/common-voice", "txt"),
}
_TEST_PARTS = (
    "test",
    "dev",
    "val",
    "oos_test",
    "oos_dev",
    "test2016",
    "test2017",
    "testcoco",
    "simple_python",
    "multiple",
    "parallel",
    "irrelevance",
)


class Library:
    """Two folders of public data, one of data sets and one of text; a file that is not there gives no rows."""

    def __init__(self, data: Path | None, corpus: Path | None) -> None:
        self.data, self.corpus = data, corpus

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a data set that may be learnt from.

        Raises:
            ValueError: the set is not one of `SOURCES`.
        """
        if name not in SOURCES:
            raise ValueError(f"{name!r} may not be learnt from; known: {', '.join(SOURCES)}")
        if self.data is None:
            return []
        rows = _read(self.data / name / f"{SOURCES[name].part}.jsonl")
        return [row for row in rows if not self._seen(row)]

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a JSON Lines file of the corpus."""
        return [] if self.corpus is None else _read(self.corpus / f"{name}.jsonl")

    def documents(self, name: str) -> list[str]:
        """Return the documents of a text file of the corpus."""
        path = None if self.corpus is None else self.corpus / f"{name}.txt.xz"
        if path is None or not path.is_file():
            return []
        return lzma.open(path, "rt", encoding="utf-8").read().split("<|endoftext|>")

    def held_out(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield every row that is there to measure with, and its set: all but training parts and plain documents."""
        if self.data is None:
            return
        for folder in sorted(p for p in self.data.iterdir() if p.is_dir()):
            for path in sorted({_stem(p) for p in folder.glob("*.jsonl*")}):
                if path in _TEST_PARTS:
                    for row in _read(folder / f"{path}.jsonl"):
                        yield f"{folder.name}/{path}", row

    @cached_property
    def _short(self) -> set[str]:
        from instructions.sentences import plain

        return {plain(row["text"]) for _, row in self.held_out() if isinstance(row.get("text"), str)}

    def _seen(self, row: dict[str, Any]) -> bool:
        """Tell whether a set holds this very text among its test or dev rows too: some overlap as published."""
        from instructions.sentences import plain

        return isinstance(row.get("text"), str) and plain(row["text"]) in self._short


def _stem(path: Path) -> str:
    return path.name.removesuffix(".xz").removesuffix(".jsonl")


def _read(path: Path) -> list[dict[str, Any]]:
    packed = path.with_name(path.name + ".xz")
    if path.is_file():
        text = path.read_text("utf-8")
    elif packed.is_file():
        text = lzma.decompress(packed.read_bytes()).decode("utf-8")
    else:
        return []
    return [json.loads(line) for line in text.split("\n") if line.strip()]
