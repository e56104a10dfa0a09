"""The token classifier: decoding against brute force, fields both ways, one tiny model from training to its part."""

import itertools
import json

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from alambic.engines.tag_answer import assemble
from alambic.engines.tag_fields import fields_of, locate, parse_number
from alambic.engines.tagger import TaggerPart, TaggerWriter
from alambic.engines.tagging import (
    Reading,
    Span,
    aligned,
    best_tags,
    decode,
    guess,
    log_softmax,
    read,
    restored,
    tag_names,
    tags_of,
    windows,
)
from alambic.engines.writer import Writer
from alambic.errors import EngineError, InputTooLong, PackError, TrainError
from alambic.events import Note, drain
from alambic.kinds.chat import Chat
from alambic.kinds.generation import GenerationRequest, Sampling
from alambic.model.tagger import Tagger
from alambic.train.tagger import Answers, TaggerParams, TagRow, choose_unit, rows_of_answers, train_tagger

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


# A tiny model, from rows to its part.

CITIES, NAMES = ["paris", "lyon", "aix en provence", "new york"], ["anne", "bob", "chloé", "zoé"]
VERBS = {"book": ["réserve", "prends"], "cancel": ["annule", "supprime"]}
TINY = {
    "type": "object",
    "properties": {"intent": {"enum": ["book", "cancel"]}, "city": {"type": "string"},
                   "names": {"type": "array", "items": {"type": "string"}}},
    "required": ["intent", "city", "names"],
    "additionalProperties": False,
}  # fmt: skip
CHOICES = {"intent": ("book", "cancel")}


def pairs(n, seed):
    rng = np.random.default_rng(seed)
    texts, answers = [], []
    for _ in range(n):
        intent = str(rng.choice(list(VERBS)))
        city, (first, second) = str(rng.choice(CITIES)), map(str, rng.choice(NAMES, 2, replace=False))
        both = bool(rng.random() < 0.5)
        names = f"{first} et {second}" if both else first
        texts.append(f"{rng.choice(VERBS[intent])} un billet pour {names} vers {city} demain")
        answers.append({"intent": intent, "city": city, "names": [first, second] if both else [first]})
    return texts, answers


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    torch.manual_seed(0)
    words = sorted(
        {word for text in pairs(200, 9)[0] for word in text.split()} | set("abcdefghijklmnopqrstuvwxyz0123456789")
    )
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *words,
        *(f"##{w}" for w in "abcdefghijklmnopqrstuvwxyz0123456789"),
    ]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32, pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tagger") / "base"
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def params(**given):
    return TaggerParams(**{"learning_rate": 3e-3, "head_learning_rate": 1e-2, "overlap": 8, "threads": 1, **given})


def tiny_rows(n, seed):
    texts, answers = pairs(n, seed)
    return rows_of_answers(texts, answers, fields_of(TINY))[0]


ANSWERS = Answers(("city", "names"), CHOICES)


@pytest.fixture(scope="session")
def trained(tiny_base):
    """A model trained once for the file; its result and folder."""
    torch.set_num_threads(1)
    out = tiny_base.with_name("model")
    given = params(epochs=12)
    return drain(train_tagger(tiny_base, tiny_rows(160, 0), tiny_rows(40, 1), answers=ANSWERS, params=given, out=out))


def pack(model, out, **options):
    from alambic.pack.tagger import pack_tagger

    given = {"runtime": "onnx", "precision": "fp32", "choices": CHOICES, "schema": TINY, "overlap": 8, **options}
    notes = []
    spec = drain(pack_tagger(model, out, cache=model.with_name("graphs"), **given), notes.append)
    return spec, [note for note in notes if isinstance(note, Note)]


@pytest.fixture(scope="session")
def packed(trained):
    out = trained.model.with_name("part")
    return out, pack(trained.model, out)[0]


def test_dev_score_rises_to_the_top_when_trained(trained):
    assert trained.unit == "word" and trained.best_dev > 0.97 and not trained.interrupted
    assert trained.history[0].dev < 0.6 and trained.steps <= trained.schedule


