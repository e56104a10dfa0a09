"""A build that promises: rows kept apart, thresholds in the bundle, abstention, label sets and reasons everywhere."""

import json
import random

import numpy as np
import pytest

import alambic as package
from alambic.build import build
from alambic.build.deciding import _fit_scope
from alambic.build.keeping import Kept, keep
from alambic.build.prepare import read_rows
from alambic.bundle import open_bundle, seal
from alambic.errors import BundleError, DataError, EngineError, TaskError
from alambic.kinds.classify import decide
from alambic.kinds.decision import Decision
from alambic.manifest import FORMAT
from alambic.serve.classify import _add_reasons, _entries
from alambic.task import load_task
from linear_task import TASK, alambic, messages, write_csv, write_task

OUTSIDE = [
    (f"lovely {a} {b} swims",) for a in ("dog", "cat", "horse", "fish", "bird") for b in ("sea", "lake", "pond", "bay")
]
SVM = TASK.replace('[[candidate]]\nname = "majority"\n', "")
ASKS = SVM.replace("[budget]\n", 'out_of_scope = "oos.csv"\nreasons = "{reasons}"\n[budget]\n{asked}\n')
ALL = "precision = 0.9\ncoverage = 0.9\nin_scope = 0.95"


def write(folder, *, asked=ALL, reasons="rows", rows=None, text=ASKS):
    """Write a task that promises, its rows and texts out of scope."""
    text = text.replace("{asked}", asked).replace("{reasons}", reasons)
    path = write_task(folder, text=text, rows=rows or messages(130))
    write_csv(folder / "oos.csv", OUTSIDE, header=("message",))
    return path


