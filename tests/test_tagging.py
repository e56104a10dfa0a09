"""What the token classifier does without a model: decoding against brute force, fields both ways."""

import itertools

import numpy as np
import pytest

from alambic.engines.tag_answer import assemble
from alambic.engines.tag_fields import fields_of, locate, parse_number
from alambic.engines.tagging import (
    Reading,
    Span,
    aligned,
    best_tags,
    decode,
    guess,
    log_softmax,
    restored,
    tag_names,
    tags_of,
    windows,
)
from alambic.errors import EngineError, InputTooLong

# Tags and windows.


def valid(tags, k):
    return all(not (tag > k and (i == 0 or tags[i - 1] not in (tag, tag - k))) for i, tag in enumerate(tags))


@pytest.mark.parametrize("seed", range(20))
def test_best_tags_are_those_of_all_valid_sequences_when_searched(seed):
    k, steps = 2, 5
    scores = log_softmax(np.random.default_rng(seed).normal(size=(steps, 1 + 2 * k)).astype(np.float32) * 2)
    sequences = [s for s in itertools.product(range(1 + 2 * k), repeat=steps) if valid(s, k)]
    best = max(sequences, key=lambda s: sum(float(scores[i, tag]) for i, tag in enumerate(s)))
    assert tuple(best_tags(scores)) == best


def units(text):
    """Return a reading with a token a word."""
    offsets, at = [], 0
    for word in text.split():
        start = text.index(word, at)
        at = start + len(word)
        offsets.append((start, at))
    return Reading(tuple(range(len(offsets))), tuple(offsets), tuple(range(len(offsets))))


def certain(tags, k):
    scores = np.full((len(tags), 1 + 2 * k), -9.0, dtype=np.float32)
    scores[np.arange(len(tags)), tags] = 0.0
    return log_softmax(scores)


def test_spans_come_back_when_their_tags_are_decoded():
    text, labels = "de Paris à Aix en Provence le 3 mai", ["city", "day"]
    reading = units(text)
    spans = [Span(3, 8, "city"), Span(11, 26, "city"), Span(30, 35, "day")]
    tags = tags_of(spans, reading, labels)
    assert [tag_names(labels)[tag] for tag in tags] == [
        "O", "B-city", "O", "B-city", "I-city", "I-city", "O", "B-day", "I-day",
    ]  # fmt: skip
    found = decode(certain(tags, 2), reading, labels)
    assert [(s.start, s.end, s.label) for s in found] == [(s.start, s.end, s.label) for s in spans]
    assert all(0.9 < s.score <= 1 for s in found)


def test_neighbours_of_one_label_stay_two_when_each_begins():
    assert len(decode(certain([1, 1], 1), units("a b"), ["x"])) == 2


def test_guess_is_the_likeliest_span_when_none_was_found():
    scores = certain([0, 0, 0], 1)
    scores[1, 1] = -3.0
    found = guess(scores, units("un deux trois"), ["x"], "x")
    assert (found.start, found.end, found.label) == (3, 7, "x") and found.score < 0.1


@pytest.mark.parametrize("length", [1, 10, 11, 17, 25, 100, 101])
def test_windows_share_tokens_and_keep_each_once_when_long(length):
    found = windows(length, room=10, overlap=4)
    assert [i for w in found for i in range(w.keep, w.until)] == list(range(length))
    assert all(w.start <= w.keep < w.until <= w.stop and w.stop - w.start <= 10 for w in found)
    for before, after in itertools.pairwise(found):
        assert before.stop - after.start >= 4
        # Each token is taken from the window that shows at least two on its nearer side.
        assert before.stop - before.until >= 2 and after.keep - after.start >= 2


def test_long_text_is_cut_or_refused_when_asked():
    assert [(w.start, w.until) for w in windows(30, room=10, overlap=4, long="head")] == [(0, 10)]
    with pytest.raises(InputTooLong, match="30 tokens and the model reads 10"):
        windows(30, room=10, overlap=4, long="error")
    with pytest.raises(EngineError, match="cannot read long texts by 'head_tail'"):
        windows(5, room=10, overlap=4, long="head_tail")


