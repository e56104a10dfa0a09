"""What every test gets: a home of its own, and no socket beyond this machine."""

import os
import socket
from collections import Counter
from pathlib import Path

# Tests run in two processes (make test). Two times two threads of torch would get nothing done on two cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

_LOOPBACK = ("127.", "::1", "localhost")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Put the files with the most slow tests first: none begins when the other process has nothing left to do."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


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
