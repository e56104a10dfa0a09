"""Pre-training: from a configuration and a folder of text to a model directory, by stages of the run folder.

    test-sets    n-grams of every test text
    corpus NAME  one stage a source: kept documents and why the others were dropped
    dedup        duplicates over all sources, and what is held out
    tokenizer    byte-level BPE from a balanced sample
    shards       token ids of every document
    train        the model; resumable

Each stage is known by a digest of what goes in: a second run does no work, a changed source prepares that source again,
and a killed run loses at most the stage that ran (of `train`, the minutes since its last checkpoint).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from alambic import _extras
from alambic.build.crew import processes, shared
from alambic.build.pretraining_plan import PretrainPlan, plan
from alambic.build.pretraining_report import corpus_record, training_lines, write_report
from alambic.data import corpus_contamination as contamination
from alambic.data import shards as shard_files
from alambic.data.corpus import Sieve, decide, draw_rows, prepare_source
from alambic.data.corpus_read import digest_of, files_of
from alambic.data.corpus_store import Store, open_store
from alambic.data.shards import Part, PartCounts, Shards, ShardSource
from alambic.errors import DataError
from alambic.events import Note, Progress, Work
from alambic.pretrain_config import PretrainConfig, SourceSpec
from alambic.workspace import Stage, StageSpec, Workspace, on_disk

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["UNTIL", "PretrainOutcome", "PretrainPlan", "Until", "plan", "pretrain_events"]
Until = Literal["corpus", "tokenizer", "shards", "train"]
UNTIL: tuple[Until, ...] = ("corpus", "tokenizer", "shards", "train")
_CURVE = "curve.svg"
_BATCH = 64  # documents encoded at once
_CHECKED = 200  # documents of each source that must come back from their ids unchanged


@dataclass(frozen=True)
class Prepared:
    """What comes before the training loop.

    Attributes:
        stores: kept documents by source, in the order of the configuration.
        train: rows of each store to learn from.
        valid: rows held out.
        record: the report, as plain data.
        key: digest of the whole corpus.
    """

    stores: tuple[Store, ...]
    train: tuple[np.ndarray[Any, Any], ...]
    valid: tuple[np.ndarray[Any, Any], ...]
    record: dict[str, Any]
    key: str


@dataclass(frozen=True)
class PretrainOutcome:
    """What a run of `alambic pretrain` made; what it did not come to is None.

    Attributes:
        run: run folder.
        report: corpus.md, with corpus.json beside it.
        record: the report as plain data.
        tokenizer: folder of the tokenizer.
        shards: folder of the shards.
        model: folder of the model.
        training: what the training loop says of itself.
        curve: picture of the loss and of held-out bits per byte so far.
    """

    run: Path
    report: Path
    record: dict[str, Any]
    tokenizer: Path | None = None
    shards: Path | None = None
    model: Path | None = None
    training: dict[str, Any] | None = None
    curve: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in vars(self).items()}

    def text(self) -> str:
        """Return the paths and what the training came to, for a person."""
        lines = [f"  report     {self.report}"]
        for name in ("tokenizer", "shards", "model", "curve"):
            path = getattr(self, name)
            lines += [f"  {name:<10} {path}"] if path is not None else []
        return "\n".join(lines + ([] if self.training is None else training_lines(self.training)))


def pretrain_events(
    config: PretrainConfig, run: Path, *, until: Until = "train", minutes: float | None = None
) -> Work[PretrainOutcome]:
    """Run the stages up to `until` in the folder `run`; a generator of events that returns the outcome.

    Args:
        config: what to do.
        run: folder; an earlier run in it is gone on with.
        until: last stage.
        minutes: that the training may take before it stops with a checkpoint.

    Raises:
        AlambicError: see its subclasses; what was finished is kept.
    """
    if until == "train" and config.train.sharding == "full" and processes() > 1:
        from alambic.train.pretrain_sharding import reshards

        reshards()  # what it refuses, it refuses before hours of corpus
    workspace = Workspace(run)
    with workspace.locked(), on_disk(run):
        outcome = yield from _run(config, workspace, until, minutes)
    return outcome


def _run(config: PretrainConfig, workspace: Workspace, until: Until, minutes: float | None) -> Work[PretrainOutcome]:
    prepared = yield from prepare_corpus(config, workspace)
    record = prepared.record
    report = write_report(record, workspace.root)
    if until == "corpus":
        return PretrainOutcome(workspace.root, report, record)
    tokenizer = yield from train_own_tokenizer(config, workspace, prepared)
    if until == "tokenizer":
        return PretrainOutcome(workspace.root, report, record, tokenizer.folder)
    made = yield from make_shards(config, workspace, prepared, tokenizer)
    record = {**record, "shards": made.result}
    report = write_report(record, workspace.root)
    if until == "shards":
        return PretrainOutcome(workspace.root, report, record, tokenizer.folder, made.folder)
    model, training = yield from _train(config, workspace, tokenizer, made, minutes)
    picture = workspace.root / _CURVE
    curve = picture if picture.is_file() else None
    return PretrainOutcome(workspace.root, report, record, tokenizer.folder, made.folder, model, training, curve)


def prepare_corpus(config: PretrainConfig, workspace: Workspace) -> Work[Prepared]:
    """Read, filter and deduplicate all sources."""
    index = yield from _test_sets(config, workspace)
    stages: list[Stage] = []
    for source in config.source:
        stage = yield from _source_stage(config, workspace, source, index)
        stages.append(stage)
    decided = yield from _decide(config, workspace, stages)
    stores = tuple(open_store(stage.folder) for stage in stages)
    for stage, part in zip(stages, decided.result.values(), strict=True):
        if not part["train"]["documents"]:
            raise DataError(
                f"{stage.name}: no document is left to learn from: {_why(stage.result, part)}",
                hint="raise its thresholds (source.clean), or leave the source out",
            )
    with np.load(decided.folder / "rows.npz") as rows:
        parts = {part: tuple(rows[f"{part}-{s.name}"] for s in config.source) for part in ("train", "valid")}
    record = corpus_record(config, [stage.result for stage in stages], decided.result, index)
    return Prepared(stores, parts["train"], parts["valid"], record, decided.key)


def shares_of(config: PretrainConfig, amounts: list[float]) -> list[float]:
    """Return the share of the mix of each source: its amount times its weight, balanced by language.

    Args:
        config: with weights and `[mix]`.
        amounts: tokens (or bytes) of each source, in order.
    """
    weighted = [amount * source.weight for amount, source in zip(amounts, config.source, strict=True)]
    by_language: dict[str, float] = {}
    for source, amount in zip(config.source, weighted, strict=True):
        by_language[source.language] = by_language.get(source.language, 0.0) + amount
    total = sum(weighted)
    wanted = config.mix.languages or {language: amount / total for language, amount in by_language.items()}
    return [
        wanted[source.language] * amount / by_language[source.language]
        for source, amount in zip(config.source, weighted, strict=True)
    ]


def train_own_tokenizer(config: PretrainConfig, workspace: Workspace, prepared: Prepared) -> Work[Stage]:
    """Train the tokenizer, or copy the one that the configuration names."""
    spec = config.tokenizer
    given = (config.path.parent / spec.path).expanduser().resolve() if spec.path is not None else None
    params = {**spec.model_dump(exclude={"path"}), "context": config.model.context, "seed": config.seed}
    inputs = {"corpus": prepared.key} if given is None else {"given": digest_of([given / "tokenizer.json"])}
    if given is None:
        params["mix"] = [config.mix.model_dump(), [source.weight for source in config.source]]
    stage = StageSpec("tokenizer", params, inputs, version=1, libraries=("tokenizers",))

    def work(folder: Path) -> Work[dict[str, Any]]:
        from alambic.model import tokenizer_training as training
        from alambic.model.tokenizer import read_tokenizer

        if given is None:
            yield Progress("tokenizer", 0, 0, {"sample_mb": spec.sample_mb})
            tokenizer = training.train_tokenizer(_sample(config, prepared), vocabulary=spec.vocabulary)
        else:
            tokenizer = read_tokenizer(given)
            if tokenizer.token_to_id(training.START) is None:
                raise DataError(f"{given}: the tokenizer has no {training.START}", hint="leave tokenizer.path out")
        training.save(tokenizer, folder, context_tokens=config.model.context)
        return {"vocabulary": tokenizer.get_vocab_size(with_added_tokens=True)}

    made = yield from workspace.run(stage, work)
    if given is None and made.result["vocabulary"] < spec.vocabulary:
        yield Note(f"tokenizer: {made.result['vocabulary']:,} of {spec.vocabulary:,} entries; the text has no more")
    return made


def make_shards(config: PretrainConfig, workspace: Workspace, prepared: Prepared, tokenizer: Stage) -> Work[Stage]:
    """Write the token ids of every document, after checking that the first ones come back from them unchanged."""
    weights = [config.mix.model_dump(), [source.model_dump() for source in config.source]]
    inputs = {"corpus": prepared.key, "tokenizer": tokenizer.key}
    spec = StageSpec("shards", {"weights": weights}, inputs, version=1, libraries=("tokenizers",))

    def work(folder: Path) -> Work[dict[str, Any]]:
        from alambic.model.tokenizer import read_tokenizer
        from alambic.model.tokenizer_training import START

        loaded = read_tokenizer(tokenizer.folder)
        vocabulary = loaded.get_vocab_size(with_added_tokens=True)
        end = loaded.token_to_id(START)
        dtype = shard_files.dtype_for(vocabulary)
        counts: list[dict[Part, PartCounts]] = []
        for i, source in enumerate(config.source):
            _check_lossless(source.name, prepared.stores[i], loaded)
            found: dict[Part, PartCounts] = {}
            for part in shard_files.PARTS:
                rows = (prepared.train if part == "train" else prepared.valid)[i]
                done = sum(c["train"].tokens for c in counts)
                yield Progress(f"shards {source.name}", i, len(config.source), {"million_tokens": done / 1e6})
                documents = _encoded(prepared.stores[i], rows, loaded)
                found[part] = shard_files.write_part(folder, part, source.name, documents, dtype=dtype, end_id=end)
            counts.append(found)
        shares = shares_of(config, [float(found["train"].tokens) for found in counts])
        sources = tuple(
            ShardSource(source.name, source.language, source.licence, share, found["train"], found["valid"])
            for source, share, found in zip(config.source, shares, counts, strict=True)
        )
        digest = hashlib.sha256((tokenizer.folder / "tokenizer.json").read_bytes()).hexdigest()
        shards = Shards(folder, vocabulary, dtype, digest, end, sources)
        shard_files.write_index(shards)
        return shard_files.describe(shards)

    made = yield from workspace.run(spec, work, resumable=True)
    return made


def _test_sets(config: PretrainConfig, workspace: Workspace) -> Work[tuple[contamination.TestIndex, str] | None]:
    """Index the test sets; return the index and its key, None when there are none."""
    if not config.test_sets:
        yield Note("contamination: no test sets are named, so none is looked for", "warning")
        return None
    given = config.contamination
    files = contamination.test_files(config.test_sets, given.patterns)
    params = {"names": [name for name, _ in files], "ngram": given.ngram, "short": given.short}
    spec = StageSpec("test-sets", params, {"files": digest_of([path for _, path in files])}, version=1)

    def work(folder: Path) -> Work[dict[str, Any]]:
        index = yield from contamination.build_index(files, ngram=given.ngram, short=given.short)
        index.save(folder / "index.npz")
        return {"files": len(files), "texts": index.texts, "not_searched": index.not_searched}

    stage = yield from workspace.run(spec, work)
    return contamination.TestIndex.load(stage.folder / "index.npz"), stage.key


def _source_stage(
    config: PretrainConfig, workspace: Workspace, source: SourceSpec, index: tuple[contamination.TestIndex, str] | None
) -> Work[Stage]:
    from alambic.model.tokenizer_training import TEMPLATE, own_template

    files = files_of(source.path, config.corpus)
    clean = config.cleaning(source)
    params = {"source": source.model_dump(include={"name", "language", "mb"}), "clean": clean.model_dump(),
              "seed": config.seed, "template": TEMPLATE}  # fmt: skip
    inputs = {"files": digest_of(files), "test-sets": index[1] if index is not None else "none"}
    spec = StageSpec(f"corpus-{source.name}", params, inputs, version=1)

    def work(folder: Path) -> Work[dict[str, Any]]:
        sieve = Sieve(source.language, clean, index[0] if index is not None else None)
        render = own_template().render
        counts = yield from prepare_source(source, files, sieve, render, seed=config.seed, out=folder)
        return counts.to_dict()

    stage = yield from workspace.run(spec, work)
    return stage


def _decide(config: PretrainConfig, workspace: Workspace, stages: list[Stage]) -> Work[Stage]:
    params = {"dedup": config.dedup.model_dump(), "valid": config.valid.model_dump(), "seed": config.seed,
              "order": [source.name for source in config.source]}  # fmt: skip
    spec = StageSpec("dedup", params, {stage.name: stage.key for stage in stages}, version=1)

    def work(folder: Path) -> Work[dict[str, Any]]:
        stores = [(s.name, open_store(stage.folder)) for s, stage in zip(config.source, stages, strict=True)]
        yield Progress("dedup", 0, sum(len(store) for _, store in stores))
        made = decide(stores, config.dedup, config.valid, seed=config.seed)
        parts = {"train": made.train, "valid": made.valid, "exact": made.exact, "near": made.near}
        arrays = {f"{p}-{s.name}": r for p, rows in parts.items() for s, r in zip(config.source, rows, strict=True)}
        np.savez(folder / "rows.npz", **arrays)  # type: ignore[arg-type]
        return {
            name: _amounts(store, {p: rows[i] for p, rows in parts.items()}) for i, (name, store) in enumerate(stores)
        }

    stage = yield from workspace.run(spec, work)
    return stage


def _why(counts: dict[str, Any], decided: dict[str, Any]) -> str:
    found = {reason: dropped["documents"] for reason, dropped in counts["dropped"].items()}
    found |= {f"{part} duplicates": decided[part]["documents"] for part in ("exact", "near")}
    told = [f"{count:,} {reason}" for reason, count in sorted(found.items(), key=lambda item: -item[1]) if count]
    return ", ".join(told) or "its files are empty"


def _amounts(store: Store, parts: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part, rows in parts.items():
        found[part] = {"documents": len(rows), "utf8_bytes": int(store.sizes[rows].sum())}
        if part in ("exact", "near"):
            found[part]["examples"] = [" ".join(text[:640].split())[:160] for text in store.texts(rows[:3].tolist())]
    return found


def _sample(config: PretrainConfig, prepared: Prepared) -> Iterator[str]:
    """Yield training documents for the tokenizer, as much of each source as its share of the mix."""
    sizes = [float(store.sizes[rows].sum()) for store, rows in zip(prepared.stores, prepared.train, strict=True)]
    for i, share in enumerate(shares_of(config, sizes)):
        store, rows = prepared.stores[i], prepared.train[i]
        limit = share * config.tokenizer.sample_mb * 1e6
        name = config.source[i].name + "/tokenizer"
        yield from store.texts(draw_rows(store.sizes, rows, limit, name=name, seed=config.seed))


def _encoded(store: Store, rows: Any, tokenizer: Tokenizer) -> Iterator[tuple[list[int], int]]:
    from alambic.model.tokenizer_training import encode_plain

    for start in range(0, len(rows), _BATCH):
        block = rows[start : start + _BATCH].tolist()
        texts = list(store.texts(block))
        sizes = store.sizes[block].tolist()
        yield from zip(encode_plain(tokenizer, texts, special=store.chat), sizes, strict=True)


def _check_lossless(name: str, store: Store, tokenizer: Tokenizer) -> None:
    from alambic.model.tokenizer_training import first_loss

    lost = first_loss(tokenizer, list(store.texts(range(min(_CHECKED, len(store))))))
    if lost is not None:
        at, text, back = lost
        raise DataError(
            f"source {name!r}: a text does not come back from its tokens: character {at}, {text!r} became {back!r}",
            hint="use a byte-level tokenizer without normalisation",
        )


def _draw(log: Path, picture: Path) -> Work[None]:
    """Draw the curve of a training so far; a picture is not worth a training, so what is missing is said."""
    if not _extras.available("matplotlib"):
        yield Note("no picture of the loss: it needs matplotlib: pip install 'alambic[build]'")
        return
    from alambic.report.pretraining import curve_of, write_curve
    from alambic.train.pretrain_log import Log

    curve = curve_of(Log(log).read())
    if curve.tokens:
        write_curve(curve, picture)


class _Paused(Exception):
    def __init__(self, training: dict[str, Any]) -> None:
        self.training = training


def _train(
    config: PretrainConfig, workspace: Workspace, tokenizer: Stage, shards: Stage, minutes: float | None
) -> Work[tuple[Path | None, dict[str, Any]]]:
    """Train; return the Model directory (None when time was up before the last step) and what the loop says."""
    from alambic.train.pretrain_params import PretrainParams

    given = {**config.model.model_dump(), **config.train.model_dump()}
    params = PretrainParams(
        **given, seed=config.seed, threads=config.pretrain.threads, sitting_minutes=minutes
    ).checked()
    identity = {**params.identity(), "tokens": params.tokens, "passes": params.passes}
    inputs = {"shards": shards.key, "tokenizer": tokenizer.key}
    spec = StageSpec("train", identity, inputs, version=1, libraries=("torch", "transformers"))
    licences = "; ".join(sorted({source.licence for source in config.source}))
    base = {"name": config.name, "description": config.pretrain.description, "licence": licences}

    def work(folder: Path) -> Work[dict[str, Any]]:
        result = yield from shared("pretrain", shards.folder, tokenizer.folder, params, folder / "model", base=base)
        yield from _draw(result.log, workspace.root / _CURVE)
        if not result.finished:
            raise _Paused(result.to_dict())
        return dict(result.to_dict())

    try:
        stage = yield from workspace.run(spec, work, resumable=True)
    except _Paused as paused:
        return None, paused.training
    return stage.folder / "model", stage.result
