"""Promises that rows support: exact bounds, fixed-sequence thresholds, label sets, scope, calibration error."""

import numpy as np
import pytest

from alambic.kinds.decision import Decision, scope_scores, tempered
from alambic.measure.calibration import Reliability, fit_temperature, reliability
from alambic.measure.selective import (
    auroc,
    binomial_tail,
    choose_scope,
    rows_needed,
    scope_threshold,
    select,
    set_rows_needed,
    set_threshold,
    upper_bound,
)

LABELS = ("a", "b", "c")


def rows(n, rng, *, better=0.0):
    """Confidence and rightness of rows that are right a little more often than they say."""
    logit = rng.normal(4.0 + better, 2.0, n)
    return 1 / (1 + np.exp(-logit)), rng.random(n) < 1 / (1 + np.exp(-0.9 * logit - 0.1))


def drawn(p, rng):
    """One label a row, with the probabilities of that row."""
    return (p.cumsum(axis=1) < rng.random((len(p), 1))).sum(axis=1).clip(max=p.shape[1] - 1)


def test_binomial_tail_equals_the_sum_of_its_terms_when_n_is_small():
    from math import comb

    for k in range(7):
        exact = sum(comb(6, i) * 0.3**i * 0.7 ** (6 - i) for i in range(k + 1))
        assert binomial_tail(k, 6, 0.3) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(("errors", "n", "bound"), [(0, 149, 0.01990), (3, 200, 0.03831), (0, 1, 0.95), (2, 2, 1.0)])
def test_upper_bound_is_clopper_pearsons_when_tables_are_asked(errors, n, bound):
    assert upper_bound(errors, n) == pytest.approx(bound, abs=1e-5)


def test_rows_needed_are_the_fewest_when_none_may_be_wrong():
    assert rows_needed(0.98) == 149
    assert upper_bound(0, 149) <= 0.02 < upper_bound(0, 148)
    assert set_rows_needed(0.9) == 9
    assert set_threshold(np.linspace(0.1, 0.9, 9), 0.9) is not None
    assert set_threshold(np.linspace(0.1, 0.9, 8), 0.9) is None


def test_select_promises_nothing_when_no_threshold_is_supported():
    rng = np.random.default_rng(0)
    confidence = rng.random(400)
    found = select((confidence, rng.random(400) < 0.5), (confidence, rng.random(400) < 0.5), precision=0.98)
    assert not found.kept and found.bound > 0.02
    assert found.n == 400


def test_select_answers_everything_when_nothing_is_wrong():
    confidence = np.linspace(0.3, 1.0, 300)
    found = select((confidence, np.ones(300, bool)), (confidence, np.ones(300, bool)), precision=0.98)
    assert (found.kept, found.threshold, found.answered, found.errors) == (True, 0.0, 300, 0)
    assert found.bound == pytest.approx(1 - 0.05 ** (1 / 300), abs=1e-9)


def test_select_never_answers_rows_that_the_scope_refused():
    confidence = np.linspace(0.3, 1.0, 300)
    right = np.ones(300, bool)
    right[:100] = False
    refused = np.where(right, confidence, -np.inf)
    found = select((confidence, right), (refused, right), precision=0.98)
    assert found.kept and found.errors == 0 and found.answered <= 200


def test_select_keeps_its_promise_in_19_of_20_draws_when_drawn_again_and_again():
    rng = np.random.default_rng(1)
    everyone = rows(200_000, rng, better=1.0)
    broken = made = 0
    for _ in range(120):
        found = select(rows(400, rng, better=1.0), rows(600, rng, better=1.0), precision=0.97)
        made += found.kept
        answered = everyone[0] >= found.threshold
        broken += found.kept and everyone[1][answered].mean() < 0.97
    # 120 draws of an event of at most 1 in 20: more than 11 happen by chance once in 50.
    assert made > 60 and broken <= 11


