"""The label audit on BANKING77 and TREC with 5 % of the training labels flipped, and what its suggestions win back.

Labels are flipped at random to any other label, once for each seed. The audit sees the flipped rows only. Found: the
share of true flips among the first rows of the list, as many as there are flips. Won back: test accuracy with those
rows relabelled as suggested, unread, of the accuracy lost to the flips; and with a reader who corrects the flips among
them. ALAMBIC_BENCH_FINETUNE=1 adds the fine-tuned encoder, with the steps that benchmark `quality` found.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import quality
import sets
from run import data_folder, say

MINUTES = 40
WHAT = "Labels flipped at random, found again by the label audit, and the accuracy that its suggestions win back"
SETS = ("trec", "banking77")
BASE = "all-minilm-l6-v2"
FLIPPED = 0.05
FOUND, WON_BACK = 0.70, 0.60  # bars
CANDIDATES = ("logreg", "tfidf-svm")
CONDITIONS = ("clean", "flipped", "applied", "reviewed")
SEEDS = tuple(map(int, os.environ.get("ALAMBIC_BENCH_SEEDS", "0,1,2,3,4").split(",")))
TUNED_SEEDS = (0, 1, 2)


def run(store: Any) -> str:
    """Do what is not kept yet, and write the tables of what is."""
    wanted = os.environ.get("ALAMBIC_BENCH_SETS", ",".join(SETS)).split(",")
    for name in wanted:
        store.part(f"{name}-vectors", partial(embed, name, store.folder))
        for seed in SEEDS:
            store.part(f"{name}-{seed}", partial(audit, name, seed, store.folder))
    if os.environ.get("ALAMBIC_BENCH_FINETUNE"):
        for name in wanted:
            for seed in TUNED_SEEDS:
                for condition in CONDITIONS[:3]:
                    store.part(f"{name}-{seed}-{condition}", partial(tuned, name, seed, condition, store.folder))
    return "\n\n".join(filter(None, (_found(store), _won_back(store))))


def embed(name: str, folder: Path) -> dict[str, Any]:
    """Embed train and test of one set with the packed base, as a build does; the vectors are kept beside."""
    from alambic.engines import open_part
    from alambic.events import drain
    from alambic.model.bases import resolve
    from alambic.model.encoder import Encoder
    from alambic.pack import int8

    train, _, test = sets.load(data_folder(), name)
    model, at = folder / "base", folder / "packed"
    shutil.rmtree(at, ignore_errors=True)
    Encoder.load(resolve(BASE)).save(model)
    part = drain(int8.pack_form(int8.REFERENCE, model, at, calibration=[], cache=folder / "graphs"))
    with open_part(part, at) as runner:
        for what, rows in (("train", train), ("test", test)):
            np.save(folder / f"{name}-{what}.npy", runner.run(rows.texts), allow_pickle=False)
    return {"train": len(train), "test": len(test), "form": int8.REFERENCE}


def flip(rows: Any, seed: int) -> tuple[Any, Any]:
    """Return the rows with labels flipped, and which ones were [N]."""
    rng = np.random.default_rng((seed, 5))
    chosen = rng.choice(len(rows), round(FLIPPED * len(rows)), replace=False)
    labels = [target[0] for target in rows.targets()]
    for i in chosen:
        labels[i] = (labels[i] + int(rng.integers(1, len(rows.labels)))) % len(rows.labels)
    return relabelled(rows, labels), np.isin(np.arange(len(rows)), chosen)


def relabelled(rows: Any, labels: Any) -> Any:
    """Return the rows with other label numbers."""
    from alambic.data.dataset import Dataset

    examples = (replace(e, labels=(rows.labels[int(i)],)) for e, i in zip(rows, labels, strict=True))
    return Dataset(tuple(examples), rows.labels)


def audit(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Audit the flipped rows, and score candidates fitted on clean, flipped, relabelled and reviewed rows on test."""
    from alambic.build.audit import folds_for
    from alambic.data.audit import pooled
    from alambic.data.audit_rows import rank
    from alambic.events import drain
    from alambic.train.audit import Material, answer, auditors, out_of_fold

    train, _, test = sets.load(data_folder(), name)
    vectors = {part: np.load(folder / f"{name}-{part}.npy", allow_pickle=False) for part in ("train", "test")}
    flipped, wrong = flip(train, seed)
    material, scratch = Material(flipped, vectors["train"]), folder / f"{name}-{seed}.fit"
    began = time.perf_counter()
    folds = folds_for(flipped, seed=0)
    answers = {a: drain(out_of_fold(a, material, folds, scratch=scratch)) for a in auditors(material)}
    ranking = rank(flipped, pooled(list(answers.values())), said_by=tuple(answers), vectors=vectors["train"])
    seconds = time.perf_counter() - began
    top, suggested, chances = _top(flipped, ranking, int(wrong.sum()))
    truth = np.array([target[0] for target in train.targets()])
    given = np.array([target[0] for target in flipped.targets()])
    versions = _versions(truth, given, wrong, top, suggested)
    asked = Material(test, vectors["test"])
    right = np.array([target[0] for target in test.targets()])
    correct = {
        a: {c: (answer(a, Material(relabelled(train, y), vectors["train"]), asked, scratch=scratch).argmax(1) == right)
            .astype(int).tolist() for c, y in versions.items()} for a in CANDIDATES
    }  # fmt: skip
    single = {a: _precision(p, given, wrong) for a, p in answers.items()}
    return {
        "flips": int(wrong.sum()), "found": float(wrong[top].mean()), "expected": float(np.mean(chances)),
        "suggestion_right": float((suggested == truth[top])[wrong[top]].mean()), "share": ranking.share,
        "counted": ranking.counted, "listed": len(ranking.listed), "seconds": seconds, "alone": single,
        "applied": [int(i) for i in versions["applied"]], "flipped": given.tolist(), "correct": correct,
    }  # fmt: skip


