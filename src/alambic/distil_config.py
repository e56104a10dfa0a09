"""DistilConfig: the TOML file of `alambic distil`, validated whole, frozen.

Every error names the file, the line, the key, the value got and the values allowed; unknown keys are errors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from alambic import toml_file
from alambic.errors import TaskError
from alambic.task_tables import Name

_GUIDE = "see docs/guides/distil.md"


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DistilSpec(_Spec):
    """What is made."""

    name: Name = Field(description="Short name: names the run folder and the encoder.")
    description: str = Field("", description="One sentence on the encoder, copied to its card.")
    licence: str = Field("unknown", description="Licence of what comes out (SPDX name), copied to its card.")
    languages: tuple[str, ...] = Field((), description="Codes of its languages, copied to its card.")
    seed: int = Field(0, ge=0, description="Seed of every random choice. 0 is a seed.")
    threads: int | None = Field(None, ge=1, description="Threads used to train; all cores when absent.")


class TeacherSpec(_Spec):
    """The encoder that is followed; the student starts as its copy."""

    name: str = Field("all-minilm-l6-v2", description="A name of `alambic bases`, a local folder, or a hub id.")
    revision: str | None = Field(None, description="Commit or tag on the hub.")
    max_tokens: int | None = Field(None, ge=8, description="Tokens read at once; the base's own limit when absent.")


class DataSpec(_Spec):
    """The text that is learnt from."""

    pairs: str = Field(description="Parallel sentences: a file (csv, tsv, jsonl, parquet) with two columns.")
    known: str | None = Field(None, description="Column in the teacher's language; the first of two when absent.")
    new: str | None = Field(None, description="Column in the further language; the second of two when absent.")
    held_out: int = Field(1000, ge=20, description="Pairs set aside to choose the weights by, and never learnt from.")
    known_text: tuple[str, ...] = Field(
        (), description="Files of text in the teacher's language, one sentence a line: keeps what the teacher knows."
    )
    new_text: tuple[str, ...] = Field(
        (), description="Files of text in the further language, one sentence a line: for the vocabulary and its start."
    )


class VocabularySpec(_Spec):
    """The student's vocabulary."""

    pieces: int = Field(
        32_000, ge=1_000, description="Pieces of a new vocabulary for both languages, cased, with accents."
    )
    keep: bool = Field(False, description="True: the teacher's own vocabulary (a teacher of many languages).")


class MaskedSpec(_Spec):
    """Before the teacher is followed, the student guesses masked words of the text; only where this table is there."""

    tokens: int = Field(4_000_000, ge=1_000, description="Tokens read, in as many passes over the text as that takes.")
    train: Literal["all", "embeddings"] = Field("all", description="What learns: all weights, or the word embeddings.")
    mask_share: float = Field(
        0.2,
        gt=0,
        le=0.6,
        description="Share of a line's tokens that are masked and guessed; larger encoders bear more.",
    )
    known_share: float = Field(
        0.0, ge=0, lt=1, description="Share of the tokens in the teacher's language, so that it is not forgotten."
    )
    learning_rate: float = Field(3e-4, gt=0, description="Peak rate of the layers.")
    embedding_rate: float = Field(4e-4, gt=0, description="Peak rate of the word embeddings.")
    head_rate: float = Field(1e-3, gt=0, description="Peak rate of the head that guesses, which is then thrown away.")
    batch_tokens: int = Field(4096, ge=64, description="Tokens of a step, padding included.")
    warmup: float = Field(0.05, ge=0, le=1, description="Share of the steps in which the rate rises.")
    weight_decay: float = Field(0.01, ge=0, description="Of the layers' matrices.")
    max_tokens: int = Field(128, ge=8, description="Tokens read at once; longer lines are learnt in parts.")
    held_out: int = Field(1000, ge=20, description="Lines of each language set aside to score the guesses on.")
    evaluations: int = Field(4, ge=1, description="Scores on the held-out lines.")


class EmbeddingsSpec(_Spec):
    """First stage: the word embeddings alone."""

    epochs: float = Field(0.2, ge=0, description="Passes over the text; 0 leaves the stage out.")
    embedding_rate: float = Field(4e-4, gt=0, description="Peak rate of the word embeddings.")


