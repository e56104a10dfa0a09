"""Chains of classifiers: what thresholds the rows support, how a chain answers, what its bundle refuses."""

import numpy as np
import pytest

from alambic.errors import AlambicError
from alambic.kinds.cascade import CascadeStage, relay_known
from alambic.measure.cascade import Member, fit_cascade, loss_bound, probabilities_of, rows_needed, too_few

LABELS = 4


def answers(truths, accuracy, *, seed, sharp=6.0):
    """Probabilities [N, L] right on about `accuracy` of the rows, and the surer the likelier they are right."""
    draw = np.random.default_rng(seed)
    quality = draw.random(len(truths))
    right = draw.random(len(truths)) < np.clip(accuracy + (quality - 0.5), 0.0, 1.0)
    said = np.where(right, truths, (truths + draw.integers(1, LABELS, len(truths))) % LABELS)
    logits = np.zeros((len(truths), LABELS))
    logits[np.arange(len(truths)), said] = sharp * quality
    values = np.exp(logits)
    return values / values.sum(axis=1, keepdims=True)


def members(n=3000, *, linear=0.85, full=0.97, ms=(0.1, 2.0)):
    truths = np.random.default_rng(0).integers(0, LABELS, n)
    chain = [
        Member("linear", answers(truths, linear, seed=1), ms[0]),
        Member("full", answers(truths, full, seed=2), ms[1]),
    ]
    return chain, truths


def test_bound_covers_a_loss_at_its_confidence_when_rows_are_drawn_again():
    draw, n, lose, gain = np.random.default_rng(5), 600, 0.02, 0.012
    rows = draw.multinomial(n, [lose, gain, 1 - lose - gain], size=2000)
    bounds = {pair: loss_bound(*pair, n) for pair in {(int(r[0]), int(r[1])) for r in rows}}
    covered = np.mean([bounds[int(r[0]), int(r[1])] >= lose - gain for r in rows])
    assert 0.93 <= covered <= 0.98


def test_bound_stays_above_zero_when_no_row_differs():
    assert loss_bound(0, 0, 1000) == pytest.approx(1.6449**2 / (1000 + 1.6449**2), abs=1e-5)
    assert loss_bound(0, 0, 1000) < loss_bound(2, 2, 1000) < loss_bound(4, 2, 1000)


@pytest.mark.parametrize("tolerance", [0.005, 0.01, 0.05])
def test_rows_needed_is_the_fewest_that_can_support_a_chain(tolerance):
    least = rows_needed(tolerance)
    assert loss_bound(0, 0, least) <= tolerance < loss_bound(0, 0, least - 1)
    assert too_few(least, tolerance) is None


def test_threshold_is_refused_with_the_numbers_when_rows_are_too_few():
    chain, truths = members(200)
    found = fit_cascade(chain, truths, tolerance=0.01)
    assert found.stages == () and found.tried == 0
    assert found.why == (
        "no threshold can be supported: to show at 95% confidence that at most 1 points are lost takes 268 rows that "
        "decide even if none is lost; there are 200"
    )


def test_threshold_is_refused_with_the_numbers_when_confidence_means_nothing():
    chain, truths = members(1000)
    draw = np.random.default_rng(9)
    blind = draw.dirichlet(np.full(LABELS, 0.2), size=len(truths))
    found = fit_cascade([Member("blind", blind, 0.1), chain[1]], truths, tolerance=0.01)
    assert found.stages == ()
    assert "no threshold is supported by the 1,000 rows that decide" in found.why and "answers lost" in found.why


def test_threshold_is_refused_when_the_first_stage_saves_no_time():
    chain, truths = members(ms=(5.0, 2.0))
    assert "saves time: linear 5 ms, full 2 ms" in fit_cascade(chain, truths).why


def test_chain_keeps_the_quality_at_less_time_when_the_rows_support_it():
    chain, truths = members()
    found = fit_cascade(chain, truths, tolerance=0.01)
    assert [stage.name for stage in found.stages] == ["linear", "full"]
    assert found.bound <= 0.01 and found.bound == loss_bound(found.lost, found.gained, 3000)
    assert found.ms == pytest.approx(0.1 + 2.0 * found.answered[1]) and found.ms < 0.9 * found.full_ms
    said = probabilities_of(found, chain).argmax(axis=1)
    full = chain[1].probabilities.argmax(axis=1)
    assert int(((said == truths) & (full != truths)).sum()) == found.gained
    assert int(((said != truths) & (full == truths)).sum()) == found.lost


