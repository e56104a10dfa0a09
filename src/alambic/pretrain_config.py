"""PretrainConfig: the TOML file of `alambic pretrain`, validated whole, frozen.

One format serves every size, from a few million parameters on a processor to a large model on several accelerators.
Every error names the file, the line, the key, the value got and the values allowed; unknown keys are errors.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from alambic import toml_file
from alambic.errors import TaskError, nearest
from alambic.task_tables import Name

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PretrainSpec(_Spec):
    """What is made."""

    name: Name = Field(description="Short name: names the run folder and the model.")
    description: str = Field("", description="One sentence on the model, copied to its record.")
    seed: int = Field(0, ge=0, description="Seed of every random choice. 0 is a seed.")
    threads: int | None = Field(None, ge=1, description="Threads used to train; all cores when absent.")
    corpus: str | None = Field(None, description="Folder that the paths of sources start from; or give --corpus.")


class CleanSpec(_Spec):
    """Thresholds of the quality rules (docs/guides/pretrain.md gives the source of each); shares are 0..1."""

    filters: bool = Field(True, description="False keeps every document that is not empty (text checked by hand).")
    language_check: bool = Field(True, description="Drop a document that is in another language than its source.")
    min_words: int = Field(40, ge=0, description="Fewest words of a document.")
    mean_word_min: float = Field(2.5, ge=0, description="Shortest mean length of its words, in characters.")
    mean_word_max: float = Field(12.0, gt=0, description="Longest mean length of its words, in characters.")
    filler: bool = Field(True, description="Drop short pages with placeholder text or a notice of missing scripts.")
    stop_words: int = Field(2, ge=0, description="Different function words of its language, at least.")
    alphabetic_words: Share = Field(0.7, description="Smallest share of words that have a letter.")
    symbols: Share = Field(0.35, description="Largest share of characters that are neither letter, digit nor space.")
    digits: Share = Field(0.25, description="Largest share of characters that are digits.")
    bullet_lines: Share = Field(0.9, description="Largest share of lines that begin with a bullet.")
    ellipsis_lines: Share = Field(0.3, description="Largest share of lines that end with an ellipsis.")
    duplicate_lines: Share = Field(0.3, description="Largest share of characters in lines that came before.")
    top_ngrams: tuple[Share, Share, Share] = Field(
        (0.2, 0.18, 0.16), description="Largest share of words in the most frequent 2-, 3- and 4-gram."
    )
    duplicate_ngrams: tuple[Share, Share] = Field(
        (0.25, 0.2), description="Largest share of words in 5- and 10-grams that came before."
    )
    mojibake: Share = Field(0.001, description="Largest share of characters wrongly decoded.")
    personal_data: Literal["keep", "drop"] = Field(
        "keep", description="drop: leave out documents with a likely e-mail address, telephone, card, IBAN or NIR."
    )


class SourceSpec(_Spec):
    """One source of text."""

    name: Name = Field(description="Short name, used in reports and for files.")
    path: str = Field(description="File or glob (.txt, .jsonl, plain or .xz, .gz, .bz2, .zst), from the corpus folder.")
    language: str = Field(pattern=r"^[a-z]{2,3}$", description="Code of its language: fr, en ...")
    licence: str = Field(min_length=1, description="SPDX name or words; copied to the model's record.")
    weight: float = Field(1.0, gt=0, description="Its tokens count this many times in the mix of training.")
    mb: float | None = Field(None, gt=0, description="Read at most this many 10^6 bytes of text, drawn at random.")
    clean: dict[str, Any] = Field(default_factory=dict, description="Thresholds of [clean] that differ here.")


class DedupSpec(_Spec):
    """How duplicates are found."""

    exact: bool = Field(True, description="Drop a document whose text came before (case and white space ignored).")
    near: bool = Field(True, description="Drop a document that is nearly one that came before (MinHash).")
    threshold: float = Field(0.75, gt=0.3, lt=1.0, description="Jaccard similarity of 5-grams of words from which.")


class ContaminationSpec(_Spec):
    """Test sets whose texts may not be in the corpus."""

    folders: tuple[str, ...] = Field((), description="Folders or files, from the configuration; or --test-sets.")
    patterns: tuple[str, ...] = Field(
        ("*test*", "*dev*", "*val*"), description="Names of the files read in those folders."
    )
    ngram: int = Field(13, ge=5, le=50, description="Words in a row that tell that a test text is in a document.")
    short: int = Field(8, ge=4, le=50, description="Test texts of fewer than ngram words are looked for from here on.")


class MixSpec(_Spec):
    """Balance of the training tokens."""

    languages: dict[str, float] = Field(
        default_factory=dict, description="Share of the training tokens by language; by weights alone when absent."
    )


class TokenizerSpec(_Spec):
    """The tokenizer to be trained: byte-level BPE."""

    vocabulary: int = Field(16384, ge=512, description="Entries, special tokens and spare ids included.")
    sample_mb: float = Field(20.0, gt=0, description="10^6 bytes of training text to learn from, balanced as the mix.")
    path: str | None = Field(None, description="Folder of a tokenizer to use instead of training one.")


class ModelSpec(_Spec):
    """Shape of the model and its objective."""

    objective: Literal["causal", "masked"] = Field("causal", description="causal: a decoder. masked: an encoder.")
    hidden: int = Field(ge=32, description="Width.")
    layers: int = Field(ge=1, description="Blocks.")
    heads: int = Field(ge=1, description="Heads of attention; hidden is a multiple of them.")
    kv_heads: int | None = Field(
        None, ge=1, description="Heads of keys and values (causal); as many as heads if absent."
    )
    ffn: int | None = Field(None, ge=32, description="Width of the feed-forward part; 8/3 of hidden when absent.")
    context: int = Field(512, ge=32, description="Tokens that are read at once.")
    rope_theta: float = Field(10_000.0, gt=0, description="Base of the rotary positions.")
    mask_share: float = Field(0.3, gt=0, lt=1, description="Share of tokens to be guessed (masked).")
    document_mask: bool = Field(True, description="A token sees its own document only.")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.hidden % self.heads:
            raise ValueError(f"hidden = {self.hidden} is no multiple of heads = {self.heads}")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"heads = {self.heads} is no multiple of kv_heads = {self.kv_heads}")
        if self.objective == "masked" and self.kv_heads not in (None, self.heads):
            raise ValueError("kv_heads: an encoder (objective = 'masked') has as many as heads")
        return self


class TrainSpec(_Spec):
    """How it is trained."""

    tokens: int | None = Field(None, ge=1, description="Tokens to train on.")
    passes: float | None = Field(None, gt=0, description="Or: passes over the corpus.")
    batch_tokens: int = Field(32_768, ge=32, description="Tokens of one step of the optimiser.")
    micro_tokens: int | None = Field(None, ge=32, description="Tokens computed at once; chosen when absent.")
    optimizer: Literal["adamw", "muon"] = Field("muon", description="muon: matrices by Muon, the rest by AdamW.")
    learning_rate: float = Field(3e-3, gt=0, description="Peak rate of AdamW.")
    muon_rate: float = Field(6e-3, gt=0, description="Peak rate of Muon, on the scale of AdamW's.")
    weight_decay: float = Field(0.1, ge=0, le=1, description="Of matrices.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="Of AdamW.")
    schedule: Literal["cosine", "wsd"] = Field("wsd", description="wsd: warm up, stay, decay at the end.")
    warmup: Share = Field(0.02, description="Share of the steps in which the rate rises.")
    decay: Share = Field(0.2, description="Share of the steps in which it falls (wsd).")
    final_rate: Share = Field(0.0, description="Rate at the end, as a share of the peak.")
    z_loss: float = Field(1e-4, ge=0, le=1, description="Weight of log(Z)^2, which keeps the logits small.")
    clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    precision: Literal["auto", "f32", "bf16"] = Field("auto", description="auto: bf16 where the machine has it.")
    compile: Literal["auto", "on", "off"] = Field("auto", description="torch.compile; auto: where it pays.")
    sharding: Literal["none", "full"] = Field(
        "none", description="full: weights, gradients and optimiser state are cut over the processes (FSDP)."
    )
    checkpoint_minutes: float = Field(10.0, gt=0, description="Minutes between two checkpoints.")
    valid_every: int | None = Field(None, ge=1, description="Tokens between two validations; a tenth when absent.")
    valid_tokens: int = Field(
        50_000, ge=32, description="Held-out tokens of each source read by a validation on the way."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where it is computed.")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.tokens is None) == (self.passes is None):
            raise ValueError("give tokens or passes, one of the two")
        if self.warmup + (self.decay if self.schedule == "wsd" else 0.0) > 1.0:
            raise ValueError("warmup and decay together are more than the whole training")
        return self


class ValidSpec(_Spec):
    """What is held out."""

    share: float = Field(0.01, gt=0, lt=0.5, description="Share of the text of each source, by whole documents.")
    documents: int | None = Field(None, ge=1, description="Or: documents of each source.")
    max_mb: float = Field(1.0, gt=0, description="Most 10^6 bytes held out of a source.")


class PretrainConfig(_Spec):
    """A validated configuration.

    Attributes:
        path: of the file.
        text: of the file.
        corpus: folder that the paths of sources start from.
        test_sets: folders of `[contamination]`, resolved.
    """

    path: Path
    text: str
    corpus: Path
    test_sets: tuple[Path, ...]
    pretrain: PretrainSpec
    source: tuple[SourceSpec, ...]
    clean: CleanSpec
    dedup: DedupSpec
    contamination: ContaminationSpec
    mix: MixSpec
    tokenizer: TokenizerSpec
    model: ModelSpec
    train: TrainSpec
    valid: ValidSpec

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.pretrain.name

    @property
    def seed(self) -> int:
        """Seed of every random choice."""
        return self.pretrain.seed

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the file's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def cleaning(self, source: SourceSpec) -> CleanSpec:
        """Return `[clean]` with what `source` has otherwise."""
        return CleanSpec.model_validate({**self.clean.model_dump(), **source.clean})


class _File(_Spec):
    pretrain: PretrainSpec
    source: tuple[SourceSpec, ...] = Field(min_length=1)
    model: ModelSpec
    train: TrainSpec
    clean: CleanSpec = CleanSpec()  # type: ignore[call-arg]
    dedup: DedupSpec = DedupSpec()  # type: ignore[call-arg]
    contamination: ContaminationSpec = ContaminationSpec()  # type: ignore[call-arg]
    mix: MixSpec = MixSpec()
    tokenizer: TokenizerSpec = TokenizerSpec()  # type: ignore[call-arg]
    valid: ValidSpec = ValidSpec()  # type: ignore[call-arg]


_TABLES: dict[str, type[BaseModel]] = {
    "pretrain": PretrainSpec, "source": SourceSpec, "clean": CleanSpec, "dedup": DedupSpec,
    "contamination": ContaminationSpec, "mix": MixSpec, "tokenizer": TokenizerSpec, "model": ModelSpec,
    "train": TrainSpec, "valid": ValidSpec,
}  # fmt: skip


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the file, for editors."""
    schema = _File.model_json_schema(mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "alambic pretrain file"}