def _top(rows: Any, ranking: Any, most: int) -> tuple[Any, Any, Any]:
    """Return the first `most` rows of the ranking, the label suggested for each, and the chance said of each."""
    index = {label: i for i, label in enumerate(rows.labels)}
    places: dict[Any, list[int]] = {}
    for i, e in enumerate(rows):
        places.setdefault((e.text, e.labels), []).append(i)
    ordered = [
        (i, index[s.suggested[0]], s.wrong) for s in ranking.suspects for i in places[s.text, s.labels]
    ]  # fmt: skip
    found, suggested, chances = zip(*ordered[:most], strict=True)
    return np.array(found), np.array(suggested), np.array(chances)


def _versions(truth: Any, given: Any, wrong: Any, top: Any, suggested: Any) -> dict[str, Any]:
    applied, reviewed = given.copy(), given.copy()
    applied[top] = suggested
    reviewed[top[wrong[top]]] = truth[top[wrong[top]]]
    return {"clean": truth, "flipped": given, "applied": applied, "reviewed": reviewed}


def _precision(p: Any, given: Any, wrong: Any) -> float:
    order = np.argsort(p[np.arange(len(p)), given], kind="stable")
    return float(wrong[order[: wrong.sum()]].mean())


def tuned(name: str, seed: int, condition: str, folder: Path) -> dict[str, Any]:
    """Fine-tune on clean, flipped or relabelled rows for the steps of benchmark `quality`; score the bundle on test."""
    from alambic.events import drain
    from alambic.model.bases import resolve
    from alambic.pack import int8
    from alambic.train.finetune import FinetuneParams, finetune

    train, _, test = sets.load(data_folder(), name)
    kept = json.loads((folder / f"{name}-{seed}.json").read_text("utf-8"))["result"]
    rows = train if condition == "clean" else relabelled(train, kept[condition])
    found = folder.parent / "quality" / f"{name}-dev.json"
    if not found.exists():
        raise SystemExit(f"{found}: run `make bench B=quality` for {name} first: it finds the steps")
    refit = json.loads(found.read_text("utf-8"))["result"]["refit"]
    asked = {key: refit[key] for key in ("steps", "schedule", "learning_rate")}
    model, at = folder / f"{name}-{seed}-{condition}.model", folder / "tuned.part"
    params = FinetuneParams(seed=seed, few_shot="on" if refit["few_shot"] == "few-shot" else "off", **asked)
    drain(finetune(resolve(BASE), rows, None, params=params, out=model))
    part = drain(int8.pack_form(int8.REFERENCE, model, at, calibration=[], cache=folder / "graphs"))
    p, _ = quality.bundle_answers(part, at, folder / "tuned.bundle", rows.labels, test.texts)
    for path in (model, at, folder / "tuned.bundle"):
        shutil.rmtree(path)
    truths = np.array([target[0] for target in test.targets()])
    return {"correct": (p.argmax(1) == truths).astype(int).tolist()}


