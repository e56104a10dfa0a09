"""A sealed bundle measured from end to end: real engine, real fresh processes."""

import json

import numpy as np
import pytest

from alambic.bundle import PartSpec, seal
from alambic.data.dataset import Dataset, Example
from alambic.events import drain
from alambic.manifest import Manifest
from alambic.measure import Options, measure
from alambic.measure.compare import compare_bundles
from alambic.measure.frontier import Point, point_of

LABELS = ("bill", "fault")
ROWS = Dataset(tuple(Example(f"message {i}", (LABELS[i % 4 == 0],), f"t.csv:{i + 2}") for i in range(40)), LABELS)
QUICK = Options(repeats=30, seconds=0.5, energy_seconds=0.1, cold_starts=1, memory_texts=5)


def majority(folder, probabilities):
    (folder / "majority").mkdir(parents=True)
    np.save(folder / "majority" / "bias.npy", np.log(probabilities).astype(np.float32))
    part = PartSpec("majority", "majority", "majority", {"output": "logits"})
    manifest = Manifest(
        alambic="0.1.0", name="t", created="2026-01-01T00:00:00Z", labels=LABELS, entry="majority", parts=(part,)
    )
    seal(folder, manifest)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return majority(tmp_path_factory.mktemp("run") / "bundle", [0.75, 0.25])


@pytest.fixture(scope="module")
def measurement(bundle):
    return drain(measure(bundle, ROWS, options=QUICK))


def test_measure_gives_the_contract(measurement):
    figures = json.loads(json.dumps(measurement.to_dict(), allow_nan=False))
    assert {"bundle", "n", "quality", "speed", "size_mb", "peak_ram_mb", "energy", "machine"} <= set(figures)
    assert {"value", "low", "high", "n"} <= set(figures["quality"]["accuracy"])
    assert {"p50_ms", "p95_ms", "per_second", "cold_start_ms"} <= set(figures["speed"])
    assert figures["energy"]["source"] in {"rapl", "estimated", "unavailable"}
    assert figures["n"] == 40 and figures["quality"]["accuracy"]["value"] == 0.75


def test_measure_counts_every_file_of_the_bundle(measurement, bundle):
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()) / 1e6
    assert measurement.to_dict()["size_mb"] == size


def test_measure_sees_a_process_of_plausible_size(measurement):
    assert 10 < measurement.costs.memory.peak_ram_mb < 500


def test_point_of_a_measurement_survives_json(measurement):
    point = point_of("majority", measurement.quality, measurement.costs)
    again = Point.from_dict(json.loads(json.dumps(point.to_dict(rows=True))))
    assert again.to_dict(rows=True) == point.to_dict(rows=True)


def test_compare_gives_paired_differences_to_the_first(bundle, tmp_path):
    other = majority(tmp_path / "other", [0.25, 0.75])
    first, second = drain(compare_bundles([bundle, other], ROWS, seconds=0.2))
    assert "difference" not in first and first["quality"]["accuracy"]["value"] == 0.75
    assert second["difference"]["value"] == pytest.approx(-0.5)
    assert second["difference"]["low"] < -0.5 < second["difference"]["high"]
    assert np.isfinite(second["faster"]["value"]) and second["speed"]["n"] >= 30
