"""Texts without labels: what is read, what is left out and what is told."""

import pytest

from alambic.data.unlabelled import read_unlabelled
from alambic.errors import DataError
from alambic.task import DataSpec

SPEC = DataSpec(train="rows.csv", text="message")
TRAIN = [
    "please cancel my order",
    "where is the invoice of my order",
    "I want to cancel the invoice",
    "is my order here",
]
FRENCH = ["je ne trouve pas la facture de mon colis", "est ce que vous avez mon colis", "la facture est dans le colis"]


def read(path, content, *, train=TRAIN, taken=()):
    path.write_text(content, encoding="utf-8")
    return read_unlabelled(path, SPEC, train=train, taken=[*train, *taken])


def test_lines_of_a_text_file_are_read_once_and_never_rows_of_the_task(tmp_path):
    content = "where is my order now\nwhere is  my order NOW\nPlease cancel my order\nthe test text\ncancel it\n"
    found = read(tmp_path / "more.txt", content, taken=["the test text"])
    assert found.texts == ("where is my order now", "cancel it")
    assert found.notes == ("more.txt: 2 texts without labels (left out: 1 doubles, 2 rows of the task)",)


@pytest.mark.parametrize(
    ("name", "content"),
    [("more.csv", "id,message\n1,where is my order now\n2,is the invoice here\n"),
     ("more.jsonl", '{"text": "where is my order now"}\n{"text": "is the invoice here"}\n')],
)  # fmt: skip
def test_tables_are_read_by_the_task_s_column_or_a_guess(tmp_path, name, content):
    assert read(tmp_path / name, content).texts == ("where is my order now", "is the invoice here")


def test_a_file_in_another_language_is_refused_with_figures(tmp_path):
    with pytest.raises(DataError, match=r"100% of the 3 texts whose language is told are in a language \(fr\)"):
        read(tmp_path / "more.txt", "\n".join(FRENCH))


def test_a_few_texts_in_another_language_are_left_out_and_told(tmp_path):
    lines = [f"where is the order number {i} of my house" for i in range(9)]
    found = read(tmp_path / "more.txt", "\n".join([*lines, FRENCH[0]]))
    assert found.texts == tuple(lines)
    assert "10% of the 10 texts" in found.warnings[0]
    assert found.warnings[0].endswith("they are left out")


def test_words_that_no_row_has_are_told_with_their_share(tmp_path):
    twice = [text for text in TRAIN for _ in range(2)]  # so that one half knows the words of the other
    found = read(tmp_path / "more.txt", "quarks couple gluons\nthe lattice has fermion loops\n", train=twice)
    assert "88% of its words are in no training row" in found.warnings[0]


def test_a_file_with_rows_of_the_task_only_is_refused(tmp_path):
    with pytest.raises(DataError, match="no text that is not a row of the task"):
        read(tmp_path / "more.txt", "\n".join(TRAIN))
