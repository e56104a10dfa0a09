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
import pytest
from tokenizers import Tokenizer

import alambic
from alambic import _extras
from alambic.bundle import Bundle, Golden, Manifest, PartSpec, open_bundle, seal
from alambic.engines import ClassifyEngine, open_engine, open_part
from alambic.engines.golden import check_golden
from alambic.errors import EngineError, InputTooLong
from classify_parts import (
    CLS,
    LABELS,
    PARAMS,
    RNG,
    SEP,
    TABLE,
    TEXTS,
    VOCABULARY,
    WEIGHT,
    WORDS,
    Engines,
    make,
    reference,
    reference_ids,
    softmax,
)


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