def kept_of(path):
    task = load_task(path)
    rows = read_rows(task, lock=None)
    return rows.splits, *keep(task, rows.splits, own_dev=rows.dev is not None)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished build, its folder and what it said."""
    folder = tmp_path_factory.mktemp("promise")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder / "home"))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return build(write(folder), out=folder / "run")


def test_rows_kept_apart_are_in_no_other_part_when_a_task_promises(tmp_path):
    before, after, kept, notes = kept_of(write(tmp_path))
    assert kept is not None and len(kept.promise) >= 29
    apart = {e.digest for e in kept.promise} | {e.digest for e in kept.scope}
    assert not apart & {e.digest for e in after.train} and not apart & {e.digest for e in after.test}
    assert not {e.digest for e in kept.promise} & {e.digest for e in kept.scope}
    assert len(after.train) + len(apart) == len(before.train)
    assert sorted(i for fold in after.folds for i in fold) == list(range(len(after.train)))
    assert set(kept.outside) | set(kept.outside_test) == {text for (text,) in OUTSIDE}
    assert any("kept apart" in note for note in notes)


def test_half_of_the_users_dev_is_kept_apart_when_there_is_one(tmp_path):
    text = ASKS.replace('train = "rows.csv"', 'train = "rows.csv"\ndev = "dev.csv"')
    path = write(tmp_path, text=text)
    write_csv(tmp_path / "dev.csv", messages(60, seed=5))
    before, after, kept, _ = kept_of(path)
    assert len(after.train) == len(before.train)
    assert len(kept.promise) + len(kept.scope) + len(after.dev) == len(before.dev)
    assert len(after.dev) == pytest.approx(len(before.dev) / 2, abs=2)


def test_nothing_is_kept_apart_when_a_task_promises_nothing(tmp_path):
    task = load_task(write_task(tmp_path))
    splits = read_rows(task, lock=None).splits
    assert keep(task, splits, own_dev=False) == (splits, None, ())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("precision = 0.98", "needs at least 149 rows kept apart, all answered and all right; this data gives"),
        ("coverage = 0.999", "budget.coverage = 0.999 needs at least 999 rows kept apart; this data gives"),
        ("in_scope = 0.999", "budget.in_scope = 0.999 needs at least 999 rows kept apart for the scope"),
    ],
)
def test_check_refuses_a_promise_that_no_data_of_this_size_can_support(tmp_path, asked, said):
    ended = alambic("check", write(tmp_path, asked=asked))
    assert ended.code == 1 and said in ended.err and "give more rows" in ended.err


def test_check_names_the_labels_when_out_of_scope_is_neither_file_nor_label(tmp_path):
    path = write(tmp_path)
    (tmp_path / "oos.csv").unlink()
    with pytest.raises(DataError, match=r"no file .*oos.csv, and no label of that name"):
        kept_of(path)


def test_task_refuses_promises_when_a_text_may_carry_several_labels(tmp_path):
    text = ASKS.replace('kind = "classify"', 'kind = "classify"\nmulti_label = true').replace("accuracy", "micro_f1")
    with pytest.raises(TaskError) as error:
        load_task(write(tmp_path, text=text))
    for key in ("data.out_of_scope", "budget.precision", "budget.coverage", "budget.in_scope"):
        assert f"{key}: needs one label per text, and multi_label is true" in error.value.message


def test_bundle_holds_its_decision_and_says_on_how_many_rows_it_rests(done):
    manifest = open_bundle(done.bundle).manifest
    facts = manifest.decision.facts
    assert manifest.format == FORMAT and facts["precision"]["kept"] and facts["precision"]["n"] >= 29
    assert facts["precision"]["bound"] <= 0.1 and facts["precision"]["confidence"] == 0.95
    assert any("rows kept apart" in line and "95% confidence" in line for line in done.sentences)
    assert {"precision", "coverage", "in_scope"} <= {limit["limit"] for limit in done.budget["limits"]}
    page = done.report.read_text("utf-8")
    assert "Confidence" in page and "expected calibration error" in page and "accuracy against confidence" in page


def test_prediction_abstains_on_a_text_out_of_scope_and_not_on_one_of_the_task(done):
    with package.open(done.bundle) as engine:
        own, other = engine.predict(["refund invoice bank charged", "a lovely horse swims in the bay"])
    assert (own.abstained, own.because, own.label) == (False, None, "billing")
    assert own.label in own.label_set
    assert (other.abstained, other.because) == (True, "out_of_scope")


def test_predict_file_gives_confidence_abstained_and_the_label_set(done, tmp_path):
    source = write_csv(tmp_path / "in.csv", [("1", "refund invoice bank charged"), ("2", "lovely horse swims bay")],
                       header=("id", "message"))  # fmt: skip
    ended = alambic("predict", done.bundle, "--input", source, "--output", tmp_path / "out.jsonl", "--why", "2")
    first, second = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert ended.code == 0, ended.err
    assert list(first)[:5] == ["id", "message", "prediction", "confidence", "abstained"]
    assert (first["abstained"], second["abstained"], second["because"]) == (False, True, "out_of_scope")
    assert first["prediction"] in first["label_set"] and len(first["reasons"]) == 2
    assert set(first["reasons"][0]) == {"labels", "similarity", "where", "digest"}
    assert first["reasons"][0]["labels"] == ["billing"]


def test_predict_says_that_it_abstained_when_asked_on_the_command_line(done):
    ended = alambic("predict", done.bundle, "a lovely horse swims in the bay", "--why", "1")
    assert "abstained: out of scope" in ended.out and "near 0." in ended.out and "sha256" in ended.out


def test_no_text_of_the_user_is_in_the_index_when_the_task_keeps_rows_only(done):
    index = done.bundle / "examples" / "rows.jsonl"
    assert "text" not in json.loads(index.read_text("utf-8").splitlines()[0])
    assert not any(word in index.read_text("utf-8") for word in ("refund", "technician", "heater"))


def test_server_entry_tells_abstention_label_set_and_reasons(done):
    from alambic.serve.batcher import Job
    from alambic.serve.classify import Classify
    from alambic.serve.models import LoadedBundle

    texts = ("refund invoice bank charged", "a lovely horse swims in the bay")
    with package.open(done.bundle) as engine:
        job = Job(texts, None, 0.0, dict(enumerate(engine.predict(texts))))
        asked = Classify(texts, True, "desk", None, 1)
        entries = _entries(asked, job, multi_label=False)
        model = LoadedBundle(engine, engine.labels)
        assert model.explains
        _add_reasons(entries, asked, model)
    assert [entry["abstained"] for entry in entries] == [False, True]
    assert entries[1]["because"] == "out_of_scope" and entries[0]["label_set"] == ["billing"]
    assert set(entries[0]["reasons"][0]) == {"labels", "similarity", "where", "digest"}


def test_reasons_are_refused_with_what_to_do_when_the_bundle_holds_no_index(done, tmp_path):
    import shutil

    plain = shutil.copytree(done.bundle, tmp_path / "plain")
    shutil.rmtree(plain / "examples")
    manifest = open_bundle(done.bundle).manifest
    parts = tuple(part for part in manifest.parts if part.engine != "examples")
    seal(plain, manifest.model_copy(update={"parts": parts, "decision": None}))
    with package.open(plain) as engine:
        assert not engine.predict(["lovely horse"])[0].abstained
        with pytest.raises(EngineError, match="no index of training rows"):
            engine.reasons(["refund"])


def test_decision_is_refused_when_it_does_not_fit_the_bundle(done, tmp_path):
    import shutil

    manifest = open_bundle(done.bundle).manifest
    copy = shutil.copytree(done.bundle, tmp_path / "copy")
    with pytest.raises(BundleError, match=r"decision.scope_label: 'nobody' is no label"):
        seal(copy, manifest.model_copy(update={"decision": Decision(scope_label="nobody")}))


def test_label_for_other_texts_is_learnt_and_counts_as_abstained(tmp_path):
    words = "lovely dog cat horse fish bird sea lake pond bay swims flies sleeps sings green blue".split()  # noqa: SIM905
    draw = random.Random(2)
    others = [(f"{' '.join(draw.sample(words, 5))} {i}", "elsewhere") for i in range(90)]
    text = SVM.replace("[budget]\n", 'out_of_scope = "elsewhere"\n[budget]\nin_scope = 0.9\n')
    result = build(write_task(tmp_path, text=text, rows=[*messages(130), *others]), out=tmp_path / "run")
    decision = open_bundle(result.bundle).manifest.decision
    assert decision.scope_label == "elsewhere" and decision.facts["in_scope"]["n_outside"] >= 10
    with package.open(result.bundle) as engine:
        own, other = engine.predict(["refund invoice bank charged", "a lovely horse swims in the bay"])
    assert (own.label, own.abstained) == ("billing", False)
    assert (other.label, other.because) == ("elsewhere", "out_of_scope")


def test_scope_is_set_from_the_tasks_own_texts_when_no_others_are_given(tmp_path):
    text = SVM.replace("[budget]\n", "[budget]\nin_scope = 0.9\n")
    result = build(write_task(tmp_path, text=text, rows=messages(130)), out=tmp_path / "run")
    decision = open_bundle(result.bundle).manifest.decision
    assert (decision.scope, decision.facts["in_scope"]["n_outside"]) == ("energy", 0)
    assert "auroc" not in decision.facts["in_scope"]
    assert any("not chosen by measurement: 0 texts out of scope" in line for line in result.sentences)
    with package.open(result.bundle) as engine:
        own, other = engine.predict(["refund invoice bank charged", "a lovely horse swims in the bay"])
    assert (own.because, other.because) == (None, "out_of_scope")


@pytest.mark.parametrize(
    ("scopes", "used"),
    [(("confidence", "max_logit", "energy", "nearest"), "nearest"), (("confidence", "max_logit", "energy"), "energy"),
     (("confidence",), "confidence")],
)  # fmt: skip
def test_nearest_row_goes_before_the_energy_when_no_text_out_of_scope_is_given(tmp_path, scopes, used):
    class Engine:
        def scored(self, texts, label=None):
            return np.zeros((len(texts), 3)), {name: np.linspace(0.0, 1.0, len(texts)) for name in scopes}

    engine = Engine()
    engine.scopes = scopes
    rows = read_rows(load_task(write_task(tmp_path)), lock=None).splits.train
    scope, least, facts = _fit_scope(engine, Kept(rows, rows), 0.9)
    assert (scope, facts["n"], facts["n_outside"]) == (used, len(rows), 0) and 0.0 < least < 0.2


def test_decide_tells_unsure_from_out_of_scope():
    p = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], dtype=np.float32)
    decision = Decision(threshold=0.7, scope="energy", scope_threshold=1.0, scope_label=None)
    said = decide(p, ("a", "b"), multi_label=False, decision=decision, scope=np.array([2.0, 2.0, 0.5]))
    assert [one.because for one in said] == [None, "unsure", "out_of_scope"]
    said = decide(p, ("a", "b"), multi_label=False, decision=Decision(scope_label="b"))
    assert [one.because for one in said] == [None, None, "out_of_scope"]
    assert not any(one.abstained for one in decide(p, ("a", "b"), multi_label=False))


def test_build_ships_the_nearest_threshold_and_misses_the_budget_when_no_threshold_is_supported(tmp_path):
    rows = messages(130)
    draw = np.random.default_rng(0)
    noisy = [
        (text, label if draw.random() < 0.5 else str(draw.choice(["billing", "fault", "visit"])))
        for text, label in rows
    ]
    text = SVM.replace("accuracy = 0.5", "accuracy = 0.3").replace("[budget]\n", "[budget]\nprecision = 0.9\n")
    ended = alambic("build", write_task(tmp_path, text=text, rows=noisy), "--out", tmp_path / "run", "--json")
    record = json.loads(ended.out.splitlines()[-1])
    limit = next(one for one in record["budget"]["limits"] if one["limit"] == "precision")
    assert (ended.code, record["budget"]["met"], limit["met"]) == (3, False, False)
    manifest = open_bundle(tmp_path / "run" / "bundle").manifest
    assert not manifest.decision.facts["precision"]["kept"] and manifest.decision.threshold > 0
