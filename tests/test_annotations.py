"""The journal of an annotation: safe against kills, shared by processes, repaired when torn; agreement by hand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from alambic.data.annotations import Journal, text_id
from alambic.data.label_pool import check_names
from alambic.errors import DataError
from alambic.measure.agreement import cohen_kappa, krippendorff_alpha, pairwise_kappa


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "texts.labels.jsonl")


def test_journal_gives_back_every_decision_when_opened_again(journal):
    journal.decide(
        "label", by="anna", text="my bill is wrong", labels=("billing",), note="sure?", guess=("repair", 0.4), ms=900
    )
    journal.decide("none", by="anna", text="hello")
    journal.decide("skip", by="bob", text="…")
    again = Journal(journal.path).decisions
    first, second, third = again.standing()
    assert (first.labels, first.note, first.guess, first.ms) == (("billing",), "sure?", ("repair", 0.4), 900)
    assert (second.verdict, third.by, third.text) == ("none", "bob", "…")
    assert set(again.by_text()) == {text_id("my bill is wrong"), text_id("hello")}


def test_undo_gives_back_what_was_there_before_when_a_text_was_decided_twice(journal):
    journal.decide("label", by="anna", text="a", labels=("x",))
    journal.decide("label", by="anna", text="a", labels=("y",))
    journal.decide("label", by="bob", text="a", labels=("z",))
    assert journal.undo("anna").labels == ("y",)
    assert journal.decisions.of("anna", text_id("a")).labels == ("x",)
    journal.undo("anna")
    assert journal.decisions.of("anna", text_id("a")) is None
    assert journal.undo("anna") is None
    assert [d.by for d in Journal(journal.path).decisions.standing()] == ["bob"]


def test_torn_last_line_is_cut_off_and_said_when_the_writer_was_killed(journal):
    journal.decide("label", by="anna", text="a", labels=("x",))
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole + b'{"v": 1, "seq": 2, "do": "lab')
    again = Journal(journal.path)
    assert "cut short (29 bytes)" in again.repaired[0] and "jsonl:2" in again.repaired[0]
    again.decide("label", by="anna", text="b", labels=("y",))
    assert [d.text for d in Journal(journal.path).decisions.standing()] == ["a", "b"]
    assert journal.path.read_bytes().startswith(whole)


def test_journal_keeps_every_answer_it_gave_when_the_process_is_killed(tmp_path):
    path = tmp_path / "j.jsonl"
    code = (
        "import sys; from pathlib import Path; from alambic.data.annotations import Journal\n"
        "j = Journal(Path(sys.argv[1])); i = 0\n"
        "while True:\n"
        "    i += 1; j.decide('label', by='anna', text=f'text {i}', labels=('x',)); print(i, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    told = [process.stdout.readline() for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    told += process.stdout.readlines()
    process.wait()
    process.stdout.close()
    kept = Journal(path).decisions.standing()
    whole = [line for line in told if line.endswith("\n")]
    assert len(kept) in (len(whole), len(whole) + 1) and len(whole) >= 20


def test_two_processes_lose_nothing_when_they_write_one_journal_at_once(tmp_path):
    path = tmp_path / "j.jsonl"
    code = (
        "import sys; from pathlib import Path; from alambic.data.annotations import Journal\n"
        "j = Journal(Path(sys.argv[1]))\n"
        "for i in range(40): j.decide('label', by=sys.argv[2], text=f'text {i}', labels=(sys.argv[2],))\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in ("anna", "bob")]
    assert [one.wait(300) for one in both] == [0, 0]
    journal = Journal(path)
    assert len(journal.decisions.standing()) == 80
    numbers = [json.loads(line)["seq"] for line in path.read_text().splitlines()]
    assert numbers == list(range(1, 81))
    assert all({d.by for d in found} == {"anna", "bob"} for found in journal.decisions.by_text().values())


def test_journal_sees_what_another_one_added_when_refreshed(journal):
    other = Journal(journal.path)
    other.decide("label", by="bob", text="a", labels=("x",))
    assert journal.decisions.standing() == []
    journal.refresh()
    assert journal.decisions.of("bob", text_id("a")).labels == ("x",)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("not json\n", "j.jsonl:2: not a record"),
        ('{"seq": 2}\n', "no version and number"),
        ('{"v": 9, "seq": 2, "do": "label"}\n', "newer alambic (version 9)"),
        ('{"v": 1, "seq": 2, "do": "lable"}\n', "did you mean 'label'?"),
        ('{"v": 1, "seq": 2, "do": "label", "by": "a"}\n', "'label' without 'id'"),
    ],
)
def test_damaged_line_in_the_middle_is_refused_with_its_place_when_read(tmp_path, line, said):
    journal = Journal(tmp_path / "j.jsonl")
    journal.decide("skip", by="a", text="b")
    whole = journal.path.read_text()
    journal.path.write_text(whole + line + whole)
    with pytest.raises(DataError, match="") as caught:
        Journal(journal.path)
    assert said in str(caught.value)


def test_journal_that_became_shorter_is_refused_when_written(journal):
    journal.decide("skip", by="a", text="b")
    journal.path.write_text("")
    with pytest.raises(DataError, match="shorter"):
        journal.decide("skip", by="a", text="c")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not hold for root")
def test_journal_says_so_when_its_folder_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match="cannot be written"):
        Journal(tmp_path / "j.jsonl").decide("skip", by="a", text="b")
    tmp_path.chmod(0o700)


def test_decisions_take_the_new_name_when_a_label_is_renamed(journal):
    journal.append("labels", labels={"bill": "", "other": ""})
    journal.decide("label", by="anna", text="a", labels=("bill",))
    journal.decide("label", by="anna", text="b", labels=("other",))
    with pytest.raises(DataError, match=r"'bill' \(1 texts; did you mean 'billing'") as caught:
        check_names(journal.decisions, {"billing": "", "other": ""}, journal.path.name)
    assert '--rename "bill=NEW NAME"' in str(caught.value)
    journal.append("rename", old="bill", new="billing")
    check_names(journal.decisions, {"billing": "", "other": ""}, journal.path.name)
    journal.append("rename", old="other", new=None)
    assert [(d.text, d.labels) for d in Journal(journal.path).decisions.standing()] == [("a", ("billing",))]


def test_decision_waits_for_the_disk_once(journal, monkeypatch):
    journal.decide("label", by="anna", text="the first makes the file", labels=("x",))
    waits, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (waits.append(file), sync(file)))
    for i in range(20):
        journal.decide("label", by="anna", text=f"text {i}", labels=("x",))
    assert len(waits) == 20


def test_alpha_is_krippendorffs_own_figure_when_given_his_examples():
    # Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability": B (two observers) and C (four, with gaps).
    meg, owen = "0100000010", "1110010000"
    two = krippendorff_alpha(list(zip(meg, owen, strict=True)))
    assert round(two.value, 3) == 0.095 and two.n == 10 and two.low <= two.value <= two.high
    rows = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")
    units = [[value for value in unit if value != "."] for unit in zip(*rows, strict=True)]
    four = krippendorff_alpha(units)
    assert round(four.value, 3) == 0.743 and four.n == 11


def test_alpha_is_undefined_when_there_is_nothing_to_tell_apart():
    assert krippendorff_alpha([]).value is None
    assert krippendorff_alpha([["a"], ["b"]]).n == 0
    assert krippendorff_alpha([["a", "a"], ["a", "a"]]).value is None
    assert krippendorff_alpha([["a", "a"], ["b", "b"]]).value == 1.0


def test_kappa_is_as_computed_by_hand_when_two_annotate():
    # 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: p_o = 0.7, p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5
    pairs = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    found = cohen_kappa(pairs)
    assert found.value == pytest.approx(0.4) and found.n == 50 and found.low < 0.4 < found.high
    assert cohen_kappa([("y", "y")] * 3).value is None
    answers = {"anna": {"1": "x", "2": "y"}, "bob": {"1": "x", "2": "x"}, "eve": {"9": "x"}}
    assert {two: kappa.n for two, kappa in pairwise_kappa(answers).items()} == {("anna", "bob"): 2}
