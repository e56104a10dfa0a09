"""The TF-IDF candidate: what it learns, and that its numpy runner agrees with scikit-learn."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import hstack
from sklearn.feature_extraction.text import TfidfVectorizer

from alambic.data.dataset import Dataset, Example
from alambic.engines.majority import Majority
from alambic.engines.tfidf_features import TOKEN_PATTERN, normalise
from alambic.engines.tfidf_linear import TfidfLinear
from alambic.errors import EngineError, TrainError
from alambic.manifest import PartSpec
from alambic.train.linear import fit_majority, fit_tfidf_svm

ROWS = [
    ("Où est mon colis ?", "delivery"),
    ("le colis n'est pas arrivé", "delivery"),
    ("my parcel is late", "delivery"),
    ("colis perdu depuis lundi", "delivery"),
    ("Je veux être remboursé", "refund"),
    ("remboursement s'il vous plaît", "refund"),
    ("give me my money back", "refund"),
    ("money back please 💸", "refund"),
    ("the screen is broken", "repair"),
    ("écran cassé, code E18", "repair"),
    ("it does not start any more", "repair"),
    ("la machine ne démarre plus", "repair"),
]
ALPHABET = "aàâbcçdeéèêëfgœoöuùü ZÉÀÇİß  \t\n\u00a0'-_.,;:!?0189€💸👩‍🔧שלוםمرحبا漢字e\u0301\u200b\x00\x1c\x85"


def dataset(rows: list[tuple[str, Any]], *, labels: tuple[str, ...] = (), multi_label: bool = False) -> Dataset:
    examples = tuple(Example(text, (label,) if isinstance(label, str) else tuple(label)) for text, label in rows)
    names = labels or tuple(sorted({label for example in examples for label in example.labels}))
    return Dataset(examples, names, multi_label)


def open_part(part: PartSpec, folder: Path) -> TfidfLinear:
    return TfidfLinear(folder, part.params, threads=None, cache_dir=None)


def random_texts(n: int, seed: int = 0) -> list[str]:
    dice = random.Random(seed)
    words = [word for text, _ in ROWS for word in text.split()]

    def piece() -> str:
        return dice.choice(words) if dice.random() < 0.5 else "".join(dice.choices(ALPHABET, k=dice.randint(0, 12)))

    return [dice.choice([" ", "  ", "\n", ""]).join(piece() for _ in range(dice.randint(0, 20))) for _ in range(n)]


def by_sklearn(folder: Path, texts: list[str], *, words: tuple[int, int], chars: tuple[int, int]) -> np.ndarray:
    """Rebuild scikit-learn's pipeline from the files of a part, and return its decision values."""
    grams = [(folder / name).read_text("utf-8").split("\n")[:-1] for name in ("words.txt", "chars.txt")]
    idf = np.load(folder / "idf.npy").astype(np.float64)
    shared: dict[str, Any] = {"preprocessor": normalise, "lowercase": False, "sublinear_tf": True}
    pair = [
        TfidfVectorizer(token_pattern=TOKEN_PATTERN, ngram_range=words, vocabulary=grams[0], **shared),
        TfidfVectorizer(analyzer="char_wb", ngram_range=chars, vocabulary=grams[1], **shared),
    ]
    for one, values in zip(pair, (idf[: len(grams[0])], idf[len(grams[0]) :]), strict=True):
        one.idf_ = values
    x = hstack([one.transform(texts) for one in pair]).tocsr()
    return x @ np.load(folder / "weight.npy").astype(np.float64) + np.load(folder / "bias.npy")


@pytest.mark.parametrize(("words", "chars"), [((1, 2), (2, 5)), ((1, 1), (1, 3)), ((2, 3), (4, 4))])
def test_logits_equal_sklearn_when_texts_are_random(
    tmp_path: Path, words: tuple[int, int], chars: tuple[int, int]
) -> None:
    train = dataset(ROWS + [(text, "repair") for text in random_texts(60, seed=1)])
    part = fit_tfidf_svm(train, tmp_path, params={"words": words, "chars": chars})
    texts = ["", " ", "💸", "x", *random_texts(400), *train.texts]
    ours = open_part(part, tmp_path).run(texts)
    np.testing.assert_allclose(ours, by_sklearn(tmp_path, texts, words=words, chars=chars), atol=2e-5)


