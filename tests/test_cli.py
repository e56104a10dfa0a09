"""The command line: exit codes, what goes to stdout and what to stderr, the JSON that others rely on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alambic.cli.main import COMMANDS
from alambic.task import load_task
from linear_task import TASK, alambic, built, messages, write_csv, write_task


@pytest.fixture
def run(tmp_path_factory):
    return built(tmp_path_factory)


@pytest.fixture
def bundle(run):
    return run / "bundle"


@pytest.fixture
def rows(tmp_path):
    return write_csv(tmp_path / "test.csv", messages(4, seed=5))


# ---- the program itself ----------------------------------------------------------------------------------------------


def test_help_lists_every_command():
    ended = alambic("--help")
    assert ended.code == 0
    assert all(f"\n  {name} " in ended.out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_is_given(name):
    ended = alambic(name, "-h")
    assert ended.code == 0 and ended.out.startswith(f"Usage: alambic {name}")


def test_version_is_given():
    ended = alambic("--version")
    assert (ended.code, ended.out.split()[0]) == (0, "alambic,")


def test_unknown_command_is_misuse_with_the_nearest():
    ended = alambic("biuld")
    assert ended.code == 2 and "no command 'biuld'; did you mean 'build'?" in ended.err


@pytest.mark.parametrize(
    "argv", [["build"], ["predict", "b", "--nope"], ["export", "b", "--to", "pdf", "--out", "x"], ["check"]]
)
def test_misuse_exits_two_with_the_usage(argv):
    ended = alambic(*argv)
    assert ended.code == 2 and ended.err.startswith("Usage: ") and ended.out == ""


def test_bug_keeps_its_traceback(monkeypatch, bundle):
    monkeypatch.setattr("alambic.bundle.open_bundle", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        alambic("show", bundle)


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom alambic.cli.main import cli\ncli.main(['-h'], standalone_mode=False)\n"
        "print([m for m in ('numpy', 'pydantic', 'torch', 'openvino', 'sklearn', 'rich') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"


def test_closed_pipe_ends_quietly(bundle):
    script = f'yes "my refund" | head -n 5000 | "{sys.executable}" -m alambic predict "{bundle}" --json | head -n 1'
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=600)
    assert json.loads(ended.stdout)["prediction"] == "billing" and ended.stderr == ""


# ---- build -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def again(run, tmp_path):
    """A copy of the run beside its task, to build again."""
    write_task(tmp_path)
    shutil.copytree(run, tmp_path / "run")
    return tmp_path


def test_build_ends_with_one_json_object(again):
    ended = alambic("build", again / "task.toml", "--out", again / "run", "--json")
    record = json.loads(ended.out)
    assert ended.code == 0 and ended.out.count("\n") == 1
    assert {"bundle", "chosen", "candidates", "budget", "seconds"} <= set(record)
    assert record["budget"]["met"] is True and record["chosen"] == "tfidf-svm"
    assert [c["name"] for c in record["candidates"]] == ["majority", "tfidf-svm"]
    assert {"value", "low", "high", "n"} <= set(record["candidates"][0]["quality"]["accuracy"])
    assert Path(record["bundle"], "bundle.json").is_file() and Path(record["report"]).is_file()
    assert "predicted time: " in ended.err and "stages kept from an earlier run" in ended.err


def test_build_ends_with_a_table_and_the_next_commands(again):
    ended = alambic("build", again / "task.toml", "--out", again / "run")
    assert "> tfidf-svm" in ended.out and "budget: met" in ended.out
    assert f"alambic predict {again / 'run' / 'bundle'} " in ended.out
    assert "nothing changed: no work was done" not in ended.out


def test_dry_run_says_the_plan_and_trains_nothing(tmp_path):
    write_task(tmp_path)
    ended = alambic("build", tmp_path / "task.toml", "--out", tmp_path / "run", "--dry-run", "--json")
    plan = json.loads(ended.out)
    assert (ended.code, plan["candidates"], plan["folds"]) == (0, ["majority", "tfidf-svm"], 5)
    assert plan["seconds"] > 0 and "predicted time: about" in ended.err
    assert not list((tmp_path / "run" / "stages").iterdir())


def test_run_folder_is_named_after_the_task_when_none_is_given(tmp_path, monkeypatch):
    write_task(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert alambic("build", "task.toml", "--dry-run").code == 0
    assert (tmp_path / "runs" / "desk").is_dir()


# ---- predict ---------------------------------------------------------------------------------------------------------


def test_predict_prints_label_and_confidence(bundle):
    ended = alambic("predict", bundle, "where is my refund and the invoice")
    label, confidence = ended.out.rstrip("\n").split("\t")
    assert (ended.code, label, ended.err) == (0, "billing", "") and 0 < float(confidence) <= 1


def test_predict_prints_json_when_asked(bundle):
    record = json.loads(alambic("predict", bundle, "my refund", "--json", "--top-k", "2").out)
    assert list(record) == ["prediction", "confidence", "abstained", "scores"]
    assert (record["prediction"], record["abstained"], len(record["scores"])) == ("billing", False, 2)


def test_predict_reads_lines_of_stdin(bundle):
    ended = alambic("predict", bundle, "--json", stdin="my refund\n\nla fuite, déjà a leak\r\n".encode())
    assert [json.loads(line)["prediction"] for line in ended.out.splitlines()] == ["billing", "fault"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--input", "x.csv"], "--input and --output go together"),
        (["text", "--input", "x.csv", "--output", "y"], "give TEXT or --input, not both"),
        ([" "], "TEXT is empty"),
    ],
)
def test_predict_is_misused_when_its_inputs_clash(bundle, argv, said):
    ended = alambic("predict", bundle, *argv)
    assert ended.code == 2 and said in ended.err


# ---- measure, compare ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_measure_prints_the_contract(bundle, rows):
    ended = alambic("measure", bundle, "--data", rows, "--json")
    record = json.loads(ended.out, parse_constant=pytest.fail)
    assert ended.code == 0, ended.err
    assert (record["bundle"], record["n"], ended.err) == (str(bundle), 12, "")
    assert {"value", "low", "high"} <= set(record["quality"]["accuracy"])
    assert {"p50_ms", "p95_ms", "per_second"} <= set(record["speed"])
    assert record["energy"]["source"] in ("rapl", "estimated", "unavailable")
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    assert record["size_mb"] == pytest.approx(size / 1e6) and record["peak_ram_mb"] > 10
    assert {"cpu", "cores"} <= set(record["machine"])


@pytest.mark.slow
def test_compare_puts_bundles_side_by_side(bundle, rows, tmp_path):
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    ended = alambic("compare", bundle, other, "--data", rows, "--json")
    first, second = json.loads(ended.out)
    assert (ended.code, first["bundle"], second["bundle"]) == (0, str(bundle), str(other))
    assert second["difference"]["value"] == 0 and {"p50_ms", "p95_ms"} <= set(second["speed"])


# ---- show, verify, export --------------------------------------------------------------------------------------------


def test_show_tells_what_a_bundle_is(bundle):
    text, record = alambic("show", bundle).out, json.loads(alambic("show", bundle, "--json").out)
    assert "desk (classify, 4 labels), candidate tfidf-svm" in text and "accuracy" in text
    assert (record["name"], record["labels"]) == ("desk", ["billing", "fault", "other", "visit"])
    assert "golden" not in record and record["size_mb"] > 0


def test_show_tells_what_a_run_held(run):
    text, record = alambic("show", run).out, json.loads(alambic("show", run, "--json").out)
    assert "> tfidf-svm" in text and str(run / "bundle") in text
    assert record["chosen"] == "tfidf-svm"


def test_verify_rehashes_and_predicts_the_golden_texts(bundle):
    ended = alambic("verify", bundle)
    assert ended.code == 0 and "as sealed" in ended.out and "golden texts: same tokens" in ended.out
    record = json.loads(alambic("verify", bundle, "--json").out)
    assert record["files"] == sum(path.is_file() for path in bundle.rglob("*"))


def test_single_file_predicts_as_the_folder_does(bundle, tmp_path):
    file = tmp_path / "desk.alambic"
    ended = alambic("export", bundle, "--to", "file", "--out", file)
    assert (ended.code, ended.out.strip()) == (0, str(file))
    assert alambic("predict", file, "my refund").out == alambic("predict", bundle, "my refund").out
    assert alambic("verify", file).code == 0


def test_export_refuses_what_exists(bundle, tmp_path):
    (tmp_path / "x.alambic").write_text("precious")
    ended = alambic("export", bundle, "--to", "file", "--out", tmp_path / "x.alambic")
    assert ended.code == 1 and "x.alambic: exists already" in ended.err
    assert (tmp_path / "x.alambic").read_text() == "precious"


@pytest.mark.parametrize("form", ["onnx", "hf"])
def test_export_of_a_linear_bundle_as_a_model_is_refused(bundle, tmp_path, form):
    ended = alambic("export", bundle, "--to", form, "--out", tmp_path / "model")
    assert ended.code == 1 and "candidate 'tfidf-svm' has no encoder to export" in ended.err
    assert not (tmp_path / "model").exists()


# ---- new, check, doctor, bases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tickets", "mes tickets", "x" * 80, "_é"])
def test_new_writes_a_task_that_is_valid(tmp_path, name):
    ended = alambic("new", tmp_path / name)
    task = load_task(tmp_path / name / "task.toml")
    assert ended.code == 0 and "alambic build" in ended.out
    assert task.path_of(task.data.train).is_file()


def test_new_refuses_a_folder_that_has_a_task(tmp_path):
    alambic("new", tmp_path)
    ended = alambic("new", tmp_path)
    assert ended.code == 1 and "task.toml: exists already" in ended.err


def test_check_audits_without_writing_anything(tmp_path):
    task = write_task(tmp_path)
    ended = alambic("check", task)
    audit = json.loads(alambic("check", task, "--json").out)
    assert ended.code == 0 and "text = 'message'" in ended.err and "billing" in ended.out
    assert audit and sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv", "task.toml"]


def test_check_prints_the_schema_for_editors():
    schema = json.loads(alambic("check", "--schema").out)
    assert schema["$schema"].startswith("https://json-schema.org/") and "TaskSpec" in schema["$defs"]


def test_doctor_says_what_can_be_done():
    ended, record = alambic("doctor"), json.loads(alambic("doctor", "--json").out)
    assert ended.code == 0 and ended.out.splitlines()[-1].startswith("can predict")
    assert record["libraries"]["numpy"] and record["machine"]["cores"] >= 1


def test_bases_are_listed_with_licence():
    assert "all-minilm-l6-v2" in alambic("bases").out
    entries = json.loads(alambic("bases", "list", "--json").out)
    assert all(entry["licence"] for entry in entries)


def test_base_is_shown_after_its_hash_was_checked():
    ended = alambic("bases", "show", "all-minilm-l6-v2", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["licence"] == "apache-2.0"


def test_progress_is_plain_lines_when_stderr_is_no_terminal(again):
    (again / "task.toml").write_text(TASK.replace("0.5", "0.55"))
    ended = alambic("build", again / "task.toml", "--out", again / "run")
    assert "\x1b" not in ended.err and "\r" not in ended.err


def test_python_m_alambic_is_the_command():
    env = {**os.environ, "NO_COLOR": "1"}
    ended = subprocess.run([sys.executable, "-m", "alambic", "-V"], capture_output=True, text=True, env=env)
    assert ended.returncode == 0 and ended.stdout.startswith("alambic")


@pytest.mark.parametrize("kind", ["classify", "generate", "chat", "extract"])
def test_first_task_of_every_kind_is_read_as_written(kind, tmp_path):
    from alambic.data.read import read_dataset
    from alambic.data.read_chats import read_chats

    ended = alambic("new", tmp_path / kind, "--kind", kind)
    assert ended.code == 0 and f"{kind}/task.toml" in ended.out
    task = load_task(tmp_path / kind / "task.toml")
    rows = task.path_of(task.data.train)
    assert task.kind == kind
    if task.writes:
        assert len(read_chats(rows, task.data).dataset) == 4
    else:
        assert len(read_dataset(rows, task.data, multi_label=False).dataset) == 9