def test_label_sets_hold_the_truth_as_often_as_asked_when_drawn_again():
    rng = np.random.default_rng(2)

    def draw(n):
        p = rng.dirichlet((0.5, 0.5, 0.5), n)
        return p, drawn(p, rng)

    held = []
    for _ in range(40):
        p, truth = draw(200)
        least = set_threshold(p[np.arange(200), truth], 0.9)
        p, truth = draw(500)
        held.append((p[np.arange(500), truth] >= least).mean())
    assert 0.895 <= np.mean(held) <= 0.92


def test_label_set_is_never_empty_when_all_probabilities_are_low():
    decision = Decision(set_threshold=0.6)
    assert decision.label_set({"a": 0.5, "b": 0.3, "c": 0.2}, "a") == ("a",)
    assert Decision(set_threshold=0.25).label_set({"a": 0.3, "b": 0.5, "c": 0.2}, "b") == ("b", "a")
    assert Decision().label_set({"a": 1.0}, "a") is None


def test_scope_threshold_lets_the_asked_share_pass():
    scores = np.random.default_rng(3).normal(size=999)
    assert (scores >= scope_threshold(scores, 0.98)).mean() == pytest.approx(0.98, abs=0.0015)
    assert scope_threshold(scores[:40], 0.98) is None


def test_choose_scope_takes_the_score_that_catches_most():
    inside = {"confidence": np.linspace(0, 1, 100), "energy": np.linspace(10, 11, 100)}
    outside = {"confidence": np.linspace(0, 1, 50), "energy": np.linspace(0, 9, 50)}
    assert choose_scope(inside, outside, 0.95) == ("energy", 1.0)
    assert auroc(inside["energy"], outside["energy"]) == 1.0
    assert auroc(inside["confidence"], outside["confidence"]) == pytest.approx(0.5, abs=0.01)


def test_scope_scores_follow_their_formulas_when_a_label_means_none_of_the_others():
    logits = np.array([[2.0, 1.0, -1.0]])
    p = np.exp(logits) / np.exp(logits).sum()
    assert scope_scores("confidence", p, None, LABELS)[0] == pytest.approx(p[0, 0])
    assert scope_scores("max_logit", p, logits, LABELS)[0] == 2.0
    assert scope_scores("energy", p, logits, LABELS)[0] == pytest.approx(np.log(np.exp(logits).sum()))
    assert scope_scores("confidence", p, None, LABELS, label="a")[0] == pytest.approx(p[0, 1])
    assert scope_scores("max_logit", p, logits, LABELS, label="a")[0] == -1.0
    assert scope_scores("energy", p, logits, LABELS, label="a")[0] == pytest.approx(
        np.log(np.exp(1.0) + np.exp(-1.0)) - 2.0
    )


def test_temperature_undoes_overconfidence_and_leaves_the_winner():
    rng = np.random.default_rng(4)
    true = rng.dirichlet((0.4, 0.4, 0.4), 4000)
    truth = drawn(true, rng)
    sure = tempered(true, 3.0)
    factor = fit_temperature(sure, truth)
    assert factor == pytest.approx(1 / 3, rel=0.08)
    after = tempered(sure, factor)
    assert (after.argmax(1) == sure.argmax(1)).all()
    errors = [
        reliability(p.max(1), p.argmax(1) == truth, rng=np.random.default_rng(0), draws=50).ece for p in (sure, after)
    ]
    assert errors[0] > 0.1 and errors[1] < 0.025


def test_reliability_bins_have_equal_mass_and_survive_json():
    rng = np.random.default_rng(5)
    confidence = rng.random(307)
    found = reliability(confidence, rng.random(307) < confidence, rng=rng, draws=20)
    assert len(found.bins) == 15 and sum(b.n for b in found.bins) == 307
    assert max(b.n for b in found.bins) - min(b.n for b in found.bins) <= 1
    assert Reliability.from_dict(found.to_dict()) == found
    exact = sum(b.n * abs(b.confidence - b.accuracy) for b in found.bins) / 307
    assert found.ece == pytest.approx(exact)
