"""Annotations out and in: CSV, Label Studio, Argilla; texts and label names as they come."""

from __future__ import annotations

import json

import pytest

from alambic.data.annotation_formats import export, label_studio_config
from alambic.data.annotation_import import import_annotations
from alambic.data.annotations import Journal
from alambic.data.label_pool import language_notes, read_labels, read_pool
from alambic.data.read import read_dataset
from alambic.errors import DataError, TaskError
from alambic.task import DataSpec

LABELS = {"billing": "money, invoices", "repair, on site": "", "autre": ""}


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "texts.labels.jsonl")
    journal.append("labels", labels=LABELS)
    journal.decide(
        "label", by="anna", text='my "bill",\nis wrong', labels=("billing",), note="twice", guess=("billing", 0.8)
    )
    journal.decide("label", by="bob", text='my "bill",\nis wrong', labels=("billing",))
    journal.decide("label", by="anna", text="ça fuit", labels=("repair, on site",))
    journal.decide("none", by="anna", text="hello")
    journal.decide("label", by="anna", text="tied", labels=("billing",))
    journal.decide("label", by="bob", text="tied", labels=("autre",))
    journal.decide("skip", by="bob", text="skipped")
    return journal


def _spec(name, **more):
    return DataSpec(train=name, **more)


def test_csv_is_read_by_a_task_when_exported(journal, tmp_path):
    out = export("csv", journal.decisions, multi_label=False)
    assert out.n == 2
    assert [note.split()[0] for note in out.notes] == ["1", "1"]
    (tmp_path / "out.csv").write_text(out.body, "utf-8")
    read = read_dataset(tmp_path / "out.csv", _spec("out.csv"), multi_label=False)
    assert {(e.text, e.labels) for e in read.dataset} == {
        ('my "bill",\nis wrong', ("billing",)),
        ("ça fuit", ("repair, on site",)),
    }
    assert not read.rows_skipped


