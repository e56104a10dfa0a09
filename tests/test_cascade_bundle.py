"""Chains as bundles and in a build: one bundle, one interface, the usual errors, chosen like any other candidate."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from starlette.testclient import TestClient

import alambic as package
from alambic.build.chain import check_rows, try_chains
from alambic.build.final import finish
from alambic.build.prepare import find_base, prepare
from alambic.build.trial import deciding_rows, try_candidate
from alambic.bundle import Manifest, open_bundle, seal, verify
from alambic.data.clean import clean_text
from alambic.data.dataset import Dataset, Example
from alambic.engines import open_engine
from alambic.engines.golden import check_golden
from alambic.errors import BundleError, DataError, EngineError, TaskError
from alambic.events import Note, drain
from alambic.kinds.cascade import Cascade, CascadeStage, relay_known
from alambic.kinds.decision import Decision, tempered
from alambic.manifest import seal_of
from alambic.pack.cascade import join
from alambic.serve.app import create_app
from alambic.serve.models import load
from alambic.task import Budget, load_task
from alambic.train.linear import fit_tfidf_svm
from alambic.workspace import Workspace
from linear_task import WORDS, alambic, messages, write_csv, write_task

TEXTS = [text for text, _ in messages(12, seed=7)] + ["", "hello there"]


def rows(seed):
    made = [
        Example(clean_text(text).text, (label,), where=f"row {i}")
        for i, (text, label) in enumerate(messages(seed=seed))
    ]
    return Dataset(tuple(made), tuple(sorted(WORDS)))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A chain of two linear models, its folder, and its stages."""
    at = tmp_path_factory.mktemp("chain")
    parts = [
        ((fit_tfidf_svm(rows(seed), at / f"{seed}" / "classifier", params={"c": c}), at / f"{seed}" / "classifier"),)
        for seed, c in ((1, 0.1), (2, 1.0))
    ]
    asked = (CascadeStage("quick", "", 2.0, 0.7, 1.0), CascadeStage("full", "", 1.5, 0.0, 0.8))
    stages, joined = join(asked, parts)
    for part, source in joined:
        shutil.copytree(source, at / "bundle" / part.folder)
    cascade = Cascade(stages, {"n": 100})
    manifest = Manifest(
        alambic="0", name="desk", created="-", labels=tuple(sorted(WORDS)), entry=joined[-1][0].name,
        parts=tuple(part for part, _ in joined), cascade=cascade, temperature=0.9,
    )  # fmt: skip
    seal(at / "bundle", manifest)
    return at / "bundle", stages


@pytest.fixture
def bundle(packed, tmp_path):
    shutil.copytree(packed[0], tmp_path / "bundle")
    return tmp_path / "bundle"


def change(folder, **changes):
    data = json.loads((folder / "bundle.json").read_text()) | changes
    data["seal"] = seal_of(data)
    (folder / "bundle.json").write_text(json.dumps(data))


def alone(folder, stage, copy):
    """What a stage says by itself, before any temperature."""
    shutil.copytree(folder, copy)
    change(copy, entry=stage.entry, cascade=None, temperature=1.0)
    with open_engine(copy) as engine:
        return engine.probabilities(TEXTS)


def test_chain_answers_what_its_stages_would_when_it_is_one_bundle(packed, tmp_path):
    folder, stages = packed
    known = [alone(folder, stage, tmp_path / stage.name) for stage in stages]
    expected, who = relay_known(stages, known)
    with open_engine(folder) as engine:
        found, names = engine.probabilities(TEXTS), engine.answered_by(TEXTS)
    assert set(names) == {"quick", "full"} and names == [stages[k].name for k in who]
    assert np.allclose(found, tempered(expected, 0.9), atol=1e-5)


def test_chain_answers_one_text_as_it_does_many(packed):
    with open_engine(packed[0]) as engine:
        many = engine.probabilities(TEXTS)
        assert np.allclose(np.concatenate([engine.probabilities([text]) for text in TEXTS]), many, atol=1e-6)
        assert engine.probabilities([]).shape == (0, 3)


def test_chain_has_the_interface_of_any_classifier(packed):
    with package.open(packed[0]) as engine:
        assert engine.stages == ("quick", "full") and engine.scopes == ("confidence",)
        said = engine.predict(TEXTS)
        assert [p.label for p in said] == [engine.labels[i] for i in engine.probabilities(TEXTS).argmax(axis=1)]
        assert set(engine.describe()["parts"]) == {"quick.classifier", "full.classifier"}
    with pytest.raises(EngineError, match="closed"):
        engine.predict(TEXTS)


