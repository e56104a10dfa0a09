"""One fine-tuned encoder (and one linear model) a set, and its answers to rows it never saw: shared by benchmarks.

The encoder learns from train and stops by one half of dev; it answers the other half of dev and test through its packed
bundle. What it answered is kept in .bench/tuned, so that benchmarks of confidence cost no training of their own.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import sets
from quality import BASE
from run import ROOT, Store, data_folder, say

OUTSIDE = "oos"  # label of CLINC150's rows out of scope
FORMS = ("tfidf-svm", "finetune")
FOLDER = ROOT / ".bench" / "tuned"


@dataclass(frozen=True)
class Answers:
    """Probabilities and scope scores of one part of a set.

    Attributes:
        labels: label order.
        probabilities: [N, L], temperature 1.
        truths: label indices [N].
        scopes: scores by name, [N] each.
    """

    labels: tuple[str, ...]
    probabilities: Any
    truths: Any
    scopes: dict[str, Any]

    @property
    def own(self) -> Any:
        """Which rows are of the task, [N]."""
        return self.truths != self.labels.index(OUTSIDE) if OUTSIDE in self.labels else np.ones(len(self.truths), bool)

    def take(self, rows: Any) -> Answers:
        """Return the rows chosen by indices or flags."""
        scopes = {name: values[rows] for name, values in self.scopes.items()}
        return Answers(self.labels, self.probabilities[rows], self.truths[rows], scopes)

    def __add__(self, other: Answers) -> Answers:
        scopes = {name: np.concatenate([values, other.scopes[name]]) for name, values in self.scopes.items()}
        both = np.concatenate([self.probabilities, other.probabilities])
        return Answers(self.labels, both, np.concatenate([self.truths, other.truths]), scopes)


def answers(name: str, form: str) -> dict[str, Answers]:
    """Return what `form`, fitted on set `name`, answers: `choose` and `kept` (halves of dev) and `test`.

    CLINC150 is learnt with its 100 training rows out of scope as one more label, and its other parts hold theirs too.
    """
    store = Store(FOLDER)
    at = FOLDER / f"{name}-{form}.npz"
    if not at.exists():
        (FOLDER / f"{name}-{form}.json").unlink(missing_ok=True)
    store.part(f"{name}-{form}", lambda: _fit(name, form, store.folder, at))
    with np.load(at, allow_pickle=False) as kept:
        labels = tuple(kept["labels"].tolist())
        return {part: _part(kept, part, labels) for part in ("choose", "kept", "test")}


def _part(kept: Any, part: str, labels: tuple[str, ...]) -> Answers:
    prefix = f"{part}.scope."
    scopes = {key.removeprefix(prefix): kept[key] for key in kept.files if key.startswith(prefix)}
    return Answers(labels, kept[f"{part}.probabilities"], kept[f"{part}.truths"], scopes)


def parts_of(name: str) -> tuple[Any, Any, Any, Any]:
    """Return train, both halves of dev, and test of one set; CLINC150 with its rows out of scope."""
    from alambic.data.split import set_aside, split
    from alambic.task import DataSpec

    if name == "clinc150":
        folder = data_folder() / name
        read = [
            sets.rows(folder, part) + [(t, OUTSIDE) for t, _ in _outside(folder, f"oos_{part}")]
            for part in ("train", "dev", "test")
        ]
        labels = tuple(sorted({label for _, label in read[0]}))
        train, dev, test = (sets.dataset(rows, labels) for rows in read)
    else:
        train, dev, test = sets.load(data_folder(), name)
    if dev is None:
        made = split(train, None, test, spec=DataSpec(train=name), seed=0, lock=None)  # type: ignore[call-arg]
        assert made.dev is not None, "only sets of 2,000 rows and more have a dev part"
        train, dev = made.train, made.dev
    kept = set(set_aside(dev, len(dev) // 2, seed=0))
    return train, dev.take([i for i in range(len(dev)) if i not in kept]), dev.take(sorted(kept)), test


def _outside(folder: Path, part: str) -> list[tuple[str, str]]:
    import json

    with (folder / f"{part}.jsonl").open(encoding="utf-8") as handle:
        return [(json.loads(line)["text"], OUTSIDE) for line in handle]


def _fit(name: str, form: str, folder: Path, at: Path) -> dict[str, Any]:
    train, choose, kept, test = parts_of(name)
    bundle = folder / f"{name}-{form}.bundle"
    facts = _linear(train, bundle) if form == "tfidf-svm" else _encoder(name, train, choose, bundle, folder)
    if form == "finetune":
        _index(bundle, train)
    from alambic.engines import open_engine

    arrays: dict[str, Any] = {"labels": np.array(train.labels)}
    label = OUTSIDE if OUTSIDE in train.labels else None
    with open_engine(bundle, threads=1) as engine:
        for part, rows in (("choose", choose), ("kept", kept), ("test", test)):
            probabilities, scopes = engine.scored(rows.texts, label=label)
            arrays[f"{part}.probabilities"] = probabilities
            arrays[f"{part}.truths"] = np.array([row[0] for row in rows.targets()])
            arrays |= {f"{part}.scope.{key}": values for key, values in scopes.items()}
    np.savez_compressed(at, **arrays)
    return {**facts, "rows": {"train": len(train), "choose": len(choose), "kept": len(kept), "test": len(test)}}


def _linear(train: Any, bundle: Path) -> dict[str, Any]:
    from alambic.train.linear import fit_tfidf_svm

    scratch = bundle.with_suffix(".part")
    shutil.rmtree(scratch, ignore_errors=True)
    # A build searches for c; here one value serves, as the linear model is only there to compare with.
    seal_part(fit_tfidf_svm(train, scratch, seed=0, params={"c": 1.0}), scratch, bundle, train.labels)
    return {}


def _encoder(name: str, train: Any, choose: Any, bundle: Path, folder: Path) -> dict[str, Any]:
    from alambic.events import Progress, drain
    from alambic.model.bases import resolve
    from alambic.pack import int8
    from alambic.train.finetune import FinetuneParams, finetune

    def listen(event: Any) -> None:
        if isinstance(event, Progress) and "dev" in event.values and event.done % 50 == 0:
            say(f"  {name} {event.done}/{event.total} {event.values} {event.seconds_left or 0:.0f} s left")

    model, scratch = folder / f"{name}.model", folder / f"{name}.part"
    params = FinetuneParams(seed=0, threads=1)
    result = drain(finetune(resolve(BASE), train, choose, params=params, out=model), listen)
    shutil.rmtree(scratch, ignore_errors=True)
    packing = int8.pack_form(int8.REFERENCE, model, scratch, calibration=train.texts, cache=folder / "graphs")
    seal_part(drain(packing), scratch, bundle, train.labels)
    return {"steps": result.steps, "seconds": result.seconds, "best_dev": result.best_dev}


def _index(bundle: Path, train: Any) -> None:
    """Add the index of training rows, as a build does where texts may be out of scope: how near they are may tell."""
    from alambic.bundle import open_bundle, seal
    from alambic.engines import open_engine
    from alambic.engines.examples import NAME, write_index
    from alambic.manifest import PartSpec

    with open_engine(bundle, threads=1) as engine:
        vectors = engine.embed(train.texts)
    rows = [{"labels": e.labels, "where": e.where, "digest": e.digest} for e in train]
    params = write_index(bundle / NAME, rows, train.texts, vectors)
    manifest = open_bundle(bundle).manifest
    seal(bundle, manifest.model_copy(update={"parts": (*manifest.parts, PartSpec(NAME, NAME, NAME, params))}))


def seal_part(part: Any, scratch: Path, bundle: Path, labels: tuple[str, ...]) -> None:
    """Seal the one part in `scratch`, which goes, as the bundle `bundle`."""
    from alambic import __version__
    from alambic.bundle import seal
    from alambic.manifest import Manifest

    shutil.rmtree(bundle, ignore_errors=True)
    shutil.copytree(scratch, bundle / part.folder)
    shutil.rmtree(scratch)
    seal(
        bundle, Manifest(alambic=__version__, name="bench", created="-", labels=labels, entry=part.name, parts=(part,))
    )
