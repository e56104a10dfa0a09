"""What every test gets: a home of its own, and no socket beyond this machine."""

import gc
import os
import socket
import sys
from collections import Counter
from pathlib import Path

# Tests run in two processes (make test). Two times two threads of torch would get nothing done on two cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from alambic._extras import hide_telemetry

# Before any test file imports OpenVINO by itself: it would report each conversion from a process of its own.
hide_telemetry()

_LOOPBACK = ("127.", "::1", "localhost")


# Files of a quarter of a minute and more on two cores, the longest first (pytest --durations=0 tells).
LONGEST = (
    "test_offline.py", "test_build_processes.py", "test_families.py", "test_pack_writer.py", "test_build_distilled.py",
    "test_build_trained.py", "test_guessing.py", "test_build_chain.py", "test_chat_page.py", "test_abstain.py",
    "test_sft_processes.py", "test_scratch.py", "test_tagger.py", "test_audit_base.py", "test_sft_train.py",
    "test_engine_graph.py", "test_arithmetic.py", "test_pack_writer_exports.py", "test_writer_proof.py",
)  # fmt: skip


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Put the longest files first, then others with slow tests: none begins when the other process is at its end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (place.get(item.path.name, len(place)), -slow[item.path]))


_settled = [0]


def pytest_runtest_setup():
    """Take what was imported out of the collector's rounds: with torch, each of an export took a quarter second."""
    if len(sys.modules) > _settled[0] + 100:
        gc.collect()
        gc.freeze()
        _settled[0] = len(sys.modules)


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory, monkeypatch):
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return home


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch):
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family != getattr(socket, "AF_UNIX", None) and not str(address[0]).startswith(_LOOPBACK):
            raise AssertionError(f"a test opened a socket to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public data sets beside the checkout; most users have none."""
    folder = Path(os.environ.get("ALAMBIC_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("public data sets are not there (set ALAMBIC_SHARED_DATA to their folder)")
    return folder
