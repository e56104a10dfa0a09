"""Test accuracy of fine-tuned all-MiniLM-L6-v2 and of its 8-bit form, as a build makes them, on public data sets.

Steps, mode and 8-bit form are found on dev with seed 0 (on five folds where rows are few, as a build does); then seeds
0, 1, 2 are trained on train and dev for those steps, packed, and scored on test through the packed bundle.
"""

from __future__ import annotations

import datetime
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import sets
from run import data_folder, say

MINUTES = 150
WHAT = "Test accuracy of the fine-tuned encoder and of its 8-bit form on public data sets, means of 3 seeds"
BASE = "all-minilm-l6-v2"
BARS = {"banking77": 94.0, "banking77-10shot": 87.5, "hwu64": 92.3, "snips": 98.4, "trec": 96.0, "sst2": 90.0}
SEEDS = (0, 1, 2)
# ALAMBIC_BENCH_SETS=trec,sst2 and ALAMBIC_BENCH_SEEDS=0 run a part of it; the page shows what was run so far.
ORDER = ("banking77-10shot", "trec", "banking77", "hwu64", "sst2", "snips")


def run(store: Any) -> str:
    """Train what is not kept yet, and write the table of what is."""
    wanted = os.environ.get("ALAMBIC_BENCH_SETS", ",".join(ORDER)).split(",")
    for name in wanted:
        found = store.part(f"{name}-dev", partial(on_dev, name, store.folder))
        for seed in map(int, os.environ.get("ALAMBIC_BENCH_SEEDS", "0,1,2").split(",")):
            store.part(f"{name}-{seed}", partial(on_test, name, seed, found, store.folder))
    return _table(store)


def on_dev(name: str, folder: Path, *, base: str = BASE) -> dict[str, Any]:
    """Find the steps, the mode and the 8-bit form on dev, with seed 0; on five folds where a build would."""
    from alambic.build.ladder import agree_recipes
    from alambic.build.prepare import folds_of
    from alambic.data.split import split
    from alambic.events import drain
    from alambic.model.bases import resolve
    from alambic.pack import int8
    from alambic.task import DataSpec
    from alambic.train.finetune import FinetuneParams, finetune

    train, dev, test = sets.load(data_folder(), name)
    folds = folds_of(split(train, dev, test, spec=DataSpec(train=name), seed=0, lock=None))
    total = len(train) if dev is None else len(train) + len(dev)
    found = []
    for i, fold in enumerate(folds):
        model = folder / f"{name}-dev{i}.model"
        params = FinetuneParams(seed=0)
        found.append(
            drain(finetune(resolve(base), fold.train, fold.dev, params=params, out=model), _listen(f"{name}-dev{i}"))
        )
        if i == 0:
            options = int8.Options(cache=folder / "graphs")
            at = folder / f"{name}-dev.int8"
            shutil.rmtree(at, ignore_errors=True)
            choice = drain(int8.choose(model, at, fold.dev, calibration=fold.train.texts, options=options))
        shutil.rmtree(model)
    more = [total / len(fold.train) for fold in folds]
    refits = [
        {
            "steps": round(result.steps * m), "schedule": round(result.schedule * m), "few_shot": result.mode,
            "learning_rate": result.learning_rate,
        }
        for result, m in zip(found, more, strict=True)
    ]  # fmt: skip
    return {
        "refit": agree_recipes(refits), "refits": refits, "dev": [result.best_dev for result in found],
        "n_dev": [len(fold.dev) for fold in folds], "seconds": sum(r.seconds for r in found), "int8": choice.to_dict(),
    }  # fmt: skip


