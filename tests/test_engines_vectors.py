"""Engines that give vectors: neighbours, scope by the nearest row, heads that vote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alambic.bundle import Bundle, PartSpec
from alambic.engines import open_engine, open_part
from alambic.engines.examples import standing, write_index
from alambic.errors import EngineError
from alambic.kinds.decision import Decision
from classify_parts import (
    TABLE,
    TEXTS,
    Engines,
    make,
    reference,
    reference_ids,
)

ROWS = [("bill please", "bill"), ("my pump is broken", "fault"), ("wrong invoice", "bill"), ("thanks", "other")]


def indexed(root: Path, engine: str, **manifest: Any) -> Bundle:
    """A bundle that gives scores and vectors, with an index of ROWS by vectors."""
    rows = [{"labels": [label], "where": f"rows.csv:{i}", "digest": f"{i}"} for i, (_, label) in enumerate(ROWS)]
    texts = [text for text, _ in ROWS]
    params = write_index(root / "examples", rows, texts, np.stack([vector_of(text) for text in texts]))
    index = PartSpec("examples", "examples", "examples", params)
    return make(root, engine, vectors=True, parts=(index,), entry="encoder", **manifest)


def vector_of(text: str) -> np.ndarray:
    return TABLE[reference_ids(text)].mean(0)


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


@pytest.mark.parametrize("name", Engines)
def test_model_that_ends_in_scores_gives_its_vectors_too(tmp_path: Path, name: str) -> None:
    with open_engine(indexed(tmp_path / "b", name)) as engine:
        assert engine.capabilities >= {"embed", "reasons"}
        np.testing.assert_allclose(engine.embed(TEXTS[:4]), [vector_of(t) for t in TEXTS[:4]], atol=1e-5)
        np.testing.assert_allclose(engine.probabilities(TEXTS), [reference(t) for t in TEXTS], atol=1e-5)
        (near,) = engine.reasons(["the pump is broken"], n=1)[0]
        assert near.where == "rows.csv:1"
        assert near.similarity == pytest.approx(
            cosine(vector_of("the pump is broken"), vector_of(ROWS[1][0])), abs=0.02
        )
        with pytest.raises(EngineError, match="takes no embeddings"):
            engine.probabilities_of(engine.embed(["pump"]))


@pytest.mark.parametrize("name", Engines)
@pytest.mark.parametrize("label", [None, "other"])
def test_nearest_row_tells_how_surely_a_text_belongs_to_the_task(tmp_path: Path, name: str, label: str | None) -> None:
    with open_engine(indexed(tmp_path / "b", name)) as engine:
        probabilities, scores = engine.scored(TEXTS, label=label)
    assert list(scores) == ["confidence", "max_logit", "energy", "nearest"]
    np.testing.assert_allclose(probabilities, [reference(t) for t in TEXTS], atol=1e-5)
    inside = [vector_of(text) for text, of in ROWS if of != label]
    expected = [max(cosine(vector_of(text), row) for row in inside) for text in TEXTS[:6]]
    np.testing.assert_allclose(scores["nearest"][:6], expected, atol=0.02)  # rows are kept in 8 bits


@pytest.mark.parametrize("name", Engines)
def test_bundle_abstains_by_the_nearest_row_when_its_decision_says_so(tmp_path: Path, name: str) -> None:
    decision = Decision(scope="nearest", scope_threshold=0.99)
    with open_engine(indexed(tmp_path / "b", name, decision=decision)) as engine:
        said = engine.predict([*(text for text, _ in ROWS), "the leak"])
    assert [one.because for one in said] == [None, None, None, None, "out_of_scope"]


def test_decision_by_the_nearest_row_is_refused_when_there_is_no_index_of_vectors(tmp_path: Path) -> None:
    bundle = make(tmp_path / "b", "onnx", vectors=True, decision=Decision(scope="nearest", scope_threshold=0.5))
    with pytest.raises(EngineError, match="looks at 'nearest', and the bundle gives confidence, max_logit, energy"):
        open_engine(bundle)


@pytest.mark.parametrize("name", Engines)
def test_part_is_refused_when_it_lacks_the_vectors_that_it_promises(tmp_path: Path, name: str) -> None:
    first = make(tmp_path / "b", name).manifest.parts[0]
    spec = PartSpec(first.name, name, first.folder, {**first.params, "vectors": True})
    with pytest.raises(EngineError, match=r"has .*1 output\(s\); expected .*(2 output|scores and vectors)"):
        open_part(spec, tmp_path / "b" / "encoder")


def test_few_rows_of_every_label_stand_for_all_when_there_are_many() -> None:
    rows = [{"labels": [label]} for label in "aaaaaaaabbc"]
    assert standing(rows, None, 6) == [0, 1, 2, 8, 9, 10]
    assert standing(rows, "a", 6) == [8, 9, 10]
    assert standing(rows, None, 99) == list(range(11))


def test_knn_head_weighs_votes_by_similarity(tmp_path: Path) -> None:
    folder = tmp_path / "b" / "classifier"
    folder.mkdir(parents=True)
    vectors = TABLE[4:9] / np.linalg.norm(TABLE[4:9], axis=1, keepdims=True)
    np.save(folder / "vectors.npy", vectors.astype(np.float16))
    np.save(folder / "labels.npy", np.array([0, 1, 1, 2, 0]))
    head = PartSpec("classifier", "knn-head", "classifier", {"k": 3, "temperature": 0.1, "labels": 3}, "encoder")
    with open_engine(make(tmp_path / "b", "onnx", head=False, parts=(head,))) as engine:
        vector = TABLE[reference_ids("fault")].mean(0)
        near = vectors.astype(np.float16) @ vector / np.linalg.norm(vector)
        best = np.argsort(-near)[:3]
        weights = np.exp(near[best] / 0.1)
        expected = np.zeros(3)
        np.add.at(expected, np.array([0, 1, 1, 2, 0])[best], weights / weights.sum())
        np.testing.assert_allclose(engine.probabilities(["fault"])[0], expected, atol=2e-3)
