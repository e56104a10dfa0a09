"""A whole build with linear candidates: what is kept, what runs again, what a kill or Ctrl-C leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from alambic.build import build, build_events
from alambic.bundle import open_bundle, verify
from alambic.events import Finished, Note, Skipped, Started
from alambic.task import load_task
from linear_task import RARE, TASK, alambic, built, messages, write_csv, write_task


@pytest.fixture
def run(tmp_path_factory, tmp_path):
    """A copy of a finished build, beside its task."""
    done = built(tmp_path_factory)
    shutil.copytree(done, tmp_path / "run")
    write_task(tmp_path)
    return tmp_path / "run"


def build_here(run, *, text=TASK):
    """Build again into `run`; return the result, the stages that ran and what was said."""
    (run.parent / "task.toml").write_text(text)
    events = []
    result = build(run.parent / "task.toml", out=run, on_event=events.append)
    ran = [e.stage for e in events if isinstance(e, Started)]
    return result, ran, [e.message for e in events if isinstance(e, Note)]


def test_build_does_no_work_and_says_so_when_nothing_changed(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "lock"}
    # The run was built elsewhere; its own record names another place, so the pages are written once more here.
    build_here(run)
    before = {path: path.stat().st_mtime_ns for path in before}
    result, ran, said = build_here(run)
    assert (ran, result.ran) == ([], False)
    assert "nothing changed: no work was done, every stage was kept" in said
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_build_runs_only_the_last_stage_when_only_the_budget_changed(run):
    result, ran, said = build_here(run, text=TASK.replace("accuracy = 0.5", "accuracy = 0.6"))
    assert ran == ["final"]
    assert result.ran and not any("nothing changed" in line for line in said)


def test_build_keeps_the_other_candidates_when_one_changed(run):
    text = TASK.replace('name = "tfidf-svm"', 'name = "tfidf-svm"\nrecipe = { c = 2.0 }')
    (run.parent / "task.toml").write_text(text)
    skipped, work = [], build_events(load_task(run.parent / "task.toml"), run)
    for event in work:
        if isinstance(event, Started):
            break
        skipped += [event.stage] if isinstance(event, Skipped) else []
    work.close()
    assert event.stage == "tfidf-svm.fold0"
    assert skipped[0] == "audit" and skipped[-1] == "measure.majority" and len(skipped) == 17


def test_build_runs_what_is_lost_when_a_stage_was_deleted(run):
    shutil.rmtree(next(run.glob("stages/predict.majority.fold1-*")))
    _, ran, _ = build_here(run)
    assert ran == ["predict.majority.fold1"]


def test_build_puts_the_bundle_back_when_it_was_tampered_with(run):
    target = next(run.glob("bundle/*/*.npy"))
    target.write_bytes(target.read_bytes()[:-1] + b"\x01")
    assert verify(build_here(run)[0].bundle).name == "desk"


def test_bundle_records_where_it_comes_from(run):
    manifest = open_bundle(run / "bundle").manifest
    task = load_task(run.parent / "task.toml")
    assert (manifest.task["digest"], manifest.candidate, manifest.base) == (task.digest, "tfidf-svm", None)
    assert set(manifest.scores) == {"dev", "test"} and manifest.scores["test"]["n"] == manifest.data["test"]["rows"]
    assert manifest.data["train"]["rows"] + manifest.data["test"]["rows"] == len(messages()) + 1
    assert {"bundle", "base", "data"} == set(manifest.licences) and manifest.golden and manifest.versions["numpy"]


def test_new_rows_never_move_old_ones_when_the_file_grows(run):
    before = json.loads((run / "splits.lock").read_text())["rows"]
    write_csv(run.parent / "rows.csv", [*messages(), RARE, *messages(3, seed=9)])
    work = build_events(load_task(run.parent / "task.toml"), run)
    while not isinstance(next(work), Started):
        continue
    work.close()
    after = json.loads((run / "splits.lock").read_text())["rows"]
    assert len(after) > len(before) and {key: after[key] for key in before} == before


def test_several_labels_a_text_are_built_end_to_end(tmp_path):
    rows = [(text, label) for text, label in messages()]
    both = [(f"{a} {b}", f"{x}|{y}") for (a, x), (b, y) in zip(rows[:12], rows[12:24], strict=True) if x != y]
    text = TASK.replace('kind = "classify"', 'kind = "classify"\nmulti_label = true').replace("accuracy", "micro_f1")
    text = text.replace('[[candidate]]\nname = "majority"\n', "")
    write_task(tmp_path, rows=rows + both + [("hello can you please", "")] * 1)
    (tmp_path / "task.toml").write_text(text)
    ended = alambic("build", tmp_path / "task.toml", "--out", tmp_path / "run", "--json")
    record = json.loads(ended.out)
    assert ended.code == 0, ended.err
    assert {"micro_f1", "macro_f1", "subset_accuracy"} <= set(record["candidates"][0]["quality"])
    answer = alambic("predict", record["bundle"], "refund invoice bank technician visit monday", "--json")
    found = json.loads(answer.out)
    assert set(found["prediction"]) == {"billing", "visit"} and 0 <= found["confidence"] <= 1
    table = alambic("predict", record["bundle"], "refund invoice bank technician visit monday")
    assert table.out.startswith("billing, visit\t")


# Build in a child that kills itself just before its n-th change to the run folder, again and again, then in peace.
KILLED = """
import json, os, random, signal, sys
from alambic.build import build
import matplotlib.backends.backend_agg, matplotlib.backends.backend_svg, sklearn.feature_extraction.text, sklearn.svm