def test_logits_are_the_same_when_texts_run_alone_or_together(tmp_path: Path) -> None:
    part = fit_tfidf_svm(dataset(ROWS), tmp_path)
    runner, texts = open_part(part, tmp_path), random_texts(30)
    together = runner.run(texts)
    assert together.dtype == np.float32
    np.testing.assert_array_equal(together, np.concatenate([runner.run([text]) for text in texts]))


def test_fit_learns_its_examples_when_they_can_be_told_apart(tmp_path: Path) -> None:
    train = dataset(ROWS)
    logits = open_part(fit_tfidf_svm(train, tmp_path), tmp_path).run(train.texts)
    assert [train.labels[i] for i in logits.argmax(axis=1)] == [label for _, label in ROWS]


def test_accents_are_kept_and_composed_when_text_is_normalised() -> None:
    assert normalise("E\u0301TÉ Cassé") == "été cassé"


def test_same_files_when_the_seed_is_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        fit_tfidf_svm(dataset(ROWS), tmp_path / name, seed=3)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_absent_label_is_never_chosen_when_the_task_has_it(tmp_path: Path) -> None:
    train = dataset(ROWS, labels=("delivery", "other", "refund", "repair"))
    logits = open_part(fit_tfidf_svm(train, tmp_path), tmp_path).run(["zzz", *train.texts])
    assert logits.shape == (13, 4)
    assert (logits[:, 1] == -1e4).all()
    assert 1 not in logits.argmax(axis=1)


def test_two_labels_give_opposite_logits_when_the_task_is_binary(tmp_path: Path) -> None:
    train = dataset([row for row in ROWS if row[1] != "repair"])
    logits = open_part(fit_tfidf_svm(train, tmp_path), tmp_path).run(train.texts)
    np.testing.assert_allclose(logits[:, 0], -logits[:, 1], atol=1e-3)


def test_several_labels_are_found_when_the_task_is_multi_label(tmp_path: Path) -> None:
    rows = [(text, [label]) for text, label in ROWS] + [("colis cassé", ["delivery", "repair"]), ("bonjour", [])]
    train = dataset(rows, labels=("delivery", "other", "refund", "repair"), multi_label=True)
    logits = open_part(fit_tfidf_svm(train, tmp_path, params={"c": 10.0}), tmp_path).run(["colis cassé", "bonjour"])
    assert (logits > 0).tolist() == [[True, False, False, True], [False] * 4]


def test_always_present_label_is_always_found_when_multi_label(tmp_path: Path) -> None:
    train = dataset([(text, [label, "all"]) for text, label in ROWS], multi_label=True)
    logits = open_part(fit_tfidf_svm(train, tmp_path), tmp_path).run(["never seen before"])
    assert logits[0, train.labels.index("all")] > 0


def test_part_stays_small_when_max_mb_is_given(tmp_path: Path) -> None:
    train = dataset(ROWS)
    part = fit_tfidf_svm(train, tmp_path, params={"max_mb": 0.005})
    assert part.params["pruned"] > 0
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 5000
    logits = open_part(part, tmp_path).run(train.texts)
    assert (logits.argmax(axis=1) == [train.labels.index(label) for _, label in ROWS]).mean() > 0.9


def test_emoji_alone_can_be_learnt_when_no_text_has_a_word(tmp_path: Path) -> None:
    train = dataset([("😀😀", "up"), ("😀 !", "up"), ("😀", "up"), ("😡😡", "down"), ("😡 !", "down"), ("😡", "down")])
    logits = open_part(fit_tfidf_svm(train, tmp_path), tmp_path).run(["😡", "😀"])
    assert [train.labels[i] for i in logits.argmax(axis=1)] == ["down", "up"]


