"""Packing, on a tiny model whose graphs are traced once for the whole file."""

import functools
import json
import resource
import signal

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from alambic.data.dataset import Dataset, Example
from alambic.engines import load_part
from alambic.errors import PackError, WorkspaceError
from alambic.events import Note, drain
from alambic.kinds.golden import GOLDEN_TEXTS
from alambic.model.encoder import Encoder, pad
from alambic.pack import hf, int8, onnx, openvino
from alambic.pack.proof import prove

pytestmark = pytest.mark.slow

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LABELS = ["machine", "other"]
TEXTS = [text for text in GOLDEN_TEXTS if text.strip()]


@functools.cache  # its training breaks ties at random
def trained_tokenizer():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(GOLDEN_TEXTS, trainer)
    ids = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", ids)
    tokenizer.enable_truncation(6)
    tokenizer.enable_padding(length=6)
    return tokenizer.to_str()


def tiny_tokenizer():
    return Tokenizer.from_str(trained_tokenizer())


def save_model(folder, seed, *, labels=LABELS):
    base = folder.with_name(f"{folder.name}-base")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    transformers.AutoModel.from_config(config).save_pretrained(base)
    tokenizer.save(str(base / "tokenizer.json"))
    encoder = Encoder.load(base)
    (encoder if labels is None else encoder.with_head(labels, multi_label=False)).save(folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("pack")


@pytest.fixture(scope="module")
def model(home):
    return save_model(home / "model", seed=0)


@pytest.fixture(scope="module")
def graphs(home, model):
    """A cache that holds both traced graphs."""
    drain(openvino.pack(model, home / "first-openvino", precision="fp16", cache=home / "graphs"))
    drain(onnx.pack(model, home / "first-onnx", precision="fp32", cache=home / "graphs"))
    return home / "graphs"


@pytest.fixture
def packed(model, graphs, tmp_path):
    """An ONNX part to spoil, and its folder."""
    part = drain(onnx.pack(model, tmp_path / "part", precision="fp32", cache=graphs))
    return part, tmp_path / "part"


def logits_of(model, texts):
    encoder = Encoder.load(model)
    with torch.no_grad():
        return encoder(*pad(encoder.tokenize(texts), pad_id=encoder.pad_id)).numpy()


def spoil(folder, change):
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text("utf-8"))
    change(data)
    path.write_text(json.dumps(data), "utf-8")


def test_openvino_part_holds_model_and_both_tokenizers_when_packed(model, graphs, tmp_path):
    drain(openvino.pack(model, tmp_path / "part", precision="fp16", cache=graphs))
    names = {file.name for file in (tmp_path / "part").iterdir()}
    assert names == {"model.xml", "model.bin", "tokenizer.json", "tokenizer.xml", "tokenizer.bin", "proof.json"}


def test_openvino_part_states_its_properties_when_packed(model, graphs, tmp_path):
    part = drain(openvino.pack(model, tmp_path / "part", precision="fp16", cache=graphs))
    assert part.params == {
        "output": "logits", "prefix_ids": [2], "suffix_ids": [3], "pad_id": 0, "max_tokens": 64, "precision": "fp16",
        "tokenizer": "tokenizer.json", "vectors": True,
        "properties": {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0},
    }  # fmt: skip


def test_packed_tokenizer_neither_cuts_nor_pads_when_the_base_bakes_it_in(packed):
    data = json.loads((packed[1] / "tokenizer.json").read_text("utf-8"))
    assert (data["truncation"], data["padding"]) == (None, None)


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_kept_graph_gives_another_model_its_own_logits(engine, graphs, tmp_path):
    other = save_model(tmp_path / "other", seed=7, labels=["a", "b", "c"])
    before = sorted(graphs.iterdir())
    pack, precision = {"openvino": (openvino.pack, "fp16"), "onnx": (onnx.pack, "fp32")}[engine]
    part = drain(pack(other, tmp_path / "part", precision=precision, cache=graphs))
    runner = load_part(part, tmp_path / "part")
    np.testing.assert_allclose(runner.run(["a machine"]), logits_of(other, ["a machine"]), atol=2e-3)
    assert sorted(graphs.iterdir()) == before  # nothing was traced again