def test_chain_answers_more_early_when_more_may_be_lost():
    chain, truths = members()
    strict, loose = (fit_cascade(chain, truths, tolerance=t) for t in (0.005, 0.03))
    assert strict.answered[0] < loose.answered[0]
    assert strict.stages[0].threshold > loose.stages[0].threshold


def test_chain_keeps_what_it_was_promised_on_rows_drawn_anew():
    broken, made = 0, 0
    for seed in range(40):
        truths = np.random.default_rng(seed).integers(0, LABELS, 9000)
        chain = [
            Member("linear", answers(truths, 0.85, seed=1000 + seed), 0.1),
            Member("full", answers(truths, 0.95, seed=2000 + seed), 2.0),
        ]
        some = [Member(m.name, m.probabilities[:1000], m.ms) for m in chain]
        found = fit_cascade(some, truths[:1000], tolerance=0.02)
        if not found.stages:
            continue
        made += 1
        rest = [Member(m.name, m.probabilities[1000:], m.ms) for m in chain]
        right = probabilities_of(found, rest).argmax(axis=1) == truths[1000:]
        lost = (rest[1].probabilities.argmax(axis=1) == truths[1000:]).mean() - right.mean()
        broken += bool(lost > 0.02)
    assert made >= 20 and broken <= 0.15 * made  # 5 % expected, and chance in 40 draws


def test_stages_that_save_nothing_are_left_out_only_when_asked():
    chain, truths = members()
    useless = Member("useless", answers(truths, 0.3, seed=4), 1.9)
    assert len(fit_cascade([chain[0], useless, chain[1]], truths, tolerance=0.02).stages) in (0, 3)
    found = fit_cascade([chain[0], useless, chain[1]], truths, tolerance=0.02, skip=True)
    assert [stage.name for stage in found.stages] == ["linear", "full"]


def test_three_stages_cost_less_than_two_when_the_middle_one_is_good():
    chain, truths = members(6000)
    middle = Member("student", answers(truths, 0.93, seed=3), 0.5)
    two = fit_cascade(chain, truths, tolerance=0.02)
    three = fit_cascade([chain[0], middle, chain[1]], truths, tolerance=0.02, skip=True)
    assert len(three.stages) == 3 and three.ms < two.ms
    assert sum(three.answered) == pytest.approx(1.0)


def test_no_early_stage_answers_under_the_least_confidence_asked():
    chain, truths = members()
    found = fit_cascade(chain, truths, tolerance=0.03, least=0.97)
    assert found.stages[0].threshold >= 0.97


def test_a_chain_of_one_or_five_is_refused():
    chain, truths = members(300)
    with pytest.raises(AlambicError, match="2 to 4 stages, got 1"):
        fit_cascade(chain[:1], truths)
    with pytest.raises(AlambicError, match="2 to 4 stages, got 5"):
        fit_cascade(chain[:1] * 5, truths)


def test_confidence_is_right_for_texts_that_reach_the_last_stage():
    chain, truths = members(8000, full=0.9)
    found = fit_cascade(chain, truths, tolerance=0.03)
    probabilities = probabilities_of(found, chain)
    passed = relay_known(found.stages, [m.probabilities for m in chain])[1] == 1
    gap = probabilities[passed].max(axis=1).mean() - (probabilities[passed].argmax(axis=1) == truths[passed]).mean()
    assert abs(gap) < 0.03


def test_relay_asks_later_stages_only_for_what_is_left():
    stages = (CascadeStage("a", "a", threshold=0.8), CascadeStage("b", "b"))
    first = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    second = np.array([[0.3, 0.7], [0.1, 0.9], [0.5, 0.5]])
    found, who = relay_known(stages, [first, second])
    assert who.tolist() == [0, 1, 0]
    assert np.allclose(found, [[0.9, 0.1], [0.1, 0.9], [0.2, 0.8]])
