"""The French/English encoder of alambic-bases against the English one it learnt from, and against TF-IDF.

Retrieval: each caption of Multi30k test2016 looks for its translation among 1,000 (accuracy at 1, both ways).
BANKING77: the recipe of `quality` on either base, three seeds, scored once on test through the packed bundle.
French intents: five folds (ha_intents_fr train and dev, wikit_fr) or the set's own dev part (umsab_fr); each method is
fitted as a build without a dev part fits it, and answers through its packed bundle.

ALAMBIC_BENCH_PARTS=retrieval,french,banking77 runs a part; ALAMBIC_BENCH_BASE names another encoder than ours.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import quality
import sets
from run import TINY, data_folder, say

MINUTES = 120
WHAT = "Ours (French and English) against all-MiniLM-L6-v2 and TF-IDF: retrieval, BANKING77, French intents"
THEIRS = "all-minilm-l6-v2"
OURS = os.environ.get("ALAMBIC_BENCH_BASE", "alambic-encoder-fr-en")
FOLDS = 2 if TINY else 5
FRENCH = {"ha_intents_fr": ("train", "dev"), "wikit_fr": ("train",), "umsab_fr": ("train",)}
_OWN_DEV = ("umsab_fr",)
METHODS = ("tfidf", f"head {THEIRS}", f"head {OURS}", f"tuned {THEIRS}", f"tuned {OURS}")
_PARTS = ("retrieval", "french", "banking77")
_REPEATS = 2_000


def run(store: Any) -> str:
    """Run what is not kept yet, and write the tables of what is."""
    wanted = os.environ.get("ALAMBIC_BENCH_PARTS", ",".join(_PARTS)).split(",")
    if "retrieval" in wanted:
        for base in (OURS, THEIRS):
            store.part(_file(f"retrieval-{base}"), partial(_retrieval, base))
    if "french" in wanted:
        for name in FRENCH:
            for method in METHODS:
                store.part(_file(f"{name}-{method}"), partial(_french, name, method, store.folder))
    if "banking77" in wanted:
        for base in (OURS, THEIRS):
            _banking(store, base)
    return "\n".join([*_retrieval_table(store), "", *_banking_table(store), "", *_french_table(store)])


def _file(name: str) -> str:
    return name.replace(" ", "-").replace("/", "_")


def _kept(store: Any, name: str) -> Any:
    path = store.folder / f"{_file(name)}.json"
    return json.loads(path.read_text("utf-8"))["result"] if path.exists() else None


def _retrieval(base: str) -> dict[str, list[int]]:
    """Return which captions of test2016 find their translation first, both ways."""
    from alambic.model.bases import resolve
    from alambic.model.encoder import Encoder
    from alambic.train.crosslingual import unit

    rows = [json.loads(line) for line in (data_folder() / "multi30k_en_fr" / "test2016.jsonl").open(encoding="utf-8")]
    encoder = Encoder.load(resolve(base))
    english, french = (unit(encoder.embed([row[language] for row in rows])) for language in ("en", "fr"))
    near = french @ english.T
    own = np.arange(len(rows))
    return {
        "fr-en": (near.argmax(1) == own).astype(int).tolist(),
        "en-fr": (near.argmax(0) == own).astype(int).tolist(),
    }


def _french(name: str, method: str, folder: Path) -> dict[str, list[int]]:
    """Return truths and answers of one method on one set, all rows in order."""
    rows = [row for part in FRENCH[name] for row in sets.rows(data_folder() / name, part)]
    dev = sets.rows(data_folder() / name, "dev") if name in _OWN_DEV else None
    labels = tuple(sorted({label for _, label in rows}))
    if TINY:
        rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:150].tolist()]
    if dev is not None:
        return _answers(method, rows, dev, labels, folder)
    fold_of = _folds([label for _, label in rows])
    found = {"truth": [0] * len(rows), "answer": [0] * len(rows)}
    for fold in range(FOLDS):
        held = [i for i in range(len(rows)) if fold_of[i] == fold]
        train = [rows[i] for i in range(len(rows)) if fold_of[i] != fold]
        one = _answers(method, train, [rows[i] for i in held], labels, folder)
        for key in found:
            for i, value in zip(held, one[key], strict=True):
                found[key][i] = value
        say(f"  {name} {method}: fold {fold + 1} of {FOLDS}")
    return found


def _folds(labels: Sequence[str]) -> list[int]:
    """Return the fold of each row: every label is spread evenly over the folds, the same way for every method."""
    order = np.random.default_rng(0).permutation(len(labels))
    seen: dict[str, int] = {}
    folds = [0] * len(labels)
    for i in order.tolist():
        folds[i] = seen.get(labels[i], len(seen)) % FOLDS
        seen[labels[i]] = folds[i] + 1
    return folds


def _answers(
    method: str, train: list[tuple[str, str]], test: list[tuple[str, str]], labels: tuple[str, ...], folder: Path
) -> dict[str, list[int]]:
    """Fit on `train`, pack, and answer `test` through the bundle's engine."""
    from alambic.pack import int8
    from alambic.train.linear import fit_tfidf_svm

    fitted, asked = sets.dataset(train, labels), sets.dataset(test, labels)
    part_at, bundle = folder / "part", folder / "one.bundle"
    shutil.rmtree(part_at, ignore_errors=True)
    if method == "tfidf":
        part_at.mkdir()
        part = fit_tfidf_svm(fitted, part_at)
    else:
        how, _, base = method.partition(" ")
        model = folder / "model"
        _fit(how, base, fitted, model)
        from alambic.events import drain

        part = drain(int8.pack_form(int8.REFERENCE, model, part_at, calibration=fitted.texts, cache=folder / "graphs"))
    probabilities, _ = quality.bundle_answers(part, part_at, bundle, labels, asked.texts)
    shutil.rmtree(bundle)
    return {"truth": [t[0] for t in asked.targets()], "answer": probabilities.argmax(1).tolist()}


