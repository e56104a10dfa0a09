"""Line ends that the tagger reads: a token of their own, inside values and never at their ends."""

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from alambic.engines.tagging import Reading, Span, decode, guess, line_mark, read, tags_of
from alambic.train.tagger import TagRow, has_lines

TEXT = "Anne Roy\n\n12 Main St\nAix"
WORDS = ["Anne", "Roy", "12", "Main", "St", "Aix"]
LABELS = ("name", "street")


def encoded(text=TEXT):
    tokenizer = Tokenizer(WordLevel({"?": 0, **{word: i for i, word in enumerate(WORDS, 1)}}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer.encode(text)


@pytest.fixture
def reading():
    return read(encoded(), TEXT, unit="word", line_id=99)


def scores_of(tags, width=5):
    return np.log(np.where(np.arange(width) == np.array(tags)[:, None], 0.9, 0.025)).astype(np.float32)


@pytest.mark.parametrize("unit", ["word", "token"])
def test_line_end_is_a_unit_when_a_mark_is_given(unit):
    found = read(encoded(), TEXT, unit=unit, line_id=99)
    assert found.ids == (1, 2, 99, 3, 4, 5, 99, 6)  # one for an empty line too
    assert found.words == tuple(range(8)) and found.breaks == {2, 6}
    assert [TEXT[start:end] for start, end in found.units] == ["Anne", "Roy", "\n", "12", "Main", "St", "\n", "Aix"]


def test_reading_is_unchanged_when_no_mark_is_given():
    found = read(encoded(), TEXT, unit="word")
    assert found == Reading((1, 2, 3, 4, 5, 6), found.offsets, tuple(range(6)))


def test_text_of_one_line_reads_alike_when_a_mark_is_given():
    assert read(encoded("Anne Roy"), "Anne Roy", unit="word", line_id=99) == read(
        encoded("Anne Roy"), "Anne Roy", unit="word"
    )


def test_span_over_lines_comes_back_when_tagged_and_decoded(reading):
    spans = (Span(0, 8, "name"), Span(10, 24, "street"))
    tags = tags_of(spans, reading, LABELS)
    assert tags == [1, 3, 0, 2, 4, 4, 4, 4]
    assert [(s.start, s.end, s.label) for s in decode(scores_of(tags), reading, LABELS)] == [
        (0, 8, "name"), (10, 24, "street"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tags", "texts"),
    [
        ([1, 3, 3, 0, 0, 0, 0, 0], ["Anne Roy"]),  # ends with a line end
        ([0, 0, 2, 4, 4, 0, 0, 0], ["12 Main"]),  # begins with one
        ([0, 0, 2, 0, 0, 0, 1, 0], []),  # is one
    ],
)
def test_span_has_no_line_end_at_its_ends_when_decoded(reading, tags, texts):
    assert [span.text(TEXT) for span in decode(scores_of(tags), reading, LABELS)] == texts


def test_guess_is_no_line_end_when_that_is_the_likeliest(reading):
    assert guess(scores_of([0, 0, 2, 4, 4, 0, 0, 0]), reading, LABELS, "street").text(TEXT) != "\n"


def test_mark_is_the_last_token_of_every_text_when_there_is_one():
    assert line_mark((7, 8)) == 8 and line_mark(()) is None


@pytest.mark.parametrize(("several", "shown"), [(0, False), (1, True), (5, True)])
def test_lines_are_read_when_a_hundredth_of_the_rows_has_them(several, shown):
    rows = [TagRow("a\nb")] * several + [TagRow("a b\n")] * (100 - several)
    assert has_lines(rows) is shown