def test_chain_abstains_from_what_no_stage_is_sure_of(bundle):
    manifest = open_bundle(bundle).manifest
    seal(bundle, manifest.model_copy(update={"decision": Decision(threshold=0.6)}))
    with open_engine(bundle) as engine:
        said = engine.predict(TEXTS)
        assert [p.abstained for p in said] == [p.confidence < 0.6 for p in said]
        assert {p.because for p in said} == {None, "unsure"}


@pytest.fixture
def unsure(bundle):
    """The chain, abstaining under 0.6; texts of it; what its engine says of them and who answers."""
    manifest = open_bundle(bundle).manifest
    seal(bundle, manifest.model_copy(update={"decision": Decision(threshold=0.6)}))
    texts = [*(text for text in TEXTS if text), "qqq", "9"]
    with open_engine(bundle) as engine:
        said, who = engine.predict(texts), engine.answered_by(texts)
    assert set(who) == {"quick", "full"} == {one.answered_by for one in said}
    assert {one.abstained for one in said} == {True, False}
    return bundle, texts, said, who


def test_server_tells_confidence_abstention_and_stage_when_a_chain_answers(unsure):
    bundle, texts, said, who = unsure
    with load([bundle]) as models, TestClient(create_app(models), "http://localhost") as client:
        many = client.post("/v1/classify", json={"input": texts}).json()["data"]
        one = client.post("/v1/classify", json={"input": texts[0], "top_k": 1}).json()["data"][0]
    assert [item["answered_by"] for item in many] == who
    assert [item["abstained"] for item in many] == [p.abstained for p in said]
    assert [item.get("because") for item in many] == [p.because for p in said]
    assert [item["confidence"] for item in many] == pytest.approx([p.confidence for p in said], abs=1e-5)
    assert (one["answered_by"], one["abstained"], len(one["scores"])) == (who[0], said[0].abstained, 1)


def test_server_names_no_stage_when_one_model_answers_alone(bundle):
    stage = open_bundle(bundle).manifest.cascade.stages[0]
    change(bundle, entry=stage.entry, cascade=None)
    with load([bundle]) as models, TestClient(create_app(models), "http://localhost") as client:
        assert "answered_by" not in client.post("/v1/classify", json={"input": "refund"}).json()["data"][0]


def test_command_tells_confidence_abstention_and_stage_when_a_chain_answers(unsure, tmp_path):
    bundle, texts, said, who = unsure
    source = write_csv(tmp_path / "in.csv", [(text,) for text in texts], header=("message",))
    assert alambic("predict", bundle, "--input", source, "--output", tmp_path / "out.jsonl").code == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert [line["answered_by"] for line in lines] == who
    assert [line["abstained"] for line in lines] == [p.abstained for p in said]
    assert [line["confidence"] for line in lines] == pytest.approx([p.confidence for p in said], abs=1e-5)
    for text, stage in {stage: (text, stage) for text, stage in zip(texts, who, strict=True)}.values():
        assert json.loads(alambic("predict", bundle, text, "--json").out)["answered_by"] == stage
        assert f"\n  answered by {stage}\n" in alambic("predict", bundle, text).out


def test_chain_is_refused_when_a_part_of_any_stage_is_corrupt(bundle):
    target = bundle / "quick" / "classifier" / "weight.npy"
    target.write_bytes(target.read_bytes()[:-1] + b"\x01")
    with pytest.raises(BundleError, match=r"quick/classifier/weight\.npy: changed since the bundle was sealed"):
        open_engine(bundle)
    ended = alambic("predict", bundle, "refund")
    assert ended.code == 1 and "weight.npy" in ended.err and "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["stages"][-1].update(threshold=0.5), "the last stage, 'full', has a threshold"),
        (lambda c: c["stages"][0].update(entry="no.such"), "stage 'quick': 'no.such' is not a part"),
        (lambda c: c["stages"][0].update(threshold=1.5), "threshold 1.5 is no probability"),
        (lambda c: c["stages"][0].update(temperature=0.0), "temperature and factor are positive"),
        (lambda c: c["stages"].pop(0), "1 stage\\(s\\); a chain has two at least"),
        (lambda c: c["stages"][-1].update(entry="quick.classifier"), "the last stage ends in 'quick.classifier'"),
    ],
)
def test_chain_is_refused_when_its_manifest_makes_no_sense(bundle, edit, message):
    cascade = json.loads((bundle / "bundle.json").read_text())["cascade"]
    edit(cascade)
    change(bundle, cascade=cascade)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle)


