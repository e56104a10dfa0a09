"""Fetching a base from a hub on this machine: resumed, hash-checked, gated, broken, killed in the middle."""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save

from alambic.errors import BaseModelError
from alambic.events import Note, Progress, drain
from alambic.model import hub
from alambic.model.bases import resolve

ID = "someone/small-model"
COMMIT = "c" * 40
OTHER = "d" * 40
CONFIG = {"model_type": "llama", "hidden_size": 32, "max_position_embeddings": 64}


def base_files(megabytes=1):
    rows = np.arange(megabytes * 250_000, dtype=np.float32)
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "tokenizer.json": b"{}",
        "README.md": b"---\nlicense: mit\nlanguage: fr\n---\n",
        "model.safetensors": save({"w": rows}),
        "pytorch_model.bin": b"a pickle",
        "modeling_evil.py": b"import os",
        "onnx/model.onnx": b"graph",
        "original/params.json": b"{}",
    }


class FakeHub(ThreadingHTTPServer):
    """Speaks the part of the Hub that a download needs: model information, resolve, a store behind a redirect."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = base_files()
        self.refuse = None  # (status, X-Error-Code) for every file
        self.refuse_info = None
        self.commit = COMMIT
        self.gated = False
        self.cut_after = []  # bytes after which a transfer breaks, one entry a transfer
        self.ignores_range = False
        self.corrupt = False
        self.busy = 0  # answers of 429 before the store serves
        self.describes = True  # tells sizes and hashes in the listing
        self.token = None
        self.delay = 0.0  # seconds between 64 kB
        self.ranges, self.asked, self.tokens, self.sent = [], [], [], 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        server, path = self.server, unquote(urlsplit(self.path).path)
        server.tokens.append(self.headers.get("Authorization"))
        if found := re.fullmatch(rf"/api/models/{ID}(?:/revision/(.+))?", path):
            self.information(found[1])
        elif found := re.fullmatch(rf"/{ID}/resolve/([^/]+|refs/pr/\d+)/(.+)", path):
            self.resolve(found[2], body=body)
        elif found := re.fullmatch(r"/store/(.+)", path):
            self.store(found[1])
        else:
            self.refusal(404, "RepoNotFound")

    def information(self, revision):
        server = self.server
        if server.refuse_info:
            return self.refusal(*server.refuse_info)
        if revision not in (None, "main", "v1", "refs/pr/7", COMMIT):
            return self.refusal(404, "RevisionNotFound")
        siblings = [{"rfilename": name, **(described(name, data) if server.describes else {})}
                    for name, data in server.files.items()]  # fmt: skip
        self.reply(
            200, json.dumps({"id": ID, "sha": server.commit, "gated": server.gated, "siblings": siblings}).encode()
        )

    def resolve(self, name, *, body):
        server = self.server
        if server.refuse:
            return self.refusal(*server.refuse)
        if server.token is not None and self.headers.get("Authorization") != f"Bearer {server.token}":
            return self.refusal(401, "GatedRepo")
        if name not in server.files:
            return self.refusal(404, "EntryNotFound")
        data, facts = server.files[name], described(name, server.files[name])
        headers = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if "lfs" in facts:
            headers |= {"X-Linked-Etag": f'"{facts["lfs"]["sha256"]}"', "X-Linked-Size": str(len(data)),
                        "Location": f"{server.url}/store/{name}"}  # fmt: skip
            return self.reply(302, b"", **headers)
        if body:
            server.asked.append(name)
        self.reply(200, data, ETag=f'"{facts["blobId"]}"', **headers)

    def store(self, name):
        server = self.server
        data = server.files[name]
        if server.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if server.busy:
            server.busy -= 1
            return self.reply(429, b"", **{"Retry-After": "7"})
        asked = self.headers.get("Range")
        server.asked.append(name)
        server.ranges.append(asked)
        start = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked and not server.ignores_range else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        stop = min(len(data), start + server.cut_after.pop(0)) if server.cut_after else len(data)
        for at in range(start, stop, 65536):
            piece = data[at : min(at + 65536, stop)]
            try:
                self.wfile.write(piece)
            except OSError:
                break
            server.sent += len(piece)
            time.sleep(server.delay)
        if stop < len(data):
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()

    def refusal(self, status, code):
        self.reply(status, b"", **{"X-Error-Code": code})

    def reply(self, status, data, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle(self):
        with contextlib.suppress(OSError, ValueError):
            super().handle()

    def log_message(self, *args):
        pass


def described(name, data):
    """The facts that the Hub's listing gives of a file."""
    oid = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    large = name.endswith((".safetensors", ".bin"))
    lfs = {"lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}} if large else {}
    return {"size": len(data), "blobId": oid, **lfs}


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub on loopback; the client's settings, read once on import, point to it."""
    fake = FakeHub()
    thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", fake.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub, "_FIRST_WAIT_S", 0.0)
    yield fake
    fake.shutdown()
    fake.server_close()
    thread.join()


def pull(**options):
    return drain(hub.pull(ID, **options))


def repository(tmp_path):
    return tmp_path / "hub" / "models--someone--small-model"


def partial(tmp_path):
    return [path.name for path in (repository(tmp_path) / "blobs").glob("*.incomplete")]


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
    monkeypatch.setitem(
        globals(), "described", lambda name, data: wrong if name == "tokenizer.json" else honest(name, data)
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


# ---- broken transfers ------------------------------------------------------------------------------------------------


def test_transfer_that_breaks_goes_on_where_it_stopped(server):
    server.cut_after = [300_000, 200_000]
    pulled = pull()
    assert (pulled.folder / "model.safetensors").read_bytes() == server.files["model.safetensors"]
    assert server.ranges == [None, "bytes=300000-", "bytes=500000-"]


def test_busy_store_is_asked_again_after_what_it_says(server, monkeypatch):
    waits = []
    monkeypatch.setattr(hub.time, "sleep", waits.append)
    server.busy = 2
    assert (pull().folder / "model.safetensors").read_bytes() == server.files["model.safetensors"]
    assert [wait for wait in waits if wait >= 1] == [7.0, 7.0]


def test_two_pulls_at_once_fetch_each_file_once(server):
    server.delay = 0.01
    done = []
    threads = [threading.Thread(target=lambda: done.append(pull())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.folder for one in done] == [done[0].folder] * 2
    assert sorted(server.asked) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]


def test_later_pull_goes_on_where_an_earlier_one_gave_up(server, tmp_path):
    server.cut_after = [400_000, *[0] * 60]
    with pytest.raises(BaseModelError, match=r"(?s)connection broke.*goes on where it stopped"):
        pull()
    assert len(partial(tmp_path)) == 1 and hub.find_cached(ID) is None
    server.cut_after, server.ranges = [], []
    pulled = pull()
    assert server.ranges == ["bytes=400000-"]
    assert pulled.fetched_bytes == len(server.files["model.safetensors"]) - 400_000
    assert partial(tmp_path) == []


def test_server_that_ignores_ranges_is_read_from_the_start(server):
    server.cut_after, server.ignores_range = [300_000], True
    pulled = pull()
    assert (pulled.folder / "model.safetensors").read_bytes() == server.files["model.safetensors"]


def test_damaged_partial_file_is_found_by_its_hash_and_removed(server, tmp_path):
    blobs = repository(tmp_path) / "blobs"
    blobs.mkdir(parents=True)
    name = described("model.safetensors", server.files["model.safetensors"])["lfs"]["sha256"]
    (blobs / f"{name}.alambic.incomplete").write_bytes(b"x" * 1000)
    with pytest.raises(BaseModelError, match="its SHA-256 is"):
        pull()
    assert partial(tmp_path) == []
    assert (pull().folder / "model.safetensors").read_bytes() == server.files["model.safetensors"]


def test_file_that_is_not_what_the_hub_states_is_refused(server, tmp_path):
    server.corrupt = True
    said = r"(?s)model.safetensors: its SHA-256 is [0-9a-f]{64}, the Hub said [0-9a-f]{64}; what was fetched is removed"
    with pytest.raises(BaseModelError, match=said):
        pull()
    assert hub.find_cached(ID) is None and partial(tmp_path) == []
    assert not list(repository(tmp_path).glob("snapshots/*/model.safetensors"))


def test_small_file_is_checked_by_its_git_hash(server, monkeypatch):
    honest = described
    wrong = {"size": 2, "blobId": "0" * 40}
    monkeypatch.setitem(
        globals(), "described", lambda name, data: wrong if name == "tokenizer.json" else honest(name, data)
    )
    with pytest.raises(BaseModelError, match=r"tokenizer.json: its SHA-1 is [0-9a-f]{40}, the Hub said 0{40}"):
        pull()


def test_damaged_blob_of_the_cache_is_fetched_again(server):
    path = pull().folder / "model.safetensors"
    path.resolve().write_bytes(b"x" * len(server.files["model.safetensors"]))
    pull()
    assert path.read_bytes() == server.files["model.safetensors"]


def test_hash_that_the_user_gives_is_held_too(server):
    with pytest.raises(BaseModelError, match=r"its SHA-256 is [0-9a-f]{64}, you said 0{64}"):
        pull(sha256={"model.safetensors": "0" * 64})
    right = hashlib.sha256(server.files["model.safetensors"]).hexdigest().upper()
    assert pull(sha256={"model.safetensors": right}).commit == COMMIT


@pytest.mark.parametrize(
    ("given", "said"),
    [({"model.safetensors": "abc"}, "64 hexadecimal digits"), ({"x": "0" * 64}, "not among the files to fetch")],
)
def test_hash_that_cannot_be_one_is_refused_before_anything_is_fetched(server, given, said):
    with pytest.raises(BaseModelError, match=said):
        pull(sha256=given)
    assert server.asked == []


def test_no_room_is_said_before_anything_is_fetched(server, monkeypatch):
    monkeypatch.setattr(hub, "_SPARE_BYTES", 10**18)
    with pytest.raises(BaseModelError, match=r"(?s)are to be fetched, and .* GB are free.*HF_HOME"):
        pull()
    assert server.asked == []


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


# ---- telling, stopping, killing --------------------------------------------------------------------------------------


def test_progress_is_told_and_nothing_is_printed(server, capfd):
    server.files, server.delay = base_files(megabytes=4), 0.01
    events = []
    drain(hub.pull(ID), events.append)
    told = [event for event in events if isinstance(event, Progress)]
    assert told and all(event.total == 4 and 0 <= event.done <= 4 for event in told)
    assert [event.done for event in told] == sorted(event.done for event in told)
    assert any("4 files, 4 MB to fetch" in event.message for event in events if isinstance(event, Note))
    assert capfd.readouterr() == ("", "")


def test_closing_the_work_stops_the_transfer(server, tmp_path):
    server.files, server.delay = base_files(megabytes=20), 0.005
    work = hub.pull(ID)
    while not (isinstance(event := next(work), Progress) and event.done > 0):
        pass
    begun = time.monotonic()
    work.close()
    assert time.monotonic() - begun < 3
    assert len(partial(tmp_path)) == 1 and server.sent < len(server.files["model.safetensors"])


def environment(server, tmp_path, **more):
    keep = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return {**keep, "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", **more}


def command(*words):
    return [sys.executable, "-m", "alambic", "bases", *words]


def test_pull_goes_on_after_kill_9(server, tmp_path):
    server.files, server.delay = base_files(megabytes=30), 0.01
    size = len(server.files["model.safetensors"])
    env = environment(server, tmp_path)
    running = subprocess.Popen(command("pull", ID), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while server.sent < 5_000_000:
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    folder = tmp_path / "hf" / "hub" / "models--someone--small-model"
    kept = next((folder / "blobs").glob("*.incomplete")).stat().st_size
    assert 0 < kept < size and not (folder / "refs").exists()

    server.delay, server.ranges = 0.0, []
    again = subprocess.run(command("pull", ID, "--json"), env=env, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert server.ranges == [f"bytes={kept}-"]
    told = json.loads(again.stdout)
    assert told["fetched_bytes"] == size - kept
    assert (Path(told["folder"]) / "model.safetensors").read_bytes() == server.files["model.safetensors"]


def test_environment_of_the_hub_client_is_respected(server, tmp_path):
    server.token = "hf_secret"
    env = environment(server, tmp_path, HF_TOKEN="hf_secret")
    done = subprocess.run(command("pull", ID), env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Bearer hf_secret" in server.tokens and "hf_secret" not in done.stdout + done.stderr
    asked = len(server.tokens)
    shown = subprocess.run(
        command("show", ID), env={**env, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0 and str(tmp_path / "hf") in shown.stdout
    refused = subprocess.run(
        command("pull", ID), env={**env, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1 and "switched off" in refused.stderr
    assert len(server.tokens) == asked
