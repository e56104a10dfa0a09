"""Fetching a base from a hub on this machine: what is fetched, and what is refused."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save

import fake_hub
from alambic.errors import BaseModelError
from alambic.model import hub
from alambic.model.bases import resolve
from fake_hub import COMMIT, ID, described, partial, pull, running_hub


@pytest.fixture
def server(monkeypatch, tmp_path):
    yield from running_hub(monkeypatch, tmp_path)


# ---- what is fetched -------------------------------------------------------------------------------------------------


def test_pull_brings_weights_configuration_and_tokenizer_and_nothing_else(server, tmp_path):
    pulled = pull()
    assert sorted(pulled.files) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert {name: (pulled.folder / name).read_bytes() for name in pulled.files} == {
        name: server.files[name] for name in pulled.files}  # fmt: skip
    assert (pulled.commit, pulled.folder.parent.name) == (COMMIT, "snapshots")
    assert pulled.fetched_bytes == sum(len(server.files[name]) for name in pulled.files)
    assert partial(tmp_path) == []


def test_pulled_base_is_found_without_the_hub(server):
    pull()
    server.asked.clear()
    base = resolve(ID, offline=True, kinds=("decoder",))
    assert (base.source, base.licence, base.languages) == (f"hub:{ID}@{COMMIT}", "mit", ("fr",))
    assert (base.parameters, server.asked) == (250_000, [])


def test_cache_is_the_one_of_the_hub_client(server):
    from huggingface_hub import snapshot_download

    folder = pull().folder
    assert Path(snapshot_download(ID, local_files_only=True)) == folder
    assert (folder / "config.json").is_symlink()


def test_resolve_fetches_what_is_not_in_the_cache(server):
    assert resolve(ID, kinds=("decoder",)).parameters == 250_000


def test_second_pull_fetches_nothing(server):
    pull()
    server.asked.clear()
    pulled = pull()
    assert (pulled.fetched_bytes, server.asked) == (0, [])


def test_pull_of_named_files_fetches_only_those(server):
    pulled = pull(files=["*.md", "tokenizer.json"])
    assert sorted(pulled.files) == ["README.md", "tokenizer.json"]
    assert sorted(server.asked) == ["README.md", "tokenizer.json"]


@pytest.mark.parametrize("pattern", ["*.bin", "modeling_evil.py"])
def test_pickles_and_code_are_not_fetched_even_when_named(server, pattern):
    with pytest.raises(BaseModelError, match="holds code or a pickle, which is never fetched"):
        pull(files=[pattern])
    assert server.asked == []


def test_unknown_file_lists_what_there_is(server):
    with pytest.raises(BaseModelError, match=r"(?s)no file is called model\.gguf.*it holds: README\.md, config\.json"):
        pull(files=["model.gguf"])


def test_shards_are_fetched_and_other_forms_of_the_same_weights_are_not(server):
    server.files = {
        "config.json": server.files["config.json"], "tokenizer.json": b"{}",
        "model-00001-of-00002.safetensors": save({"a": np.zeros(3, np.float32)}),
        "model-00002-of-00002.safetensors": save({"b": np.zeros(4, np.float32)}),
        "consolidated.safetensors": b"the same again",
        "model.safetensors.index.json": json.dumps({"weight_map": {
            "a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}).encode(),
    }  # fmt: skip
    assert "consolidated.safetensors" not in pull().files
    assert resolve(ID, offline=True, kinds=("decoder",)).parameters == 7


def test_one_whole_file_is_preferred_to_its_other_precisions(server):
    server.files["model.fp16.safetensors"] = b"half"
    assert "model.fp16.safetensors" not in pull().files


def test_repository_of_pickles_is_refused_before_anything_is_fetched(server):
    del server.files["model.safetensors"]
    said = r"(?s)pickled only \(pytorch_model.bin\).*/someone/small-model/discussions.*--revision refs/pr/N"
    with pytest.raises(BaseModelError, match=said):
        pull()
    assert server.asked == []


@pytest.mark.parametrize("revision", ["main", "v1", "refs/pr/7", COMMIT])
def test_revision_is_remembered_under_its_name(server, revision):
    pull(revision=revision)
    assert hub.find_cached(ID, revision=revision) is not None
    assert hub.find_cached(ID, revision="other") is None


def test_mirror_that_lists_no_sizes_is_asked_for_each_file(server):
    server.describes = False
    pulled = pull()
    assert (pulled.folder / "model.safetensors").read_bytes() == server.files["model.safetensors"]


@pytest.mark.parametrize("name", ["../evil.json", "/etc/evil.json", "a/../../evil.json", "..\\\\evil.json"])
def test_names_that_leave_the_folder_are_passed_over(server, tmp_path, name):
    server.files[name] = b"{}"
    pulled = pull(files=["*.json"])
    assert name not in pulled.files and not list(tmp_path.rglob("evil.json"))


def test_file_without_a_hash_is_refused_unless_the_user_gives_one(server, tmp_path, monkeypatch):
    honest = described
    wrong = {"size": 2, "blobId": "../../../evil"}
    monkeypatch.setattr(
        fake_hub, "described", lambda name, data: wrong if name == "tokenizer.json" else honest(name, data)
    )
    with pytest.raises(BaseModelError, match=r"(?s)states no hash of tokenizer\.json.*--sha256 tokenizer\.json=HEX"):
        pull()
    assert pull(sha256={"tokenizer.json": hashlib.sha256(b"{}").hexdigest()}).commit == COMMIT
    assert not list(tmp_path.rglob("evil*"))


def test_commit_that_is_none_is_refused(server):
    server.commit = "../../evil"
    with pytest.raises(BaseModelError, match=r"gives '\.\./\.\./evil' for a commit"):
        pull()


def test_token_is_sent_to_the_hub(server, monkeypatch):
    server.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull()
    assert server.tokens[0] == "Bearer hf_secret"


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403])
def test_gated_base_names_the_page_where_its_licence_is_accepted(server, status):
    server.refuse = (status, "GatedRepo")
    said = rf"(?s)'{ID}' is gated.*accept it at https://huggingface.co/{ID}, then set HF_TOKEN"
    with pytest.raises(BaseModelError, match=said):
        pull()


def test_base_that_is_not_there_is_said(server):
    server.refuse_info = (404, "RepoNotFound")
    with pytest.raises(BaseModelError, match=r"(?s)is not on the Hub, or is private.*HF_TOKEN"):
        pull()


def test_revision_that_is_not_there_is_said(server):
    with pytest.raises(BaseModelError, match="has no revision 'nightly'"):
        pull(revision="nightly")


def test_hub_in_trouble_is_said_with_its_status(server):
    server.refuse_info = (500, "")
    with pytest.raises(BaseModelError, match=r"cannot be downloaded: .*500"):
        pull()


def test_token_is_in_no_message(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for refusal in ((401, "GatedRepo"), (401, "RepoNotFound"), (403, ""), (500, "")):
        server.refuse_info = refusal
        with pytest.raises(BaseModelError) as raised:
            pull()
        assert "hf_secret" not in str(raised.value)


def test_hub_that_is_switched_off_is_not_asked(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BaseModelError, match=r"(?s)switched off.*HF_HUB_OFFLINE"):
        pull()
    with pytest.raises(BaseModelError, match=r"(?s)not in the local cache.*switched off.*alambic bases pull"):
        resolve(ID, kinds=("decoder",))
    assert server.tokens == []


def test_hub_out_of_reach_is_said(server, monkeypatch):
    server.shutdown()
    server.server_close()
    with pytest.raises(BaseModelError, match=r"(?s)cannot be reached.*HF_ENDPOINT"):
        pull()