def test_chain_predicts_without_the_training_stack(packed):
    code = (
        "import sys, json, alambic\n"
        "engine = alambic.open(sys.argv[1])\n"
        "label = engine.predict(['refund of my invoice'])[0].label\n"
        "heavy = [m for m in ('torch', 'transformers', 'sklearn', 'nncf') if m in sys.modules]\n"
        "print(json.dumps([label, heavy]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(packed[0])], capture_output=True, text=True, env=dict(os.environ), timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["billing", []]


def test_show_and_verify_tell_the_stages(packed):
    said = alambic("show", packed[0]).out
    assert "quick.classifier (tfidf-linear) from confidence 0.7000, then full.classifier (tfidf-linear)" in said
    assert verify(packed[0]).name == "desk"


CHAINED = """\
[task]
name = "desk"
kind = "classify"
[data]
train = "rows.csv"
[budget]
prefer = "mean_ms"
quality = { accuracy = 0.5 }
[[candidate]]
name = "majority"
[[candidate]]
name = "tfidf-svm"
[[candidate]]
name = "cascade"
chain = ["tfidf-svm", "majority"]
recipe = { tolerance = 0.2 }
"""


def slow(trial, p50_ms):
    """The same trial as if the model were slow: then it is worth asking another one first."""
    return replace(trial, costs={**trial.costs, "speed": {**trial.costs["speed"], "p50_ms": p50_ms}})


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    """A chain composed, packed, measured and finished in a run folder, from trials of linear candidates."""
    folder = tmp_path_factory.mktemp("composed")
    task = load_task(write_task(folder, text=CHAINED))
    notes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder / "home"))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        workspace = Workspace(folder / "run")
        with workspace.locked():
            ctx = drain(prepare(task, find_base(task), workspace))
            specs = {spec.name: spec for spec in task.candidates}
            singles = [drain(try_candidate(ctx, specs[name], ctx.folds)) for name in ("majority", "tfidf-svm")]
            singles = [slow(singles[0], 50.0), singles[1]]
            work = try_chains(ctx, task.candidates, ctx.folds, singles)
            (trial,) = drain(work, lambda e: notes.append(e.message) if isinstance(e, Note) else None)
            final = drain(finish(ctx, trial, folder / "run"))
    return ctx, singles, trial, final, notes


def test_build_composes_a_chain_from_what_its_stages_answered(composed):
    ctx, singles, trial, _, notes = composed
    stages = trial.fitted.cascade.stages
    assert [stage.name for stage in stages] == ["tfidf-svm", "majority"] and stages[0].threshold > 0
    expected = relay_known(stages, [singles[1].probabilities, singles[0].probabilities])[0]
    assert np.array_equal(trial.probabilities, expected)
    assert trial.quality.n == len(deciding_rows(ctx.folds)) == trial.fitted.cascade.facts["n"]
    assert trial.point.mean_ms.n >= 30 and trial.costs["speed"]["mean_ms"] == trial.point.mean_ms.value
    assert any("rows that decide" in note and "confidence (20 allowed)" in note for note in notes)


def test_build_ships_a_chain_as_one_bundle_with_its_thresholds(composed):
    _, _, trial, final, _ = composed
    manifest = open_bundle(final.bundle).manifest
    assert manifest.candidate == "cascade" and manifest.cascade.stages == trial.fitted.cascade.stages
    assert {part.folder for part in manifest.parts} == {"tfidf-svm/classifier", "majority/classifier"}
    with open_engine(final.bundle) as engine:
        report = check_golden(engine)
        assert report.n > 0 and report.largest_difference < 1e-5
    assert final.point.mean_ms is not None and manifest.scores["test"]["n"] == final.quality.n
    assert "candidate `cascade` (tfidf-svm -> majority)" in (final.bundle / "README.md").read_text("utf-8")
    assert "of the" in final.chain[0] and "answered by tfidf-svm" in final.chain[0]
    assert "answers are lost" in final.chain[1]


