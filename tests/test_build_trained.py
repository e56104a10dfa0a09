"""A whole build that trains a tiny encoder: what ships is a neural bundle, and a kill in training changes nothing."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from alambic.bundle import open_bundle, verify
from linear_task import FILLER, WORDS, alambic, messages, write_task
from task_files import desk
from tiny_base import share_graphs, write_base

pytestmark = pytest.mark.slow

# accuracy decides, so that times measured do not: two builds must choose the same
TASK = desk("""\
[base]
name = "./base"
[budget]
prefer = "quality"
[[candidate]]
name = "majority"
[[candidate]]
name = "finetune"
recipe = { epochs = 12, batch_size = 8, learning_rate = 1e-4, few_shot = "off", checkpoint_seconds = 0.0 }
""")
ROWS = messages(20)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    path = write_task(folder, text=TASK, rows=ROWS)
    write_base(folder / "base", [*" ".join(WORDS.values()).split(), *FILLER])
    return path


def built(task, run):
    ended = alambic("build", task, "--out", run, "--json")
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


@pytest.fixture(scope="module")
def whole(task, tmp_path_factory):
    run = share_graphs(task.parent / "whole", tmp_path_factory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(task.parent / "home"))
        patch.setenv("XDG_CACHE_HOME", str(task.parent / "cache"))
        return run, built(task, run)


def test_trained_bundle_answers_without_the_training_stack(whole):
    run, record = whole
    assert record["chosen"] == "finetune"
    text = "the invoice refund charged"
    code = (
        "import sys, alambic\n"
        f"print(alambic.open({record['bundle']!r}).predict([{text!r}])[0].label)\n"
        "print([m for m in ('torch', 'transformers', 'sklearn') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, cwd=run)
    assert ended.stdout.split("\n")[:2] == ["billing", "[]"], ended.stderr


def weights(run):
    folders = sorted(run.glob("stages/finetune.*"))
    return {folder.name: load_file(folder / "model" / "model.safetensors") for folder in folders}


# Build, and kill this process when it puts the third checkpoint of a stage in its place.
KILLED = """
import os, signal, sys
from alambic.build import build

seen = 0
def hook(name, args):
    global seen
    if name == "os.rename" and str(args[1]).endswith(".checkpoint") and f"/{sys.argv[3]}-" in str(args[1]):
        seen += 1
        if seen == 3:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
build(sys.argv[1], out=sys.argv[2])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_build_ends_the_same_when_killed_in_training(task, whole, tmp_path_factory):
    run = share_graphs(task.parent / "killed", tmp_path_factory)
    for stage in ("finetune.fold1", "finetune.all"):
        command = [sys.executable, "-c", KILLED, str(task), str(run), stage]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert list(run.glob(f"stages/{stage}-*.part/*.checkpoint*"))
    again, first = built(task, run), whole[1]
    assert again["chosen"] == first["chosen"]
    for one, two in zip(first["candidates"], again["candidates"], strict=True):
        assert one["quality"] == two["quality"]
    kept, expected = weights(run), weights(whole[0])
    assert kept.keys() == expected.keys()
    for name, tensors in expected.items():
        assert all(torch.equal(tensors[key], kept[name][key]) for key in tensors), name
    assert verify(run / "bundle").seal == open_bundle(run / "bundle").manifest.seal
    assert alambic("predict", run / "bundle", "the invoice refund charged").out.startswith("billing\t")
