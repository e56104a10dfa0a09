"""A build that learns preferences, in one process and in two: what a user sees, the same losses, and a clear end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import alambic
from alambic.build.crew import crew, processes, shared
from alambic.bundle import open_bundle
from alambic.errors import ProcessLost, TrainError
from alambic.train.distributed import _together
from alambic.train.lora import load_in_4_bits
from task_files import echo

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TASK = echo("""\
[base]
name = "scratch"
parameters = 150_000
max_tokens = 64
[answer]
max_tokens = 8
[preferences]
file = "pairs.jsonl"
learning_rate = 5e-4
epochs = 2
""")
CANDIDATE = '[[candidate]]\nname = "{}"\nrecipe = {{ epochs = {}, batch_size = 16, evaluations = 1 }}\n'
WORDS = ("alpha", "beta", "gamma", "delta", "omega", "sigma", "kappa", "theta", "zeta")
PAIRS = [(a, b) for a in WORDS for b in WORDS if a != b]


def write_task(folder, *candidates):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.csv").write_text("text,answer\n" + "".join(f"{a} {b},{b} {a}\n" for a, b in PAIRS), "utf-8")
    pairs = [{"prompt": f"{a} {b}", "chosen": f"{b} {a} !", "rejected": f"{b} {a} ?"} for a, b in PAIRS]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), "utf-8")
    (folder / "task.toml").write_text(TASK + "".join(CANDIDATE.format(*c) for c in candidates), "utf-8")
    return folder / "task.toml"


def alambic_build(task, run, *, launcher=(), more=()):
    command = [sys.executable, *launcher, "-m", "alambic", "build", str(task), "--out", str(run), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def ended(process):
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err[-3000:]
    return out, err


def stage(run, name):
    (path,) = (run / "stages").glob(f"{name}-*/stage.json")
    return json.loads(path.read_text("utf-8"))["result"]


def curve(run, name):
    return [point["dev"] for point in stage(run, name)["history"]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same trainings by one process and by two; one packs the model before the preferences too."""
    folder = tmp_path_factory.mktemp("crew")
    task = write_task(folder / "last", ("preferred-int8", 6))
    two = ended(alambic_build(task, folder / "two", launcher=TORCHRUN, more=("--json",)))
    task = write_task(folder, ("finetune-int8", 6), ("preferred-int8", 6))
    one = ended(alambic_build(task, folder / "one", more=("--json",)))
    return folder, one, two


def stages(run):
    return {path.name.rpartition("-")[0] for path in (run / "stages").iterdir()}


@pytest.mark.slow
def test_losses_of_two_processes_are_those_of_one_when_built(runs):
    folder, *_ = runs
    assert curve(folder / "two", "sft") == pytest.approx(curve(folder / "one", "sft"), rel=1e-2)
    assert curve(folder / "two", "dpo") == pytest.approx(curve(folder / "one", "dpo"), rel=3e-2)
    assert len(curve(folder / "one", "sft")) == 7 and curve(folder / "one", "dpo")[0] == pytest.approx(0.6931, abs=1e-3)


@pytest.mark.slow
def test_one_process_alone_speaks_and_writes_when_two_build(runs):
    folder, _, (out, err) = runs
    found = json.loads(out)  # one object: the other process printed nothing
    assert [c["name"] for c in found["candidates"]] == ["preferred-int8"] == [found["chosen"]]
    assert err.count("test: ") == 1 and err.count("predicted time") == 1 and "in 2 processes" in err
    assert not list((folder / "two" / "stages").glob("*.part"))
    alone = {name for name in stages(folder / "one") if not name.endswith(".finetune-int8")}
    assert stages(folder / "two") == alone | {"test.preferred-int8"}


@pytest.mark.slow
def test_preferences_are_measured_and_reported_when_built(runs):
    folder, (out, _), _ = runs
    result = json.loads(out)
    tuned, preferred = (candidate["preference"] for candidate in result["candidates"])
    assert preferred["against"] == "finetune-int8" and preferred["gained"]["value"] > 0.9
    assert preferred["n"] == tuned["n"] == preferred["accuracy"]["n"] and "gained" not in tuned
    assert preferred["accuracy"]["value"] >= tuned["accuracy"]["value"]
    assert any("against finetune-int8 the better answer gained" in line for line in result["sentences"])
    page = (folder / "one" / "report.html").read_text("utf-8")
    assert "Preferences (dev pairs)" in page and page.count("better answer gained") == 1
    with alambic.open(result["bundle"]) as writer:
        reply = writer.predict(["alpha beta"])[0]  # what so small a model writes is not the point
        assert reply.finish_reason in ("stop", "length") and reply.usage.completion_tokens > 0
    if result["chosen"] == "preferred-int8":
        assert open_bundle(result["bundle"]).manifest.data["preferences"]["rows"] > 0


