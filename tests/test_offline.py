"""Nothing leaves the machine: build and predict, children included, in a namespace without network and a new home.

An audit hook in every Python process writes down each attempt, and strace, where it is there, those of native
code. Plain processes, because NNCF leaves its telemetry out under pytest.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from alambic.model.bases_default import default_base

WATCH = """\
import os, sys

def watch(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        if args[0].family == 1:  # a Unix socket stays on the machine
            return
        what = args[1]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        what = args[0]
    else:
        return
    with open(os.environ["ATTEMPTS"], "a") as file:
        print(os.getpid(), event, what, file=file)

sys.addaudithook(watch)
"""
# Stands before the real NumPy on the path: phones home on import, hides that it failed, and hands over.
PLANT = """\
import socket, sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

try:
    socket.create_connection(("203.0.113.7", 443), timeout=0.2)
except OSError:
    pass
spec = PathFinder.find_spec("numpy", [p for p in sys.path if p != __file__.rpartition("/")[0]])
sys.modules["numpy"] = module = module_from_spec(spec)
spec.loader.exec_module(module)
"""
WORDS = {
    "breakdown": ("leaks", "rattles", "stops", "smokes"),
    "billing": ("invoice", "refund", "charged", "paid"),
    "visit": ("monday", "appointment", "technician", "visit"),
}
THINGS = ("oven", "fridge", "kettle", "dryer", "hob")
MOTS = {
    "panne": ("la fuite", "le bruit", "la fumée", "l'arrêt"),
    "facture": ("la facture", "le remboursement", "le prix", "le paiement"),
    "visite": ("la visite", "le rendez-vous", "le technicien", "la date"),
}
CHOSES = ("four", "frigo", "lave-linge", "séchoir", "robinet")
LINEAR = ("majority", "tfidf-svm")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")


@dataclass(frozen=True)
class Place:
    """A folder with a task, a home that is new, and the list of attempts."""

    root: Path

    @property
    def home(self) -> Path:
        return self.root / "home"

    def attempts(self) -> list[str]:
        file = self.root / "attempts"
        return file.read_text().splitlines() if file.exists() else []

    def in_home(self) -> set[str]:
        """Files and folders of the home, except ours and the folders that lead to it."""
        ours = {".cache", ".cache/alambic"}
        found = {str(path.relative_to(self.home)) for path in self.home.rglob("*")}
        return {path for path in found if path not in ours and not path.startswith(".cache/alambic/")}

    def run(self, *args: str, before: tuple[str, ...] = (), path: str = "", check: bool = True):
        env = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "TMPDIR": str(self.root / "tmp"),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(self.root / "watch"), path))),
            "ATTEMPTS": str(self.root / "attempts"),
            # Beside another process of tests, two threads of torch get nothing done on two cores (conftest.py).
            **{name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ},
        }
        command = [*no_network(), *before, sys.executable, *args]
        done = subprocess.run(command, cwd=self.root, env=env, capture_output=True, text=True, timeout=900)
        assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done

    def alambic(self, *args: str, **options):
        return self.run("-m", "alambic", *args, **options)


def no_network() -> tuple[str, ...]:
    unshare = shutil.which("unshare")
    for flags in ("-rn", "-n"):
        if unshare and subprocess.run([unshare, flags, "true"], capture_output=True).returncode == 0:
            return (unshare, flags)
    pytest.skip("no network namespace can be made here (unshare -rn)")


def tracing(log: Path) -> tuple[str, ...]:
    """What to put before a command so that its network calls, and its children's, end up in `log`; may be nothing."""
    command = ("strace", "-f", "--seccomp-bpf", "-e", "trace=network", "-o")
    if not shutil.which("strace") or subprocess.run([*command, os.devnull, "true"], capture_output=True).returncode:
        return ()
    return (*command, str(log))


def internet_calls(log: Path) -> list[str]:
    lines = log.read_text("utf-8", "replace").splitlines()
    assert any("exited with 0" in line for line in lines)
    # A socket that is only opened goes nowhere: libuuid reads the addresses of the network cards through one.
    return [line for line in lines if "AF_INET" in line and re.search(r"\b(connect|bind|send\w+)\(", line)]


def place(root: Path, candidates: tuple[str, ...], *, rows: list[tuple[str, str]], extra: str = "") -> Place:
    for folder in ("home", "tmp", "watch"):
        (root / folder).mkdir()
    (root / "watch" / "sitecustomize.py").write_text(WATCH)
    write_csv(root / "rows.csv", rows)
    head = '[task]\nname = "t"\nkind = "classify"\nthreads = 1\n[data]\ntrain = "rows.csv"\n'
    columns = 'text = "text"\nlabel = "label"\n'
    (root / "task.toml").write_text(
        head + columns + extra + "".join(f'[[candidate]]\nname = "{c}"\n' for c in candidates)
    )
    return Place(root)


def write_csv(path: Path, rows: list[tuple[str, str]]) -> None:
    path.write_text("\n".join(["text,label", *(",".join(row) for row in rows), ""]), "utf-8")


def english(n: int) -> list[tuple[str, str]]:
    """Return `n` rows of each label."""
    return [
        (f"the {THINGS[i % 5]} {words[i % 4]} {words[(i // 4 + 1) % 4]} since {i}", label)
        for label, words in WORDS.items()
        for i in range(n)
    ]


def french(n: int) -> list[tuple[str, str]]:
    """The same in French."""
    return [
        (f"{words[i % 4]} de mon {CHOSES[i % 5]} et {words[(i // 4 + 1) % 4]} depuis {i}", label)
        for label, words in MOTS.items()
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def linear(tmp_path_factory) -> Place:
    """A place where a linear bundle was built."""
    made = place(tmp_path_factory.mktemp("linear"), LINEAR, rows=english(24))
    made.alambic("build", "task.toml", "--out", "run")
    return made


def test_linear_build_and_predict_try_no_connection_when_there_is_no_network(linear):
    answer = linear.alambic("predict", "run/bundle", "the kettle leaks", "--json").stdout

    assert json.loads(answer)["prediction"] == "breakdown"
    assert linear.attempts() == []


def test_linear_build_leaves_only_our_cache_when_the_home_is_new(linear):
    assert linear.in_home() == set()
    assert (linear.home / ".cache" / "alambic").is_dir()


def test_build_leaves_no_temporary_file_when_it_ends(linear):
    assert list((linear.root / "tmp").iterdir()) == []


def test_system_calls_show_no_internet_socket_when_predicting(linear):
    calls = linear.root / "calls"
    if not (strace := tracing(calls)):
        pytest.skip("strace is not there, or may not trace")
    linear.alambic("predict", "run/bundle", "the kettle leaks", before=strace)

    assert internet_calls(calls) == []


PHONES = """\
from alambic.measure.probe import Request, run
run(Request("run/bundle", ("the kettle leaks",)))
"""


def test_a_dependency_that_phones_home_is_seen_in_children_too(linear):
    watched = Place(linear.root)
    planted = linear.root / "planted"
    planted.mkdir()
    (planted / "numpy.py").write_text(PLANT)
    try:
        watched.run("-c", "import numpy\n" + PHONES, path=str(planted))
        seen = watched.attempts()
    finally:
        (linear.root / "attempts").unlink(missing_ok=True)

    assert len({line.split()[0] for line in seen}) == 2, seen
    assert all("203.0.113.7" in line for line in seen)


ENGINES = """\
from alambic import _extras
for name in ("openvino", "openvino_tokenizers", "onnxruntime", "tokenizers"{build}):
    _extras.load(name)
"""


@pytest.mark.parametrize("build", ["", pytest.param(', "nncf", "transformers"', marks=pytest.mark.slow)])
def test_engine_libraries_neither_connect_nor_write_home_when_imported(tmp_path, build):
    if build:
        pytest.importorskip("nncf")
    made = place(tmp_path, LINEAR, rows=english(1))

    made.run("-c", ENGINES.format(build=build))

    assert made.attempts() == []
    assert made.in_home() == set()


def test_openvino_reports_home_when_not_loaded_through_our_door(tmp_path):
    if PathFinder.find_spec("openvino_telemetry") is None:  # the tests' own process hides it from import
        pytest.skip("openvino_telemetry is not installed")
    made = place(tmp_path, LINEAR, rows=english(1))

    def reported():
        return made.attempts() != [] or any("openvino_ga_cid" in path for path in made.in_home())

    for seconds in (1, 5, 25):  # it reports in a thread of its own, later on a busy machine
        made.run("-c", f"import openvino, time; time.sleep({seconds})", check=False)
        if reported():
            break
    assert reported()


# Two gradient steps on one split: enough to pass through training, export, quantisation and the proof.
SHORT = 'recipe = { steps = 2, few_shot = "off" }\n'


@pytest.mark.slow
def test_french_task_is_built_offline_on_the_encoder_for_its_language_when_there_is_no_network(tmp_path):
    """On the base that ships for French; where its package is not installed, on the one for English."""
    pytest.importorskip("torch")
    rows = french(12)
    made = place(tmp_path, ("finetune-int8",), rows=rows, extra='dev = "dev.csv"\n')
    dev = [(f"c'est pour {words[3]} ou pour {words[1]}", label) for label, words in MOTS.items()]
    write_csv(tmp_path / "dev.csv", dev)
    with (tmp_path / "task.toml").open("a") as task:
        task.write(SHORT)

    strace = tracing(tmp_path / "calls")
    built = made.alambic("build", "task.toml", "--out", "run", before=strace)
    answer = made.alambic("predict", "run/bundle", rows[0][0], "--json").stdout

    assert f"base = {default_base([text for text, _ in rows]).name!r}" in built.stderr
    assert json.loads(answer)["prediction"] in MOTS
    assert made.attempts() == []
    assert not strace or internet_calls(tmp_path / "calls") == []
    assert made.in_home() == set()
