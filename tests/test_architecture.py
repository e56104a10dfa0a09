"""The import direction of the design, held by reading the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "alambic"

FOUNDATION = {"errors", "toml_file", "events", "_extras", "_registry"}
# Everything that makes a prompt does it through the one renderer.
# Package -> packages of ours it may import, besides the foundation and itself.
MAY_IMPORT = {
    "render": {"kinds"},
    "task": {"kinds", "task_tables"},
    "task_tables": {"kinds"},
    "pretrain_config": {"task_tables"},
    "kinds": set(),
    "data": {"kinds", "task", "pretrain_config"},
    "model": {"kinds", "data", "task", "pretrain_config", "bundle_cache"},
    "train": {"kinds", "data", "task", "pretrain_config", "model", "bundle", "manifest", "measure", "engines"},
    "pack": {"kinds", "data", "task", "model", "bundle", "manifest", "measure", "engines"},
    "bundle": {"kinds", "manifest", "bundle_cache", "bundle_file"},
    "bundle_cache": set(),
    "bundle_file": {"kinds", "bundle", "manifest", "bundle_cache"},
    "manifest": {"kinds"},
    "engines": {"kinds", "data", "bundle", "bundle_file", "manifest"},
    "measure": {"kinds", "data", "task", "bundle", "bundle_file", "manifest", "engines"},
    "report": {"kinds", "data", "task", "measure", "bundle", "manifest"},
    "serve": {"kinds", "bundle", "bundle_file", "manifest", "engines", "web", "measure"},
    "web": set(),
    "workspace": set(),
}
LIGHT = (
    "render",
    "bundle",
    "bundle_file",
    "manifest",
    "engines",
    "measure",
    "serve",
    "report",
    "kinds",
    "data",
    "task",
    "task_tables",
    "pretrain_config",
    "web",
)
HEAVY = {"torch", "transformers", "sklearn", "nncf", "accelerate", "peft"}


def modules():
    for path in sorted(SOURCE.rglob("*.py")):
        relative = path.relative_to(SOURCE).with_suffix("")
        yield relative.parts[0], path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "alambic":
                yield from (f"alambic.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_package_imports_only_what_the_design_allows_when_read(package):
    allowed = MAY_IMPORT[package] | FOUNDATION | {"render", package, "__init__", "__version__"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for own, path in modules()
        if own == package
        for name in imports(path)
        if name.startswith("alambic.") and name.split(".")[1] not in allowed
    ]
    assert wrong == []


@pytest.mark.parametrize("package", LIGHT)
def test_light_package_names_no_training_library_when_read(package):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for own, path in modules()
        if own == package and path.name != "torch.py"
        for name in imports(path)
        if name.split(".")[0] in HEAVY
    ]
    assert wrong == []


def test_nobody_imports_the_command_line_or_the_build_when_read():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for own, path in modules()
        if own not in ("cli", "__main__", "__init__", "build")
        for name in imports(path)
        if name.startswith(("alambic.cli", "alambic.build"))
    ]
    assert wrong == []


def test_openvino_and_nncf_have_one_door_when_read():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for _, path in modules()
        for name in imports(path)
        if name.split(".")[0] in ("openvino", "openvino_tokenizers", "nncf")
    ]
    assert wrong == []


def test_no_file_is_a_drawer_of_odds_and_ends():
    assert [p.name for _, p in modules() if p.stem in ("utils", "common", "helpers")] == []


def test_files_stay_under_five_hundred_lines():
    files = [*(path for _, path in modules()), *Path(__file__).parent.glob("*.py")]
    assert [p.name for p in files if len(p.read_text("utf-8").splitlines()) > 500] == []


def test_help_imports_no_heavy_library_when_asked():
    code = "import sys; from alambic.cli.main import cli; cli.main(['-h'], standalone_mode=False); " \
           "print([m for m in ('numpy', 'openvino', 'torch', 'pydantic', 'rich') if m in sys.modules])"  # fmt: skip
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "[]"


def test_files_that_start_first_are_there():
    from conftest import LONGEST

    assert [name for name in LONGEST if not (ROOT / "tests" / name).is_file()] == []
