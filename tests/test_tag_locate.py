"""Where a value stands in its text: spaces beside signs come and go, words stay whole."""

import pytest

from alambic.engines.tag_fields import fields_of, locate

FIELDS = fields_of({"type": "object", "properties": {"a": {"type": "string"}}})


def found(text, value):
    return [span.text(text) for span in locate(text, {"a": value}, FIELDS).spans]


@pytest.mark.parametrize(
    ("text", "value", "place"),
    [
        ("x NO.53 55,57 &59,JALAN\nSAGU 18 y", "No.53 55, 57 & 59, Jalan Sagu 18", "NO.53 55,57 &59,JALAN\nSAGU 18"),
        ("le café :\n12 , rue d ' Aix .", "12, rue d'Aix", "12 , rue d ' Aix"),
        ("ABC (M)SDN BHD", "ABC (M) SDN BHD", "ABC (M)SDN BHD"),
        ("a-b", "a - b", "a-b"),
    ],
)
def test_value_is_located_when_spaces_differ_beside_signs(text, value, place):
    assert found(text, value) == [place]


@pytest.mark.parametrize(("text", "value"), [("12 34", "1234"), ("New York", "NewYork"), ("NewYork", "New York")])
def test_value_is_not_located_when_spaces_differ_inside_or_between_words(text, value):
    assert found(text, value) == []


def test_exact_place_is_taken_when_a_looser_one_exists():
    assert found("1 , 2 and 1, 2", "1, 2") == ["1, 2"]


@pytest.mark.parametrize("value", ["", "   "])
def test_nothing_is_located_when_the_value_is_blank(value):
    assert found("a b", value) == []
