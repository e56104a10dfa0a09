"""Heads on frozen embeddings: logistic regression and nearest neighbours, through the parts that run them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from alambic.data.dataset import Dataset, Example
from alambic.engines.heads import KnnHead, LinearHead
from alambic.errors import TrainError
from alambic.train.heads import fit_knn_head, fit_logreg_head

LABELS = ("a", "b", "c", "d")
CENTRES = np.random.default_rng(7).normal(size=(len(LABELS), 16))


def blobs(n: int, used: tuple[int, ...] = (0, 1, 3), *, noise: float = 0.4) -> tuple[np.ndarray, Dataset]:
    """N points around one centre per label; label c (index 2) has none unless asked for."""
    rng = np.random.default_rng(n)
    picks = [used[i % len(used)] for i in range(n)]
    x = CENTRES[picks] + rng.normal(scale=noise, size=(n, 16))
    x[:, 5] = 0.25  # real encoders have dimensions that never move
    examples = tuple(Example(f"text {i}", (LABELS[pick],), where=f"rows.csv:{i + 2}") for i, pick in enumerate(picks))
    return x.astype(np.float32), Dataset(examples, LABELS)


def linear(folder: Path, x: np.ndarray, train: Dataset) -> np.ndarray:
    part = fit_logreg_head(x, train, folder)
    return LinearHead(folder, part.params, threads=None, cache_dir=None).run(x)


def knn(folder: Path, x: np.ndarray, train: Dataset, asked: np.ndarray) -> np.ndarray:
    part = fit_knn_head(x, train, folder)
    return KnnHead(folder, part.params, threads=None, cache_dir=None).run(asked)


def test_logreg_finds_labels_when_blobs_are_apart(tmp_path: Path) -> None:
    x, train = blobs(60)
    assert linear(tmp_path, x, train).argmax(axis=1).tolist() == [t[0] for t in train.targets()]


def test_logreg_part_equals_sklearn_when_standardisation_is_folded(tmp_path: Path) -> None:
    x, train = blobs(60, (0, 1, 2, 3))
    ours = linear(tmp_path, x, train)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    spread = np.where(unit.std(axis=0) < 1e-6, 1.0, unit.std(axis=0))
    theirs = [
        LogisticRegression(C=c, max_iter=2000, tol=1e-6)
        .fit((unit - unit.mean(axis=0)) / spread, [t[0] for t in train.targets()])
        .decision_function((unit - unit.mean(axis=0)) / spread)
        for c in (0.003, 0.01, 0.03, 0.1)
    ]
    fits = [
        np.abs(ours - logits * np.sum(ours * logits) / np.sum(logits**2)).max() / np.abs(ours).max()
        for logits in theirs
    ]
    assert min(fits) < 0.02


def test_logreg_never_chooses_a_label_when_training_has_none(tmp_path: Path) -> None:
    x, train = blobs(60)
    logits = linear(tmp_path, x, train)
    assert logits.shape == (60, 4)
    assert (logits[:, 2] == -1e4).all()


def test_logreg_gives_opposite_logits_when_two_labels_are_seen(tmp_path: Path) -> None:
    x, train = blobs(40, (0, 3))
    logits = linear(tmp_path, x, train)
    np.testing.assert_allclose(logits[:, 0], -logits[:, 3], atol=1e-4)
    assert logits.argmax(axis=1).tolist() == [t[0] for t in train.targets()]


def test_logreg_probabilities_are_calibrated_when_labels_overlap(tmp_path: Path) -> None:
    x, train = blobs(400, (0, 1, 3), noise=3.0)
    part = fit_logreg_head(x[:200], train.take(range(200)), tmp_path)
    logits = LinearHead(tmp_path, part.params, threads=None, cache_dir=None).run(x[200:])
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    right = logits.argmax(axis=1) == [t[0] for t in train.take(range(200, 400)).targets()]
    assert abs(shares.max(axis=1).mean() - right.mean()) < 0.1


def test_logreg_writes_the_same_files_when_the_seed_is_the_same(tmp_path: Path) -> None:
    x, train = blobs(40)
    for name in ("a", "b"):
        fit_logreg_head(x, train, tmp_path / name, seed=5)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("fit", [fit_logreg_head, fit_knn_head])
def test_several_labels_are_found_when_multi_label(tmp_path: Path, fit: object) -> None:
    rng = np.random.default_rng(0)
    bits = rng.random((120, 3)) < 0.5
    x = (bits @ CENTRES[:3] + CENTRES[3] + rng.normal(scale=0.1, size=(120, 16))).astype(np.float32)
    examples = tuple(Example("t", tuple(np.array(LABELS)[:3][row])) for row in bits)
    train = Dataset(examples, LABELS, multi_label=True)
    part = fit(x, train, tmp_path)  # type: ignore[operator]
    runner = (LinearHead if part.engine == "linear-head" else KnnHead)(
        tmp_path, part.params, threads=None, cache_dir=None
    )
    found = runner.run(x) >= (0.0 if part.params["output"] == "logits" else 0.5)
    assert not found[:, 3].any()
    assert (found[:, :3] == bits).mean() > 0.97


def test_knn_finds_labels_when_blobs_are_apart(tmp_path: Path) -> None:
    x, train = blobs(60)
    asked, truth = blobs(31)
    probabilities = knn(tmp_path, x, train, asked)
    assert probabilities.argmax(axis=1).tolist() == [t[0] for t in truth.targets()]
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, atol=1e-5)
    assert (probabilities[:, 2] == 0).all()


def test_knn_takes_more_neighbours_when_labels_are_noisy(tmp_path: Path) -> None:
    x, train = blobs(300, noise=0.2)
    dice = np.random.default_rng(1)
    noisy = tuple(
        Example(e.text, (LABELS[dice.choice([0, 1, 3])],)) if dice.random() < 0.3 else e for e in train.examples
    )
    assert fit_knn_head(x, Dataset(noisy, LABELS), tmp_path).params["k"] >= 10


def test_knn_does_not_learn_from_twins_when_they_share_a_group(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(40, 16)), 2, axis=0).astype(np.float32)
    labels = np.repeat(["a", "a", "a", "b"], 20)
    rng.shuffle(labels.reshape(40, 2))
    alone = Dataset(tuple(Example("t", (str(v),)) for v in labels), ("a", "b"))
    grouped = Dataset(tuple(Example("t", (str(v),), group=f"g{i // 2}") for i, v in enumerate(labels)), ("a", "b"))
    assert fit_knn_head(x, alone, tmp_path / "alone").params["k"] == 1
    assert fit_knn_head(x, grouped, tmp_path / "grouped").params["k"] > 1


@pytest.mark.parametrize("fit", [fit_logreg_head, fit_knn_head])
def test_fit_works_when_there_are_two_examples(tmp_path: Path, fit: object) -> None:
    x, train = blobs(2, (0, 1))
    part = fit(x, train, tmp_path)  # type: ignore[operator]
    assert part.after == "encoder"


@pytest.mark.parametrize("fit", [fit_logreg_head, fit_knn_head])
def test_fit_fails_when_embeddings_have_another_length(tmp_path: Path, fit: object) -> None:
    x, train = blobs(10)
    with pytest.raises(TrainError, match=r"embeddings have shape \(9, 16\), expected \[10, H\]"):
        fit(x[:9], train, tmp_path)  # type: ignore[operator]


def test_fit_fails_when_an_embedding_is_not_finite(tmp_path: Path) -> None:
    x, train = blobs(10)
    x[3, 0] = np.nan
    with pytest.raises(TrainError, match=r"rows\.csv:5: its embedding is not finite \(1 of 10 examples\)"):
        fit_logreg_head(x, train, tmp_path)


@pytest.mark.parametrize("fit", [fit_logreg_head, fit_knn_head])
def test_fit_fails_when_every_example_has_one_label(tmp_path: Path, fit: object) -> None:
    x, train = blobs(5, (1,))
    with pytest.raises(TrainError, match=r"all 5 training examples have the same answer \('b'\)"):
        fit(x, train, tmp_path)  # type: ignore[operator]
