"""`alambic export` of a base: each form is written and proven, and nothing is left where the proof fails."""

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("optimum.intel", reason="needs alambic[generate]")

from alambic.model.clone import clone  # noqa: E402
from alambic.pack import writer_proof  # noqa: E402
from linear_task import alambic  # noqa: E402


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return clone("llama-3.2-1b", tmp_path_factory.mktemp("base") / "llama", width=64).folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("base") / "bert"
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordPiece({c: i for i, c in enumerate(["[PAD]", "[UNK]", *"abcdefghij"])}))
    tokenizer.model.unk_token = "[UNK]"
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(("form", "file"), [("gguf", "model.gguf"), ("openvino", "openvino_model.xml")])
def test_decoder_is_exported_with_its_proof(decoder, tmp_path, form, file):
    pytest.importorskip("xllamacpp", reason="needs alambic[gguf]")
    ended = alambic("export", decoder, "--to", form, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert (tmp_path / "out" / file).is_file() and str(tmp_path / "out") in ended.out
    proof = json.loads((tmp_path / "out" / "proof.json").read_text("utf-8"))
    assert ("llama.cpp" in proof["tokenizers"]) == (form == "gguf") and "trained" in proof["tokenizers"]


def test_nothing_is_left_when_the_proof_fails(decoder, tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="needs alambic[gguf]")
    monkeypatch.setattr(writer_proof, "_difference", lambda tokenizer, got, expected: "token 0 is another")
    ended = alambic("export", decoder, "--to", "gguf", "--out", tmp_path / "out", "--precision", "F16")
    assert ended.code == 1 and "token 0 is another" in ended.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("form", "file"), [("openvino", "model.xml"), ("onnx", "model.onnx"), ("hf", "modules.json")])
def test_encoder_is_exported(encoder, tmp_path, form, file):
    ended = alambic("export", encoder, "--to", form, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert (tmp_path / "out" / file).is_file()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--to", "gguf"), 1, "an encoder has no form 'gguf'"),
        (("--to", "openvino", "--precision", "int4"), 1, "no precision 'int4' to choose"),
        (("--to", "file"), 2, "--to file is for bundles"),
        (("--to", "hf", "--precision", "F16"), 2, "--precision goes with"),
    ],
)
def test_what_an_encoder_has_not_is_refused(encoder, tmp_path, words, code, said):
    ended = alambic("export", encoder, *words, "--out", tmp_path / "out")
    assert ended.code == code and said in ended.err and not (tmp_path / "out").exists()


def test_unknown_precision_is_refused_with_the_list(decoder, tmp_path):
    ended = alambic("export", decoder, "--to", "openvino", "--precision", "int3", "--out", tmp_path / "out")
    assert ended.code == 1 and "allowed: fp32, fp16, int8, int4" in ended.err


def test_base_that_is_not_here_says_how_to_have_it(tmp_path):
    ended = alambic("export", "qwen2.5-0.5b-instruct", "--to", "gguf", "--out", tmp_path / "out")
    assert ended.code == 1 and "alambic bases pull" in ended.err