def load_pretrain(path: Path | str, *, corpus: Path | None = None, test_sets: tuple[Path, ...] = ()) -> PretrainConfig:
    """Read and validate a configuration.

    Args:
        path: of the file.
        corpus: folder that the paths of sources start from, instead of `pretrain.corpus`; the file's own by default.
        test_sets: folders added to `contamination.folders`.

    Raises:
        TaskError: the file is missing, is not TOML, or breaks its schema; every fault is listed with its line.
    """
    path = Path(path).resolve()
    text = toml_file.read_text(path)
    raw = toml_file.parse(text, path, hint="see docs/guides/pretrain.md")
    file = toml_file.validate(_File, raw, text, path, tables=_TABLES, hint="see docs/guides/pretrain.md")
    wrong = _faults(file)
    if wrong:
        raise TaskError("\n".join(f"{path.name}:{toml_file.line_of(text, loc)}: {fault}" for loc, fault in wrong))
    root = corpus or path.parent / (file.pretrain.corpus or ".")
    named = tuple(path.parent / name for name in file.contamination.folders)
    return PretrainConfig(
        path=path, text=text, corpus=root.expanduser().resolve(),
        test_sets=tuple(p.expanduser().resolve() for p in (*named, *test_sets)),
        **{name: getattr(file, name) for name in _File.model_fields},
    )  # fmt: skip


