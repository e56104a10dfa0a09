"""Fetching a base from a hub on this machine: resumed, hash-checked, broken, killed in the middle."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import fake_hub
from alambic.errors import BaseModelError
from alambic.events import Note, Progress, drain
from alambic.model import hub
from fake_hub import COMMIT, ID, base_files, described, partial, pull, repository, running_hub


@pytest.fixture
def server(monkeypatch, tmp_path):
    yield from running_hub(monkeypatch, tmp_path)


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
    monkeypatch.setattr(
        fake_hub, "described", lambda name, data: wrong if name == "tokenizer.json" else honest(name, data)
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
    server.files, server.slow_after = base_files(megabytes=40), 10_000_000  # the rest would take half a minute
    work = hub.pull(ID)
    while not (isinstance(event := next(work), Progress) and event.done > 0):
        pass
    work.close()
    assert len(partial(tmp_path)) == 1 and server.sent < len(server.files["model.safetensors"])


def environment(server, tmp_path, **more):
    keep = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return {**keep, "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", **more}


def command(*words):
    return [sys.executable, "-m", "alambic", "bases", *words]


def size_of(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:  # whole by now, under its own name
        return 0


def test_pull_goes_on_after_kill_9(server, tmp_path):
    server.files, server.slow_after = base_files(megabytes=40), 10_000_000  # the rest would take half a minute
    size = len(server.files["model.safetensors"])
    env = environment(server, tmp_path)
    running = subprocess.Popen(command("pull", ID), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    blobs = tmp_path / "hf" / "hub" / "models--someone--small-model" / "blobs"
    while not any(size_of(path) > 1_000_000 for path in blobs.glob("*.incomplete")):  # the weights, no small file
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    folder = tmp_path / "hf" / "hub" / "models--someone--small-model"
    kept = next((folder / "blobs").glob("*.incomplete")).stat().st_size
    assert 0 < kept < size and not (folder / "refs").exists()

    server.slow_after, server.ranges = None, []
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
