"""The audit, and the two things it stands on: near duplicates and personal data."""

import json
import random
import time
from itertools import combinations

import pytest

from alambic.data.check import audit, render
from alambic.data.clean import clean_name, clean_text
from alambic.data.dataset import Dataset, Example
from alambic.data.duplicates import find_duplicates, jaccard, shingles
from alambic.data.personal import find_personal
from alambic.data.split import Splits

pytest.importorskip("rensa")
WORDS = [a + b for a in ("ka", "lo", "mi", "tu", "re", "po", "sa") for b in ("ban", "der", "gol", "fis", "nut", "vem")]


def sentence(rng, words=12):
    return " ".join(rng.choice(WORDS) for _ in range(words))


def data(*rows, name="a.csv"):
    examples = tuple(Example(text, (label,), f"{name}:{i}") for i, (text, label) in enumerate(rows, 2))
    return Dataset(examples, tuple(sorted({label for _, label in rows})))


def test_labels_and_balance_are_counted():
    found = audit(data(("aaaa", "x"), ("bbbb", "x"), ("cccc", "x"), ("dddd", "y")))
    assert [(c.label, c.rows) for c in found.labels] == [("x", 3), ("y", 1)]
    assert (found.rows, found.imbalance, found.few) == (4, 3.0, ("x", "y"))


def test_exact_duplicates_and_conflicts_are_found_whatever_the_case():
    found = audit(data(("Où est ma carte ?", "a"), ("où est  ma carte ?", "b"), ("autre chose", "a")))
    assert (found.exact_duplicates.rows, found.exact_duplicates.where) == (1, ("a.csv:3",))
    assert found.conflict_examples[0].labels == ("a", "b")
    assert found.conflict_examples[0].where == ("a.csv:2", "a.csv:3")


def test_conflict_does_not_repeat_personal_data():
    found = audit(data(("écrire à a.b@exemple.fr", "a"), ("écrire à a.b@exemple.fr", "b")))
    assert "exemple.fr" not in json.dumps(found.to_dict()) + render(found)


def test_leaks_are_found_exact_and_near():
    train = data(("la machine ne chauffe plus du tout depuis hier soir", "a"), ("bonjour", "b"))
    test = data(
        ("LA MACHINE ne chauffe plus du tout depuis hier soir", "a"),
        ("la machine ne chauffe plus du tout depuis hier", "a"),
        ("rien à voir", "b"),
        name="t.csv",
    )
    found = audit(Splits(train, None, test, (), ()))
    assert (found.leaks_exact.rows, found.leaks_near.rows) == (1, 1)
    assert [(a.where, a.other) for a in found.leak_examples] == [("t.csv:2", "a.csv:2"), ("t.csv:3", "a.csv:2")]
    assert "2 test rows leak" in found.advice[0]


def test_lengths_are_in_tokens_of_the_base_when_it_is_given():
    rows = data(("un deux trois", "a"), ("un", "b"))
    found = audit(rows, count_tokens=lambda texts: [10 * len(t.split()) for t in texts], max_tokens=20)
    assert (found.lengths.unit, found.lengths.longest, found.lengths.over) == ("tokens", 30, 1)
    assert found.lengths.over_where == ("a.csv:2",)
    assert "longer than the base reads (20): 1 (a.csv:2)" in render(found)


def test_languages_are_guessed():
    found = audit(data(("Bonjour, où est ma carte ?", "a"), ("Where is my card please?", "b"), ("E42", "b")))
    assert found.languages == {"fr": 0.3333, "en": 0.3333, "other": 0.3333}


def test_audit_of_nothing_is_empty():
    found = audit(Dataset((), ()))
    assert (found.rows, found.labels) == (0, ())
    assert render(found).startswith("0 rows")


def test_audit_is_plain_json():
    found = audit(data(("a b c d e", "x"), ("0612345678", "y"))).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["personal"] == {"phone": {"rows": 1, "where": ["a.csv:3"]}}


def test_ten_thousand_rows_are_audited_in_seconds():
    rng = random.Random(0)
    rows = data(*((sentence(rng), f"l{i % 50}") for i in range(10_000)))
    began = time.process_time()
    audit(rows)
    assert time.process_time() - began < 30  # of the processor's time: other programs do not count