@pytest.mark.slow
def test_training_on_pairs_goes_on_to_the_same_weights_when_killed(runs, tmp_path):
    folder, *_ = runs
    model = next((folder / "one" / "stages").glob("sft-*")) / "model"
    script = tmp_path / "dpo.py"
    script.write_text(
        KILLED.format(tests=str(Path(__file__).parent), pairs=str(folder / "pairs.jsonl"), model=str(model))
    )
    first, again = [], []
    whole = learn_pairs(folder / "pairs.jsonl", model, tmp_path / "whole", first.append)
    assert subprocess.run([sys.executable, str(script), str(tmp_path / "cut")]).returncode == -signal.SIGKILL
    resumed = learn_pairs(folder / "pairs.jsonl", model, tmp_path / "cut", again.append)
    assert [p.dev for p in resumed.history] == [p.dev for p in whole.history]
    assert again[0] == 5 and first[0] == 1


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_build_processes import learn_pairs
def listen(step):
    if step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
learn_pairs(Path({pairs!r}), Path({model!r}), Path(sys.argv[1]), listen)
"""


def learn_pairs(file, model, out, on_step):
    """Train `model` on the pairs of `file`; `on_step` hears of each step."""
    from alambic.data.pairs import read_pairs
    from alambic.events import Progress, drain
    from alambic.task import DataSpec
    from alambic.train.dpo import DpoParams, Pair, prefer_chats

    pairs = [Pair(p.prompt, p.chosen, p.rejected) for p in read_pairs(file, DataSpec(train="x")).dataset]
    params = DpoParams(epochs=1, batch_size=8, threads=1, learning_rate=5e-4, checkpoint_seconds=0.0)
    out.mkdir(exist_ok=True)
    work = prefer_chats(model, pairs[8:], pairs[:8], params=params, out=out / "model")
    return drain(work, lambda event: on_step(event.done) if isinstance(event, Progress) else None)


def child_of(process, rank):
    """Return the process that the launcher gave `rank`."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            names = (path / "environ").read_bytes().split(b"\0")
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == process.pid and f"RANK={rank}".encode() in names:
            return int(path.name)
    return None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found through /proc, which only Linux has")
def test_build_ends_with_a_clear_error_when_one_of_two_processes_is_killed(tmp_path):
    task = write_task(tmp_path, ("preferred-int8", 20_000))
    process = alambic_build(task, tmp_path / "run", launcher=TORCHRUN)
    until = time.monotonic() + 500
    while not list((tmp_path / "run" / "stages").glob("sft-*.part")):
        assert process.poll() is None and time.monotonic() < until, "the training did not begin"
        time.sleep(0.2)
    leader, other = child_of(process, 0), child_of(process, 1)
    os.kill(other, signal.SIGKILL)
    _, err = process.communicate(timeout=500)
    assert process.returncode != 0
    assert "another process of this build has ended" in err or "another of its processes has ended" in err, err[-3000:]
    assert "run the same command again" in err
    assert not Path(f"/proc/{leader}").exists()
    ended(alambic_build(task, tmp_path / "run", more=("--dry-run",)))  # the folder is free


def test_build_is_alone_without_torch_when_no_launcher_started_it(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes() == 1
    code = "import sys; from alambic.build.crew import crew\nwith crew() as leads: print(leads, 'torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["True", "False"]
    with crew() as leads:
        assert leads


def test_unknown_training_is_never_imported_when_ordered():
    with pytest.raises(alambic.AlambicError, match="unknown training 'os'"):
        next(shared("os"))


def test_loss_of_a_process_is_said_without_the_words_of_the_library():
    place = "[/pytorch/gloo/transport/tcp/pair.cc:553] "
    with pytest.raises(ProcessLost) as lost, _together():
        raise RuntimeError(f"{place}Connection closed by peer [127.0.0.1]:1. This is typically caused by ...")
    assert "another process of this build has ended (Connection closed by peer [127.0.0.1]:1)" in str(lost.value)


def test_qlora_refuses_an_encoder_decoder_before_anything_is_loaded(tmp_path):
    import torch

    (tmp_path / "config.json").write_text('{"model_type": "t5"}', encoding="utf-8")
    with pytest.raises(TrainError, match="'qlora' is for decoders"):
        load_in_4_bits(tmp_path, compute=torch.bfloat16)