@pytest.mark.parametrize(
    ("text", "piece"),
    [("plain text", "text"), ("  e\u0301te\u0301 a\u0300 Aix\r\nle\u0000 3 mai ", "Aix"),
     ("\ufeffcafe\u0301 noir\u0007", "cafe\u0301"), ("한국 \u1112\u1161\u11ab글 x", "x"),
     ("a\r\n\r\nb c\u0301", "c\u0301")],
)  # fmt: skip
def test_offsets_are_those_of_the_text_as_given_when_it_was_cleaned(text, piece):
    import unicodedata

    cleaned, places = aligned(text)
    start = cleaned.index(unicodedata.normalize("NFC", piece))
    span = restored(Span(start, start + len(unicodedata.normalize("NFC", piece)), "x"), places)
    assert span.text(text) == piece


# Fields.

SCHEMA = {
    "type": "object",
    "properties": {
        "intent": {"enum": ["book", "cancel"]},
        "buyer": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "city": {"type": ["string", "null"]}},
            "required": ["name", "city"],
        },
        "total": {"type": "number"},
        "rooms": {"type": "integer"},
        "days": {"type": "array", "items": {"type": "string"}},
        "urgent": {"type": "boolean"},
    },
    "required": ["intent", "total", "days"],
}
FIELDS = fields_of(SCHEMA)


def test_fields_are_found_or_chosen_when_the_schema_is_read():
    assert [field.name for field in FIELDS.spans] == ["buyer.name", "buyer.city", "total", "rooms", "days"]
    assert {field.name: field.choices for field in FIELDS.chosen} == {
        "intent": ("book", "cancel"), "urgent": (False, True),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("part", "message"),
    [({"type": "array", "items": {"type": "object", "properties": {"a": {"type": "string"}}}}, "object in a list"),
     ({"type": "array", "items": {"enum": ["a"]}}, "a list of choices"), ({}, "a value of any type"),
     ({"type": "null"}, "type null"), ({"anyOf": [{"type": "string"}, {"type": "number"}]}, "anyOf of 2 kinds"),
     ({"type": "array", "items": {"type": "string"}, "minItems": 2}, "a least number of values")],
)  # fmt: skip
def test_schema_is_refused_when_a_tagger_cannot_follow_it(part, message):
    with pytest.raises(EngineError, match=f"schema: lines: .*{message}"):
        fields_of({"type": "object", "properties": {"lines": part}})


def test_values_are_located_when_they_stand_in_the_text():
    text = "Anne  DUPONT, à Aix : 2 chambres les lundi et mardi, total 1 234,50 €."
    answer = {"intent": "book", "buyer": {"name": "Anne Dupont", "city": None}, "total": 1234.5, "rooms": 2,
              "days": ["lundi", "mardi", "jeudi"]}  # fmt: skip
    found = locate(text, answer, FIELDS)
    assert [(span.label, span.text(text)) for span in found.spans] == [
        ("buyer.name", "Anne  DUPONT"), ("rooms", "2"), ("days", "lundi"), ("days", "mardi"), ("total", "1 234,50"),
    ]  # fmt: skip
    assert found.choices == {"intent": 0} and found.lost == ("days",)


