"""Scores against slow references, and intervals against the loop they replace."""

import time

import numpy as np
import pytest

from alambic.errors import AlambicError
from alambic.measure import metrics


def guesses(n=500, labels=5, right=0.8, seed=0):
    rng = np.random.default_rng(seed)
    truths = rng.integers(labels, size=n)
    return truths, np.where(rng.random(n) < right, truths, rng.integers(labels, size=n))


def several(n=300, labels=6, seed=0):
    rng = np.random.default_rng(seed)
    truths = rng.random((n, labels)) < 0.3
    return truths, truths ^ (rng.random((n, labels)) < 0.1)


def slow_macro_f1(truths, predictions):
    scores = []
    for label in set(truths) | set(predictions):
        both = sum(t == p == label for t, p in zip(truths, predictions, strict=True))
        scores.append(2 * both / (sum(t == label for t in truths) + sum(p == label for p in predictions)))
    return sum(scores) / len(scores)


def test_macro_f1_agrees_with_the_slow_reference_when_labels_are_single():
    truths, predictions = guesses()
    assert metrics.macro_f1(truths, predictions) == pytest.approx(slow_macro_f1(truths.tolist(), predictions.tolist()))


def test_macro_f1_leaves_out_labels_when_neither_true_nor_predicted():
    assert metrics.macro_f1(np.array([0, 4]), np.array([0, 4])) == 1.0


def test_macro_f1_agrees_with_scikit_learn_when_labels_are_several():
    f1_score = pytest.importorskip("sklearn.metrics").f1_score
    truths, predictions = several()
    assert metrics.macro_f1(truths, predictions) == pytest.approx(f1_score(truths, predictions, average="macro"))


def test_micro_f1_agrees_with_scikit_learn_when_labels_are_several():
    f1_score = pytest.importorskip("sklearn.metrics").f1_score
    truths, predictions = several()
    assert metrics.micro_f1(truths, predictions) == pytest.approx(f1_score(truths, predictions, average="micro"))


def test_accuracy_counts_right_rows():
    assert metrics.accuracy(np.array([0, 1, 2, 2]), np.array([0, 1, 2, 1])) == 0.75


def test_subset_accuracy_wants_the_whole_set():
    truths = np.array([[1, 0], [1, 1], [0, 0]], dtype=bool)
    assert metrics.subset_accuracy(truths, np.array([[1, 0], [1, 0], [0, 0]], dtype=bool)) == pytest.approx(2 / 3)


def test_every_metric_knows_its_direction():
    assert all(metric.higher_is_better for metric in metrics.METRICS.values())


def test_metric_suggests_the_nearest_name_when_unknown():
    with pytest.raises(AlambicError, match=r"unknown metric 'acuracy'(.|\n)*did you mean 'accuracy'"):
        metrics.metric("acuracy")


def test_per_class_f1_gives_zero_when_a_label_has_no_row():
    lines = metrics.per_class_f1(np.array([0, 0]), np.array([0, 1]), ("a", "b", "c"))
    assert [(line.label, line.support, line.predicted) for line in lines] == [("a", 2, 1), ("b", 0, 1), ("c", 0, 0)]
    assert lines[0].f1 == pytest.approx(2 / 3) and lines[2].f1 == 0.0


def test_confusion_counts_truths_in_lines_and_predictions_in_columns():
    counts = metrics.confusion(np.array([0, 0, 1]), np.array([0, 1, 1]), 2)
    assert counts.tolist() == [[1, 1], [0, 1]]


def test_most_confused_lists_pairs_with_their_share():
    counts = np.array([[5, 5, 0], [1, 9, 0], [0, 0, 4]])
    pairs = metrics.most_confused(counts, ("a", "b", "c"))
    assert [(p.truth, p.predicted, p.count, p.share) for p in pairs] == [("a", "b", 5, 0.5), ("b", "a", 1, 0.1)]


