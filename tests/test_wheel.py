"""The wheel holds what it needs, and works in an environment of its own, outside of the checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORDS = {
    "breakdown": ("leaks", "rattles", "stops", "smokes"),
    "billing": ("invoice", "refund", "charged", "paid"),
    "visit": ("monday", "appointment", "technician", "visit"),
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling", reason="the build back end is not installed (make setup does)")
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q"]
    run([*pip, "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(ROOT)], folder)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The `alambic` command of an environment that has the wheel, and sees the libraries of this one but not ours."""
    root = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", "--without-pip", str(root / "venv")], root)
    bin_dir = root / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    python = bin_dir / Path(sys.executable).name
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install", "-q"]
    run([*pip, "--no-deps", "--no-index", str(wheel)], root)
    site = Path(run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], root).stdout.strip())
    # A path in a .pth file is searched after the environment's own, and the .pth files in it are not read: the editable
    # install stays out.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return bin_dir / "alambic"


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / ".cache")}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def test_wheel_holds_every_file_of_the_package_when_built(wheel):
    source = ROOT / "src"
    expected = {
        path.relative_to(source).as_posix()
        for path in (source / "alambic").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = set(zipfile.ZipFile(wheel).namelist())

    assert {"alambic/py.typed", "alambic/model/bases.toml", "alambic/report/page.html"} <= expected
    assert {name for name in found if not name.startswith("alambic-")} == expected


def test_wheel_holds_the_licence_and_no_tests_when_built(wheel):
    names = zipfile.ZipFile(wheel).namelist()

    assert [name for name in names if name.endswith("licenses/LICENSE")]
    assert [name for name in names if name.startswith(("tests", "benchmarks", "examples"))] == []


def test_installed_package_is_not_the_checkout_when_run(installed, tmp_path):
    python = installed.with_name(Path(sys.executable).name)
    where = run([str(python), "-c", "import alambic; print(alambic.__file__)"], tmp_path).stdout

    assert str(ROOT / "src") not in where


def test_installed_command_writes_a_first_task_that_checks_when_asked(installed, tmp_path):
    assert "build" in run([str(installed), "-h"], tmp_path).stdout
    run([str(installed), "new", "first"], tmp_path)

    audit = json.loads(run([str(installed), "check", "first/task.toml", "--json"], tmp_path).stdout)
    assert audit


def test_installed_command_builds_and_predicts_when_outside_the_checkout(installed, tmp_path):
    rows = [
        f"the pump {words[i % 4]} {words[i // 4 % 4]} {i},{label}" for label, words in WORDS.items() for i in range(24)
    ]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows, ""]))
    (tmp_path / "task.toml").write_text(
        '[task]\nname = "t"\nkind = "classify"\n[data]\ntrain = "rows.csv"\ntext = "text"\nlabel = "label"\n'
        '[[candidate]]\nname = "majority"\n[[candidate]]\nname = "tfidf-svm"\n'
    )

    built = json.loads(run([str(installed), "build", "task.toml", "--json"], tmp_path).stdout)
    assert Path(built["report"]).is_absolute() or (tmp_path / built["report"]).is_file()
    answer = run([str(installed), "predict", built["bundle"], "the pump leaks", "--json"], tmp_path).stdout
    assert json.loads(answer)["prediction"] == "breakdown"
    run([str(installed), "verify", built["bundle"]], tmp_path)
