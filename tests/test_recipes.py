"""Recipes read into parameters: known keys, values of the right type, each refused by name."""

from dataclasses import dataclass
from typing import Literal

import pytest

from alambic.errors import TrainError
from alambic.train.recipes import read_recipe


@dataclass(frozen=True)
class Params:
    steps: int | None = None
    rate: float = 0.1
    mode: Literal["on", "off"] = "on"
    metric: str = "accuracy"
    base: str | None = None
    quick: bool = False


def test_recipe_goes_before_what_the_task_knows_when_both_name_a_value():
    recipe = {"rate": 2, "steps": 5, "base": None, "quick": True}
    read = read_recipe(Params, recipe, {"rate": 1.0, "metric": "macro_f1"}, of="x")
    assert read == Params(steps=5, rate=2, metric="macro_f1", quick=True)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"stepps": 3}, "recipe of x: unknown key 'stepps'"),
        ({"rate": "high"}, "recipe of x: rate = 'high'; it is like 0.1 by default"),
        ({"rate": float("nan")}, "recipe of x: rate = nan; it is like 0.1 by default"),
        ({"rate": True}, "recipe of x: rate = True; it is like 0.1 by default"),
        ({"steps": 2.5}, "recipe of x: steps = 2.5; it is a whole number"),
        ({"steps": [1]}, "recipe of x: steps = [1]; it is a whole number"),
        ({"mode": "maybe"}, "recipe of x: mode = 'maybe'; allowed: on, off"),
        ({"mode": 1}, "recipe of x: mode = 1; allowed: on, off"),
        ({"metric": 3}, "recipe of x: metric = 3; it is like 'accuracy' by default"),
        ({"base": 3}, "recipe of x: base = 3; it is a text"),
        ({"quick": 1}, "recipe of x: quick = 1; it is like False by default"),
    ],
)
def test_recipe_is_refused_by_name_when_a_value_cannot_be(recipe, said):
    with pytest.raises(TrainError) as error:
        read_recipe(Params, recipe, {}, of="x")
    assert error.value.message == said


def test_nearest_key_is_told_when_one_is_unknown():
    with pytest.raises(TrainError, match="did you mean 'steps'"):
        read_recipe(Params, {"stepps": 3}, {}, of="x")
