"""How many labels `alambic label` asks for, against texts in random order, on BANKING77.

Both orders feed the learner that guesses on the page: logistic regression on vectors of the frozen all-MiniLM-L6-v2,
begun from the label names. The target is 95 % of the best test accuracy that it has with all 10,003 training labels.
Labels needed: where the test accuracy reaches the target and stays there for three rounds, between rounds by straight
lines. Each round asks for 5 % more labels (at least 10), more coarsely than the page, which learns after every answer.
A seed draws a random nine tenths of the training texts as what there is to ask about, and the random order.

What is uncertain favours the random order: in each of its rounds, and for the target, the regularisation that is best
on test is taken out of four, while the order of `alambic label` keeps the one of the page. The figures of that order
were set on rows held out of the training part; test only scores.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import sets
from run import TINY, data_folder, say

MINUTES = 12
WHAT = (
    "Labels needed to reach 95 % of full-data accuracy on BANKING77: the order of `alambic label` against random order"
)
BASE = "all-minilm-l6-v2"
SHARE = 0.95
BAR = 0.60
FIRST, LEAST_MORE, GROWTH = 20, 10, 1.05
STAYS = 3
STRENGTHS = (3.0, 10.0, 30.0, 100.0)  # inverse; the page has 30
MOST = 400 if TINY else 5_000
SEEDS = tuple(map(int, os.environ.get("ALAMBIC_BENCH_SEEDS", "0" if TINY else "0,1,2,3,4").split(",")))
_CHUNK = 256


def run(store: Any) -> str:
    """Embed once, find the target, follow both orders for each seed."""
    train, _, test = sets.load(data_folder(), "banking77")
    names = [name.replace("_", " ") for name in train.labels]
    parts = {"train": train.texts, "test": test.texts, "names": names}
    vectors = {name: embedded(store.folder, name, texts) for name, texts in parts.items()}
    truth = {"train": _first(train), "test": _first(test)}
    full = store.part("full", partial(full_accuracy, vectors, truth))
    curves: dict[str, dict[int, Any]] = {"random": {}, "useful": {}}
    for seed in SEEDS:
        for order, found in curves.items():
            found[seed] = store.part(
                f"{order}-{seed}", partial(curve, order, seed, vectors, truth, SHARE * full["accuracy"])
            )
    return _table(full, curves, len(test))


def embedded(folder: Path, name: str, texts: list[str]) -> Any:
    """Return the vectors of `texts`, kept in chunks so that an interrupted run goes on."""
    from alambic.build.labelling.encoder import open_encoder
    from alambic.events import drain
    from alambic.task import BaseSpec

    encoder = None
    found = []
    for i in range(0, len(texts), _CHUNK):
        path = folder / f"{name}-{i:05d}.npy"
        if not path.exists():
            if encoder is None:
                encoder = drain(open_encoder(BaseSpec(name=BASE), texts, root=Path.cwd(), threads=1))
            np.save(path.with_suffix(".tmp.npy"), encoder.embed(texts[i : i + _CHUNK]))
            path.with_suffix(".tmp.npy").replace(path)
            say(f"  {name} {i}/{len(texts)} embedded")
        found.append(np.load(path))
    return np.concatenate(found)


def full_accuracy(vectors: dict[str, Any], truth: dict[str, Any]) -> dict[str, Any]:
    """Return the best test accuracy of the learner with every training label."""
    n = len(truth["train"])
    found = {}
    for c in STRENGTHS:
        learner = _learner(vectors, c=c)
        for _ in range(3):  # each goes on from where the one before stopped
            found[c] = _score(learner, np.arange(n), vectors, truth)[0]
    return {"accuracy": max(found.values()), "n": n, "by_strength": found}


def _score(learner: Any, rows: Any, vectors: dict[str, Any], truth: dict[str, Any]) -> tuple[float, Any]:
    """Fit on the training texts `rows`; return the test accuracy, and the guesses."""
    n_labels = len(vectors["names"])
    guesses = learner.fit(rows, _matrix(truth["train"][rows], n_labels), calibrated=False, also=vectors["test"])
    return float((guesses.raw[len(truth["train"]) :].argmax(1) == truth["test"]).mean()), guesses


def curve(
    order: str, seed: int, vectors: dict[str, Any], truth: dict[str, Any], target: float, *, weights: Any = None
) -> dict[str, Any]:
    """Ask in `order` until the target is reached and held; return labels and test accuracy of every round."""
    from alambic.train.labelling import next_texts

    rng = np.random.default_rng(seed)
    n_train, n_labels = len(truth["train"]), len(vectors["names"])
    learner = _learner(vectors)
    learners = [_learner(vectors, c=c) for c in STRENGTHS] if order == "random" else [learner]
    pool = rng.permutation(n_train)[: n_train * 9 // 10]
    asked: list[int] = []
    points: list[tuple[int, float]] = []
    open_rows = np.zeros(n_train, dtype=bool)
    open_rows[pool] = True
    wanted = FIRST
    while len(asked) < min(MOST, len(pool)):
        rows = np.array(asked, dtype=np.intp)
        scored = [_score(one, rows, vectors, truth) for one in learners]
        guesses = scored[0][1]
        if asked:
            points.append((len(asked), max(accuracy for accuracy, _ in scored)))
            if len(points) >= STAYS and all(accuracy >= target for _, accuracy in points[-STAYS:]):
                break
        more = wanted - len(asked)
        if order == "random":
            new = [int(row) for row in pool[len(asked) : wanted]]
        else:
            counts = np.bincount(truth["train"][rows], minlength=n_labels).tolist()
            candidates = np.flatnonzero(open_rows)
            new = [row for row, _ in next_texts(guesses, learner, candidates, counts, n=more, weights=weights)]
        asked += new
        open_rows[new] = False
        wanted = max(len(asked) + LEAST_MORE, int(len(asked) * GROWTH))
    return {
        "points": points,
        "needed": _needed(points, target),
        "labels_seen": len({int(truth["train"][r]) for r in asked}),
    }


def _learner(vectors: dict[str, Any], **options: float) -> Any:
    from alambic.train.labelling import Learner

    return Learner(vectors["train"], vectors["names"], n_labels=len(vectors["names"]), multi_label=False, **options)


def _needed(points: list[tuple[int, float]], target: float) -> float | None:
    """Return the labels at which the accuracy reaches the target and stays; None if it never does."""
    for i in range(len(points) - STAYS + 1):
        if all(accuracy >= target for _, accuracy in points[i : i + STAYS]):
            if i == 0:
                return float(points[0][0])
            (n0, a0), (n1, a1) = points[i - 1], points[i]
            return n0 + (n1 - n0) * max(0.0, target - a0) / max(a1 - a0, 1e-9)
    return None


def _first(data: Any) -> Any:
    return np.array([target[0] for target in data.targets()])


def _matrix(labels: Any, n_labels: int) -> Any:
    return np.eye(n_labels, dtype=bool)[labels]


def _table(full: dict[str, Any], curves: dict[str, dict[int, Any]], n_test: int) -> str:
    target = SHARE * full["accuracy"]
    lines = [
        f"With all {full['n']:,} labels the learner has {100 * full['accuracy']:.2f} % accuracy (n = {n_test:,} test "
        f"texts); the target is {100 * target:.2f} %.",
        "",
        "| seed | random order, labels needed | order of `alambic label`, labels needed | share |",
        "|---|---|---|---|",
    ]
    shares = []
    for seed in curves["random"]:
        random, useful = curves["random"][seed]["needed"], curves["useful"][seed]["needed"]
        if random is None or useful is None:
            lines.append(f"| {seed} | {_said(random)} | {_said(useful)} | |")
            continue
        shares.append(useful / random)
        lines.append(f"| {seed} | {random:,.0f} | {useful:,.0f} | {100 * shares[-1]:.1f} % |")
    if shares:
        low, high = _interval(shares)
        lines += [
            "",
            f"Mean share {100 * np.mean(shares):.1f} % [{100 * low:.1f}, {100 * high:.1f}] (95 %, t over {len(shares)} "
            f"seeds); bar: at most {100 * BAR:.0f} %.",
        ]
    return "\n".join([*lines, "", *_accuracies(curves)])


def _said(needed: float | None) -> str:
    return f"not within {MOST:,}" if needed is None else f"{needed:,.0f}"


def _interval(values: list[float]) -> tuple[float, float]:
    from scipy import stats

    if len(values) < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def _accuracies(curves: dict[str, dict[int, Any]]) -> list[str]:
    """Return mean test accuracy at some numbers of labels, by straight lines between rounds."""
    at = (50, 100, 200, 400, 800, 1600)
    lines = ["| labels | " + " | ".join(f"{n:,}" for n in at) + " |", "|---|" + "---|" * len(at)]
    for order, found in curves.items():
        cells = []
        for n in at:
            reached = [np.array(one["points"]) for one in found.values() if one["points"][-1][0] >= n]
            values = [100 * np.interp(n, points[:, 0], points[:, 1]) for points in reached]
            cells.append(f"{np.mean(values):.1f} % ({len(values)} seeds)" if values else "")
        lines.append(f"| {order} order | " + " | ".join(cells) + " |")
    return lines
