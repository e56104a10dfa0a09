"""`alambic serve` as a process, on a sealed bundle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from alambic.bundle import Bundle, seal
from alambic.errors import BundleError
from alambic.manifest import Golden, Manifest, PartSpec
from alambic.serve.models import find_report, load

Start = Callable[..., "subprocess.Popen[str]"]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send")


def _seal(folder: Path, name: str = "tickets") -> Bundle:
    (folder / "model").mkdir(parents=True)
    np.save(folder / "model" / "bias.npy", np.log(np.array([0.2, 0.8], dtype=np.float32)))
    score = {"value": 0.8, "low": 0.7, "high": 0.9}
    manifest = Manifest(
        alambic="0.1.0",
        name=name,
        created="2026-01-01T00:00:00Z",
        labels=("facture", "délai"),
        entry="model",
        parts=(PartSpec("model", "majority", "model"),),
        candidate="majority",
        scores={"test": {"n": 40, "macro_f1": score}},
        golden=(Golden(text="Où est mon colis ?", ids=(), probabilities=(0.2, 0.8)),),
    )
    return seal(folder, manifest)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return _seal(tmp_path / "run" / "bundle").path


@pytest.fixture
def start() -> Iterator[Start]:
    """Start servers that are stopped at the end."""
    processes: list[subprocess.Popen[str]] = []

    def run(*arguments: object, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "alambic", "serve", *map(str, arguments), "--port", "0", "--json"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, text=True, env=os.environ | environment, **pipes)  # type: ignore[call-overload]
        processes.append(process)
        return process  # type: ignore[no-any-return]

    yield run
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def _url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    url: str = json.loads(process.stdout.readline())["url"]
    return url


def _stop(process: subprocess.Popen[str]) -> str:
    """Stop a server that must end well, and return its stderr."""
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    return err


def test_serve_answers_for_a_sealed_bundle(start: Start, bundle: Path) -> None:
    process = start(bundle)
    url = _url(process)
    answer = httpx.post(f"{url}/v1/classify", json={"input": "Bonjour"}, timeout=60, trust_env=False).json()
    assert answer["data"][0]["prediction"] == "délai"
    assert answer["data"][0]["confidence"] == pytest.approx(0.8, abs=1e-4)
    assert _stop(process) == f"tickets on {url} (Ctrl-C stops it)\n"


def test_serve_shows_the_report_when_it_lies_beside_the_bundle(start: Start, bundle: Path) -> None:
    (bundle.parent / "report.html").write_text("<h1>report</h1>")
    process = start(bundle)
    assert httpx.get(f"{_url(process)}/report", timeout=60, trust_env=False).text == "<h1>report</h1>"


def test_serve_never_prints_the_key_when_one_is_set(start: Start, bundle: Path) -> None:
    process = start(bundle, ALAMBIC_API_KEY="s3cret-key")
    url = _url(process)
    assert httpx.get(f"{url}/v1/models", timeout=60, trust_env=False).status_code == 401
    headers = {"Authorization": "Bearer s3cret-key"}
    assert httpx.get(f"{url}/v1/models", headers=headers, timeout=60, trust_env=False).status_code == 200
    assert "s3cret" not in _stop(process)


def test_serve_warns_when_bound_elsewhere_without_a_key(start: Start, bundle: Path) -> None:
    process = start(bundle, "--host", "0.0.0.0")
    url = _url(process)
    assert httpx.get(f"{url}/health", headers={"Host": "box.example"}, timeout=60, trust_env=False).status_code == 200
    assert f"note: anyone who can reach {url} may use it; set ALAMBIC_API_KEY to ask for a key" in _stop(process)


@pytest.mark.parametrize(("host", "status"), [("proxy.example", 200), ("evil.example", 421)])
def test_serve_accepts_a_host_name_when_allowed(start: Start, bundle: Path, host: str, status: int) -> None:
    url = _url(start(bundle, "--allow-host", "Proxy.example"))
    assert httpx.get(f"{url}/health", headers={"Host": host}, timeout=60, trust_env=False).status_code == status


def test_serve_fails_plainly_when_the_bundle_is_missing(start: Start, tmp_path: Path) -> None:
    process = start(tmp_path / "nothing")
    out, err = process.communicate(timeout=60)
    assert (out, process.returncode) == ("", 1)
    assert f"error: {tmp_path / 'nothing'}: no such bundle" in err


def test_load_reads_the_facts_of_the_manifest(bundle: Path) -> None:
    with load([bundle]) as models:
        card = models["tickets"].card("tickets")
    assert card["created"] == 1_767_225_600
    assert card["alambic"]["examples"] == ("Où est mon colis ?",)
    assert card["alambic"]["scores"] == {"n": 40, "metrics": {"macro_f1": {"value": 0.8, "low": 0.7, "high": 0.9}}}
    assert (card["alambic"]["split"], card["alambic"]["candidate"]) == ("test", "majority")


def test_load_refuses_when_two_bundles_have_one_name(bundle: Path, tmp_path: Path) -> None:
    twin = _seal(tmp_path / "twin").path
    with pytest.raises(BundleError, match="'tickets' is served already"), load([bundle, twin]):
        pass


def test_load_serves_both_when_names_differ(bundle: Path, tmp_path: Path) -> None:
    with load([bundle, _seal(tmp_path / "other", "other").path]) as models:
        assert list(models) == ["tickets", "other"]


def test_find_report_is_none_when_the_run_has_none(bundle: Path) -> None:
    assert find_report(bundle) is None