def test_longer_value_has_the_place_when_two_fields_claim_it():
    schema = fields_of({"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}}})
    assert [s.label for s in locate("New York Times", {"a": "New York", "b": "New York Times"}, schema).spans] == ["b"]


def test_part_of_a_word_is_no_value_when_located():
    schema = fields_of({"type": "object", "properties": {"a": {"type": "string"}}})
    assert [s.start for s in locate("art artist art", {"a": "art"}, schema).spans] == [0, 11]


@pytest.mark.parametrize(
    ("text", "number"),
    [("1 234,50", 1234.5), ("1,234.50", 1234.5), ("1.234,50", 1234.5), ("$9.00", 9.0), ("12", 12.0), ("1,234", 1234.0),
     ("3,5", 3.5), ("-4", -4.0), ("1\u202f000", 1000.0), ("1.2.3", 123.0), ("abc", None), ("", None),
     ("1,2.3,4", None)],
)  # fmt: skip
def test_numbers_are_read_as_people_write_them_when_parsed(text, number):
    assert parse_number(text) == number


def spans_in(text, *pairs):
    return [Span(text.index(piece), text.index(piece) + len(piece), label, score) for piece, label, score in pairs]


def test_answer_is_put_together_when_spans_are_found():
    text = "Anne Dupont et Bob, 2 chambres, lundi, mardi, total 12,50"
    spans = spans_in(text, ("Anne Dupont", "buyer.name", 0.9), ("Bob", "buyer.name", 0.5), ("2", "rooms", 0.9),
                     ("lundi", "days", 0.4), ("mardi", "days", 0.9), ("12,50", "total", 1.0))  # fmt: skip
    answer = assemble(text, spans, {"intent": "book", "urgent": True}, FIELDS)
    assert answer == {"intent": "book", "buyer": {"name": "Anne Dupont", "city": None}, "total": 12.5, "rooms": 2,
                      "days": ["lundi", "mardi"], "urgent": True}  # fmt: skip
    assert list(answer) == list(SCHEMA["properties"])


def test_required_fields_are_there_when_nothing_was_found():
    assert assemble("rien", [], {}, FIELDS) == {"intent": "book", "total": 0, "days": []}
    likeliest = assemble("reste 7", [], {}, FIELDS, guess=lambda name: Span(6, 7, name) if name == "total" else None)
    assert likeliest["total"] == 7


def test_object_is_whole_when_one_of_its_fields_was_found():
    text = "à Aix"
    answer = assemble(text, spans_in(text, ("Aix", "buyer.city", 1.0)), {"intent": "cancel"}, FIELDS)
    assert answer["buyer"] == {"name": "", "city": "Aix"}


def test_references_and_optional_values_are_read_as_pydantic_writes_them():
    import pydantic

    class Place(pydantic.BaseModel):
        city: str
        floor: int | None = None

    class Order(pydantic.BaseModel):
        place: Place
        second: Place | None
        paid: bool = False
        tags: list[str] = []

    fields = fields_of(Order.model_json_schema())
    assert [f.name for f in fields.fields] == [
        "place.city",
        "place.floor",
        "second.city",
        "second.floor",
        "paid",
        "tags",
    ]
    text = "Lyon 3"
    spans = spans_in(text, ("Lyon", "place.city", 1.0), ("3", "place.floor", 1.0))
    answer = assemble(text, spans, {"paid": True}, fields)
    assert answer == {"place": {"city": "Lyon", "floor": 3}, "second": None, "paid": True}
    assert Order.model_validate(answer).place.floor == 3


def test_values_come_with_their_places_when_the_schema_asks():
    place = {"type": "object", "properties": {"text": {"type": "string"}, "start": {"type": "integer"},
                                              "end": {"type": "integer"}}}  # fmt: skip
    fields = fields_of({"type": "object", "properties": {"who": {"type": "array", "items": place}}})
    text = "Anne et Bob"
    answer = {"who": [{"text": "Anne", "start": 0, "end": 4}, {"text": "Bob", "start": 8, "end": 11}]}
    located = locate(text, answer, fields)
    assert [span.text(text) for span in located.spans] == ["Anne", "Bob"]
    assert assemble(text, located.spans, {}, fields) == answer


BOUNDED = {
    "type": "object",
    "properties": {
        "code": {"type": "string", "minLength": 3, "maxLength": 5},
        "n": {"type": "integer", "minimum": 2, "maximum": 9},
        "price": {"type": "number", "exclusiveMinimum": 0}, "even": {"type": "integer", "minimum": 3, "multipleOf": 2},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["code", "n", "price", "even", "tags"],
}  # fmt: skip


@pytest.mark.parametrize("found", [True, False])
def test_answer_keeps_every_bound_whatever_was_found(found):
    jsonschema = pytest.importorskip("jsonschema")
    text = "ab abcd abcdefgh 1 7 0 4 a b c"
    pieces = [("ab", "code"), ("abcd", "code"), ("abcdefgh", "code"), ("1", "n"), ("7", "n"), ("0", "price"),
              ("1", "even"), ("a", "tags"), ("b", "tags"), ("c", "tags")]  # fmt: skip
    spans = spans_in(text, *[(piece, label, 0.5) for piece, label in pieces]) if found else []
    answer = assemble(text, spans, {}, fields_of(BOUNDED))
    jsonschema.validate(answer, BOUNDED)
    if found:
        assert (answer["code"], answer["n"], len(answer["tags"])) == ("abcd", 7, 2)


def test_span_that_is_no_number_is_left_out_when_a_number_is_needed():
    text = "total inconnu"
    assert assemble(text, spans_in(text, ("inconnu", "total", 1.0)), {"intent": "book"}, FIELDS)["total"] == 0