@pytest.mark.parametrize("seed", range(4))
def test_near_pairs_are_those_of_a_full_comparison(seed):
    rng = random.Random(seed)
    texts = []
    for _ in range(40):
        words = sentence(rng, 15).split()
        texts.append(" ".join(words))
        for _ in range(rng.randint(0, 3)):
            changed = list(words)
            changed[rng.randrange(15)] = rng.choice(WORDS)
            texts.append(" ".join(changed))
    texts = list(dict.fromkeys(texts))
    sets = [shingles(text) for text in texts]
    expected = {(a, b) for a, b in combinations(range(len(texts)), 2) if jaccard(sets[a], sets[b]) >= 0.8}
    assert {(p.first, p.second) for p in find_duplicates(texts).near} == expected


def test_groups_join_rows_through_others():
    found = find_duplicates(
        ["abcdefghijklmnopqrstuvwxyz 1", "rien", "ABCDEFGHIJKLMNOPQRSTUVWXYZ  1", "abcdefghijklmnopqrstuvwxyz 2"]
    )
    assert found.groups == (0, 1, 0, 0)


def test_template_rows_stay_fast_and_in_one_group():
    texts = [
        f"Bonjour, votre commande numero {i} a ete expediee par notre entrepot de Lyon ce matin." for i in range(3000)
    ]
    assert len(set(find_duplicates(texts).groups)) == 1


@pytest.mark.parametrize("texts", [[], ["a"], ["", ""], ["🙂", "🙃"], ["a", "b", "a"]])
def test_duplicates_of_tiny_texts_are_exact_ones_only(texts):
    assert find_duplicates(texts).near == ()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("écrivez à jean.dupont+sav@mail.exemple.fr merci", {"email": 1}),
        ("appelez le 06 12 34 56 78 ou 01.23.45.67.89", {"phone": 2}),
        ("tel +33 6 12 34 56 78", {"phone": 1}),
        ("call +1 (415) 555-2671", {"phone": 1}),
        ("IBAN FR14 2004 1010 0505 0001 3M02 606 AVEC MOI", {"iban": 1}),
        ("DE89370400440532013000", {"iban": 1}),
        ("IBAN FR15 2004 1010 0505 0001 3M02 606", {}),
        ("carte 4111 1111 1111 1111", {"card": 1}),
        ("carte 4111 1111 1111 1112", {}),
        ("sécu 2 55 08 14 168 025 38", {"nir": 1}),
        ("sécu 2 55 08 14 168 025 39", {}),
        ("serveur 192.168.1.10", {"ip": 1}),
        ("serveur 2001:db8::8a2e:370:7334", {"ip": 1}),
        ("version 300.168.1.10", {}),
        ("commande 123456789 du 12/03/2024 à 10:20:30", {}),
        ("erreur E42, modèle WX-1200", {}),
    ],
)
def test_personal_data_is_found_by_shape_and_checksum(text, found):
    assert find_personal(text) == found


def test_personal_data_of_a_hostile_text_takes_no_time():
    began = time.process_time()
    for text in (
        "a@" * 50_000,
        "1 " * 50_000,
        "a." * 50_000 + "@",
        ":" * 100_000,
        "FR76 " * 20_000,
        "+1" + " 1" * 50_000,
    ):
        find_personal(text)
    assert time.process_time() - began < 30


@pytest.mark.parametrize(
    ("raw", "clean", "removed"),
    [
        (" simple ", "simple", 0),
        ("e\u0301te\u0301", "été", 0),
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd", 0),
        ("a\x00b\x1bc\ufeff", "abc", 3),
        ("Bonjour\u00a0! 12\u202f€", "Bonjour\u00a0! 12\u202f€", 0),
        ("👩‍👩‍👧 \u200fسلام", "👩‍👩‍👧 \u200fسلام", 0),
        ("a\tb", "a\tb", 0),
    ],
)
def test_clean_text_keeps_what_has_meaning(raw, clean, removed):
    found = clean_text(raw)
    assert (found.text, found.removed) == (clean, removed)


@pytest.mark.parametrize("seed", range(20))
def test_clean_text_is_stable_when_applied_twice(seed):
    rng = random.Random(seed)
    text = "".join(
        chr(rng.choice([rng.randrange(0x250), rng.randrange(0x3100), rng.randrange(0x110000)])) for _ in range(200)
    )
    once = clean_text(text).text
    assert clean_text(once).text == once
    once.encode("utf-8")


def test_clean_name_puts_a_label_on_one_line():
    assert clean_name(" Service\u00a0 après\nvente ") == "Service après vente"