def test_model_is_the_same_when_saved_and_opened_again(trained, tmp_path):
    model = Tagger.load(trained.model)
    model.save(tmp_path / "again")
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    first, second = (m(ids, torch.ones_like(ids)) for m in (model, Tagger.load(tmp_path / "again")))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_training_goes_on_to_the_same_weights_when_it_was_cut(tiny_base, tmp_path):
    rows, dev = tiny_rows(40, 0), tiny_rows(10, 1)

    def train(out):
        given = params(epochs=3, checkpoint_seconds=0.0)
        return train_tagger(tiny_base, rows, dev, answers=ANSWERS, params=given, out=out)

    whole = drain(train(tmp_path / "whole"))
    cut, steps = train(tmp_path / "cut"), 0
    for event in cut:
        steps += type(event).__name__ == "Progress"
        if steps == 3:
            break
    # A kill leaves the checkpoint and nothing else; closing the generator would write the best so far.
    checkpoint = tmp_path / "cut.checkpoint"
    assert checkpoint.is_dir()
    again = drain(train(tmp_path / "cut"))
    first, second = (Tagger.load(result.model).state_dict() for result in (whole, again))
    cut.close()
    assert [(p.step, p.dev, p.loss) for p in again.history] == [(p.step, p.dev, p.loss) for p in whole.history]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_part_gives_spans_and_json_when_run(packed):
    folder, spec = packed
    texts, answers = pairs(40, 2)
    part = TaggerPart(folder, spec.params, threads=1)
    tagged = part.run(texts)
    right = sum(one.answer == answer for one, answer in zip(tagged, answers, strict=True))
    assert right >= 38
    assert all(span.text(text) in text for text, one in zip(texts, tagged, strict=True) for span in one.spans)
    assert json.loads(tagged[0].text) == tagged[0].answer and tagged[0].confidences["intent"] > 0.5
    assert part.run([]) == [] and part.describe()["runtime"] == "onnx"


def test_odd_texts_have_whole_answers_when_run(packed):
    folder, spec = packed
    texts = [
        "",
        "   ",
        "\x00",
        "𝕏" * 40,
        "réserve " * 200,
        "e\u0301" * 5,
        "prends un billet pour zoé vers lyon\r\n\x07demain",
    ]
    for one in TaggerPart(folder, spec.params, threads=1).run(texts):
        assert set(one.answer) == {"intent", "city", "names"}
        assert isinstance(one.answer["city"], str) and isinstance(one.answer["names"], list)


def test_answers_do_not_depend_on_neighbours_when_batched(packed):
    folder, spec = packed
    texts = [*pairs(9, 3)[0], "paris " * 70]
    part = TaggerPart(folder, spec.params, threads=1)
    alone = [part.run([text])[0] for text in texts]
    for one, other in zip(alone, part.run(texts), strict=True):
        assert (one.answer, len(one.spans)) == (other.answer, len(other.spans))


def test_span_is_found_beyond_the_first_window_when_the_text_is_long(packed):
    folder, spec = packed
    text = "un billet " * 40 + "réserve un billet pour bob vers lyon demain"
    one = TaggerPart(folder, spec.params, threads=1).run([text])[0]
    assert [span.text(text) for span in one.spans if span.start > 400] == ["bob", "lyon"]


def test_prediction_loads_no_training_library_when_run(packed):
    import subprocess
    import sys

    folder, spec = packed
    code = (
        "import json, sys; from pathlib import Path; from alambic.engines.tagger import TaggerPart; "
        "part = TaggerPart(Path(sys.argv[1]), json.loads(sys.argv[2]), threads=1); "
        "print(part.run(['annule un billet pour bob vers paris demain'])[0].text); "
        "print([m for m in ('torch', 'transformers', 'sklearn', 'safetensors') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(folder), json.dumps(spec.params)], capture_output=True,
                           text=True, check=True)  # fmt: skip
    assert ended.stdout.splitlines() == ['{"intent":"cancel","city":"paris","names":["bob"]}', "[]"]


def test_writer_answers_chats_with_json_when_asked(packed):
    folder, spec = packed
    writer = TaggerWriter(folder, spec.params, threads=1, cache_dir=None)
    assert isinstance(writer, Writer) and "json_schema" in writer.capabilities
    request = GenerationRequest(chat=Chat.of("annule un billet pour bob vers paris demain", system="Réponds."),
                                sampling=Sampling(json_schema=TINY))  # fmt: skip
    reply = writer.write([request])[0]
    assert json.loads(reply.text) == {"intent": "cancel", "city": "paris", "names": ["bob"]}
    assert reply.finish_reason == "stop" and reply.usage.prompt_tokens == len(writer.token_ids(request)) == 10
    assert [chunk.text for chunk in writer.stream(request)] == [reply.text]
    other = GenerationRequest(text="x", sampling=Sampling(json_schema={"type": "object"}))
    with pytest.raises(EngineError, match="under the schema of its task only"):
        writer.write([other])


@pytest.mark.slow
def test_openvino_gives_the_same_spans_when_packed_for_it(trained, packed, tmp_path):
    spec, _ = pack(trained.model, tmp_path / "ov", runtime="openvino", precision="fp16")
    texts = pairs(20, 4)[0]
    theirs = TaggerPart(tmp_path / "ov", spec.params, threads=1, cache_dir=tmp_path).run(texts)
    ours = TaggerPart(packed[0], packed[1].params, threads=1).run(texts)
    assert [[(s.start, s.end, s.label) for s in one.spans] for one in theirs] == [
        [(s.start, s.end, s.label) for s in one.spans] for one in ours
    ]
    assert json.loads((tmp_path / "ov" / "proof.json").read_text())["same_tags"] > 0.99