class TrainSpec(_Spec):
    """Second stage: all weights; and what both stages share."""

    epochs: float = Field(2.0, gt=0, description="Passes over the text; parts of one are allowed.")
    learning_rate: float = Field(2e-4, gt=0, description="Peak rate of the layers.")
    embedding_rate: float = Field(4e-4, gt=0, description="Peak rate of the word embeddings.")
    batch_tokens: int = Field(4096, ge=64, description="Tokens of a step, padding included.")
    contrast: float = Field(0.1, ge=0, description="Weight of the contrastive part of the loss; 0 leaves it out.")
    temperature: float = Field(0.05, gt=0, description="Of the contrastive part; lower is stricter.")
    weight_decay: float = Field(0.01, ge=0, description="Of the layers' matrices.")
    warmup: float = Field(0.05, ge=0, le=1, description="Share of the steps in which the rate rises.")
    max_tokens: int = Field(64, ge=8, description="Longest sentence; longer ones are left out and counted.")
    evaluations: int = Field(6, ge=1, description="Scores on the held-out pairs in a stage.")
    checkpoint_seconds: float = Field(120.0, gt=0, description="Seconds between two checkpoints.")


class DistilConfig(_Spec):
    """A validated configuration; `root` is the folder that the paths of `data` start from."""

    path: Path
    text: str
    root: Path
    distil: DistilSpec
    data: DataSpec
    teacher: TeacherSpec
    vocabulary: VocabularySpec
    masked: MaskedSpec | None
    embeddings: EmbeddingsSpec
    train: TrainSpec

    @property
    def name(self) -> str:
        """Name of the encoder."""
        return self.distil.name

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the file's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def path_of(self, name: str) -> Path:
        """Resolve a path of the configuration."""
        return (self.root / name).expanduser().resolve()


class _File(_Spec):
    distil: DistilSpec
    data: DataSpec
    teacher: TeacherSpec = TeacherSpec()  # type: ignore[call-arg]
    vocabulary: VocabularySpec = VocabularySpec()  # type: ignore[call-arg]
    masked: MaskedSpec | None = None
    embeddings: EmbeddingsSpec = EmbeddingsSpec()  # type: ignore[call-arg]
    train: TrainSpec = TrainSpec()  # type: ignore[call-arg]


_TABLES: dict[str, type[BaseModel]] = {
    "distil": DistilSpec, "data": DataSpec, "teacher": TeacherSpec, "vocabulary": VocabularySpec,
    "masked": MaskedSpec, "embeddings": EmbeddingsSpec, "train": TrainSpec,
}  # fmt: skip


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the file, for editors."""
    schema = _File.model_json_schema(mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "alambic distil file"}


def load_distil(path: Path | str, *, data: Path | None = None) -> DistilConfig:
    """Read and validate a configuration.

    Args:
        path: of the file.
        data: folder that the paths of `[data]` start from; the file's own by default.

    Raises:
        TaskError: the file is missing, is not TOML, or breaks its schema; every fault is listed with its line.
    """
    path = Path(path).resolve()
    text = toml_file.read_text(path)
    raw = toml_file.parse(text, path, hint=_GUIDE)
    file = toml_file.validate(_File, raw, text, path, tables=_TABLES, hint=_GUIDE)
    for table, key, why in _idle(file):
        line = toml_file.line_of(text, (table, key))
        raise TaskError(f"{path.name}:{line}: {table}.{key}: does not apply with {why}", hint=_GUIDE)
    return DistilConfig(
        path=path, text=text, root=(data or path.parent).expanduser().resolve(),
        **{name: getattr(file, name) for name in _File.model_fields},
    )  # fmt: skip


def _idle(file: _File) -> Iterator[tuple[str, str, str]]:
    """Yield the keys that were given and would do nothing: table, key, because of what."""
    if file.vocabulary.keep and "pieces" in file.vocabulary.model_fields_set:
        yield "vocabulary", "pieces", "keep = true"
    if file.masked is not None and file.masked.train == "embeddings":
        for key in ("learning_rate", "weight_decay"):
            if key in file.masked.model_fields_set:
                yield "masked", key, 'train = "embeddings"'
