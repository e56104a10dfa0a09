"""Instruction rows: what they hold, that they fit, that held-out texts stay out, that a seed gives the same bytes."""

from __future__ import annotations

import json
import random
import re
import sys
from itertools import islice
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "bases" / "recipes"))

import make_instructions  # noqa: E402
from alambic.data.pairs import read_pairs  # noqa: E402
from alambic.data.read_chats import read_chats  # noqa: E402
from alambic.task import DataSpec  # noqa: E402
from instructions import grammar, grounded, labels, mix, pairs, press, rewriting, structured  # noqa: E402
from instructions.contamination import Held  # noqa: E402
from instructions.frame import Frame  # noqa: E402
from instructions.row import Row, fits, talk, tokens_about  # noqa: E402
from instructions.sentences import shorten, split, typeset, unglue  # noqa: E402
from instructions.sources import Library  # noqa: E402

SHARED = HERE.parent.parent / "shared"
CONTEXT = (
    "Le pont fut bâti en 1872 par M. Duval. Il mesure 120 mètres. Une crue l'emporta en 1910, et il fut reconstruit "
    "deux ans plus tard par la commune de Sète."
)
OTHER = "La chouette chevêche niche dans les vieux pommiers. Elle pond quatre œufs en avril. On l'entend au crépuscule."


@pytest.fixture
def data(tmp_path):
    """A folder of data sets with a few rows of each kind, a test part among them."""
    folder = tmp_path / "data"
    rows = [
        {
            "id": "1",
            "context": CONTEXT,
            "question": "En quelle année le pont fut-il bâti ?",
            "answer": "1872",
            "title": "Pont",
        },
        {
            "id": "2",
            "context": CONTEXT,
            "question": "Qui reconstruisit le pont ?",
            "answer": "la commune de Sète",
            "title": "Pont",
        },
        {
            "id": "3",
            "context": OTHER,
            "question": "Où niche la chouette chevêche ?",
            "answer": "dans les vieux pommiers",
            "title": "Chouette",
        },
    ]
    _write(folder / "piaf" / "train.jsonl", rows)
    held = "Cette phrase de test ne doit paraître dans aucune ligne que le modèle apprend, jamais."
    _write(folder / "piaf" / "test.jsonl", [{"context": held, "question": "Que dit la phrase ?", "answer": "rien"}])
    banking = [
        {
            "text": f"my card number {i} does not work in the shop",
            "label": ("card_lost", "card_broken", "top_up")[i % 3],
        }
        for i in range(30)
    ]
    _write(folder / "banking77" / "train.jsonl", banking)
    _write(folder / "banking77" / "test.jsonl", [{"text": banking[7]["text"].upper(), "label": "top_up"}])
    _write(
        folder / "snips" / "train.jsonl",
        [
            {
                "text": "play jazz by Miles Davis",
                "label": "PlayMusic",
                "tokens": ["play", "jazz", "by", "Miles", "Davis"],
                "tags": ["O", "B-genre", "O", "B-artist", "I-artist"],
            }
        ],
    )
    return folder


def test_rows_and_pairs_are_read_by_the_product_and_fit_the_context(data, tmp_path):
    out = tmp_path / "out"
    figures = make_instructions.make(data, None, out, scale=0.02)
    spec = DataSpec(train="train.jsonl")
    read = read_chats(out / "train.jsonl", spec).dataset
    assert len(read) == figures["train"] > 500 and figures["valid"] > 0
    assert figures["by_language"]["fr"] > 100 and figures["by_language"]["en"] > 100
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text("utf-8").splitlines()]
    for row in rows:
        assert fits(Row(tuple(row["messages"]), "", "", tools=tuple(row.get("tools", ()))).texts)
        whole = json.dumps(row, ensure_ascii=False)
        assert not re.search(r"<(?!cite>)[a-z_]+>|\{(text|passage|question|labels|schema|answer|list)\}", whole), whole
    chosen = read_pairs(out / "pairs-train.jsonl", spec).dataset
    assert len(chosen) == figures["pairs"]["train"] > 50
    assert "Share-alike" not in (out / "DATASHEET.md").read_text("utf-8")


