"""`alambic predict --input F --output G`: one line a row, in order, resumable, a bad row never stops the good ones."""

import json
import os
import signal
import subprocess
import sys

import pytest

from alambic import predict_file as module
from alambic.engines import open_engine
from alambic.errors import InputTooLong
from linear_task import alambic, built, messages, write_csv


@pytest.fixture
def bundle(tmp_path_factory):
    return built(tmp_path_factory) / "bundle"


def predict(bundle, source, target, *options):
    ended = alambic("predict", bundle, "--input", source, "--output", target, *options)
    lines = [json.loads(line) for line in target.read_text("utf-8").splitlines()] if target.is_file() else []
    return ended, lines


def test_each_line_holds_the_row_and_the_answer_in_order(bundle, tmp_path):
    rows = [(str(i), text, label) for i, (text, label) in enumerate(messages())]
    source = write_csv(tmp_path / "in.csv", rows, ("id", "message", "team"))
    ended, lines = predict(bundle, source, tmp_path / "out.jsonl")
    assert ended.code == 0, ended.err
    assert ended.out == "" and f"{len(rows)} rows in" in ended.err
    assert [line["id"] for line in lines] == [row[0] for row in rows]
    assert list(lines[0]) == ["id", "message", "team", "prediction", "confidence", "abstained"]
    assert lines[0]["abstained"] is False and 0 < lines[0]["confidence"] <= 1
    assert sum(line["prediction"] == line["team"] for line in lines) > 0.8 * len(rows)


def test_top_k_adds_the_likeliest_labels(bundle, tmp_path):
    source = write_csv(tmp_path / "in.csv", [("my refund",)], ("message",))
    _, lines = predict(bundle, source, tmp_path / "out.jsonl", "--top-k", "2")
    scores = lines[0]["scores"]
    assert next(iter(scores)) == lines[0]["prediction"] and len(scores) == 2
    assert next(iter(scores.values())) == lines[0]["confidence"]


def test_number_is_read_as_text_as_it_is_in_training(bundle, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"message": 404}\n{"message": {"a": 1}}\n{"message": null}\n')
    ended, lines = predict(bundle, source, tmp_path / "out.jsonl")
    assert ended.code == 1
    assert "prediction" in lines[0] and lines[0]["message"] == 404
    assert ["no text" in line.get("error", "") for line in lines] == [False, True, True]


def test_bad_row_has_an_error_with_its_place_and_the_exit_code_is_one(bundle, tmp_path):
    source = tmp_path / "in.csv"
    source.write_text('id,message\n1,my refund\n2,\n3,"a "bad" quote"\n4,the technician\n5,\x00\x01\n')
    ended, lines = predict(bundle, source, tmp_path / "out.jsonl")
    assert ended.code == 1
    assert "5 rows" in ended.err and "3 in error" in ended.err
    assert lines[1] == {"id": "2", "message": "", "error": "in.csv:3: no text in column 'message'"}
    assert lines[2]["error"].startswith("in.csv:4: a quote inside a quoted field is not doubled")
    assert lines[4]["error"] == "in.csv:6: no text in column 'message'"
    assert [("prediction" in line, "error" in line) for line in lines] == [
        (True, False), (False, True), (False, True), (True, False), (False, True)]  # fmt: skip


def test_columns_that_are_ours_are_replaced_and_told(bundle, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(
        '{"message": "my refund", "error": "old", "prediction": "old"}\n{"message": "", "prediction": "x"}\n'
    )
    ended, lines = predict(bundle, source, tmp_path / "out.jsonl")
    assert "in.jsonl: columns replaced in the output: error, prediction" in ended.err
    assert "error" not in lines[0] and lines[0]["prediction"] == "billing"
    assert "prediction" not in lines[1] and "no text" in lines[1]["error"]
    assert "2 rows" in ended.err and "1 in error" in ended.err


def test_french_export_without_labels_is_read(bundle, tmp_path):
    source = tmp_path / "export.csv"
    text = "numéro;objet du message\n1;Où est ma facture ? Le montant dû est erroné\n2;Réparé à côté, ça fuit déjà\n"
    source.write_bytes(text.encode("cp1252"))
    ended, lines = predict(bundle, source, tmp_path / "out.jsonl")
    assert ended.code == 0, ended.err
    assert "text = 'objet du message'" in ended.err
    assert lines[1]["objet du message"] == "Réparé à côté, ça fuit déjà" and lines[0]["numéro"] == "1"


def test_text_column_is_taken_when_named_and_the_nearest_is_told_when_absent(bundle, tmp_path):
    source = write_csv(tmp_path / "in.csv", [("x", "my refund")], ("message", "body"))
    _, lines = predict(bundle, source, tmp_path / "out.jsonl", "--text-column", "body")
    assert lines[0]["prediction"] == "billing"
    ended, _ = predict(bundle, source, tmp_path / "other.jsonl", "--text-column", "bdy")
    assert ended.code == 1 and "'bdy'" in ended.err and "did you mean 'body'" in ended.err


def test_any_character_comes_back_as_it_went_in(bundle, tmp_path):
    texts = ["🧑‍🔧 drain 💧", "مرحبا، الفاتورة", "שלום חשבונית", "family 👨‍👩‍👧‍👦", "a\u200fb", "nul\x00 inside refund"]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(json.dumps({"message": t}) for t in [*texts, "lone \ud83d refund"]) + "\n")
    ended, lines = predict(bundle, source, tmp_path / "out.jsonl")
    assert ended.code == 0, ended.err
    assert [line["message"] for line in lines] == [*texts, "lone \ud83d refund"]
    assert all("prediction" in line for line in lines)