def test_kept_graph_filled_wrongly_is_refused_by_the_proof(graphs, model, tmp_path):
    kept = next(folder for folder in graphs.iterdir() if "onnx" in folder.name)
    spoiled = tmp_path / "graphs" / kept.name
    spoiled.mkdir(parents=True)
    (spoiled / "graph.onnx").write_bytes((kept / "graph.onnx").read_bytes())
    holes = json.loads((kept / "holes.json").read_text())
    at = {hole["name"]: hole for hole in holes}
    first, second = (at[f"backbone.encoder.layer.0.attention.self.{name}.weight"] for name in ("query", "value"))
    first["name"], second["name"] = second["name"], first["name"]
    (spoiled / "holes.json").write_text(json.dumps(holes))
    with pytest.raises(PackError, match="an output of the fp32 form differs by"):
        drain(onnx.pack(model, tmp_path / "part", precision="fp32", cache=tmp_path / "graphs"))
    assert not (tmp_path / "part").exists()


@pytest.mark.parametrize(("engine", "precision", "near"), [("openvino", "fp16", 5e-3), ("onnx", "int8", 0.1)])
def test_packed_classifier_gives_the_vector_that_its_head_takes(engine, precision, near, model, graphs, tmp_path):
    pack = {"openvino": openvino.pack, "onnx": onnx.pack}[engine]
    part = drain(pack(model, tmp_path / "part", precision=precision, cache=graphs))
    runner = load_part(part, tmp_path / "part")
    rows = runner.infer_wide(runner.token_ids(TEXTS[:3]))
    np.testing.assert_array_equal(rows[:, : len(LABELS)], runner.infer(runner.token_ids(TEXTS[:3])))
    np.testing.assert_allclose(rows[:, len(LABELS) :], Encoder.load(model).embed(TEXTS[:3]), atol=near)


def test_bare_encoder_packs_as_an_embedding(graphs, tmp_path):
    base = save_model(tmp_path / "base", seed=3, labels=None)
    part = drain(onnx.pack(base, tmp_path / "part", precision="fp32", cache=graphs))
    assert part.params["output"] == "embedding"
    np.testing.assert_allclose(
        load_part(part, tmp_path / "part").run(["hello"]), Encoder.load(base).embed(["hello"]), atol=1e-5
    )


def test_onnx_part_is_smaller_when_stored_in_half_precision(packed, model, graphs, tmp_path):
    drain(onnx.pack(model, tmp_path / "half", precision="fp16", cache=graphs))
    full, half = ((folder / "model.onnx").stat().st_size for folder in (packed[1], tmp_path / "half"))
    assert full - half > 60_000  # 2 bytes for each weight of a large matrix; the graph itself weighs as much here


@pytest.mark.parametrize("precision", ["int8-weights", "int8"])
def test_openvino_8_bit_part_is_smaller_and_states_its_divergence(precision, model, graphs, tmp_path):
    drain(openvino.pack(model, tmp_path / "half", precision="fp16", cache=graphs))
    drain(openvino.pack(model, tmp_path / "part", precision=precision, calibration=TEXTS, cache=graphs))
    smaller, larger = ((tmp_path / name / "model.bin").stat().st_size for name in ("part", "half"))
    assert smaller < 0.8 * larger
    proof = json.loads((tmp_path / "part" / "proof.json").read_text())
    assert proof["cosine"] > 0.9
    assert proof["largest_difference"] > 0