def _fit(how: str, base: str, train: Any, model: Path) -> None:
    """Write a classifier: a head on the frozen base, or the product's recipe without a dev part."""
    from alambic.events import drain
    from alambic.model.bases import resolve
    from alambic.train.finetune import FinetuneParams, finetune

    params = FinetuneParams(steps=0, few_shot="off") if how == "head" else FinetuneParams(epochs=0.1 if TINY else None)
    drain(finetune(resolve(base), train, None, params=params, out=model))


def _banking(store: Any, base: str) -> None:
    """Find steps and form on dev, then score seeds on test, as `quality` does; frozen head beside."""
    found = store.part(_file(f"banking77-dev-{base}"), partial(quality.on_dev, "banking77", store.folder, base=base))
    for seed in map(int, os.environ.get("ALAMBIC_BENCH_SEEDS", "0,1,2").split(",")):
        work = partial(quality.on_test, "banking77", seed, found, store.folder, base=base)
        store.part(_file(f"banking77-{seed}-{base}"), work)
    store.part(_file(f"banking77-head-{base}"), partial(_banking_head, base, store.folder))


def _banking_head(base: str, folder: Path) -> dict[str, list[int]]:
    train, test = (sets.rows(data_folder() / "banking77", part) for part in ("train", "test"))
    return _answers(f"head {base}", train, test, tuple(sorted({label for _, label in train})), folder)


def _retrieval_table(store: Any) -> list[str]:
    lines = ["## Retrieval, Multi30k test2016", "",
             "| base | n | French to English, % [95 %] | English to French, % [95 %] | bar |",
             "|---|---|---|---|---|"]  # fmt: skip
    for base in (OURS, THEIRS):
        kept = _kept(store, f"retrieval-{base}")
        if kept is not None:
            cells = [_interval(np.array(kept[way]), _share) for way in ("fr-en", "en-fr")]
            lines.append(
                f"| {base} | {len(kept['fr-en']):,} | {cells[0]} | {cells[1]} | {'90' if base == OURS else ''} |"
            )
    return lines


def _banking_table(store: Any) -> list[str]:
    lines = ["## English kept: BANKING77, test accuracy, %", "",
             "| base | n | head on frozen vectors [95 %] | fine-tuned, float, mean of seeds [95 %] | seeds |",
             "|---|---|---|---|---|"]  # fmt: skip
    tuned: dict[str, Any] = {}
    for base in (OURS, THEIRS):
        head = _kept(store, f"banking77-head-{base}")
        runs = [run for seed in range(3) if (run := _kept(store, f"banking77-{seed}-{base}")) is not None]
        if head is None or not runs:
            continue
        tuned[base] = np.array([run["float"]["correct"] for run in runs])
        right = np.array(head["truth"]) == np.array(head["answer"])
        seeds = ", ".join(f"{100 * row.mean():.2f}" for row in tuned[base])
        cell = _interval(tuned[base].mean(axis=0), _share)
        lines.append(f"| {base} | {len(right):,} | {_interval(right, _share)} | {cell} | {seeds} |")
    if len(tuned) == 2 and tuned[OURS].shape == tuned[THEIRS].shape:
        gap = tuned[OURS].mean(axis=0) - tuned[THEIRS].mean(axis=0)
        lines += [
            "",
            f"Ours minus theirs, fine-tuned, same rows: {_interval(gap, _share)} points (bar: at least -0.5).",
        ]
    return lines


def _french_table(store: Any) -> list[str]:
    lines = ["## French, accuracy (umsab_fr: macro F1), %", "",
             "| set | n | method | score [95 %] | tuned ours minus this, same rows [95 %] |",
             "|---|---|---|---|---|"]  # fmt: skip
    for name in FRENCH:
        best = _kept(store, f"{name}-{METHODS[-1]}")
        score = _macro_f1 if name == "umsab_fr" else _accuracy
        for method in METHODS:
            kept = _kept(store, f"{name}-{method}")
            if kept is None:
                continue
            rows = np.stack([kept["truth"], kept["answer"]], axis=1)
            gap = ""
            if best is not None and method != METHODS[-1]:
                both = np.concatenate([rows, np.array(best["answer"])[:, None]], axis=1)
                gap = _interval(both, lambda rows: score(rows[:, [0, 2]]) - score(rows[:, :2]))  # noqa: B023
            lines.append(f"| {name} | {len(rows):,} | {method} | {_interval(rows, score)} | {gap} |")
    return lines


def _share(values: Any) -> float:
    return float(values.mean())


def _accuracy(rows: Any) -> float:
    return float((rows[:, 0] == rows[:, 1]).mean())


def _macro_f1(rows: Any) -> float:
    """Mean F1 over the labels that occur, from columns truth and answer."""
    scores = []
    for label in np.unique(rows[:, 0]):
        hit = ((rows[:, 0] == label) & (rows[:, 1] == label)).sum()
        scores.append(2 * hit / ((rows[:, 0] == label).sum() + (rows[:, 1] == label).sum()))
    return float(np.mean(scores))


def _interval(rows: Any, score: Callable[[Any], float]) -> str:
    """Write `score` of the rows and its percentile bootstrap interval, in per cent."""
    rng = np.random.default_rng(0)
    drawn = [score(rows[rng.integers(0, len(rows), len(rows))]) for _ in range(_REPEATS)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return f"{100 * score(rows):.2f} [{100 * low:.2f}, {100 * high:.2f}]"