def test_empty_cells_of_parquet_are_null_not_nan(bundle, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = __import__("pyarrow").table({"message": ["my refund"], "amount": [float("nan")]})
    parquet.write_table(table, tmp_path / "in.parquet")
    predict(bundle, tmp_path / "in.parquet", tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text(), parse_constant=pytest.fail)["amount"] is None


def test_existing_output_is_refused_without_force(bundle, tmp_path):
    source, target = write_csv(tmp_path / "in.csv", [("my refund",)], ("message",)), tmp_path / "out.jsonl"
    target.write_text("precious")
    ended = alambic("predict", bundle, "--input", source, "--output", target)
    assert ended.code == 1 and f"{target}: exists already" in ended.err and "--force" in ended.err
    assert target.read_text() == "precious"
    assert predict(bundle, source, target, "--force")[1][0]["prediction"] == "billing"


def test_summary_is_json_on_stdout_when_asked(bundle, tmp_path):
    source = write_csv(tmp_path / "in.csv", [("my refund",), ("",), ("a leak",)], ("message",))
    ended, _ = predict(bundle, source, tmp_path / "out.jsonl", "--json")
    record = json.loads(ended.out)
    assert (record["errors"], record["resumed"], ended.err) == (record["rows"] - 2, 0, "")


def test_row_too_long_is_an_error_line_when_the_task_says_so(bundle, tmp_path, monkeypatch):
    with open_engine(bundle) as engine:
        real = engine.predict

        def refuse(texts, **options):
            if any(len(text) > 100 for text in texts):
                raise InputTooLong("900 tokens, the model reads 256")
            return real(texts, **options)

        monkeypatch.setattr(engine, "predict", refuse)
        answers = module._predictions(module.predicting(engine), ["my refund", "x" * 101, "the technician"])
    assert [answer.get("error") for answer in answers] == [None, "900 tokens, the model reads 256", None]
    assert answers[2]["prediction"] == "visit"


# ---- interrupted runs ------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from alambic import predict_file
from alambic.cli.main import main

predict_file._BATCH, batches = 50, []
answer = predict_file._answer

def counted(predict, rows, spec, out):
    batches.append(1)
    if len(batches) == 4:
        out.flush()
        out.write('{"message": "half a li')
        out.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return answer(predict, rows, spec, out)

predict_file._answer = counted
main(sys.argv[1:])
"""


@pytest.fixture
def many(tmp_path):
    rows = [(f"{text} {i}" if i % 7 else "", str(i)) for i, (text, _) in enumerate(messages(100))]
    return write_csv(tmp_path / "in.csv", rows, ("message", "id"))


def kill(bundle, source, target):
    command = [sys.executable, "-c", KILLED, "predict", str(bundle), "--input", str(source), "--output", str(target)]
    ended = subprocess.run(command, capture_output=True, timeout=600)
    assert ended.returncode == -signal.SIGKILL
    assert not target.exists()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_run_goes_on_and_ends_the_same(bundle, many, tmp_path):
    kill(bundle, many, tmp_path / "cut.jsonl")
    ended, lines = predict(bundle, many, tmp_path / "cut.jsonl", "--json")
    whole, _ = predict(bundle, many, tmp_path / "whole.jsonl", "--json")
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(lines) == 300 and ended.code == whole.code == 1
    cut, plain = json.loads(ended.out), json.loads(whole.out)
    assert (cut["resumed"], plain["resumed"]) == (150, 0) and cut["errors"] == plain["errors"] == 43
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.jsonl", "in.csv", "whole.jsonl"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("change", ["input", "options"])
def test_killed_run_starts_anew_when_the_work_is_another(bundle, many, tmp_path, change):
    kill(bundle, many, tmp_path / "cut.jsonl")
    if change == "input":
        os.utime(many, (1, 1))
    options = ["--text-column", "id"] if change == "options" else []
    ended, lines = predict(bundle, many, tmp_path / "cut.jsonl", "--json", *options)
    assert json.loads(ended.out)["resumed"] == 0 and len(lines) == 300


def test_damaged_remains_are_computed_again(tmp_path):
    part = tmp_path / "out.part"
    part.write_bytes(b'{"a": 1}\n\x00\x00\x00\n{"a": 3}\n')
    module._stamp_file(part).write_text("s")
    assert module._resume(part, "s") == (1, 0)
    assert part.read_bytes() == b'{"a": 1}\n'


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_is_told_and_nothing_is_lost(bundle, many, tmp_path):
    target = tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.part").symlink_to("/dev/full")
    ended = alambic("predict", bundle, "--input", many, "--output", target)
    assert ended.code == 1
    assert "the disk is full" in ended.err and "run the same command again" in ended.err
    assert not target.exists()