def _faults(file: _File) -> list[tuple[tuple[str | int, ...], str]]:
    faults: list[tuple[tuple[str | int, ...], str]] = []
    twice = {name for name, n in Counter(source.name for source in file.source).items() if n > 1}
    languages = {source.language for source in file.source}
    for i, source in enumerate(file.source):
        if source.name in twice:
            faults.append((("source", i, "name"), f"source[{i}].name: {source.name!r} is there twice"))
        try:
            CleanSpec.model_validate(source.clean)
        except ValidationError as error:
            for fault in error.errors():
                key = str(fault["loc"][0])
                known = nearest(key, CleanSpec.model_fields)
                what = f"unknown key; {known}" if fault["type"] == "extra_forbidden" else fault["msg"]
                faults.append((("source", i, "clean"), f"source[{i}].clean.{key}: {what}"))
    shares = file.mix.languages
    if shares and set(shares) != languages:
        text = f"mix.languages has {', '.join(sorted(shares))}; the sources have {', '.join(sorted(languages))}"
        faults.append((("mix", "languages"), text))
    if any(share <= 0 for share in shares.values()) or (shares and abs(sum(shares.values()) - 1) > 0.001):
        faults.append((("mix", "languages"), f"mix.languages: shares above 0 that add up to 1, not {shares}"))
    if file.contamination.short > file.contamination.ngram:
        faults.append((("contamination", "short"), "contamination.short: more than contamination.ngram"))
    return faults
