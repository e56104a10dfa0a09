"""Quality of predictions: labels, confusion, mistakes, and its trip through JSON."""

import json

import pytest

from alambic.data.dataset import Dataset, Example
from alambic.errors import AlambicError
from alambic.kinds.classify import Prediction
from alambic.measure.quality import Quality, measure_quality, quality_of


def said(*labels, confidence=0.9):
    return Prediction(labels, confidence, {label: confidence for label in labels})


ROWS = Dataset(
    tuple(Example(f"texte n° {i}", (label,), f"t.csv:{i + 2}") for i, label in enumerate("aabbc")), ("a", "b", "c")
)


class Parrot:
    def __init__(self, *predictions):
        self.predictions = list(predictions)

    def predict(self, inputs, *, batch_size=32):
        assert len(inputs) == len(self.predictions)
        return self.predictions


def test_measure_quality_scores_what_the_engine_says():
    quality = measure_quality(Parrot(*map(said, "aabba")), ROWS)
    assert quality.scores["accuracy"].value == 0.8
    assert set(quality.scores) == {"accuracy", "macro_f1"}
    assert (quality.n, quality.split) == (5, "test")


def test_quality_lists_the_most_confident_mistakes_first():
    answers = [said("b", confidence=0.6), said("a"), said("b"), said("c", confidence=0.99), said("c")]
    quality = quality_of(ROWS, answers, split="dev")
    assert [(m.text, m.truth, m.predicted, m.where) for m in quality.mistakes] == [
        ("texte n° 3", ("b",), ("c",), "t.csv:5"),
        ("texte n° 0", ("a",), ("b",), "t.csv:2"),
    ]


def test_quality_keeps_at_most_the_worst_when_there_are_many_mistakes():
    assert len(quality_of(ROWS, [said("c")] * 5, split="dev", worst=2).mistakes) == 2


def test_quality_counts_an_error_when_the_engine_knows_another_label():
    quality = quality_of(ROWS, [*map(said, "aabb"), said("zebra")], split="dev")
    assert quality.labels == ("a", "b", "c", "zebra")
    assert quality.scores["accuracy"].value == 0.8
    assert quality.confusion[2] == (0, 0, 0, 1)


def test_quality_uses_set_metrics_when_a_text_has_several_labels():
    rows = Dataset((Example("x", ("a", "b")), Example("y", ())), ("a", "b"), multi_label=True)
    quality = quality_of(rows, [said("a", "b"), said("a")], split="dev")
    assert quality.scores["subset_accuracy"].value == 0.5
    assert quality.scores["micro_f1"].value == pytest.approx(0.8)
    assert quality.confusion is None and quality.mistakes[0].predicted == ("a",)


def test_quality_survives_a_trip_through_json():
    quality = quality_of(ROWS, [said("a")] * 5, split="dev")
    again = Quality.from_dict(json.loads(json.dumps(quality.to_dict(rows=True))))
    assert again.to_dict(rows=True) == quality.to_dict(rows=True)
    assert again.mistakes == quality.mistakes and again.confused == quality.confused


def test_quality_holds_no_text_when_rows_are_not_asked_for():
    assert "texte" not in json.dumps(quality_of(ROWS, [said("a")] * 5, split="dev").to_dict())


def test_quality_fails_when_there_is_no_row():
    with pytest.raises(AlambicError, match="no row to score"):
        quality_of(Dataset((), ("a",)), [], split="dev")