task, cut, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
CHANGES = ("os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")

def changes(name, args, folder):
    if name == "open":
        writes = args[2] & (os.O_WRONLY | os.O_RDWR) if isinstance(args[2], int) else 0
    else:
        writes = name in CHANGES
    return writes and any(isinstance(a, str | os.PathLike) and os.fspath(a).startswith(folder) for a in args)

def attempt(folder, after):
    pid = os.fork()
    if pid == 0:
        seen = 0
        def hook(name, args):
            nonlocal seen
            if changes(name, args, folder):
                seen += 1
                if seen == after:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        build(task, out=folder)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

draw = random.Random(seed)
print(json.dumps([attempt(cut, after) for after in [*(draw.randint(3, 150) for _ in range(7)), None]]))
"""


def outcome(run):
    """What a build decided and shipped, without times of day and times measured."""
    record = json.loads((run / "result.json").read_text())
    manifest = open_bundle(run / "bundle").manifest
    return {
        "chosen": record["chosen"],
        "quality": {c["name"]: c["quality"] for c in record["candidates"]},
        "test": {k: v for k, v in record["test"].items() if k != "worst"},
        # The model card tells the date and the measured times.
        "files": {name: entry.sha256 for name, entry in manifest.files.items() if name != "README.md"},
        "parts": manifest.parts,
        "temperature": manifest.temperature,
        "golden": manifest.golden,
        "labels": manifest.labels,
        "splits": (run / "splits.lock").read_text(),
    }


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_build_ends_the_same_when_it_was_killed_at_any_moment(tmp_path_factory, tmp_path):
    whole, cut = built(tmp_path_factory), tmp_path / "cut"
    command = [sys.executable, "-c", KILLED, str(write_task(tmp_path)), str(cut), "7"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert ended.returncode == 0, ended.stderr
    codes = json.loads(ended.stdout)
    assert codes.count(-signal.SIGKILL) >= 4 and codes[-1] == 0
    assert outcome(cut) == outcome(whole)
    assert verify(cut / "bundle").seal == open_bundle(cut / "bundle").manifest.seal
    assert not list(cut.glob("stages/*.part")) and not list(cut.glob(".bundle.*"))


# Press Ctrl-C when the build begins a stage.
INTERRUPTED = """
import os, signal, sys
from alambic.cli.main import main

# What runs behind a shell's back inherits that the signal is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
def hook(name, args):
    if name == "os.mkdir" and "majority.fold2-" in os.fspath(args[0]):
        signal.raise_signal(signal.SIGINT)
sys.addaudithook(hook)
sys.argv = ["alambic", "build", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
def test_build_exits_130_on_ctrl_c_and_goes_on_from_there(tmp_path):
    task, run = write_task(tmp_path), tmp_path / "run"
    command = [sys.executable, "-c", INTERRUPTED, str(task), "--out", str(run)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    rest = ended.stderr
    assert (ended.returncode, "interrupted" in rest, "Traceback" in rest) == (130, True, False), rest
    skipped, work = [], build_events(load_task(task), run)
    for event in work:
        skipped += [event.stage] if isinstance(event, Skipped) else []
        if isinstance(event, Finished):
            break
    work.close()
    assert {"audit", "majority.fold0", "majority.fold1"} <= set(skipped)


def test_second_build_is_refused_when_one_runs_in_the_folder(tmp_path):
    task, run = write_task(tmp_path), tmp_path / "run"
    work = build_events(load_task(task), run)
    while not isinstance(next(work), Started):
        continue
    ended = alambic("build", task, "--out", run)
    work.close()
    assert ended.code == 1
    assert f"{run}: another build is running here" in ended.err and "--out" in ended.err
