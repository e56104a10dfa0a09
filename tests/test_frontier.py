"""Which candidate a budget chooses, and what is said when none meets it."""

import json
import math

import numpy as np
import pytest

from alambic.errors import AlambicError
from alambic.measure.frontier import Point, check_limits, choose, contradictions, pareto
from alambic.measure.metrics import Interval, bootstrap
from alambic.measure.quality import Answers
from alambic.task import Budget

N = 400


def near(value, width=0.0, n=N):
    return Interval(value, value - width, value + width, n, 0.95, value - 0.8 * width, value + 0.8 * width)


def point(name, right, p95, size, *, width=0.02, energy=None, ram=None, shift=0, time_width=0.0):
    """A candidate right on `right` of 400 rows; `shift` moves which rows those are."""
    truths = np.zeros(N, dtype=np.int64)
    predictions = np.ones(N, dtype=np.int64)
    predictions[(np.arange(right) + shift) % N] = 0
    return Point(
        name,
        {"accuracy": near(right / N, width), "macro_f1": near(right / N, width)},
        near(p95 / 2),
        near(p95, time_width),
        size,
        ram,
        energy,
        "estimated" if energy else "unavailable",
        Answers(truths, predictions),
    )


def ladder():
    return [
        point("majority", 40, 0.1, 0.1),
        point("tfidf-svm", 340, 0.5, 2.0),
        point("finetune", 376, 12.0, 90.0),
        point("finetune-int8", 374, 4.0, 24.0),
    ]


def test_choose_takes_the_best_when_nothing_is_asked():
    choice = choose(ladder(), Budget())
    assert (choice.chosen, choice.prefer, choice.metric) == ("finetune", "quality", "accuracy")
    assert choice.met and choice.surely


def test_choose_takes_the_fastest_when_a_floor_is_given():
    choice = choose(ladder(), Budget(quality={"macro_f1": 0.9}))
    assert choice.chosen == "finetune-int8"
    assert choice.reasons[0] == "finetune-int8 is the fastest of the 2 candidates that meet every limit."


def test_choose_obeys_prefer_when_a_floor_is_given():
    assert choose(ladder(), Budget(quality={"macro_f1": 0.8}, prefer="quality")).chosen == "finetune"
    assert choose(ladder(), Budget(quality={"macro_f1": 0.8}, prefer="size_mb")).chosen == "tfidf-svm"


def test_choose_warns_when_a_cost_is_preferred_without_a_floor():
    choice = choose(ladder(), Budget(prefer="p95_ms"))
    assert choice.chosen == "majority"
    assert choice.reasons[1] == "The budget has no quality floor, so accuracy had no say."


def test_choose_is_not_sure_when_the_90_percent_bound_is_under_the_floor():
    choice = choose(ladder(), Budget(quality={"accuracy": 0.93}))
    assert choice.met and not choice.surely
    assert "met, not surely" in choice.reasons[1]


def test_choose_is_sure_of_time_only_when_its_bound_passes_too():
    budget = Budget(p95_ms=5.0)
    assert choose([point("a", 300, 4.9, 1.0)], budget).surely
    assert not choose([point("a", 300, 4.9, 1.0, time_width=0.4)], budget).surely


def test_choose_shows_ties_but_keeps_the_better_point_estimate():
    choice = choose(ladder(), Budget())
    assert [tie.name for tie in choice.ties] == ["finetune-int8"]
    assert choice.ties[0].difference.value == pytest.approx(-2 / N)
    assert choice.chosen == "finetune"


def test_choose_replaces_the_best_by_a_tie_when_give_up_allows_it():
    choice = choose(ladder(), Budget(give_up=0.5))
    assert choice.chosen == "finetune-int8"
    assert "it gives up 0.50 points, and `give_up` allows 0.5" in choice.reasons[0]


def test_choose_keeps_the_best_when_the_tie_is_further_than_give_up():
    assert choose(ladder(), Budget(give_up=0.4)).chosen == "finetune"


def test_choose_keeps_the_best_when_the_difference_is_real_however_much_may_be_given_up():
    assert choose([point("a", 380, 9.0, 1.0), point("b", 340, 1.0, 1.0)], Budget(give_up=20.0)).chosen == "a"


def test_choose_prefers_quality_between_equal_costs():
    points = [point("a", 380, 5.0, 1.0), point("b", 390, 5.0, 1.0)]
    assert choose(points, Budget(quality={"accuracy": 0.9})).chosen == "b"


def test_choose_keeps_the_nearest_when_the_budget_is_missed():
    choice = choose(ladder(), Budget(quality={"macro_f1": 0.95}, p95_ms=3.0))
    assert not choice.met and not choice.surely
    assert choice.chosen == choice.missed.nearest == "finetune-int8"
    assert choice.ties == ()
    assert "finetune-int8 would meet a budget with macro_f1 = 0.935, p95_ms = 4." in choice.missed.helps


