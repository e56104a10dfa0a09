"""Decisions of an audit read back and applied: a new file, never the old one; whatever was done to the list is told."""

import csv
import json

import pytest

from alambic.data.audit_file import audit_text, read_decisions
from alambic.data.audit_rows import Suspect, row_id
from alambic.errors import DataError
from linear_task import TASK, alambic, messages, write_csv, write_task

LABELS = ("billing", "fault", "visit")


def suspect(text, label, suggested="visit", rows=1):
    return Suspect(row_id(text), (label,), (suggested,), 0.9, 0.9 * rows, rows, "rows.csv:2", text, ("because",))


@pytest.fixture
def task(tmp_path):
    """A task and its rows, the first two with the same text."""
    rows = messages(8)
    rows[1] = rows[0]
    return write_task(tmp_path, rows=rows), rows


def listed(path, rows, decide, count=4):
    """Write the list of the first rows with `decide(i)` = (decision, suggested or None)."""
    texts = list(dict.fromkeys(rows))[:count]
    other = {"billing": "fault", "fault": "visit", "visit": "billing"}
    text = audit_text([suspect(t, label, other[label]) for t, label in texts], multi_label=False)
    lines = list(csv.reader(text.removeprefix("\ufeff").splitlines()))
    for i, line in enumerate(lines[1:]):
        line[1], changed = decide(i)
        line[3] = changed or line[3]
    return save(path, lines), lines, other


def save(path, lines, **options):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, **options).writerows(lines)
    return path


def labels_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["message"], row["team"]) for row in csv.DictReader(file)]


def test_decisions_make_a_new_file_and_leave_the_old_one(task, tmp_path):
    path, rows = task
    old = (tmp_path / "rows.csv").read_bytes()
    decided, _, other = listed(
        tmp_path / "a.csv", rows, lambda i: [("relabel", None), ("drop", None), ("KEEP", None), ("", None)][i]
    )
    ended = alambic("check", path, "--apply", decided, "--json")
    assert ended.code == 0, ended.err
    said = json.loads(ended.out)
    # The first text stands twice: one decision, two rows.
    assert (said["relabelled"], said["dropped"], said["kept"], said["open"]) == (2, 1, 1, 1)
    assert (tmp_path / "rows.csv").read_bytes() == old
    expected = [(t, other[label]) if (t, label) == rows[0] else (t, label) for t, label in rows]
    del expected[2]
    assert labels_of(tmp_path / "rows.reviewed.csv") == expected
    again = alambic("check", path, "--apply", decided)
    assert again.code == 1 and "nothing is overwritten" in again.err
    over = alambic("check", path, "--apply", decided, "--output", tmp_path / "rows.csv")
    assert over.code == 1 and (tmp_path / "rows.csv").read_bytes() == old
    (tmp_path / "task.toml").write_text(TASK.replace("rows.csv", "rows.reviewed.csv"))
    assert alambic("check", path).code == 0


def test_order_separator_and_missing_lines_change_nothing_but_are_told(task, tmp_path):
    path, rows = task
    _, lines, other = listed(tmp_path / "a.csv", rows, lambda i: ("relabel" if i == 3 else "", None))
    decided = save(tmp_path / "b.csv", [lines[0], lines[4], lines[2], lines[1]], delimiter=";")
    ended = alambic("check", path, "--apply", decided, "--output", tmp_path / "new.csv")
    assert ended.code == 0, ended.err
    assert "1 of the 4 lines of the audit are missing" in ended.out and "1 relabelled" in ended.out
    text, label = list(dict.fromkeys(rows))[3]
    assert (text, other[label]) in labels_of(tmp_path / "new.csv")


def test_doubled_lines_are_told_when_equal_and_refused_when_they_differ(task, tmp_path):
    path, rows = task
    _, lines, _ = listed(tmp_path / "a.csv", rows, lambda i: ("drop" if i == 0 else "", None))
    ended = alambic("check", path, "--apply", save(tmp_path / "b.csv", [*lines, lines[1]]))
    assert ended.code == 0 and "1 lines stand twice" in ended.out
    other = [lines[1][0], "keep", *lines[1][2:]]
    ended = alambic("check", path, "--apply", save(tmp_path / "c.csv", [*lines, other]), "--output", tmp_path / "n.csv")
    assert ended.code == 1 and "decided again, differently: 'drop', then 'keep'" in ended.err
    assert not (tmp_path / "n.csv").exists()


def test_half_decided_double_keeps_its_decision(task, tmp_path):
    _, rows = task
    _, lines, _ = listed(tmp_path / "a.csv", rows, lambda i: ("drop" if i == 0 else "", None))
    blank = [lines[1][0], "", *lines[1][2:]]
    found = read_decisions(save(tmp_path / "b.csv", [*lines, blank]), LABELS, multi_label=False)
    assert [d.decision for d in found.made] == ["drop"] and found.open == 3


def test_changed_label_names_are_refused(task, tmp_path):
    path, rows = task
    decided, _, _ = listed(tmp_path / "a.csv", rows, lambda i: ("keep", None))
    write_csv(tmp_path / "rows.csv", [(t, {"billing": "invoices"}.get(label, label)) for t, label in rows])
    ended = alambic("check", path, "--apply", decided)
    assert ended.code == 1 and "the labels of the data have changed since the audit" in ended.err
    assert not (tmp_path / "rows.reviewed.csv").exists()


