"""A chain, linear model first and the fine-tuned encoder for the rest, against that encoder alone.

Each set twice: those two, and with the students that benchmark `distil` made (its bundles are used where it was run).
ALAMBIC_BENCH_PARTS=banking77,hwu64,clinc150 runs a part; the page shows what was run so far. The models are those of
tuned.py, fitted once for several benchmarks; thresholds are fitted on dev, everything shown is counted on test.
ALAMBIC_BENCH_TINY=1 takes few rows and a head on the encoder as it is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import sets
import tuned
from run import ROOT, TINY, data_folder

MINUTES = 100  # nearly all of it fits the encoders; 15 where tuned.py kept them
WHAT = (
    "A chain of a linear model, students and a fine-tuned encoder against the encoder alone: accuracy on the same test "
    "rows, and the mean time of one text at a time, both in turn on the same texts"
)
SETS = ("banking77",) if TINY else ("banking77", "hwu64", "clinc150")
STUDENTS = ("distil-static", "distil-2-int8")
TOLERANCES = (0.2,) if TINY else (0.01, 0.005)  # shares of answers that may be lost, at 95 % confidence
ROUNDS = 1 if TINY else 3  # passes over all test texts
_FEW = 300  # rows of each part where it is only tried out
_BAR = 5.0
_DISTILLED = ROOT / ".bench" / "distil"


def run(store: Any) -> str:
    """Measure each set, and write the tables."""
    wanted = os.environ.get("ALAMBIC_BENCH_PARTS", ",".join(SETS)).split(",")
    found = {}
    for name in SETS:
        for part, students in ((name, ()), (f"{name}-students", _students(name))):
            if (name in wanted and (students or part == name)) or (store.folder / f"{part}.json").exists():
                found[part] = store.part(part, partial(_measure, name, students, store.folder))
    lines = ["| set | may be lost | chain | full model alone % | chain % | chain minus full, points [95 %] | "
             "answered by each stage % | n dev, test |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    lines += [_quality_line(name, row) for name, rows in found.items() for row in rows]
    lines += ["", "| set | may be lost | chain, mean ms (p50, p95) | full model, mean ms (p50, p95) | times faster on "
              "average [95 %] | of each pass | n |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    lines += [_time_line(name, row) for name, rows in found.items() for row in rows if row["names"]]
    return "\n".join([
        *lines, "",
        f"Bar: {_BAR:g} times faster with the accuracy tied (zero lies in the interval of the difference). May be "
        "lost: points of accuracy that the thresholds may cost at 95 % confidence, shown on dev alone. The tail stays: "
        "a text that reaches the full model takes the full model's time and the linear model's.",
    ])  # fmt: skip


def _quality_line(name: str, row: dict[str, Any]) -> str:
    allowed = f"{100 * row['tolerance']:g}"
    if not row["names"]:
        return f"| {name} | {allowed} | none: {row['why']} | | | | | {row['dev']:,} |"
    gap = row["difference"]
    told = "tied" if gap["low"] <= 0.0 <= gap["high"] else "not tied"
    shares = ", ".join(f"{stage} {100 * share:.1f}" for stage, share in row["answered"].items())
    between = f"{100 * gap['value']:+.2f} [{100 * gap['low']:+.2f}, {100 * gap['high']:+.2f}], {told}"
    sure = ", ".join(f"{value:.4f}" for value in row.get("thresholds") or [row["threshold"]])
    return (
        f"| {name} | {allowed} | {' -> '.join(row['names'])} (from confidence {sure}) | "
        f"{100 * row['full']:.2f} | {100 * row['chain']:.2f} | {between} | {shares} | {row['dev']:,}, {row['test']:,} |"
    )


def _time_line(name: str, row: dict[str, Any]) -> str:
    ratio, passes = row["ratio"], ", ".join(f"{value:.2f}" for value in row["passes"])
    times = " | ".join(
        f"{row['times'][who]['mean']:.3f} ({row['times'][who]['p50']:.3f}, {row['times'][who]['p95']:.3f})"
        for who in ("chain", "full")
    )
    return (
        f"| {name} | {100 * row['tolerance']:g} | {times} | {ratio['value']:.2f} "
        f"[{ratio['low']:.2f}, {ratio['high']:.2f}] | {passes} | {ratio['n']:,} |"
    )


def _students(name: str) -> tuple[str, ...]:
    return () if TINY else tuple(form for form in STUDENTS if (_DISTILLED / f"{name}-{form}.bundle").is_dir())


def _measure(name: str, students: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Compose the chain for each tolerance and hold it against the full model."""
    bundles, dev, test = _few(name, folder) if TINY else _kept(name)
    for form in students:
        bundles[form] = _DISTILLED / f"{name}-{form}.bundle"
    out = folder / f"{name}.bundle"
    return [_compare(out, bundles, dev, test, tolerance) for tolerance in TOLERANCES]