def test_choose_names_who_meets_the_limit_when_it_is_missed():
    choice = choose(ladder(), Budget(quality={"macro_f1": 0.93}, p95_ms=3.0))
    assert choice.chosen == "finetune-int8"
    assert "tfidf-svm meets that limit, but misses macro F1." in choice.missed.helps


def test_choose_does_not_meet_a_limit_that_was_not_measured():
    choice = choose(ladder(), Budget(j_per_request=1.0))
    assert not choice.met
    assert "Energy of one text was not measured, so the limit of 1 J cannot be held." in choice.reasons
    assert not any("would meet" in line for line in choice.missed.helps)


def test_choose_says_that_energy_is_estimated():
    choice = choose([point("a", 300, 1.0, 1.0, energy=0.5)], Budget(j_per_request=1.0))
    assert choice.reasons[1] == "Energy of one text 0.5 J (estimated) for at most 1 J: surely met."


def test_choose_fails_when_a_metric_is_unknown():
    with pytest.raises(AlambicError, match=r"unknown metric 'macro_fl'(.|\n)*did you mean 'macro_f1'"):
        choose(ladder(), Budget(quality={"macro_fl": 0.5}))


def test_choose_fails_when_nothing_was_measured():
    with pytest.raises(AlambicError, match="no candidate was measured"):
        choose([], Budget())


def test_choose_fails_when_candidates_were_scored_on_different_rows():
    other = point("b", 300, 1.0, 1.0)
    other = Point.from_dict({**other.to_dict(), "answers": {"truths": [1], "predictions": [1]}})
    with pytest.raises(AlambicError, match="not scored on the same rows"):
        choose([point("a", 380, 1.0, 1.0), other], Budget())


def test_choice_survives_json_when_a_cost_is_unknown():
    choice = choose(ladder(), Budget(j_per_request=1.0))
    text = json.dumps(choice.to_dict(), allow_nan=False)
    assert json.loads(text)["missed"]["nearest"] == choice.chosen


def test_point_survives_a_trip_through_json():
    before = point("a", 380, 5.0, 1.0, ram=100.0)
    after = Point.from_dict(json.loads(json.dumps(before.to_dict(rows=True))))
    assert after.to_dict(rows=True) == before.to_dict(rows=True)


def test_pareto_leaves_out_what_another_beats_on_every_axis():
    points = [*ladder(), point("slow", 370, 13.0, 91.0)]
    assert pareto(points, "accuracy") == ("majority", "tfidf-svm", "finetune", "finetune-int8")


def test_pareto_counts_energy_when_every_point_has_it():
    points = [point("a", 300, 1.0, 1.0, energy=2.0), point("b", 300, 1.0, 1.0, energy=1.0)]
    assert pareto(points, "accuracy") == ("b",)


def test_pareto_agrees_with_the_slow_definition_when_points_are_random():
    rng = np.random.default_rng(0)
    points = [point(str(i), int(rng.integers(400)), rng.random() + 0.1, rng.random()) for i in range(40)]
    rows = {p.name: (-p.quality["accuracy"].value, p.p95_ms.value, p.size_mb) for p in points}
    slow = {
        a
        for a, row in rows.items()
        if not any(all(x <= y for x, y in zip(o, row, strict=True)) and o != row for o in rows.values())
    }
    assert set(pareto(points, "accuracy")) == slow


def test_check_limits_uses_the_bootstrap_bound():
    truths = np.zeros(200, dtype=np.int64)
    predictions = (np.arange(200) >= 182).astype(np.int64)
    score = bootstrap("accuracy", truths, predictions, rng=np.random.default_rng(0))
    plain = point("a", 1, 1.0, 1.0)
    check = check_limits(
        Point.from_dict({**plain.to_dict(), "quality": {"accuracy": score.to_dict()}}),
        Budget(quality={"accuracy": 0.9}),
    )[0]
    assert check.met and not check.surely and math.isclose(check.got, 0.91)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"quality": {"macro_fl": 0.5}}, "this task has no metric 'macro_fl' (did you mean 'macro_f1'?"),
        ({"quality": {"accuracy": 88.0}}, "quality.accuracy = 88: a share is between 0 and 1; 88% is written 0.88"),
        ({"p95_ms": 0.0}, "p95_ms = 0: nothing can meet it"),
        ({"size_mb": 0.01}, "size_mb = 0.01: the least that any candidate can have is 0.2 MB"),
        ({"prefer": "p95"}, "prefer = 'p95' (did you mean 'p95_ms'?"),
    ],
)
def test_contradictions_names_what_cannot_be_met(values, said):
    budget = Budget.model_construct(**{**Budget().model_dump(), **values})
    found = contradictions(budget, ("accuracy", "macro_f1"), least={"size_mb": 0.2})
    assert len(found) == 1 and said in found[0]


def test_contradictions_is_empty_when_the_budget_can_be_met():
    assert contradictions(Budget(quality={"accuracy": 0.9}, p95_ms=5.0, size_mb=9.0), ("accuracy",)) == ()