@pytest.mark.parametrize(("precision", "lowest", "highest"), [("int8", 0, 255), ("int8-signed", -64, 64)])
def test_onnx_8_bit_weights_keep_to_the_range_that_every_cpu_adds_without_overflow(
    precision, lowest, highest, model, graphs, tmp_path
):
    library = pytest.importorskip("onnx")
    drain(onnx.pack(model, tmp_path / "part", precision=precision, cache=graphs))
    packed = library.load(tmp_path / "part" / "model.onnx")
    entries = {entry.name: library.numpy_helper.to_array(entry) for entry in packed.graph.initializer}
    weights = [entries[node.input[1]] for node in packed.graph.node if node.op_type == "MatMulInteger"]
    assert len(weights) >= 12
    assert min(w.min() for w in weights) >= lowest and max(w.max() for w in weights) <= highest
    assert json.loads((tmp_path / "part" / "proof.json").read_text())["cosine"] > 0.9


def test_likeness_tells_the_same_model_from_another(packed, graphs, tmp_path):
    other = save_model(tmp_path / "other", seed=9)
    unlike = drain(int8.pack_form("openvino-fp16", other, tmp_path / "unlike", cache=graphs)), tmp_path / "unlike"
    found = int8.likeness({int8.REFERENCE: packed, "unlike": unlike, "like": packed}, TEXTS)
    assert found["like"] == pytest.approx(1.0) and found["unlike"] < 0.999


def test_pack_prints_nothing_when_it_quantises(model, graphs, tmp_path, capfd):
    drain(openvino.pack(model, tmp_path / "a", precision="int8", calibration=TEXTS, cache=graphs))
    drain(onnx.pack(model, tmp_path / "b", precision="int8", cache=graphs))
    assert capfd.readouterr() == ("", "")


def test_pack_refuses_when_the_folder_exists(packed, model, graphs):
    with pytest.raises(PackError, match="part: exists already"):
        drain(onnx.pack(model, packed[1], precision="fp32", cache=graphs))


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_pack_leaves_nothing_when_the_disk_is_full(engine, model, graphs, tmp_path):
    pack, precision = {"openvino": (openvino.pack, "fp16"), "onnx": (onnx.pack, "fp32")}[engine]
    # A limit on file size fails writes as a full disk does, in Python and in the libraries.
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(WorkspaceError, match=r"part: cannot be written: .*; nothing was left there"):
            drain(pack(model, tmp_path / "part", precision=precision, cache=graphs))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == []


def test_pack_works_when_the_cache_cannot_be_written(model, graphs, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    part = drain(onnx.pack(model, tmp_path / "part", precision="fp32", cache=tmp_path / "file" / "graphs"))
    assert part.engine == "onnx"


def test_proof_holds_on_the_golden_texts_when_nothing_changed(packed, model):
    proof = prove(model, *packed)
    assert (proof.n, proof.tokenizers, proof.same_label) == (len(GOLDEN_TEXTS), ("tokenizer.json",), 1.0)


def test_proof_names_the_token_when_a_special_token_changed(packed, model):
    def change(data):
        data["post_processor"]["special_tokens"]["[SEP]"].update(ids=[4], tokens=["[MASK]"])

    spoil(packed[1], change)
    with pytest.raises(PackError, match=r"token \d+ is 4 \('\[MASK\]'\), the model was trained with 3 \('\[SEP\]'\)"):
        prove(model, *packed)


def test_proof_names_the_token_when_two_words_are_swapped(packed, model):
    def change(data):
        vocab = data["model"]["vocab"]
        vocab["."], vocab[","] = vocab[","], vocab["."]

    spoil(packed[1], change)
    vocab = tiny_tokenizer().get_vocab()
    expected = rf"token \d+ is {vocab['.']} \('\.'\), the model was trained with {vocab[',']} \(','\)"
    with pytest.raises(PackError, match=expected):
        prove(model, *packed)


def test_proof_names_the_input_when_lower_casing_is_lost(packed, model):
    spoil(packed[1], lambda data: data["normalizer"].update(lowercase=False))
    with pytest.raises(PackError, match=r"input 'Hello, my washing machine .*': token 1 is \d+ \('\[UNK\]'\)"):
        prove(model, *packed)


def test_proof_names_the_missing_token_when_a_special_token_is_left_out(packed, model):
    spoil(packed[1], lambda data: data.update(post_processor=None))
    with pytest.raises(PackError, match=r"token 0 is .*, the model was trained with 2 \('\[CLS\]'\)"):
        prove(model, *packed)


def test_proof_refuses_the_part_of_another_model(packed, tmp_path):
    other = save_model(tmp_path / "other", seed=9)
    with pytest.raises(PackError, match=r"input '.*': an output of the fp32 form differs by .* at most .* is rounding"):
        prove(other, *packed)


def test_proof_refuses_a_part_without_tokenizer(packed, model):
    (packed[1] / "tokenizer.json").unlink()
    with pytest.raises(PackError, match="no tokenizer was packed"):
        prove(model, *packed)


@pytest.fixture
def rows(model):
    """Rows whose labels are the float model's own answers."""
    answers = logits_of(model, TEXTS[:20]).argmax(axis=1)
    examples = (Example(text, (LABELS[i],)) for text, i in zip(TEXTS, answers, strict=False))
    return Dataset(tuple(examples), tuple(LABELS))


def test_choose_measures_every_form_and_leaves_the_winner(model, graphs, rows, tmp_path):
    options = int8.Options(repeats=30, seconds=0.3, cache=graphs)
    forms = ("openvino-int8-weights", "openvino-int8-dynamic", "onnx-int8-dynamic")
    choice = drain(int8.choose(model, tmp_path / "part", rows, calibration=TEXTS, forms=forms, options=options))
    record = json.loads(json.dumps(choice.to_dict()))
    assert [entry["form"] for entry in record["results"]] == ["openvino-fp16", *forms]
    assert (record["results"][0]["accuracy"], record["results"][0]["drop"]) == (1.0, 0.0)
    assert choice.form in forms
    assert load_part(choice.part, choice.folder).run(["hello"]).shape == (1, 2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["part"]


def test_form_that_cannot_be_made_is_left_out_with_its_reason(model, graphs, rows, tmp_path):
    options = int8.Options(repeats=30, seconds=0.3, cache=graphs)
    forms = ("openvino-int8-static", "openvino-int8-weights")
    events = []
    work = int8.choose(model, tmp_path / "part", rows, calibration=(), forms=forms, options=options)
    choice = drain(work, events.append)
    assert choice.form == "openvino-int8-weights"
    assert "needs texts to calibrate on" in choice.left_out["openvino-int8-static"]
    assert any(isinstance(event, Note) and "openvino-int8-static is left out" in event.message for event in events)


def test_time_forms_times_every_form(packed):
    times = int8.time_forms({"onnx": packed}, TEXTS, repeats=30, seconds=0.2)
    assert times["onnx"] > 0


@pytest.mark.parametrize("normalize", [False, True])
def test_hf_export_gives_the_logits_under_sentence_transformers(normalize, model, tmp_path):
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is in the extra [bench]")
    encoder = Encoder.load(model)
    raw = json.loads((model / "alambic.json").read_text()) | {"normalize": normalize, "scale": 12.0}
    encoder.save(tmp_path / "model")
    (tmp_path / "model" / "alambic.json").write_text(json.dumps(raw))
    hf.export(tmp_path / "model", tmp_path / "out")
    texts = ["Hello, my washing machine", "merci", ""]
    got = library.SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(texts)
    np.testing.assert_allclose(got, logits_of(tmp_path / "model", texts), atol=1e-5)


def test_hf_export_opens_in_transformers_with_the_labels(model, tmp_path):
    hf.export(model, tmp_path / "out")
    opened = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert opened.config.id2label == dict(enumerate(LABELS))


def test_onnx_export_says_its_inputs_and_outputs(model, graphs, tmp_path):
    onnx.export(model, tmp_path / "out", cache=graphs)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"model.onnx", "tokenizer.json", "labels.json", "README.md", "proof.json"}
    assert "| out | `logits` | float32 | [B, 2] |" in (tmp_path / "out" / "README.md").read_text()