@pytest.mark.parametrize("name", ["accuracy", "macro_f1", "micro_f1"])
def test_bootstrap_agrees_with_the_plain_loop(name):
    truths, predictions = guesses(n=200)
    fast = metrics.bootstrap(name, truths, predictions, n=2000, rng=np.random.default_rng(0))
    rng, samples = np.random.default_rng(1), []
    for _ in range(2000):
        rows = rng.integers(200, size=200)
        samples.append(metrics.metric(name)(truths[rows], predictions[rows]))
    low, high = np.percentile(samples, [2.5, 97.5])
    assert fast.value == metrics.metric(name)(truths, predictions)
    assert (fast.low, fast.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))


def test_bootstrap_covers_more_at_95_than_at_90():
    interval = metrics.bootstrap("accuracy", *guesses(), rng=np.random.default_rng(0))
    assert interval.low <= interval.low_90 < interval.value < interval.high_90 <= interval.high
    assert (interval.n, interval.level) == (500, 0.95)


def test_bootstrap_repeats_itself_when_the_seed_is_the_same():
    first, second = (metrics.bootstrap("macro_f1", *guesses(), rng=np.random.default_rng(7)) for _ in range(2))
    assert first == second


def test_bootstrap_is_a_point_when_all_rows_are_right():
    interval = metrics.bootstrap("macro_f1", np.array([0, 1]), np.array([0, 1]), rng=np.random.default_rng(0))
    assert (interval.low, interval.value, interval.high) == (1.0, 1.0, 1.0)


def test_bootstrap_refuses_when_there_is_no_row():
    with pytest.raises(AlambicError, match="no row to score"):
        metrics.bootstrap("accuracy", np.zeros(0, int), np.zeros(0, int), rng=np.random.default_rng(0))


def test_bootstrap_of_ten_thousand_rows_takes_under_a_second_of_processor():
    truths, predictions = guesses(n=10_000, labels=77)
    start = time.process_time()
    metrics.bootstrap("macro_f1", truths, predictions, n=1000, rng=np.random.default_rng(0))
    assert time.process_time() - start < 2.0  # one second on an idle core; twice that when the machine is shared


def test_paired_bootstrap_ties_when_the_predictions_are_equal():
    truths, predictions = guesses()
    pair = metrics.paired_bootstrap("macro_f1", truths, predictions, predictions, rng=np.random.default_rng(0))
    assert pair.tied and pair.p_value == 1.0 and pair.difference.value == 0.0


def test_paired_bootstrap_sees_a_difference_when_one_is_better():
    truths, worse = guesses(right=0.6)
    pair = metrics.paired_bootstrap("accuracy", truths, truths, worse, rng=np.random.default_rng(0))
    assert not pair.tied and pair.p_value <= 0.002 and pair.difference.low > 0.2


def test_paired_bootstrap_is_narrower_than_two_separate_intervals_when_errors_are_shared():
    truths, first = guesses(n=1000, right=0.7)
    second = first.copy()
    second[:10] = truths[:10]
    rng = np.random.default_rng(0)
    pair = metrics.paired_bootstrap("accuracy", truths, second, first, rng=rng).difference
    alone = metrics.bootstrap("accuracy", truths, first, rng=rng)
    assert pair.high - pair.low < (alone.high - alone.low) / 2


def test_quantile_interval_holds_the_quantile():
    values = np.random.default_rng(0).exponential(size=400)
    interval = metrics.quantile_interval(values, 0.95, rng=np.random.default_rng(0))
    assert interval.value == np.quantile(values, 0.95)
    assert interval.low < interval.value < interval.high and interval.n == 400


def test_quantile_interval_covers_the_truth_about_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        interval = metrics.quantile_interval(rng.normal(size=200), 0.5, n=300, rng=rng)
        hits += interval.low <= 0.0 <= interval.high
    assert 0.9 <= hits / 200 <= 0.99


def test_indicators_mark_each_target():
    assert metrics.indicators([[0, 2], []], 3).tolist() == [[True, False, True], [False, False, False]]