def test_int8_states_its_difference_when_packed(trained, tmp_path):
    pack(trained.model, tmp_path / "int8", precision="int8")
    proof = json.loads((tmp_path / "int8" / "proof.json").read_text())
    assert proof["largest_difference"] > 0 and proof["cosine"] > 0.9


def test_proof_fails_and_names_the_token_when_the_tokenizer_is_another(trained, packed, tmp_path):
    import shutil

    from alambic.pack.tagger import prove

    folder = tmp_path / "part"
    shutil.copytree(packed[0], folder)
    data = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    data["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(data), "utf-8")
    with pytest.raises(PackError, match=r"the packed tokenizer is not the model's: input .*token"):
        prove(Tagger.load(trained.model), packed[1].params, folder, texts=["Réserve"])


def test_proof_fails_when_the_heads_are_others(trained, packed, tmp_path):
    import shutil

    from alambic.pack.tagger import prove

    folder = tmp_path / "part"
    shutil.copytree(packed[0], folder)
    weight = np.load(folder / "tags_weight.npy")
    # The reference reads the same heads, so what is damaged here is the encoder's part of the comparison.
    np.save(folder / "tags_weight.npy", weight * np.nan)
    with pytest.raises(EngineError, match="not finite"):
        prove(Tagger.load(trained.model), packed[1].params, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"runtime": "tensorrt"}, "runtime is 'tensorrt'"), ({"extra": 1}, "unknown parameter 'extra'"),
     ({"tagger": {"labels": "city"}}, "not a list of names"), ({"tagger": {"unit": "line"}}, "unit is 'line'"),
     ({"tagger": {"labels": ["city"], "overlap": 8}}, "5 rows .* for 3 outputs")],
)  # fmt: skip
def test_part_is_refused_when_its_parameters_are_wrong(packed, change, message):
    with pytest.raises(EngineError, match=message):
        TaggerPart(packed[0], {**packed[1].params, **change}, threads=1)


def test_packing_is_refused_when_choices_are_not_those_of_training(trained, tmp_path):
    with pytest.raises(PackError, match="the model was trained with"):
        pack(trained.model, tmp_path / "x", choices={"intent": ("a", "b", "c")})
    with pytest.raises(PackError, match="precision 'fp64' is not known"):
        pack(trained.model, tmp_path / "x", precision="fp64")
    assert not (tmp_path / "x").exists()


def test_tokens_are_tagged_one_by_one_when_spans_cut_words(tiny_base):
    tokenizer = Tokenizer.from_file(str(tiny_base / "tokenizer.json"))
    rows = [TagRow("prends 10kg demain", (Span(7, 9, "n"), Span(9, 11, "unit")))]
    assert choose_unit(tokenizer, rows) == "token"
    reading = read(tokenizer.encode(rows[0].text), rows[0].text, unit="token")
    assert tags_of(rows[0].spans, reading, ("n", "unit")) == [0, 1, 3, 2, 4, 0]


@pytest.mark.parametrize(
    ("rows", "answers", "message"),
    [([], ANSWERS, "0 rows"), ([TagRow("x")], Answers(()), "no label and no choice"),
     ([TagRow("x")], ANSWERS, "no training row has a span of city, names"),
     ([TagRow("x", (Span(0, 5, "city"),))], ANSWERS, r"row 1: span 0..5 'city' is not of this text"),
     ([TagRow("x", (Span(0, 1, "town"),))], ANSWERS, "'town' is not of this text or task")],
)  # fmt: skip
def test_training_is_refused_when_there_is_nothing_to_learn(tiny_base, tmp_path, rows, answers, message):
    with pytest.raises(TrainError, match=message):
        drain(train_tagger(tiny_base, rows, None, answers=answers, params=params(), out=tmp_path / "x"))


def test_field_is_refused_when_its_values_do_not_stand_in_the_texts():
    with pytest.raises(TrainError, match="field 'city': 100% of its values do not stand"):
        rows_of_answers(["ici"] * 10, [{"city": "Lyon"}] * 10, fields_of(TINY))
    assert rows_of_answers(["à Lyon", "ici"], [{"city": "Lyon"}] * 2, fields_of(TINY))[1] == {"city": 0.5}


def test_recipe_is_refused_when_a_key_is_unknown():
    with pytest.raises(TrainError, match="did you mean 'learning_rate'"):
        TaggerParams.from_recipe({"learning_rte": 1e-3})
    assert TaggerParams.from_recipe({"epochs": 2}, seed=7) == TaggerParams(epochs=2, seed=7)