def test_build_finds_no_chain_when_none_is_quick_enough(composed):
    ctx, singles, *_ = composed
    spec = ctx.task.candidates[2].model_copy(update={"chain": None})
    alike = [slow(singles[0], 1.0), slow(singles[1], 1.0)]
    notes = []
    found = drain(try_chains(ctx, [spec], ctx.folds, alike), lambda e: notes.append(e.message))
    assert found == []
    assert notes == [
        "cascade: no candidate takes less than half the time of tfidf-svm, the best: there is no chain to make"
    ]


def scored(trial, **values):
    known = trial.quality.scores
    scores = {name: replace(known[name], value=value) for name, value in values.items()}
    return replace(trial, quality=replace(trial.quality, scores=scores))


@pytest.mark.parametrize(("metric", "best"), [("accuracy", "majority"), ("macro_f1", "tfidf-svm")])
def test_full_model_is_the_best_by_the_metric_that_decides_when_two_differ(composed, metric, best):
    ctx, (majority, linear), *_ = composed
    spec = ctx.task.candidates[2].model_copy(update={"chain": None})
    both = [slow(one, 1.0) for one in (majority, linear)]
    both = [scored(both[0], accuracy=0.9, macro_f1=0.5), scored(both[1], accuracy=0.8, macro_f1=0.6)]
    task = ctx.task.model_copy(update={"budget": Budget(quality={metric: 0.1})})
    notes = []
    drain(try_chains(replace(ctx, task=task), [spec], ctx.folds, both), lambda e: notes.append(e.message))
    assert f"half the time of {best}, the best" in notes[0]


def test_build_refuses_a_chain_before_anything_slow_when_rows_are_too_few(tmp_path):
    task = load_task(write_task(tmp_path, text=CHAINED.replace("0.2", "0.01")))
    ended = alambic("build", task.path, "--out", tmp_path / "run")
    assert ended.code == 1
    assert "candidate 'cascade': no threshold can be supported" in ended.err and "takes 268 rows" in ended.err
    assert not list((tmp_path / "run").glob("stages/tfidf*"))
    assert alambic("check", task.path).code == 1
    with pytest.raises(DataError, match="there are 0"):
        check_rows(task, ())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            '"majority"]',
            '"tfidf-swm"]',
            "candidate\\[2\\].chain: 'tfidf-swm' is no other candidate of this task; .*tfidf-svm",
        ),
        ('"majority"]', '"finetune"]', "'finetune' is no other candidate of this task"),
        ('"majority"]', '"cascade"]', "'cascade' is no other candidate"),
        ('"majority"]', '"tfidf-svm"]', "the same stage twice"),
        ('["tfidf-svm", "majority"]', '["majority"]', "1 stages; a chain has 2 to 4"),
        ('name = "cascade"\n', 'name = "logreg"\n', "only candidates called 'cascade'"),
        ('chain = ["tfidf-svm", "majority"]\n', "", None),
        ('name = "cascade"\nchain = ["tfidf-svm", "majority"]', 'name = "cascade-x"', "'cascade-x' needs a chain"),
        ('kind = "classify"', 'kind = "classify"\nmulti_label = true', "needs one label per text"),
    ],
)
def test_task_says_what_is_wrong_with_a_chain(tmp_path, old, new, message):
    (tmp_path / "task.toml").write_text(CHAINED.replace(old, new))
    if message is None:
        assert load_task(tmp_path / "task.toml").candidates[2].chain is None
        return
    with pytest.raises(TaskError, match=message):
        load_task(tmp_path / "task.toml")


@pytest.mark.parametrize("recipe", ["{ tolerance = 0.7 }", "{ tolerance = true }", "{ tolerence = 0.1 }"])
def test_chain_recipe_is_checked_when_the_task_is(tmp_path, recipe):
    task = load_task(write_task(tmp_path, text=CHAINED.replace("{ tolerance = 0.2 }", recipe)))
    with pytest.raises(TaskError, match="candidate 'cascade'"):
        find_base(task)


def test_chains_are_tried_by_default_for_one_label_a_text_only(tmp_path):
    text = CHAINED.split("[[candidate]]")[0].replace("accuracy", "macro_f1")
    (tmp_path / "task.toml").write_text(text)
    assert load_task(tmp_path / "task.toml").candidates[-1].name == "cascade"
    (tmp_path / "task.toml").write_text(text.replace('"classify"', '"classify"\nmulti_label = true'))
    assert "cascade" not in [spec.name for spec in load_task(tmp_path / "task.toml").candidates]
