"""Engines: tiny real models through OpenVINO and ONNX Runtime, against a numpy reference that stays here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import alambic
from alambic import _extras
from alambic.bundle import Bundle, Golden, Manifest, PartSpec, open_bundle, seal
from alambic.engines import ClassifyEngine, open_engine, open_part
from alambic.engines.examples import standing, write_index
from alambic.engines.golden import check_golden
from alambic.errors import EngineError, InputTooLong
from alambic.kinds.decision import Decision

LABELS = ("bill", "fault", "other")
WORDS = ["bill", "fault", "pump", "please", "my", "the", "is", "broken", "invoice", "wrong", "thanks", "leak"]
PAD, UNK, CLS, SEP = 0, 1, 2, 3
VOCABULARY = {"[PAD]": PAD, "[UNK]": UNK, "[CLS]": CLS, "[SEP]": SEP} | {w: i + 4 for i, w in enumerate(WORDS)}
RNG = np.random.default_rng(5)
TABLE = RNG.normal(size=(len(VOCABULARY), 8)).astype(np.float32)
WEIGHT = RNG.normal(size=(8, len(LABELS))).astype(np.float32)
PARAMS = {"output": "logits", "prefix_ids": [CLS], "suffix_ids": [SEP], "pad_id": PAD, "max_tokens": 8}
TEXTS = ["my pump is broken", "the invoice is wrong", "", "thanks", "unknown words here", "BILL  please", "fault " * 30]
Engines = ("openvino", "onnx")


def reference_ids(text: str) -> list[int]:
    return [CLS, *(VOCABULARY.get(word, UNK) for word in text.lower().split()), SEP]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference(text: str, *, room: int = 6) -> np.ndarray:
    """The slow way: equal windows, mean of their probabilities weighted by length."""
    body = reference_ids(text)[1:-1]
    n = max(1, -(-len(body) // room))
    windows = [[CLS, *body[len(body) * i // n : len(body) * (i + 1) // n], SEP] for i in range(n)]
    rows = np.stack([softmax(TABLE[window].mean(0) @ WEIGHT) for window in windows])
    return np.average(rows, axis=0, weights=[len(w) for w in windows])


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    # What some bases bake in; the engine must clear both.
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_openvino(folder: Path, *, head: bool, vectors: bool = False) -> None:
    ov = _extras.load("openvino")
    op = _extras.load("openvino.opset13")
    ids = op.parameter([-1, -1], np.int64, name="input_ids")
    mask = op.parameter([-1, -1], np.int64, name="attention_mask")
    for node, name in ((ids, "input_ids"), (mask, "attention_mask")):
        node.output(0).get_tensor().set_names({name})
    rows = op.gather(op.constant(TABLE), ids, op.constant(0))
    share = op.unsqueeze(op.convert(mask, "f32"), op.constant(2))
    total = op.reduce_sum(op.multiply(rows, share), op.constant(1))
    out = op.divide(total, op.reduce_sum(share, op.constant(1)))
    outs = [op.matmul(out, op.constant(WEIGHT), False, False)] if head else []
    outs += [out] if vectors or not head else []
    ov.save_model(ov.Model(outs, [ids, mask], "tiny"), str(folder / "model.xml"), compress_to_fp16=False)


def write_onnx(folder: Path, *, head: bool, vectors: bool = False) -> None:
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["maskf"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["maskf", "two"], ["share"]),
        helper.make_node("Mul", ["rows", "share"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "one"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["share", "one"], ["count"], keepdims=0),
        helper.make_node("Div", ["total", "count"], ["mean"]),
    ]
    if head:
        nodes.append(helper.make_node("MatMul", ["mean", "weight"], ["logits"]))
    names = [*(["logits"] if head else []), *(["mean"] if vectors or not head else [])]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(n, TensorProto.INT64, ["B", "T"]) for n in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", f"of {name}"]) for name in names],
        [
            numpy_helper.from_array(TABLE, "table"),
            numpy_helper.from_array(WEIGHT, "weight"),
            numpy_helper.from_array(np.array([2]), "two"),
            numpy_helper.from_array(np.array([1]), "one"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(folder / "model.onnx"))


def make(
    root: Path,
    engine: str,
    *,
    head: bool = True,
    vectors: bool = False,
    parts: tuple[PartSpec, ...] = (),
    **manifest: Any,
) -> Bundle:
    """Seal a bundle with the tiny model; `parts` come after it, their folders written by the caller."""
    folder = root / "encoder"
    folder.mkdir(parents=True)
    write_tokenizer(folder)
    (write_openvino if engine == "openvino" else write_onnx)(folder, head=head, vectors=vectors)
    params = PARAMS | {"output": "logits" if head else "embedding"} | ({"vectors": True} if vectors else {})
    first = PartSpec("encoder", engine, "encoder", params)
    values = {"alambic": "0.1.0", "name": "tiny", "created": "2026-01-01T00:00:00Z", "labels": LABELS}
    all_parts = (first, *parts)
    return seal(root, Manifest(**(values | {"entry": all_parts[-1].name, "parts": all_parts} | manifest)))


@pytest.fixture(params=Engines)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    with open_engine(make(tmp_path / "b", request.param), threads=1) as engine:
        yield engine


def test_probabilities_equal_the_reference_when_texts_differ_in_length(engine: ClassifyEngine) -> None:
    expected = np.stack([reference(text) for text in TEXTS])
    np.testing.assert_allclose(engine.probabilities(TEXTS), expected, atol=1e-5)


def test_one_text_gives_what_a_batch_gives(engine: ClassifyEngine) -> None:
    alone = np.concatenate([engine.probabilities([text]) for text in TEXTS])
    np.testing.assert_allclose(alone, engine.probabilities(TEXTS, batch_size=3), atol=1e-5)


def test_predict_names_the_most_probable_label(engine: ClassifyEngine) -> None:
    prediction = engine.predict([TEXTS[0]])[0]
    expected = reference(TEXTS[0])
    assert prediction.label == LABELS[expected.argmax()]
    assert prediction.confidence == pytest.approx(expected.max(), abs=1e-5)
    assert list(prediction.scores) == list(LABELS)


def test_predict_returns_nothing_for_no_input(engine: ClassifyEngine) -> None:
    assert engine.predict([]) == []
    assert engine.probabilities([]).shape == (0, 3)
    assert engine.token_ids([]) == []


def test_predict_answers_an_empty_text_from_the_special_tokens(engine: ClassifyEngine) -> None:
    expected = softmax(TABLE[[CLS, SEP]].mean(0) @ WEIGHT)
    np.testing.assert_allclose(engine.probabilities([""])[0], expected, atol=1e-5)


def test_token_ids_are_neither_cut_nor_padded(engine: ClassifyEngine) -> None:
    assert engine.token_ids(TEXTS) == [reference_ids(text) for text in TEXTS]


@pytest.mark.parametrize("text", ["\ud800 pump", "\x00\x00", "🔥👩‍👩‍👧 مرحبا", "pump\u202e\u200f is", "é" * 5000])
def test_predict_survives_a_strange_text(engine: ClassifyEngine, text: str) -> None:
    row = engine.probabilities([text, "pump"])
    assert np.isfinite(row).all()
    assert row.sum(axis=1) == pytest.approx(1.0, abs=1e-5)


def test_predict_reads_all_of_a_very_long_text(engine: ClassifyEngine) -> None:
    text = "thanks " * 20_000 + "fault " * 60_000
    np.testing.assert_allclose(engine.probabilities([text])[0], reference(text), atol=1e-3)


@pytest.mark.parametrize(("value", "name"), [(3, "int"), (None, "NoneType"), ({"text": "x"}, "dict")])
def test_predict_refuses_what_is_not_a_text(engine: ClassifyEngine, value: Any, name: str) -> None:
    with pytest.raises(EngineError, match=f"input 1 is a {name}, not a text"):
        engine.predict(["pump", value])


def test_predict_refuses_a_bare_string(engine: ClassifyEngine) -> None:
    with pytest.raises(EngineError, match="takes a list of texts, got one text"):
        engine.predict("pump")


def test_predict_refuses_to_run_when_closed(engine: ClassifyEngine) -> None:
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="this engine is closed"):
        engine.predict(["pump"])


def test_predict_agrees_when_threads_share_the_engine(engine: ClassifyEngine) -> None:
    expected = engine.probabilities(TEXTS)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in np.random.default_rng(seed).permutation(len(TEXTS) * 6) % len(TEXTS):
            if not np.allclose(engine.probabilities([TEXTS[i]])[0], expected[i], atol=1e-5):
                wrong.append(int(i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_describe_states_what_runs(engine: ClassifyEngine) -> None:
    described = engine.describe()
    assert described["engine"] == engine.bundle.parts[0].engine
    assert described["threads"] == 1
    json.dumps(described)


def test_capabilities_leave_out_embed_when_the_model_ends_in_scores(engine: ClassifyEngine) -> None:
    assert engine.capabilities == {"predict", "probabilities", "token_ids"}
    with pytest.raises(EngineError, match="gives no embeddings"):
        engine.embed(["pump"])


def test_openvino_states_its_properties_when_described(tmp_path: Path) -> None:
    with open_engine(make(tmp_path / "b", "openvino")) as engine:
        properties = engine.describe()["properties"]
    assert properties["INFERENCE_PRECISION_HINT"] in ("f32", "float32")
    assert properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == 0


@pytest.mark.parametrize("name", Engines)
@pytest.mark.parametrize(("long", "kept"), [("head", slice(0, 6)), ("head_tail", [0, 6, 7, 8, 9, 10])])
def test_probabilities_follow_long_when_a_text_is_cut(tmp_path: Path, name: str, long: str, kept: Any) -> None:
    body = np.array([VOCABULARY[w] for w in WORDS[:11]])
    with open_engine(make(tmp_path / "b", name, long=long)) as engine:
        expected = softmax(TABLE[[CLS, *body[kept], SEP]].mean(0) @ WEIGHT)
        np.testing.assert_allclose(engine.probabilities([" ".join(WORDS[:11])])[0], expected, atol=1e-5)


def test_predict_refuses_a_long_text_when_long_is_error(tmp_path: Path) -> None:
    with (
        open_engine(make(tmp_path / "b", "onnx", long="error")) as engine,
        pytest.raises(InputTooLong, match="the text has 13 tokens and the model reads 8"),
    ):
        engine.predict([" ".join(WORDS[:11])])


def test_probabilities_are_independent_when_multi_label(tmp_path: Path) -> None:
    with open_engine(make(tmp_path / "b", "onnx", multi_label=True, temperature=0.5, threshold=0.4)) as engine:
        logits = TABLE[reference_ids("my pump")].mean(0) @ WEIGHT
        expected = 1 / (1 + np.exp(-0.5 * logits))
        np.testing.assert_allclose(engine.probabilities(["my pump"])[0], expected, atol=1e-5)
        chosen = tuple(label for label, p in zip(LABELS, expected, strict=True) if p >= 0.4)
        assert engine.predict(["my pump"])[0].labels == chosen


def test_temperature_multiplies_the_logits(tmp_path: Path) -> None:
    with open_engine(make(tmp_path / "b", "onnx", temperature=3.0)) as engine:
        logits = TABLE[reference_ids("my pump")].mean(0) @ WEIGHT
        np.testing.assert_allclose(engine.probabilities(["my pump"])[0], softmax(3 * logits), atol=1e-5)


@pytest.mark.parametrize("name", Engines)
def test_linear_head_follows_the_encoder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "b" / "classifier"
    folder.mkdir(parents=True)
    mean, scale = RNG.normal(size=8), RNG.uniform(0.5, 2, size=8)
    arrays = {"weight": WEIGHT.T, "bias": np.array([0.1, 0.2, 0.3]), "mean": mean, "scale": scale}
    for file, array in arrays.items():
        np.save(folder / f"{file}.npy", array)
    head = PartSpec("classifier", "linear-head", "classifier", {"normalize": True}, "encoder")
    with open_engine(make(tmp_path / "b", name, head=False, parts=(head,))) as engine:
        vector = TABLE[reference_ids("my pump")].mean(0)
        vector /= np.linalg.norm(vector)
        expected = softmax((vector - mean) / scale @ WEIGHT + arrays["bias"])
        np.testing.assert_allclose(engine.probabilities(["my pump"])[0], expected, atol=1e-4)
        assert engine.embed(["my pump", ""]).shape == (2, 8)
        assert "embed" in engine.capabilities


ROWS = [("bill please", "bill"), ("my pump is broken", "fault"), ("wrong invoice", "bill"), ("thanks", "other")]


def indexed(root: Path, engine: str, **manifest: Any) -> Bundle:
    """A bundle that gives scores and vectors, with an index of ROWS by vectors."""
    rows = [{"labels": [label], "where": f"rows.csv:{i}", "digest": f"{i}"} for i, (_, label) in enumerate(ROWS)]
    texts = [text for text, _ in ROWS]
    params = write_index(root / "examples", rows, texts, np.stack([vector_of(text) for text in texts]))
    index = PartSpec("examples", "examples", "examples", params)
    return make(root, engine, vectors=True, parts=(index,), entry="encoder", **manifest)


def vector_of(text: str) -> np.ndarray:
    return TABLE[reference_ids(text)].mean(0)


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


@pytest.mark.parametrize("name", Engines)
def test_model_that_ends_in_scores_gives_its_vectors_too(tmp_path: Path, name: str) -> None:
    with open_engine(indexed(tmp_path / "b", name)) as engine:
        assert engine.capabilities >= {"embed", "reasons"}
        np.testing.assert_allclose(engine.embed(TEXTS[:4]), [vector_of(t) for t in TEXTS[:4]], atol=1e-5)
        np.testing.assert_allclose(engine.probabilities(TEXTS), [reference(t) for t in TEXTS], atol=1e-5)
        (near,) = engine.reasons(["the pump is broken"], n=1)[0]
        assert near.where == "rows.csv:1"
        assert near.similarity == pytest.approx(
            cosine(vector_of("the pump is broken"), vector_of(ROWS[1][0])), abs=0.02
        )
        with pytest.raises(EngineError, match="takes no embeddings"):
            engine.probabilities_of(engine.embed(["pump"]))


@pytest.mark.parametrize("name", Engines)
@pytest.mark.parametrize("label", [None, "other"])
def test_nearest_row_tells_how_surely_a_text_belongs_to_the_task(tmp_path: Path, name: str, label: str | None) -> None:
    with open_engine(indexed(tmp_path / "b", name)) as engine:
        probabilities, scores = engine.scored(TEXTS, label=label)
    assert list(scores) == ["confidence", "max_logit", "energy", "nearest"]
    np.testing.assert_allclose(probabilities, [reference(t) for t in TEXTS], atol=1e-5)
    inside = [vector_of(text) for text, of in ROWS if of != label]
    expected = [max(cosine(vector_of(text), row) for row in inside) for text in TEXTS[:6]]
    np.testing.assert_allclose(scores["nearest"][:6], expected, atol=0.02)  # rows are kept in 8 bits


@pytest.mark.parametrize("name", Engines)
def test_bundle_abstains_by_the_nearest_row_when_its_decision_says_so(tmp_path: Path, name: str) -> None:
    decision = Decision(scope="nearest", scope_threshold=0.99)
    with open_engine(indexed(tmp_path / "b", name, decision=decision)) as engine:
        said = engine.predict([*(text for text, _ in ROWS), "the leak"])
    assert [one.because for one in said] == [None, None, None, None, "out_of_scope"]


def test_decision_by_the_nearest_row_is_refused_when_there_is_no_index_of_vectors(tmp_path: Path) -> None:
    bundle = make(tmp_path / "b", "onnx", vectors=True, decision=Decision(scope="nearest", scope_threshold=0.5))
    with pytest.raises(EngineError, match="looks at 'nearest', and the bundle gives confidence, max_logit, energy"):
        open_engine(bundle)


@pytest.mark.parametrize("name", Engines)
def test_part_is_refused_when_it_lacks_the_vectors_that_it_promises(tmp_path: Path, name: str) -> None:
    first = make(tmp_path / "b", name).manifest.parts[0]
    spec = PartSpec(first.name, name, first.folder, {**first.params, "vectors": True})
    with pytest.raises(EngineError, match=r"has .*1 output\(s\); expected .*(2 output|scores and vectors)"):
        open_part(spec, tmp_path / "b" / "encoder")


def test_few_rows_of_every_label_stand_for_all_when_there_are_many() -> None:
    rows = [{"labels": [label]} for label in "aaaaaaaabbc"]
    assert standing(rows, None, 6) == [0, 1, 2, 8, 9, 10]
    assert standing(rows, "a", 6) == [8, 9, 10]
    assert standing(rows, None, 99) == list(range(11))


def test_knn_head_weighs_votes_by_similarity(tmp_path: Path) -> None:
    folder = tmp_path / "b" / "classifier"
    folder.mkdir(parents=True)
    vectors = TABLE[4:9] / np.linalg.norm(TABLE[4:9], axis=1, keepdims=True)
    np.save(folder / "vectors.npy", vectors.astype(np.float16))
    np.save(folder / "labels.npy", np.array([0, 1, 1, 2, 0]))
    head = PartSpec("classifier", "knn-head", "classifier", {"k": 3, "temperature": 0.1, "labels": 3}, "encoder")
    with open_engine(make(tmp_path / "b", "onnx", head=False, parts=(head,))) as engine:
        vector = TABLE[reference_ids("fault")].mean(0)
        near = vectors.astype(np.float16) @ vector / np.linalg.norm(vector)
        best = np.argsort(-near)[:3]
        weights = np.exp(near[best] / 0.1)
        expected = np.zeros(3)
        np.add.at(expected, np.array([0, 1, 1, 2, 0])[best], weights / weights.sum())
        np.testing.assert_allclose(engine.probabilities(["fault"])[0], expected, atol=2e-3)


def test_open_part_runs_a_part_outside_a_bundle(tmp_path: Path) -> None:
    bundle = make(tmp_path / "b", "openvino", head=True)
    with open_part(bundle.parts[0], bundle.folder(bundle.parts[0])) as part:
        expected = TABLE[reference_ids("pump")].mean(0) @ WEIGHT
        np.testing.assert_allclose(part.run(["pump"])[0], expected, atol=1e-5)
        assert part.run([]).shape == (0, 0)


def test_tokenizer_graph_gives_the_ids_of_the_json_when_it_is_the_only_one(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="converting a tokenizer needs the extra [build]")
    bundle = make(tmp_path / "b", "openvino")
    folder = bundle.path / "encoder"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    graph = _extras.load("openvino_tokenizers").convert_tokenizer(wrapped, with_detokenizer=False)
    _extras.load("openvino").save_model(graph, str(folder / "tokenizer.xml"))
    (folder / "tokenizer.json").unlink()
    with open_engine(seal(bundle.path, bundle.manifest)) as engine:
        assert engine.token_ids(TEXTS) == [reference_ids(text) for text in TEXTS]
        assert engine.token_ids(TEXTS[:1]) == [reference_ids(TEXTS[0])]


def test_open_works_when_the_compiled_cache_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the cache should be")
    with open_engine(make(tmp_path / "b", "openvino"), cache_dir=blocked / "x") as engine:
        assert engine.predict(["pump"])


def test_open_works_when_the_compiled_cache_is_damaged(tmp_path: Path) -> None:
    bundle, cache = make(tmp_path / "b", "openvino"), tmp_path / "cache"
    open_engine(bundle, cache_dir=cache).close()
    blobs = list(cache.rglob("*.blob"))
    assert blobs
    for blob in blobs:
        blob.chmod(0o600)
        blob.write_bytes(blob.read_bytes()[:50])
    with open_engine(bundle, cache_dir=cache) as engine:
        np.testing.assert_allclose(engine.probabilities(["pump"])[0], reference("pump"), atol=1e-5)


def broken(tmp_path: Path, name: str, file: str, raw: bytes | None) -> Bundle:
    bundle = make(tmp_path / "b", name)
    path = bundle.path / "encoder" / file
    path.unlink() if raw is None else path.write_bytes(raw)
    return seal(bundle.path, bundle.manifest)


@pytest.mark.parametrize(
    ("name", "file", "raw", "message"),
    [
        ("openvino", "model.xml", b"<net>", r"model\.xml: OpenVINO cannot load this model"),
        ("openvino", "model.bin", None, r"model\.bin: missing"),
        ("openvino", "tokenizer.json", b"{}", r"tokenizer\.json: not a readable tokenizer"),
        ("openvino", "tokenizer.json", None, r"no tokenizer; expected tokenizer\.json or tokenizer\.xml"),
        ("onnx", "model.onnx", b"\x00garbage", r"model\.onnx: ONNX Runtime cannot load this model"),
        ("onnx", "model.onnx", None, r"model\.onnx: missing"),
    ],
)
def test_open_names_the_file_when_a_model_is_broken(
    tmp_path: Path, name: str, file: str, raw: bytes | None, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        open_engine(broken(tmp_path, name, file, raw))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"prefix": [2]}, "unknown parameter 'prefix'"),
        ({"prefix_ids": "2"}, "prefix_ids is '2', not a list of token ids"),
        ({"max_tokens": 2, "prefix_ids": [2], "suffix_ids": [3]}, "the special tokens alone fill"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"output": "pickle"}, "output is 'pickle'"),
        ({"properties": {"CACHE_DIR": "/"}}, "unknown parameter 'CACHE_DIR'"),
        ({"tokenizer": "../x.json"}, r"tokenizer is '\.\./x\.json'"),
    ],
)
def test_open_refuses_parameters_it_does_not_know(tmp_path: Path, params: dict[str, Any], message: str) -> None:
    bundle = make(tmp_path / "b", "openvino")
    part = PartSpec("encoder", "openvino", "encoder", params)
    with pytest.raises(EngineError, match=message):
        open_engine(seal(bundle.path, bundle.manifest.model_copy(update={"parts": (part,)})))


def test_open_refuses_an_engine_outside_the_table(tmp_path: Path) -> None:
    bundle = make(tmp_path / "b", "onnx")
    part = PartSpec("encoder", "os:system", "encoder", PARAMS)
    with pytest.raises(EngineError, match="part 'encoder': unknown engine 'os:system'"):
        open_engine(seal(bundle.path, bundle.manifest.model_copy(update={"parts": (part,)})))


def test_open_refuses_a_head_without_an_encoder(tmp_path: Path) -> None:
    bundle = make(tmp_path / "b", "onnx")
    part = PartSpec("encoder", "linear-head", "encoder")
    with pytest.raises(EngineError, match="engine 'linear-head' takes the output of another part"):
        open_engine(seal(bundle.path, bundle.manifest.model_copy(update={"parts": (part,)})))


def test_predict_refuses_when_labels_and_scores_do_not_fit(tmp_path: Path) -> None:
    with (
        open_engine(make(tmp_path / "b", "onnx", labels=("a", "b"))) as engine,
        pytest.raises(EngineError, match="gives 3 scores and the bundle has 2 labels"),
    ):
        engine.predict(["pump"])


def test_open_refuses_a_pickled_array(tmp_path: Path) -> None:
    folder = tmp_path / "b" / "model"
    folder.mkdir(parents=True)
    np.save(folder / "bias.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    part = PartSpec("model", "majority", "model")
    manifest = Manifest(alambic="0", name="x", created="now", labels=LABELS, entry="model", parts=(part,))
    with pytest.raises(EngineError, match=r"bias\.npy: cannot be read as an array"):
        open_engine(seal(tmp_path / "b", manifest))


def majority(root: Path) -> Bundle:
    (root / "model").mkdir(parents=True)
    np.save(root / "model" / "bias.npy", np.log(np.array([0.2, 0.5, 0.3], dtype=np.float32)))
    part = PartSpec("model", "majority", "model")
    return seal(root, Manifest(alambic="0", name="x", created="now", labels=LABELS, entry="model", parts=(part,)))


def test_majority_answers_with_the_shares_of_the_labels(tmp_path: Path) -> None:
    with alambic.open(majority(tmp_path / "b").path) as engine:
        assert engine.predict(["anything"])[0].scores == pytest.approx({"bill": 0.2, "fault": 0.5, "other": 0.3})
        assert engine.capabilities == {"predict", "probabilities"}


def test_open_refuses_no_threads(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="threads is 0, not 1 or more"):
        open_engine(majority(tmp_path / "b"), threads=0)


def golden(bundle: Bundle, **changes: Any) -> Bundle:
    with open_engine(bundle) as engine:
        values = {"text": "my pump", "ids": tuple(engine.token_ids(["my pump"])[0])}
        values["probabilities"] = tuple(map(float, engine.probabilities(["my pump"])[0]))
    sample = Golden(**(values | changes))
    return seal(bundle.path, bundle.manifest.model_copy(update={"golden": (sample,)}))


def test_golden_report_when_nothing_changed(tmp_path: Path) -> None:
    with open_engine(golden(make(tmp_path / "b", "onnx"))) as engine:
        report = check_golden(engine)
    assert (report.n, report.changed_labels) == (1, 0)
    assert report.largest_difference < 1e-6


def test_golden_names_the_first_token_that_differs(tmp_path: Path) -> None:
    bundle = golden(make(tmp_path / "b", "onnx"), ids=(CLS, 8, 9, SEP))
    with open_engine(bundle) as engine, pytest.raises(EngineError, match="token 2 is 6, 9 at the build"):
        check_golden(engine)


def test_golden_refuses_other_probabilities(tmp_path: Path) -> None:
    bundle = golden(make(tmp_path / "b", "onnx"), probabilities=(1.0, 0.0, 0.0))
    with open_engine(bundle) as engine, pytest.raises(EngineError, match="a probability differs by"):
        check_golden(engine)


@pytest.mark.parametrize("name", Engines)
def test_predict_imports_no_training_library_when_run_alone(tmp_path: Path, name: str) -> None:
    bundle = make(tmp_path / "b", name)
    home = tmp_path / "home"
    home.mkdir()
    code = (
        "import sys, alambic\n"
        f"assert alambic.open({str(bundle.path)!r}).predict(['my pump is broken'])[0].label\n"
        "heavy = {'torch', 'transformers', 'sklearn', 'scipy', 'nncf', 'openvino_genai', 'openvino_telemetry'}\n"
        "print(sorted(m for m in heavy if sys.modules.get(m) is not None))\n"
    )
    environment = {"PATH": os.environ["PATH"], "HOME": str(home)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (run.stdout, run.stderr) == ("[]\n", "")
    assert [p.name for p in home.iterdir()] == [".cache"]


def test_open_bundle_reads_back_what_the_engine_was_given(tmp_path: Path) -> None:
    bundle = make(tmp_path / "b", "onnx")
    assert open_bundle(bundle.path).parts == bundle.parts