def _kept(name: str) -> tuple[dict[str, Path], Any, Any]:
    """Return the bundles of tuned.py, fitted where they are not kept, and dev and test."""
    for form in tuned.FORMS:
        tuned.answers(name, form)
    _, choose, kept, test = tuned.parts_of(name)
    return {form: tuned.FOLDER / f"{name}-{form}.bundle" for form in tuned.FORMS}, choose + kept, test


def _compare(out: Path, bundles: dict[str, Path], dev: Any, test: Any, tolerance: float) -> dict[str, Any]:
    from alambic.engines import open_engine
    from alambic.measure.cascade import Member, fit_cascade

    members = []
    for name, bundle in bundles.items():
        with open_engine(bundle, threads=1) as engine:
            members.append(Member(name, engine.probabilities(dev.texts), _p50(engine, dev.texts[:200])))
    members.sort(key=lambda member: (member.name == "finetune", member.ms))
    found = fit_cascade(members, np.array([row[0] for row in dev.targets()]), tolerance=tolerance, skip=True)
    facts = {"tolerance": tolerance, "names": [s.name for s in found.stages], "why": found.why, "dev": len(dev)}
    if not found.stages:
        return facts
    _pack(found, bundles, out)
    full = bundles[found.stages[-1].name]
    with open_engine(out, threads=1) as chain, open_engine(full, threads=1) as alone:
        thresholds = [stage.threshold for stage in found.stages[:-1]]
        return {**facts, "thresholds": thresholds, **_held(chain, alone, test)}


def _p50(engine: Any, texts: list[str]) -> float:
    from alambic.measure.speed import measure_speed

    return float(measure_speed(engine, texts, repeats=len(texts), seconds=20.0).p50_ms.value)


def _pack(found: Any, bundles: dict[str, Path], out: Path) -> None:
    """Pack the bundles of the stages as one."""
    from alambic.bundle import open_bundle, seal
    from alambic.kinds.cascade import Cascade
    from alambic.pack.cascade import join

    opened = [open_bundle(bundles[stage.name]) for stage in found.stages]
    packed = [tuple((part, bundle.folder(part)) for part in bundle.manifest.chain()) for bundle in opened]
    stages, parts = join(found.stages, packed)
    shutil.rmtree(out, ignore_errors=True)
    for part, source in parts:
        shutil.copytree(source, out / part.folder)
    changed = {"parts": tuple(part for part, _ in parts), "entry": parts[-1][0].name, "temperature": 1.0}
    seal(out, opened[-1].manifest.model_copy(update={**changed, "cascade": Cascade(stages, found.facts())}))