def test_a_row_changed_since_the_audit_is_refused_with_what_it_is_now(task, tmp_path):
    path, rows = task
    decided, _, other = listed(tmp_path / "a.csv", rows, lambda i: ("drop" if i == 1 else "", None))
    text, label = rows[2]
    write_csv(tmp_path / "rows.csv", [*rows[:2], (text, other[label]), *rows[3:]])
    ended = alambic("check", path, "--apply", decided)
    assert ended.code == 1 and f"labelled '{other[label]}' now, not '{label}'" in ended.err
    write_csv(tmp_path / "rows.csv", [*rows[:2], *rows[3:]])
    ended = alambic("check", path, "--apply", decided)
    assert ended.code == 1 and "no row of rows.csv has that text" in ended.err
    assert not (tmp_path / "rows.reviewed.csv").exists()


@pytest.mark.parametrize(
    ("decision", "suggested", "said"),
    [
        ("relable", None, "did you mean 'relabel'"),
        ("relabel", "vist", "did you mean 'visit'"),
        ("relabel", "same", "write keep"),
    ],
)
def test_misspelt_decisions_and_labels_are_refused(task, tmp_path, decision, suggested, said):
    path, rows = task
    suggested = rows[0][1] if suggested == "same" else suggested
    decided, _, _ = listed(tmp_path / "a.csv", rows, lambda i: (decision, suggested) if i == 0 else ("", None))
    ended = alambic("check", path, "--apply", decided)
    assert ended.code == 1 and said in ended.err and "a.csv:2" in ended.err


def test_another_csv_is_no_audit_file(task, tmp_path):
    ended = alambic("check", task[0], "--apply", tmp_path / "rows.csv")
    assert ended.code == 1 and "not an audit file: no column 'rank'" in ended.err


def test_audit_and_apply_are_not_asked_at_once(task):
    assert alambic("check", task[0], "--audit", "--apply", "x.csv").code == 2
    assert alambic("check", task[0], "--output", "x.csv").code == 2


def test_dropping_all_but_one_label_is_refused(tmp_path):
    rows = [(f"bill {i} please", "billing") for i in range(5)] + [("machine broken", "fault")]
    path = write_task(tmp_path, rows=rows)
    text = audit_text([suspect("machine broken", "fault")], multi_label=False).replace(",,fault", ",drop,fault")
    (tmp_path / "a.csv").write_text(text)
    ended = alambic("check", path, "--apply", tmp_path / "a.csv")
    assert ended.code == 1 and "leave 1 label(s)" in ended.err


def test_jsonl_keeps_every_field_and_bad_rows_are_told(tmp_path):
    rows = [
        {"id": i, "message": t, "team": label, "tags": [1, {"a": None}]} for i, (t, label) in enumerate(messages(8))
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines[:3], "{broken", *lines[3:]]) + "\n")
    path = write_task(tmp_path, text=TASK.replace("rows.csv", "rows.jsonl"))
    new = "fault" if rows[0]["team"] != "fault" else "visit"
    text = audit_text([suspect(rows[0]["message"], rows[0]["team"], new)], multi_label=False)
    (tmp_path / "a.csv").write_text(text.replace("1 of 1,,", "1 of 1,relabel,"))
    ended = alambic("check", path, "--apply", tmp_path / "a.csv")
    assert ended.code == 0, ended.err
    assert "1 rows of rows.jsonl cannot be used and are not in the new file; first: rows.jsonl:4" in ended.out
    written = [json.loads(line) for line in (tmp_path / "rows.reviewed.jsonl").read_text().splitlines()]
    assert written == [{**rows[0], "team": new}, *rows[1:]]


def test_several_labels_are_written_as_a_list(tmp_path):
    rows = [(f"text {i} of {i * 37 % 23} things", "a|b" if i % 2 else "b") for i in range(12)]
    text = TASK.replace('kind = "classify"', 'kind = "classify"\nmulti_label = true').replace("accuracy", "macro_f1")
    path = write_task(tmp_path, text=text, rows=rows)
    one = Suspect(row_id(rows[1][0]), ("a", "b"), ("a",), 0.9, 0.9, 1, "rows.csv:3", rows[1][0], ())
    listing = audit_text([one], multi_label=True)
    (tmp_path / "a.csv").write_text(listing.replace("1 of 1,,", "1 of 1,relabel,"))
    ended = alambic("check", path, "--apply", tmp_path / "a.csv")
    assert ended.code == 0, ended.err
    assert [label for _, label in labels_of(tmp_path / "rows.reviewed.csv")][:3] == ["b", "a", "b"]


def test_text_that_a_spreadsheet_would_compute_is_shown_as_text():
    text = audit_text([suspect("=HYPERLINK(1)", "fault")], multi_label=False)
    assert ",'=HYPERLINK(1)," in text


def test_empty_audit_file_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("rank,decision,label,suggested,row\n")
    with pytest.raises(DataError, match="no rows"):
        read_decisions(tmp_path / "a.csv", LABELS, multi_label=False)