def test_a_seed_gives_the_same_bytes_and_another_one_others(data, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_instructions.make(data, None, tmp_path / name, seed=seed, scale=0.004)
    files = ("train.jsonl", "valid.jsonl", "pairs-train.jsonl", "DATASHEET.md")
    same = [(tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files]
    assert all(same)
    assert (tmp_path / "a" / "train.jsonl").read_bytes() != (tmp_path / "c" / "train.jsonl").read_bytes()


def test_groups_stay_on_one_side_of_the_split(data, tmp_path):
    make_instructions.make(data, None, tmp_path, scale=0.02)
    sides = [
        {json.loads(line)["group"] for line in (tmp_path / f"{part}.jsonl").read_text("utf-8").splitlines()}
        for part in ("train", "valid")
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_answers_of_passages_are_where_they_are_said_to_be(data):
    for language, rows in (
        ("fr", grounded.piaf(_frame("fr"), Library(data, None))),
        ("fr", grounded.invented(_frame("fr"), 400)),
        ("en", grounded.invented(_frame("en"), 400)),
    ):
        families = set()
        for row in rows:
            asked, told = row.messages[-2]["content"], row.messages[-1]["content"]
            families.add(row.family)
            if row.family == "cite":
                answer, number = re.fullmatch(r"(.*) \[(\d+)\]", told, re.DOTALL).groups()
                line = next(line for line in asked.split("\n") if line.startswith(f"[{number}] "))
                assert answer in line
            elif row.family == "quote":
                assert re.fullmatch(r"(.*)\n<cite>(.*)</cite>", told, re.DOTALL)[2] in asked
            elif row.family == "answer":
                assert told in asked
        assert {"answer", "cite", "quote", "refuse"} <= families, language


def test_passages_are_cut_at_sentences_and_keep_the_answer():
    text, cut = shorten(" ".join([OTHER] * 20 + [CONTEXT]), 60, keep="1872")
    assert cut and "1872" in text and tokens_about([text]) <= 60 and text[-1] == "."
    assert set(split(text)) <= set(split(OTHER) + split(CONTEXT))
    assert shorten(CONTEXT, 400) == (CONTEXT, False)
    assert shorten(CONTEXT, 5) == ("", True)
    assert split("M. Duval vint. Il repartit.") == ["M. Duval vint.", "Il repartit."]
    assert unglue("Il vint.Elle partit.  Fin") == "Il vint. Elle partit. Fin"


def test_typography_is_french():
    assert (
        typeset('Il dit : "Vraiment ?" et l\'on rit...') == "Il dit\u00a0: «\u00a0Vraiment\u202f?\u00a0» et l’on rit…"
    )


def test_held_out_texts_are_found_whatever_their_case_and_marks():
    long = " ".join(f"mot{i}" for i in range(200))
    held = Held(
        [
            ("a/test", {"text": "Une phrase de test, assez longue pour être cherchée partout !"}),
            ("b/test", {"question": "Combien de fois par année ?", "id": "x" * 50}),
            ("c/test", {"context": long}),
        ]
    )
    assert held.count == 3
    assert held.inside(["avant... UNE PHRASE de test assez longue, pour être cherchée partout ; après"]) == "a/test"
    assert held.inside(["Dis : combien de fois par année ?"]) is None  # short: a common phrase inside a longer line
    assert held.inside(["Dis :\ncombien de fois par année"]) == "b/test"
    assert held.inside([long[-900:]]) == "c/test" and held.inside([long[300:420]]) is None
    assert held.inside(["Une phrase de test, assez longue pour être cherchée ailleurs !"]) is None


def test_rows_with_held_out_texts_are_left_out_and_counted(data):
    library = Library(data, None)
    # As published, a training text is also a test text: the source drops it before any row is made of it.
    assert len(library.rows("banking77")) == 29
    held = Held(library.held_out())
    text = "Cette phrase de test ne doit paraître dans aucune ligne que le modèle apprend, jamais."
    rows = [
        Row(talk(f"Résume : {text}", "Non."), "summary", "fr"),
        Row(talk("Résume : rien.", "Rien."), "summary", "fr"),
    ]
    made = mix.sift([*rows, rows[1], Row(talk("mot " * 3000, "x"), "summary", "fr")], held)
    assert (
        len(made.all) == 1 and made.held_out == {"piaf/test": 1} and made.double == 1 and sum(made.long.values()) == 1
    )


def test_sets_that_may_not_be_learnt_from_are_refused(data):
    with pytest.raises(ValueError, match="wikit_fr"):
        Library(data, None).rows("wikit_fr")


def test_labels_offered_hold_the_answer_or_say_that_none_fits(data):
    for row in [
        *labels.messages(_frame("fr"), 300),
        *labels.sets(_frame("en"), Library(data, None), {"banking77": 29}),
    ]:
        asked, told = row.messages[-2]["content"], row.messages[-1]["content"]
        assert told in asked, (asked, told)


def test_json_answers_hold_what_the_text_holds():
    nulls = 0
    for row in structured.documents(_frame("fr"), 200):
        for value in json.loads(row.messages[-1]["content"]).values():
            nulls += value is None
            assert value is None or value in row.messages[0]["content"]
    assert nulls
    assert not list(structured.slots(_frame("en"), Library(None, None), "snips", 5))  # no folder, no rows


def test_slots_are_put_together_from_their_tags(data):
    [row] = structured.slots(_frame("en"), Library(data, None), "snips", 5)
    assert json.loads(row.messages[-1]["content"]) == {"genre": "jazz", "artist": "Miles Davis"}


@pytest.mark.parametrize("language", ["fr", "en"])
def test_calls_have_the_arguments_of_their_tool(language):
    kinds = {"call": 0, "told": 0, "none": 0}
    for row in structured.tools(_frame(language), 200):
        calls = [call["function"] for message in row.messages for call in message.get("tool_calls", ())]
        for call in calls:
            tool = next(t["function"] for t in row.tools if t["function"]["name"] == call["name"])
            assert set(json.loads(call["arguments"])) == set(tool["parameters"]["required"])
        kinds["none" if not calls else "told" if len(row.messages) > 2 else "call"] += 1
        assert "{" not in (row.messages[-1]["content"] or "")
    assert all(kinds.values())


def test_pairs_prefer_the_short_grounded_answer(data):
    made = list(pairs.pairs(_frame("fr"), Library(data, None), 300))
    assert len({pair.fault for pair in made}) >= 8
    for pair in made:
        asked = pair.prompt[-1]["content"]
        assert pair.chosen != pair.rejected
        assert re.sub(r" \[\d+\]$", "", pair.chosen) in asked or pair.chosen == "Le texte ne le dit pas."
        if pair.fault == "not in the passage":
            assert pair.rejected not in asked


@pytest.mark.parametrize("language", ["fr", "en"])
def test_every_pattern_of_the_grammar_can_be_filled(language):
    words, text = grammar.book(language)
    frame = _frame(language)

    def patterns(value):
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            for one in value:
                yield from patterns(one)
        elif isinstance(value, dict):
            for one in value.values():
                yield from patterns(one)

    for pattern in patterns([words.words, {k: v for k, v in text.items() if k != "wordings"}]):
        assert "<" not in frame.fill(pattern), pattern
    for document in text["documents"]:
        for pattern in [
            *document["titles"],
            *document["summary"],
            *(s for f in document["fields"].values() for s in f["say"]),
        ]:
            assert set(re.findall(r"\{(\w+)\}", pattern)) <= set(document["fields"]), pattern


@pytest.mark.parametrize("language", ["fr", "en"])
def test_other_families_say_what_they_should(language):
    for row in rewriting.shorter(_frame(language), 50):
        assert row.messages[1]["content"] in row.messages[0]["content"]
    for row in rewriting.registers(_frame(language), 30):
        assert row.messages[1]["content"] not in row.messages[0]["content"]
    assert {row.family for row in press.invented(_frame(language), 60)} == {"summary", "title"}


@pytest.mark.skipif(not (SHARED / "data" / "piaf").is_dir(), reason="../shared/data/piaf is not there")
def test_rows_of_piaf_are_many_and_hold_no_test_paragraph(tmp_path):
    (tmp_path / "piaf").symlink_to(SHARED / "data" / "piaf")
    library = Library(tmp_path, None)
    held = Held(library.held_out())
    made = mix.sift(islice(grounded.piaf(_frame("fr"), library), 1500), held)
    assert len(made.all) > 1300 and held.count > 500
    assert all(held.inside(row.texts) is None for row in made.all[:200])


def _frame(language):
    return Frame(language, random.Random(0))


def _write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
