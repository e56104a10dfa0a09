"""The token classifier: one tiny model from training to its part."""

import json

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from alambic.engines.tag_fields import fields_of
from alambic.engines.tagger import TaggerPart, TaggerWriter
from alambic.engines.tagging import (
    Span,
    read,
    tags_of,
)
from alambic.engines.writer import Writer
from alambic.errors import EngineError, PackError, TrainError
from alambic.events import Note, drain
from alambic.kinds.chat import Chat
from alambic.kinds.generation import GenerationRequest, Sampling
from alambic.model.tagger import Tagger
from alambic.train.tagger import Answers, TaggerParams, TagRow, choose_unit, rows_of_answers, train_tagger

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