def _kept(store: Any, name: str) -> Any:
    path = store.folder / f"{name}.json"
    return json.loads(path.read_text("utf-8"))["result"] if path.exists() else None


def _runs(store: Any, name: str) -> list[Any]:
    return [run for seed in SEEDS if (run := _kept(store, f"{name}-{seed}")) is not None]


def _found(store: Any) -> str:
    lines = [
        f"Found among the first rows of the list, as many as there are flips (bar {FOUND:.2f}); means over seeds.",
        "",
        "| set | flips | seeds | found | by seed | the audit expected | suggestion right, of the flips found | "
        "said to be wrong, % | confident learning alone, % | one candidate alone | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in SETS:
        done = _runs(store, name)
        if not done:
            lines.append(f"| {name} | | not run | | | | | | | | |")
            continue

        def mean(key: str, done: list[Any] = done) -> float:
            return float(np.mean([run[key] for run in done]))

        by_seed = ", ".join(f"{run['found']:.3f}" for run in done)
        alone = ", ".join(f"{a} {np.mean([run['alone'][a] for run in done]):.3f}" for a in done[0]["alone"])
        lines.append(
            f"| {name} | {done[0]['flips']} | {len(done)} | {mean('found'):.3f} | {by_seed} | {mean('expected'):.3f} | "
            f"{mean('suggestion_right'):.3f} | {100 * mean('share'):.1f} | {100 * mean('counted'):.1f} | {alone} | "
            f"{mean('seconds'):.0f} |"
        )
    return "\n".join(lines)


def _won_back(store: Any) -> str:
    lines = [
        "Test accuracy of a candidate fitted on each version of the rows; won back is (relabelled - flipped) / (clean "
        f"- flipped) over all seeds (bar {WON_BACK:.0%}), its interval from test rows drawn again.",
        "",
        "| set | candidate | n test | seeds | clean % | flipped % | relabelled unread % | won back [95 %] | "
        "read by a person % | won back |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in SETS:
        done = _runs(store, name)
        for a in CANDIDATES if done else ():
            lines.append(_line(name, a, [run["correct"][a] for run in done]))
        fine = [[_kept(store, f"{name}-{seed}-{c}") for c in CONDITIONS[:3]] for seed in TUNED_SEEDS]
        whole = [dict(zip(CONDITIONS, (r["correct"] for r in runs), strict=False)) for runs in fine if all(runs)]
        if whole:
            lines.append(_line(name, "finetune", whole))
    return "\n".join(lines)


def _line(name: str, candidate: str, runs: list[dict[str, list[int]]]) -> str:
    right = {c: np.array([run[c] for run in runs]).mean(axis=0) for c in CONDITIONS if c in runs[0]}  # [N] over seeds
    n = len(right["clean"])
    draws = np.random.default_rng(0).integers(0, n, (2000, n))

    def won(condition: str, rows: Any) -> Any:
        means = {c: right[c][rows].mean(axis=-1) for c in ("clean", "flipped", condition)}
        lost = means["clean"] - means["flipped"]
        return (means[condition] - means["flipped"]) / np.where(np.abs(lost) > 1e-9, lost, np.nan)

    whole = np.arange(n)
    low, high = np.nanpercentile(won("applied", draws), [2.5, 97.5])
    shares = [f"{100 * right[c].mean():.2f}" if c in right else "" for c in CONDITIONS]
    reviewed = f"{won('reviewed', whole):.0%}" if "reviewed" in right else ""
    if right["clean"].mean() <= right["flipped"].mean():
        say(f"  {name} {candidate}: nothing was lost to the flips")
    return (
        f"| {name} | {candidate} | {n:,} | {len(runs)} | {shares[0]} | {shares[1]} | {shares[2]} | "
        f"{won('applied', whole):.0%} [{low:.0%}, {high:.0%}] | {shares[3]} | {reviewed} |"
    )