def test_label_seen_once_is_accepted_when_folds_cannot_hold_it(tmp_path: Path) -> None:
    train = dataset([*ROWS, ("bonjour à tous", "greeting")])
    logits = open_part(fit_tfidf_svm(train, tmp_path), tmp_path).run(["bonjour à tous"])
    assert train.labels[int(logits.argmax())] == "greeting"


def test_fit_fails_when_every_example_has_one_label(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"all 4 training examples have the same answer \('refund'\)"):
        fit_tfidf_svm(dataset([row for row in ROWS if row[1] == "refund"]), tmp_path)


def test_fit_fails_when_there_are_no_examples(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="there is nothing to train on: 0 examples"):
        fit_tfidf_svm(Dataset((), ("a", "b")), tmp_path)


def test_fit_fails_when_no_ngram_is_left(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="none of the 2 training texts has an n-gram found in 5 or more of them"):
        fit_tfidf_svm(dataset([("a", "x"), ("b", "y")]), tmp_path, params={"min_df": 5})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"char": [2, 4]}, "unknown key 'char'\n  hint: did you mean 'chars'"),
        ({"words": [2, 1]}, "words is \\[2, 1\\], expected two whole numbers"),
        ({"c": 0}, "c is 0, expected a number above 0"),
        ({"min_df": True}, "min_df is True, expected a whole number of 1 or more"),
    ],
)
def test_recipe_is_refused_when_a_value_is_wrong(tmp_path: Path, params: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        fit_tfidf_svm(dataset(ROWS), tmp_path, params=params)


def test_open_fails_when_arrays_do_not_fit(tmp_path: Path) -> None:
    part = fit_tfidf_svm(dataset(ROWS), tmp_path)
    np.save(tmp_path / "idf.npy", np.ones(3, dtype=np.float32))
    with pytest.raises(EngineError, match=r"n-grams but idf \(3,\)"):
        open_part(part, tmp_path)


def test_open_fails_when_an_array_is_a_pickle(tmp_path: Path) -> None:
    part = fit_tfidf_svm(dataset(ROWS), tmp_path)
    np.save(tmp_path / "bias.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(EngineError, match=r"bias\.npy"):
        open_part(part, tmp_path)


def test_open_fails_when_the_text_was_prepared_in_another_way(tmp_path: Path) -> None:
    part = fit_tfidf_svm(dataset(ROWS), tmp_path)
    with pytest.raises(EngineError, match=r"normalisation is 'v9', this version knows 'lower-nfc\.v1'"):
        TfidfLinear(tmp_path, {**part.params, "normalisation": "v9"}, threads=None, cache_dir=None)


def test_runner_needs_no_sklearn_when_it_predicts(tmp_path: Path) -> None:
    part = fit_tfidf_svm(dataset(ROWS), tmp_path)
    code = (
        "import sys; from pathlib import Path; from alambic.engines.tfidf_linear import TfidfLinear\n"
        f"TfidfLinear(Path({str(tmp_path)!r}), {part.params!r}, threads=None, cache_dir=None).run(['colis'])\n"
        "print([m for m in ('sklearn', 'scipy', 'torch') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_majority_answers_the_most_frequent_label_when_counts_differ(tmp_path: Path) -> None:
    train = dataset([("a", "x"), ("b", "y"), ("c", "y")], labels=("w", "x", "y"))
    part = fit_majority(train, tmp_path)
    logits = Majority(tmp_path, part.params, threads=None, cache_dir=None).run(["anything", ""])
    np.testing.assert_allclose(np.exp(logits), [[0, 1 / 3, 2 / 3]] * 2, atol=1e-6)


def test_majority_gives_each_share_when_multi_label(tmp_path: Path) -> None:
    train = dataset([("a", ["x"]), ("b", ["x"]), ("c", ["x", "y"]), ("d", [])], multi_label=True)
    part = fit_majority(train, tmp_path)
    logits = Majority(tmp_path, part.params, threads=None, cache_dir=None).run(["a"])
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), [[0.75, 0.25]], atol=1e-6)