def _held(chain: Any, alone: Any, test: Any) -> dict[str, Any]:
    """Hold the chain against the full model on test."""
    from alambic.measure.metrics import paired_bootstrap

    truths = np.array([row[0] for row in test.targets()])
    mine, theirs = (engine.probabilities(test.texts).argmax(axis=1) for engine in (chain, alone))
    pair = paired_bootstrap("accuracy", truths, mine, theirs, n=2000, rng=np.random.default_rng(0))
    who = chain.answered_by(test.texts)
    return {
        "test": len(test),
        "chain": float((mine == truths).mean()),
        "full": float((theirs == truths).mean()),
        "difference": pair.difference.to_dict(),
        "answered": {stage: who.count(stage) / len(who) for stage in chain.stages},
        **_times(chain, alone, test.texts),
    }


def _times(chain: Any, alone: Any, texts: list[str]) -> dict[str, Any]:
    """Time both in turn, text by text, `ROUNDS` passes over all texts."""
    from alambic.measure.speed import compare_speed

    both = {"chain": chain.predict, "full": alone.predict}
    passes = [compare_speed(both, texts, repeats=len(texts), seconds=600.0, seed=seed) for seed in range(ROUNDS)]
    times = {who: np.concatenate([one[who].times_ms for one in passes]) for who in both}
    figures = {
        who: {"mean": float(t.mean()), "p50": float(np.median(t)), "p95": float(np.quantile(t, 0.95))}
        for who, t in times.items()
    }
    each = [float(one["full"].times_ms.mean() / one["chain"].times_ms.mean()) for one in passes]
    return {"times": figures, "ratio": _ratio(times["full"], times["chain"]), "passes": each}


def _ratio(slow: Any, fast: Any) -> dict[str, float]:
    """Return the ratio of the means with its interval, texts resampled together."""
    from alambic.measure.metrics import Interval

    rng, n = np.random.default_rng(0), len(slow)
    draws = [rng.integers(n, size=n) for _ in range(1000)]
    samples = np.array([slow[at].mean() / fast[at].mean() for at in draws])
    return Interval.of(float(slow.mean() / fast.mean()), samples, n=n).to_dict()


def _few(name: str, folder: Path) -> tuple[dict[str, Path], Any, Any]:
    """Return two quickly made bundles and few rows, to try the benchmark out."""
    train, _, test = sets.load(data_folder(), f"{name}-10shot")
    order = np.random.default_rng(0).permutation(len(test))
    dev, few = (test.take(sorted(order[i : i + _FEW].tolist())) for i in (0, _FEW))
    quick, full = folder / f"{name}-tfidf-svm.bundle", folder / f"{name}-head.bundle"
    if not quick.is_dir():
        tuned._linear(train, quick)
    if not full.is_dir():
        _head(train, full, folder)
    return {"tfidf-svm": quick, "finetune": full}, dev, few


def _head(train: Any, bundle: Path, folder: Path) -> None:
    """Make a bundle of the encoder as it is, in 8 bits, and logistic regression on its vectors."""
    from alambic import __version__
    from alambic.bundle import seal
    from alambic.engines import open_part
    from alambic.events import drain
    from alambic.manifest import Manifest
    from alambic.model.bases import resolve
    from alambic.model.encoder import Encoder
    from alambic.pack import int8
    from alambic.train.heads import fit_logreg_head
    from quality import BASE

    at, head = folder / "base.part", folder / "head.part"
    for scratch in (at, head):
        shutil.rmtree(scratch, ignore_errors=True)
    Encoder.load(resolve(BASE)).save(folder / "base.model")
    calibration = train.texts[:100]
    part = drain(int8.pack_form(int8.REFERENCE, folder / "base.model", at, calibration=calibration, cache=folder))
    with open_part(part, at, threads=1) as reader:
        last = fit_logreg_head(reader.run(train.texts), train, head, seed=0)
    for one, source in ((part, at), (last, head)):
        shutil.copytree(source, bundle / one.folder)
    manifest = Manifest(
        alambic=__version__, name="bench", created="-", labels=train.labels, entry=last.name, parts=(part, last)
    )
    seal(bundle, manifest)