def on_test(name: str, seed: int, found: dict[str, Any], folder: Path, *, base: str = BASE) -> dict[str, Any]:
    """Train on train and dev for the steps found, pack both forms, score them on test through their bundles."""
    from alambic.events import drain
    from alambic.model.bases import resolve
    from alambic.pack import int8
    from alambic.train.finetune import FinetuneParams, finetune

    train, dev, test = sets.load(data_folder(), name)
    rows = train if dev is None else train + dev
    refit = found["refit"]
    few_shot = "on" if refit["few_shot"] == "few-shot" else "off"
    model = folder / f"{name}-{seed}.model"
    asked = {key: refit[key] for key in ("steps", "schedule", "learning_rate")}
    params = FinetuneParams(seed=seed, few_shot=few_shot, **asked)
    result = drain(finetune(resolve(base), rows, None, params=params, out=model), _listen(f"{name}-{seed}"))
    answers: dict[str, Any] = {"steps": refit["steps"], "seconds": result.seconds}
    truths = np.array([t[0] for t in test.targets()])
    for form in (int8.REFERENCE, found["int8"]["form"]):
        at = folder / f"{name}-{seed}.part"
        part = drain(int8.pack_form(form, model, at, calibration=rows.texts, cache=folder / "graphs"))
        bundle = folder / f"{name}-{seed}-{'int8' if 'int8' in form else 'float'}.bundle"
        probabilities, size_mb = bundle_answers(part, at, bundle, rows.labels, test.texts)
        answers["int8" if "int8" in form else "float"] = {
            "form": form, "correct": (probabilities.argmax(1) == truths).astype(int).tolist(), "size_mb": size_mb,
        }  # fmt: skip
        shutil.rmtree(at)
        if not (name == "banking77" and seed == 0):
            shutil.rmtree(bundle)
    if not (name == "banking77" and seed == 0):
        shutil.rmtree(model)
    return answers


def bundle_answers(part: Any, at: Path, out: Path, labels: tuple[str, ...], texts: list[str]) -> tuple[Any, float]:
    """Seal one part as a bundle, and return its probabilities [N, L] and its size."""
    from alambic import __version__
    from alambic.bundle import seal
    from alambic.engines import open_engine
    from alambic.manifest import Manifest

    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(at, out / part.folder)
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    manifest = Manifest(
        alambic=__version__, name="bench", created=created, labels=labels, entry=part.name, parts=(part,)
    )
    bundle = seal(out, manifest)
    with open_engine(out) as engine:
        return engine.probabilities(texts), round(bundle.size_bytes / 1e6, 2)


def _listen(name: str) -> Any:
    from alambic.events import Progress

    def listen(event: Any) -> None:
        if isinstance(event, Progress) and "dev" in event.values and event.done % 50 == 0:
            say(f"  {name} {event.done}/{event.total} {event.values} {event.seconds_left or 0:.0f} s left")

    return listen


def _table(store: Any) -> str:
    lines = [
        "| set | n test | float, mean % | seeds % | 8-bit, mean % | drop in points [95 %] | 8-bit form | MB | bar |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    drops = []
    for name in BARS:
        runs = [_kept(store, f"{name}-{seed}") for seed in SEEDS]
        done = [run for run in runs if run is not None]
        if not done:
            lines.append(f"| {name} | | not run | | | | | | {BARS[name]} |")
            continue
        flt = np.array([run["float"]["correct"] for run in done])
        low = np.array([run["int8"]["correct"] for run in done])
        seeds = ", ".join(f"{100 * row.mean():.2f}" for row in flt)
        value, lo, hi = _paired(flt, low)
        drops.append(value)
        lines.append(
            f"| {name} | {flt.shape[1]:,} | {100 * flt.mean():.2f} | {seeds} | {100 * low.mean():.2f} | "
            f"{value:.2f} [{lo:.2f}, {hi:.2f}] | {done[0]['int8']['form']} | {done[0]['int8']['size_mb']} | "
            f"{BARS[name]} |"
        )
    if drops:
        lines += ["", f"Mean drop of the 8-bit form over the sets run: {np.mean(drops):.2f} points."]
    return "\n".join(lines)


def _kept(store: Any, name: str) -> Any:
    import json

    path = store.folder / f"{name}.json"
    return json.loads(path.read_text("utf-8"))["result"] if path.exists() else None


def _paired(flt: Any, low: Any) -> tuple[float, float, float]:
    """Return the mean drop in points, and its interval over resampled test rows (seeds averaged within a row)."""
    per_row = (flt - low).mean(axis=0)
    rng = np.random.default_rng(0)
    means = [per_row[rng.integers(0, len(per_row), len(per_row))].mean() for _ in range(2000)]
    lo, hi = np.percentile(means, [2.5, 97.5])
    return 100 * per_row.mean(), 100 * lo, 100 * hi
