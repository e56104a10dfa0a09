"""What the folds agree on before the winner is fitted on all rows."""

from alambic.build.context import Fitted
from alambic.build.ladder import agree


def fit(steps, *, schedule=100, way="off", rate=1e-4, **more):
    return Fitted((), "key", {"steps": steps, "schedule": schedule, "few_shot": way, "learning_rate": rate, **more})


def test_one_fold_that_stopped_early_does_not_decide():
    agreed = agree([fit(6, int8="onnx-int8-signed"), fit(80), fit(90), fit(100), fit(100)])
    assert agreed.refit == {
        "steps": 90, "schedule": 100, "few_shot": "off", "learning_rate": 1e-4, "int8": "onnx-int8-signed",
    }  # fmt: skip


def test_folds_of_the_other_way_are_left_out():
    agreed = agree([fit(5, schedule=50), *[fit(n, schedule=60, way="on", rate=3e-4) for n in (30, 36, 60)]])
    assert (agreed.refit["few_shot"], agreed.refit["schedule"], agreed.refit["steps"]) == ("on", 60, 36)
    assert agreed.refit["learning_rate"] == 3e-4


def test_candidate_without_steps_is_refitted_as_its_recipe_says():
    first = Fitted((), "a", {"c": 1.0})
    assert agree([first, Fitted((), "b", {"c": 2.0})]) == first
