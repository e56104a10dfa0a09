"""Whatever is wrong with files, task, bundle or disk: one clear error, an exit code, no traceback, nothing lost."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import alambic.build.outcome as alambic_build
from alambic.build import build_events, trial
from alambic.events import Finished, Skipped
from alambic.model import bases
from alambic.task import load_task
from linear_task import TASK, alambic, built, messages, write_csv, write_task


@pytest.fixture
def bundle(tmp_path_factory, tmp_path):
    """A copy of a good bundle."""
    return Path(shutil.copytree(built(tmp_path_factory) / "bundle", tmp_path / "bundle"))


@pytest.fixture
def run(tmp_path_factory, tmp_path):
    """A copy of a finished build, beside its task."""
    write_task(tmp_path)
    return Path(shutil.copytree(built(tmp_path_factory), tmp_path / "run"))


def refused(ended, *said, code=1):
    """Hold that a command failed plainly."""
    assert ended.code == code, (ended.out, ended.err)
    assert ended.err.startswith(("error: ", "Usage: ")) or "\nerror: " in ended.err, ended.err
    assert "Traceback" not in ended.err and ended.out == ""
    for text in said:
        assert text in ended.err, ended.err


def build(folder, *options):
    return alambic("build", folder / "task.toml", "--out", folder / "run", *options)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["build", "check"])
def test_missing_data_file_names_the_nearest(tmp_path, command):
    write_task(tmp_path, text=TASK.replace("rows.csv", "row.csv"))
    ended = build(tmp_path) if command == "build" else alambic("check", tmp_path / "task.toml")
    refused(ended, f"{tmp_path / 'row.csv'}: no such file", "did you mean 'rows.csv'?")


def test_missing_column_names_the_nearest(tmp_path):
    write_task(tmp_path, text=TASK.replace("[data]", '[data]\ntext = "mesage"'))
    refused(build(tmp_path), "rows.csv", "'mesage'", "did you mean 'message'")


def test_unknown_encoding_is_refused(tmp_path):
    write_task(tmp_path, text=TASK.replace("[data]", '[data]\nencoding = "utf-9"'))
    refused(build(tmp_path), "utf-9")


def test_rows_in_another_encoding_than_named_are_refused_with_the_way_out(tmp_path):
    write_task(tmp_path, text=TASK.replace("[data]", '[data]\nencoding = "utf-8"'))
    rows = "".join(f"réparé à côté {i},team{i % 2}\n" for i in range(30))
    (tmp_path / "rows.csv").write_bytes(f"message,team\n{rows}".encode("latin-1"))
    refused(build(tmp_path), "rows.csv:2", "30 of 30 rows cannot be used", "data.encoding")


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\n\n"])
def test_empty_file_is_refused(tmp_path, content):
    write_task(tmp_path)
    (tmp_path / "rows.csv").write_bytes(content)
    refused(build(tmp_path), "rows.csv: the file", "at least one row")


def test_one_label_only_is_refused(tmp_path):
    write_task(tmp_path, rows=[(text, "billing") for text, _ in messages()])
    refused(build(tmp_path), "only one label ('billing') in 42 rows; a classifier needs two", "check data.label")


def test_too_few_rows_are_refused_plainly(tmp_path):
    write_task(tmp_path, rows=messages(1)[:2])
    refused(build(tmp_path), "2 rows are too few to split", "10 rows per label")


def test_label_seen_once_is_told_and_stays_in_the_bundle(bundle, tmp_path):
    ended = alambic("check", write_task(tmp_path))
    assert "1 label(s) seen once ('other'): too few to learn from" in ended.err
    assert json.loads(alambic("show", bundle, "--json").out)["labels"] == ["billing", "fault", "other", "visit"]


def test_broken_quote_in_the_middle_costs_one_row(tmp_path):
    write_task(tmp_path)
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    lines[20] = '"this quote is never closed,fault'
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    ended = alambic("check", tmp_path / "task.toml", "--json")
    assert ended.code == 0, ended.err
    shown = alambic("check", tmp_path / "task.toml")
    assert "1 of 43 rows left out; first: rows.csv:21: a quote opened here is never closed" in shown.err


def test_nul_bytes_are_removed_and_told(tmp_path):
    write_task(tmp_path)
    body = (tmp_path / "rows.csv").read_bytes().replace(b"refund", b"re\x00fund")
    (tmp_path / "rows.csv").write_bytes(body)
    ended = alambic("check", tmp_path / "task.toml")
    assert ended.code == 0, ended.err
    assert f"{body.count(0)} control characters removed from texts; first: rows.csv:" in ended.err


def test_emoji_and_right_to_left_text_are_learnt(bundle):
    ended = alambic("predict", bundle, "🧾 refund 💶 \u202bالفاتورة\u202c חשבונית", "--json")
    assert ended.code == 0 and json.loads(ended.out)["prediction"] == "billing"


def test_text_of_two_megabytes_is_predicted(bundle):
    text = "refund invoice bank " * 100_000
    ended = alambic("predict", bundle, "--json", stdin=text.encode() + b"\n")
    assert ended.code == 0 and json.loads(ended.out)["prediction"] == "billing"


def test_missing_input_file_names_the_nearest(bundle, tmp_path):
    write_csv(tmp_path / "mails.csv", [("my refund",)], ("message",))
    ended = alambic("predict", bundle, "--input", tmp_path / "mail.csv", "--output", tmp_path / "out.jsonl")
    refused(ended, "no such file", "did you mean 'mails.csv'?")
    assert not list(tmp_path.glob("out.jsonl*"))


def test_labels_unknown_to_the_bundle_are_refused_when_measuring(bundle, tmp_path):
    rows = write_csv(tmp_path / "test.csv", [(text, "elsewhere") for text, _ in messages(3)])
    refused(alambic("measure", bundle, "--data", rows), "label 'elsewhere' is not in the training data")


# ---- task ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["build", "check"])
def test_missing_task_file_is_misuse(tmp_path, command):
    refused(alambic(command, tmp_path / "task.toml"), "no such task file", "alambic new", code=2)


def test_unknown_key_is_misuse_with_line_and_nearest(tmp_path):
    write_task(tmp_path, text=TASK.replace("train =", "trian ="))
    refused(build(tmp_path), "task.toml:5: data.trian: unknown key; did you mean 'train'?", code=2)


def test_unknown_option_of_a_candidate_is_misuse(tmp_path):
    write_task(tmp_path, text=TASK + "recipe = { cc = 1 }\n")
    refused(build(tmp_path), "candidate 'tfidf-svm'", "'cc'", code=2)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("size_mb = 50\npeak_ram_mb = 20", "peak_ram_mb = 20 is under budget.size_mb = 50"),
        ('prefer = "quality"\ngive_up = 1', "contradicts prefer = 'quality'"),
        ("size_mb = -1", "budget.size_mb = -1"),
    ],
)
def test_contradictory_budget_is_misuse(tmp_path, budget, said):
    write_task(tmp_path, text=TASK.replace("[budget]", f"[budget]\n{budget}"))
    refused(build(tmp_path), said, code=2)
    assert not (tmp_path / "run").exists()


def test_budget_that_cannot_be_met_exits_three_with_the_nearest(run):
    text = TASK.replace("[budget]", "[budget]\nsize_mb = 0.0001")
    (run.parent / "task.toml").write_text(text)
    ended = build(run.parent, "--json")
    record = json.loads(ended.out)
    assert (ended.code, record["budget"]["met"]) == (3, False)
    assert any("budget: missed" in line for line in record["sentences"])
    assert alambic("verify", record["bundle"]).code == 0


# ---- base ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def wrong_base(tmp_path, monkeypatch):
    """A catalogue whose only base has weights of another hash."""
    model = tmp_path / "site" / "a_wrong_base" / "model"
    model.mkdir(parents=True)
    (model.parent / "__init__.py").write_text("")
    (model / "config.json").write_text('{"model_type": "bert", "max_position_embeddings": 64}')
    (model / "model.safetensors").write_bytes(b"not the genuine weights")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    entry = bases.CatalogueEntry("genuine", "a_wrong_base", "model", "o/x", "0" * 64, "mit", ("en",), 32, "")
    monkeypatch.setattr(bases, "catalogue", lambda: {"genuine": entry})
    return "genuine"


def test_base_with_the_wrong_hash_is_refused(wrong_base):
    said = ("model.safetensors: SHA-256 is ", f"the catalogue says {'0' * 64}", "reinstall")
    refused(alambic("bases", "show", wrong_base), *said)


def test_build_on_a_base_with_the_wrong_hash_is_refused_before_anything_is_written(wrong_base, tmp_path):
    text = TASK.replace("[budget]", '[base]\nname = "genuine"\n[budget]').replace("majority", "logreg")
    write_task(tmp_path, text=text)
    refused(build(tmp_path), "model.safetensors: SHA-256 is ")
    assert not (tmp_path / "run").exists()


def test_unknown_base_names_the_nearest(tmp_path):
    text = TASK.replace("[budget]", '[base]\nname = "all-minilm"\n[budget]').replace("majority", "logreg")
    write_task(tmp_path, text=text)
    refused(build(tmp_path), "base 'all-minilm' is neither", "did you mean 'all-minilm-l6-v2'?")


# ---- bundle ----------------------------------------------------------------------------------------------------------


def corrupt(bundle):
    (bundle / "bundle.json").write_bytes(b"\x00\xff{")


def truncate(bundle):
    file = max(bundle.glob("*/*"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-7])


def flip(bundle):
    file = max(bundle.glob("*/*"), key=lambda path: path.stat().st_size)
    body = bytearray(file.read_bytes())
    body[len(body) // 2] ^= 1
    file.write_bytes(body)


def rewrite(bundle):
    manifest = (bundle / "bundle.json").read_text()
    (bundle / "bundle.json").write_text(manifest.replace("billing", "selling"))


def renew(bundle):
    record = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**record, "format": 99, "alambic": "9.0.0"}))


def lose(bundle):
    (bundle / "bundle.json").unlink()


DAMAGES = [
    (corrupt, "bundle.json"),
    (truncate, "truncated or changed"),
    (flip, "changed since the bundle was sealed"),
    (rewrite, "bundle.json"),
    (renew, "9.0.0"),
    (lose, "not a bundle, it has no bundle.json"),
]


@pytest.mark.parametrize("command", ["predict", "verify", "show", "measure", "compare", "export"])
@pytest.mark.parametrize(("damage", "said"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_damaged_bundle_is_refused(bundle, tmp_path, command, damage, said):
    damage(bundle)
    rows = write_csv(tmp_path / "rows.csv", messages(2))
    options = {
        "predict": ["my refund"], "measure": ["--data", rows], "compare": ["--data", rows],
        "export": ["--to", "file", "--out", tmp_path / "x.alambic"],
    }  # fmt: skip
    refused(alambic(command, bundle, *options.get(command, [])), said)
    assert not (tmp_path / "x.alambic").exists()


def test_damaged_bundle_is_refused_without_a_traceback_by_the_real_process(bundle):
    flip(bundle)
    command = [sys.executable, "-m", "alambic", "predict", str(bundle), "my refund"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("error: ") and "Traceback" not in ended.stderr


def test_truncated_single_file_is_refused(bundle, tmp_path):
    file = tmp_path / "desk.alambic"
    assert alambic("export", bundle, "--to", "file", "--out", file).code == 0
    file.write_bytes(file.read_bytes()[:-100])
    refused(alambic("predict", file, "my refund"), "desk.alambic")


def test_missing_bundle_is_refused_with_the_way_out(tmp_path):
    refused(alambic("predict", tmp_path / "nothing", "my refund"), "no such bundle", "bundle.json")


# ---- disk ------------------------------------------------------------------------------------------------------------


def test_output_folder_that_is_a_file_is_refused(tmp_path):
    write_task(tmp_path)
    (tmp_path / "run").write_text("in the way")
    refused(build(tmp_path), "run", "cannot be written", "--out")
    assert (tmp_path / "run").read_text() == "in the way"


def test_output_that_is_a_folder_is_refused_when_predicting(bundle, tmp_path):
    rows = write_csv(tmp_path / "in.csv", [("my refund",)], ("message",))
    ended = alambic("predict", bundle, "--input", rows, "--output", tmp_path, "--force")
    refused(ended, f"{tmp_path}: is a folder", "--output")


def full(*args):
    raise OSError(28, "No space left on device", "run/full")


def test_full_disk_while_packing_is_told_and_the_next_build_goes_on(tmp_path, monkeypatch):
    task = write_task(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(trial, "assemble", full)
        refused(build(tmp_path), "run/full: the disk is full", "run the same command again: finished stages are kept")
    work = build_events(load_task(task), tmp_path / "run")
    events = list(itertools.islice((e for e in work if isinstance(e, Skipped | Finished)), 3))
    work.close()
    assert events[:2] == [Skipped("audit"), Skipped("majority.fold0")]
    assert events[2].stage == "bundle.majority.fold0"


def test_full_disk_while_reporting_is_told_and_the_next_build_goes_on(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(alambic_build, "write_tradeoff", full)
        refused(build(run.parent), "run/full: the disk is full", "run the same command again: finished stages are kept")
    ended = build(run.parent, "--json")
    assert json.loads(ended.out)["ran"] is True and " s\n" not in ended.err


def in_namespace(script, *args):
    """Run a shell script with mounts of its own; they are gone when it ends."""
    flags = "-m" if os.geteuid() == 0 else "-rm"
    probe = subprocess.run(["unshare", flags, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
    if probe.returncode:
        pytest.skip(f"this system lets no test mount a small disk: {probe.stderr.decode().strip()}")
    command = ["unshare", flags, "sh", "-c", script, "sh", sys.executable, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


needs_unshare = pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare (Linux)")


@needs_unshare
def test_read_only_folder_is_refused(tmp_path):
    script = 'mount --bind "$2" "$2" && mount -o remount,ro,bind "$2" && exec "$1" -m alambic new "$2/desk"'
    ended = in_namespace(script, tmp_path)
    assert ended.returncode == 1, ended.stderr
    assert "cannot be written (Read-only file system)" in ended.stderr and "Traceback" not in ended.stderr


@needs_unshare
@pytest.mark.slow
def test_small_disk_that_fills_up_is_told_and_the_next_build_goes_on(tmp_path):
    text = TASK.replace('[[candidate]]\nname = "tfidf-svm"\n', "")
    write_task(tmp_path, text=text.replace("0.5", "0.0"))
    (tmp_path / "run").mkdir()
    build = '"$1" -m alambic build "$2/task.toml" --out "$2/run"'
    disk = 'mount -t tmpfs -o size=40k none "$2/run"'
    script = f'{disk} && {build}; echo "code $?"; mount -o remount,size=50m "$2/run" && {build}'
    ended = in_namespace(script, tmp_path)
    assert "code 1" in ended.stdout and ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "No space left" in ended.stderr or "the disk is full" in ended.stderr
    assert "stages kept from an earlier run" in ended.stderr
