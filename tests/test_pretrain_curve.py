"""The picture of a pre-training says what its log says."""

import json
from itertools import pairwise

import pytest

pytest.importorskip("matplotlib")

from alambic.report.pretraining import Curve, _spread, curve_of, smoothed, write_curve


def step(number, loss=2.0, share=1.0):
    return {"kind": "step", "step": number, "tokens": 100 * number, "loss": loss, "rate_share": share}


def valid(number, **bits):
    sources = {name: {"bits_per_byte": value} for name, value in bits.items()}
    return {"kind": "valid", "step": number, "bits_per_byte": 1.5, "sources": sources}


def test_curve_has_each_step_and_validation_once_when_read():
    lines = [{"kind": "run"}, step(1), step(2), valid(2, fr=1.4, en=1.6), {"kind": "resumed", "step": 2},
             step(3, 1.0), valid(2, fr=1.3, en=1.6), step(3, 1.1), valid(3, fr=1.2)]  # fmt: skip
    curve = curve_of(lines)
    assert curve == Curve(
        tokens=(100, 200, 300), loss=(2.0, 2.0, 1.1), scored=(200, 300), bits=(1.5, 1.5), sources={"fr": (1.3, 1.2)},
        resumed=(200,), falls=None,
    )  # fmt: skip


@pytest.mark.parametrize(("shares", "falls"), [((0.5, 1.0, 1.0), None), ((0.5, 1.0, 1.0, 0.6, 0.2), 300), ((), None)])
def test_fall_of_the_rate_is_after_the_last_step_at_its_peak(shares, falls):
    assert curve_of([step(i + 1, share=share) for i, share in enumerate(shares)]).falls == falls


def test_running_mean_neither_lags_nor_starts_from_zero():
    assert smoothed([2.0] * 30, 10) == [pytest.approx(2.0)] * 30
    assert smoothed([float(i) for i in range(400)], 10)[200] == pytest.approx(200.0, abs=1e-3)
    noisy = smoothed([2.0, 4.0] * 100, 20)
    assert all(2.9 < value < 3.1 for value in noisy[50:-50]) and smoothed([], 10) == []


def test_names_are_apart_and_in_order_when_values_are_close():
    places = _spread({"a": 1.0, "b": 1.001, "c": 1.002, "d": 2.0}, least=0.1)
    assert places["d"] == pytest.approx(2.0) and sum(places[n] for n in "abc") / 3 == pytest.approx(1.001)
    ordered = [places[name] for name in "abcd"]
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(ordered))


@pytest.mark.parametrize("ending", ["svg", "png"])
@pytest.mark.parametrize("scored", [True, False])
def test_picture_is_the_same_again_and_names_every_source_when_drawn(tmp_path, ending, scored):
    lines = [step(i, 5.0 / i, 1.0 if i < 8 else 0.5) for i in range(1, 11)]
    lines += [valid(5, fr=1.4, en=1.6), valid(10, fr=1.3, en=1.5)] if scored else []
    curve = curve_of(json.loads(json.dumps(lines)))
    first, second = (write_curve(curve, tmp_path / f"{name}.{ending}").read_bytes() for name in "ab")
    assert first == second
    if ending == "svg":
        text = first.decode()
        told = ("en 1.500", "fr 1.300", "all 1.500") if scored else ("no validation yet",)
        assert all(part in text for part in (*told, "the rate falls", "million tokens trained on"))


def test_curve_without_a_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="without a step"):
        write_curve(curve_of([{"kind": "run"}]), tmp_path / "curve.svg")
