"""Teaching an encoder a further language: from a configuration to an encoder folder, by stages of the run folder.

    vocabulary   pieces of both languages, and where their embeddings start
    masked       where [masked] asks for it: the student guesses masked words of the further language; resumable
    teacher      the teacher's embeddings of every sentence it reads; resumable
    embeddings   the student's word embeddings learn alone; resumable
    all          all its weights learn; resumable

Each stage is known by a digest of what goes in, so a second run does no work and a killed one goes on from its last
checkpoint. What comes out is a folder that `[base] name`, transformers and sentence-transformers open.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from alambic.data.parallel import ParallelText, digest_of, hold_out, hold_out_lines, read_lines, read_parallel
from alambic.distil_config import DistilConfig, MaskedSpec
from alambic.events import Note, Work
from alambic.model.bases import Base, resolve
from alambic.model.encoder import Encoder, load_tokenizer
from alambic.model.vocabulary import mask_id
from alambic.task import BaseSpec
from alambic.train.crosslingual import FollowParams, follow, retrieval, teacher_vectors
from alambic.train.masked import Lines, MaskedParams, learn_masked
from alambic.workspace import Stage, StageSpec, Workspace, write_text

_WORD = re.compile(r"[^\W\d_]+")
_TRAINING = ("torch", "transformers", "tokenizers")


@dataclass(frozen=True)
class DistilOutcome:
    """What a run of `alambic distil` made.

    Attributes:
        encoder: folder of the encoder.
        record: pairs, vocabulary, steps, tokens, seconds and scores, as plain data.
    """

    encoder: Path
    record: dict[str, Any]


@dataclass(frozen=True)
class _Text:
    """What is learnt from; the held-out sentences are in none but `held_out`.

    `guessed` are the lines of it that the stage `masked` learns from and those that it is scored on.
    """

    train: ParallelText
    held_out: ParallelText
    known: tuple[str, ...]
    new: tuple[str, ...]
    guessed: tuple[Lines, Lines] | None = None

    @cached_property
    def targets(self) -> list[str]:
        """Every sentence that the teacher reads, once."""
        return list(dict.fromkeys((*self.train.known, *self.known)))

    @cached_property
    def rows(self) -> list[tuple[str, int]]:
        """Every sentence that the student reads, and the number of its target."""
        number = {text: i for i, text in enumerate(self.targets)}
        pairs = zip(self.train.known, self.train.new, strict=True)
        both = [row for k, n in pairs for row in ((k, number[k]), (n, number[k]))]
        return list(dict.fromkeys([*both, *((text, number[text]) for text in self.known)]))

    @cached_property
    def digest(self) -> str:
        """Digest of all of it."""
        return digest_of((self.train.digest, self.held_out.digest, digest_of(self.known), digest_of(self.new)))


def distil_events(config: DistilConfig, run: Path) -> Work[DistilOutcome]:
    """Make the encoder of `config` in the folder `run`; its own folder there is `encoder`.

    Raises:
        DataError: a file is missing or holds too little.
        BaseModelError: the teacher cannot be had or is no encoder.
        TrainError: teacher and student do not fit, no token can be masked, or the loss diverges.
        WorkspaceError: the run folder cannot be written, or another run holds it.
    """
    base = _teacher(config)
    if config.masked is not None and config.vocabulary.keep:
        mask_id(load_tokenizer(base.folder))  # a missing mask is told before anything slow
    text, notes = _read(config)
    for note in notes:
        yield Note(note)
    workspace = Workspace(run)
    with workspace.locked():
        vocabulary = None if config.vocabulary.keep else (yield from _vocabulary(config, workspace, base, text))
        stages: list[Stage] = []
        if config.masked is not None:
            stages.append((yield from _masked(config, workspace, base, text, vocabulary)))
        teacher = yield from _targets(config, workspace, base, text)
        for name in ("embeddings", "all"):
            if name == "embeddings" and not config.embeddings.epochs:
                continue
            before = stages[-1] if stages else vocabulary
            stages.append((yield from _train(config, workspace, name, base, text, teacher, before)))
        record = _record(config, base, text, vocabulary, stages)
        _write_encoder(config, stages[-1].folder / "model", run / "encoder", record)
    return DistilOutcome(run / "encoder", record)


def _teacher(config: DistilConfig) -> Base:
    spec = config.teacher
    named = BaseSpec(name=spec.name, revision=spec.revision, max_tokens=spec.max_tokens)  # type: ignore[call-arg]
    return resolve(named, root=config.root)


def _read(config: DistilConfig) -> tuple[_Text, list[str]]:
    data = config.data
    pairs = read_parallel(config.path_of(data.pairs), known=data.known, new=data.new)
    train, held_out = hold_out(pairs, number=data.held_out)
    hidden = {*held_out.known, *held_out.new}
    known, new = (
        tuple(dict.fromkeys(text for text in read_lines([config.path_of(f) for f in files]) if text not in hidden))
        for files in (data.known_text, data.new_text)
    )
    notes = [*pairs.notes, f"{len(train):,} pairs to learn from, {len(held_out):,} held out; {len(known):,} more texts "
             f"in the teacher's language, {len(new):,} in the further one"]  # fmt: skip
    # All the text there is: the sentences of the pairs too.
    guessed = None if config.masked is None else _lines(config.masked, (*train.new, *new), (*train.known, *known))
    return _Text(train, held_out, known, new, guessed), notes


def _vocabulary(config: DistilConfig, workspace: Workspace, base: Base, text: _Text) -> Work[Stage]:
    spec = StageSpec(
        "vocabulary", {"pieces": config.vocabulary.pieces}, {"text": text.digest, "teacher": base.digest},
        libraries=("tokenizers", "scipy"),
    )  # fmt: skip

    def work(folder: Path) -> Work[dict[str, Any]]:
        from alambic.model.vocabulary import count_words, train_vocabulary
        from alambic.model.vocabulary_align import align_words
        from alambic.model.vocabulary_company import alike
        from alambic.model.vocabulary_start import special_tokens, start_embeddings

        teacher = Encoder.load(base)
        counts = count_words((*text.train.known, *text.known)), count_words((*text.train.new, *text.new))
        tokenizer = train_vocabulary(counts, pieces=config.vocabulary.pieces, pad_id=teacher.pad_id)
        yield Note(f"vocabulary: {tokenizer.get_vocab_size():,} pieces")
        lexicon = align_words(_words(text.train.known), _words(text.train.new))
        yield Note(f"vocabulary: {len(lexicon):,} words have a translation in the pairs")
        near = alike(_words((*text.train.new, *text.new)), lexicon)
        embeddings = teacher.backbone.get_input_embeddings().weight.detach().numpy()
        start = start_embeddings(
            tokenizer, teacher.tokenizer, embeddings, known=counts[0], new=counts[1], lexicon=lexicon,
            neighbours=near, special=special_tokens(teacher),
        )  # fmt: skip
        tokenizer.save(str(folder / "tokenizer.json"))
        np.save(folder / "start.npy", start.table)
        return {"pieces": tokenizer.get_vocab_size(), "translated": len(lexicon), "sources": start.sources}

    return (yield from workspace.run(spec, work))


def _words(texts: Sequence[str]) -> list[list[str]]:
    return [_WORD.findall(text.lower()) for text in texts]


def _masked(
    config: DistilConfig, workspace: Workspace, base: Base, text: _Text, vocabulary: Stage | None
) -> Work[Stage]:
    assert config.masked is not None and text.guessed is not None, "the stage was asked for"
    masked, lines = config.masked, text.guessed
    params = _masked_params(config, masked)
    inputs = {"text": text.digest, "base": base.digest, "before": vocabulary.key if vocabulary else ""}
    identity = {**asdict(replace(params, checkpoint_seconds=0.0, threads=None)), "held_out": masked.held_out}
    spec = StageSpec("masked", identity, inputs, libraries=_TRAINING)

    def work(folder: Path) -> Work[dict[str, Any]]:
        student = _student(base, vocabulary)
        done = yield from learn_masked(student, *lines, params=params, checkpoint=folder / "checkpoint", key=spec.key)
        if done.interrupted:
            raise KeyboardInterrupt  # the checkpoint is kept; the same command goes on from it
        student.save(folder / "model")
        return asdict(done)

    return (yield from workspace.run(spec, work, resumable=True))


def _masked_params(config: DistilConfig, masked: MaskedSpec) -> MaskedParams:
    params = MaskedParams(
        seed=config.distil.seed, threads=config.distil.threads, checkpoint_seconds=config.train.checkpoint_seconds,
        **masked.model_dump(exclude={"held_out"}),
    )  # fmt: skip
    # Where only the embeddings learn, the layers' rate and decay say nothing.
    return params if params.train == "all" else replace(params, learning_rate=0.0, weight_decay=0.0)


def _lines(masked: MaskedSpec, new: Sequence[str], known: Sequence[str]) -> tuple[Lines, Lines]:
    """Return the lines to guess in, and those to score the guesses on."""
    learnt, held = hold_out_lines(new, number=masked.held_out)
    if not masked.known_share:
        return Lines(learnt), Lines(held)
    learnt_known, held_known = hold_out_lines(known, number=masked.held_out)
    return Lines(learnt, learnt_known), Lines(held, held_known)


def _targets(config: DistilConfig, workspace: Workspace, base: Base, text: _Text) -> Work[Stage]:
    spec = StageSpec(
        "teacher", {"max_tokens": base.max_tokens}, {"text": digest_of(text.targets), "teacher": base.digest},
        libraries=_TRAINING,
    )  # fmt: skip

    def work(folder: Path) -> Work[dict[str, Any]]:
        teacher = Encoder.load(base)
        vectors = yield from teacher_vectors(
            teacher, text.targets, folder / "parts", threads_used=config.distil.threads
        )
        np.save(folder / "targets.npy", vectors)
        shutil.rmtree(folder / "parts")
        return {"texts": len(vectors), "width": int(vectors.shape[1])}

    return (yield from workspace.run(spec, work, resumable=True))


def _train(
    config: DistilConfig, workspace: Workspace, name: str, base: Base, text: _Text, teacher: Stage, before: Stage | None
) -> Work[Stage]:
    params = _params(config, name)
    inputs = {"text": text.digest, "teacher": teacher.key, "base": base.digest, "before": before.key if before else ""}
    spec = StageSpec(name, asdict(replace(params, checkpoint_seconds=0.0, threads=None)), inputs, libraries=_TRAINING)

    def work(folder: Path) -> Work[dict[str, Any]]:
        student = _student(base, before)
        targets = np.load(teacher.folder / "targets.npy")
        done = yield from follow(
            student, text.rows, targets, text.held_out, params=params, checkpoint=folder / "checkpoint", key=spec.key
        )
        if done.interrupted:
            raise KeyboardInterrupt  # the checkpoint is kept; the same command goes on from it
        student.save(folder / "model")
        scores = retrieval(student, text.held_out)
        return {**asdict(done), "retrieval": asdict(scores)}

    return (yield from workspace.run(spec, work, resumable=True))


def _params(config: DistilConfig, name: str) -> FollowParams:
    shared = FollowParams(seed=config.distil.seed, threads=config.distil.threads, **config.train.model_dump())
    if name == "embeddings":
        first = config.embeddings  # nothing but the embeddings learns, so the layers' rate and decay say nothing
        return replace(shared, train="embeddings", epochs=first.epochs, embedding_rate=first.embedding_rate,
                       learning_rate=0.0, weight_decay=0.0)  # fmt: skip
    return shared


def _student(base: Base, before: Stage | None) -> Encoder:
    """Return the student as the stage before left it: trained, a copy of the teacher with new pieces, or the copy."""
    if before is not None and (before.folder / "model").is_dir():
        return Encoder.load(before.folder / "model")
    teacher = Encoder.load(base)
    if before is None:
        return teacher
    from alambic.model.vocabulary_start import with_vocabulary

    return with_vocabulary(teacher, load_tokenizer(before.folder), np.load(before.folder / "start.npy"))


def _record(
    config: DistilConfig, base: Base, text: _Text, vocabulary: Stage | None, stages: list[Stage]
) -> dict[str, Any]:
    return {
        "name": config.name, "config": config.digest, "teacher": base.to_dict(), "pairs": len(text.train),
        "held_out": len(text.held_out), "more": {"known": len(text.known), "new": len(text.new)},
        "text": text.digest, "vocabulary": None if vocabulary is None else vocabulary.result,
        "stages": {stage.name: stage.result for stage in stages}, "retrieval": stages[-1].result["retrieval"],
    }  # fmt: skip


def _write_encoder(config: DistilConfig, model: Path, out: Path, record: dict[str, Any]) -> None:
    from alambic.pack import hf

    shutil.rmtree(out, ignore_errors=True)  # made again from the finished stage each time
    hf.export(model, out)
    write_text(out / "README.md", _card(config, record))
    write_text(out / "distil.json", json.dumps(record, ensure_ascii=False, indent=1))


def _card(config: DistilConfig, record: dict[str, Any]) -> str:
    spec, found = config.distil, record["retrieval"]
    return "\n".join(_card_lines(spec.name, spec.licence, spec.languages, spec.description, record, found)) + "\n"


def _card_lines(
    name: str, licence: str, languages: Sequence[str], description: str, record: dict[str, Any], found: dict[str, Any]
) -> Iterator[str]:
    yield "---"
    yield f"license: {licence}"
    if languages:
        yield "language:"
        yield from (f"- {language}" for language in languages)
    yield from ("library_name: sentence-transformers", "---", "", f"# {name}", "")
    if description:
        yield from (description, "")
    yield (f"A sentence encoder that follows {record['teacher']['name']} in a further language (Reimers and Gurevych "
           f"2020), made by `alambic distil` from {record['pairs']:,} pairs of sentences.")  # fmt: skip
    yield ""
    if masked := record["stages"].get("masked"):
        yield from (f"Before that it guessed {_guessed(masked)}.", "")
    yield (f"Held-out pairs, accuracy at one of {found['n']:,}: further language to known {found['from_new']:.1%}, "
           f"known to further {found['from_known']:.1%}.")  # fmt: skip


def _guessed(masked: dict[str, Any]) -> str:
    """Say what the student read with masks, and how well it guessed before and after."""
    scores = "; ".join(
        f"{title} from {found['before']['value']:.2f} to {found['after']['value']:.2f} (95 % interval "
        f"{found['after']['low']:.2f} to {found['after']['high']:.2f}, {found['guessed']:,} tokens of "
        f"{found['lines']:,} held-out lines)"
        for title, found in (("further language", masked["new"]), ("known language", masked["known"])) if found
    )  # fmt: skip
    return (f"masked tokens (Devlin et al. 2019) in {masked['tokens']:,} tokens of text: nats a guessed token, "
            f"{scores}")  # fmt: skip