def test_csv_keeps_several_labels_and_none_when_the_task_is_multi_label(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.append("labels", labels={"a|b": "", "c": ""})
    journal.decide("label", by="anna", text="both", labels=("a|b", "c"))
    journal.decide("label", by="anna", text="one", labels=("c",))
    journal.decide("none", by="anna", text="no label")
    (tmp_path / "out.csv").write_text(export("csv", journal.decisions, multi_label=True).body, "utf-8")
    read = read_dataset(tmp_path / "out.csv", _spec("out.csv"), multi_label=True)
    assert {e.text: e.labels for e in read.dataset} == {"both": ("a|b", "c"), "one": ("c",), "no label": ()}


@pytest.mark.parametrize("form", ["label-studio", "argilla"])
def test_annotations_come_back_the_same_when_exported_and_imported(journal, tmp_path, form):
    (tmp_path / "out.json").write_text(export(form, journal.decisions, multi_label=False).body, "utf-8")
    other = Journal(tmp_path / "other.jsonl")
    imported = import_annotations(tmp_path / "out.json", other, labels=LABELS, multi_label=False)
    assert (imported.tool, imported.added, imported.bad) == (form, 6, ())

    def said(one):
        return {(d.by, d.text, d.verdict, d.labels, d.note) for d in one.decisions.standing() if d.verdict != "skip"}

    assert said(other) == said(journal)
    again = import_annotations(tmp_path / "out.json", other, labels=LABELS, multi_label=False)
    assert (again.added, again.unchanged) == (0, 6)


def test_label_studio_tasks_have_the_documented_shape_when_exported(journal):
    tasks = json.loads(export("label-studio", journal.decisions, multi_label=False).body)
    first = tasks[0]
    assert first["data"] == {"text": 'my "bill",\nis wrong'}
    assert first["annotations"][0]["result"][0] == {
        "from_name": "label", "to_name": "text", "type": "choices", "value": {"choices": ["billing"]}
    }  # fmt: skip
    assert first["predictions"][0]["score"] == 0.8
    assert '<Choice value="repair, on site"/>' in label_studio_config(LABELS, multi_label=False)


def test_argilla_records_have_the_documented_shape_when_exported(journal):
    record = json.loads(export("argilla", journal.decisions, multi_label=False).body)[0]
    assert set(record) == {"id", "fields", "metadata", "suggestions", "responses", "vectors", "_server_id"}
    assert [r["value"] for r in record["responses"]["label"]] == ["billing", "billing"]
    assert record["suggestions"]["label"] == {"value": "billing", "score": 0.8, "agent": "alambic"}


def test_other_forms_are_read_when_imported(tmp_path):
    ls = [
        {"id": 7, "data": {"text": "a"}, "annotations": [
            {"completed_by": 3, "result": [{"type": "choices", "value": {"choices": ["billing"]}}]},
            {"completed_by": {"id": 4, "email": "eve@x.org"}, "result": [], "was_cancelled": True}]},
        {"id": 8, "data": {"text": "b"}, "annotations": [{"completed_by": 3, "result": []}]},
    ]  # fmt: skip
    small = [{"id": 1, "text": "c", "sentiment": "autre", "annotator": 2, "annotation_id": 9, "lead_time": 1.5}]
    old = [{"text": "d", "annotation": "autre", "annotation_agent": "rg", "status": "Validated"}]
    journal = Journal(tmp_path / "j.jsonl")
    for i, values in enumerate((ls, small, old)):
        path = tmp_path / f"{i}.json"
        path.write_text(json.dumps(values))
        import_annotations(path, journal, labels=LABELS, multi_label=False)
    (tmp_path / "table.csv").write_text("text,label\ne,billing\nf,autre\n")
    import_annotations(tmp_path / "table.csv", journal, labels=LABELS, multi_label=False, by="clerk")
    said = {(d.by, d.text, d.verdict, d.labels) for d in journal.decisions.standing()}
    assert said == {
        ("user 3", "a", "label", ("billing",)), ("eve@x.org", "a", "skip", ()), ("user 3", "b", "none", ()),
        ("user 2", "c", "label", ("autre",)), ("rg", "d", "label", ("autre",)),
        ("clerk", "e", "label", ("billing",)), ("clerk", "f", "label", ("autre",)),
    }  # fmt: skip


def test_import_writes_nothing_when_the_labels_are_of_another_task(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(
        json.dumps([{"data": {"text": "a"}, "annotations": [{"result": [{"value": {"choices": ["biling"]}}]}]}])
    )
    journal = Journal(tmp_path / "j.jsonl")
    with pytest.raises(DataError, match=r"x.json:item 1: label 'biling' is not one.*did you mean 'billing'"):
        import_annotations(path, journal, labels=LABELS, multi_label=False)
    assert not journal.path.exists()
    path.write_text('{"neither": 1}')
    with pytest.raises(DataError, match="not annotations that are known here: keys neither"):
        import_annotations(path, journal, labels=LABELS, multi_label=False)


def test_pool_has_each_text_once_with_the_labels_it_has_when_read(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text("message,type\nmy bill,billing\nit leaks,\nit leaks,\n,\nhello,\n", "utf-8")
    pool = read_pool(path, _spec("texts.csv"), labels=LABELS)
    assert [(t.text, t.labels) for t in pool.texts] == [("my bill", ("billing",)), ("it leaks", None), ("hello", None)]
    assert any("more than once" in note for note in pool.notes) and any("texts.csv:5" in note for note in pool.notes)


def test_column_of_other_values_is_not_taken_for_labels_when_guessed(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text(
        "message,type\n" + "".join(f"text number {i} is here,{'web' if i % 2 else 'phone'}\n" for i in range(8))
    )
    pool = read_pool(path, _spec("texts.csv"), labels=LABELS)
    assert all(t.labels is None for t in pool.texts)
    assert any("column 'type' is not read as labels" in note for note in pool.notes)


def test_label_names_are_read_from_a_list_or_a_file(tmp_path):
    assert read_labels("a,  b c ,d") == {"a": "", "b c": "", "d": ""}
    path = tmp_path / "labels.toml"
    path.write_text('[labels]\nbilling = "money"\n"à part" = ""\n', "utf-8")
    assert read_labels(str(path)) == {"billing": "money", "à part": ""}
    for wrong, said in (("a,,b", "empty"), ("a,a", "there twice"), ("none.toml", "no such file")):
        with pytest.raises(TaskError, match=said):
            read_labels(wrong)


def test_other_language_is_said_when_texts_to_annotate_are_in_it():
    english = ["the bill that you sent to me is not right"] * 30
    french = ["la facture que vous avez envoyée est fausse"] * 30
    assert "100% fr against mostly en" in language_notes(french, english, what="the annotated ones")[0]
    assert "50% fr" in language_notes(english + french, english, what="x")[0]
    assert language_notes(english, english, what="x") == []
    assert language_notes(french[:5], english, what="x") == []
