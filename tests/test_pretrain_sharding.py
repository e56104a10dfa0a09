"""Weights cut over two processes (FSDP): the training, its checkpoints and its model are those of one process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from alambic.errors import MissingExtra, ProcessLost, TrainError
from alambic.events import Note, drain
from alambic.train.distributed import exchanging
from alambic.train.pretrain import pretrain
from alambic.train.pretrain_muon import ShardedMuon
from alambic.train.pretrain_sharding import Replicated, place, reshards
from pretrain_shards import curve, lines, make_corpus
from sharded_training import BASE, PARAMS, replace, train

LAUNCHERS = {
    "accelerate": ["-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}
KINDS = {
    "adamw": {"optimizer": "adamw"},
    "muon": {"optimizer": "muon"},
    "masked": {"optimizer": "adamw", "objective": "masked"},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def launch(launcher, corpus, out, jobs):
    """Have `launcher` start two processes that train each of `jobs` with cut weights."""
    script = str(Path(__file__).parent / "sharded_training.py")
    jobs = {name: {**job, "changes": {**job["changes"], "sharding": "full"}} for name, job in jobs.items()}
    return subprocess.run(
        [sys.executable, *LAUNCHERS[launcher], script, str(corpus), str(out), json.dumps(jobs)],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def cut(corpus, tmp_path_factory):
    """Every kind trained by two processes, and a run of which both are killed after step 7."""
    out = tmp_path_factory.mktemp("cut")
    jobs = {name: {"changes": changes} for name, changes in KINDS.items()}
    ended = launch("accelerate", corpus, out, {**jobs, "killed": {"changes": KINDS["muon"], "stop": 7}})
    assert ended.returncode and "Signal 9" in ended.stderr and "UserWarning" not in ended.stderr, ended.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, {name: train(corpus, out / name, changes) for name, changes in KINDS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_curve_and_model_are_those_of_one_process_when_weights_are_cut(cut, whole, kind):
    out, results = whole
    ours, theirs = curve(cut / kind), curve(out / kind)
    assert [step for step, *_ in ours] == list(range(1, 13)) and lines(cut / kind, "run")[0]["processes"] == 2
    # Muon's products are in bf16 and make a little of the order in which gradients are added up. Two processes with
    # whole weights are as far from one: 3e-4 (loss), 0.02 (norm), 0.03 (weights), seen once.
    exact = kind != "muon"
    for column, near in ((1, 1e-4 if exact else 1e-3), (2, 1e-4 if exact else 0.05)):
        assert [line[column] for line in ours] == pytest.approx([line[column] for line in theirs], rel=near)
    assert theirs[0][2] > PARAMS.clip  # so the norm is that over both processes, or the losses would differ
    valid = [[line["bits_per_byte"] for line in lines(folder / kind, "valid")] for folder in (cut, out)]
    assert len(valid[0]) == 3 and valid[0] == pytest.approx(valid[1], rel=1e-3)
    assert sorted(p.name for p in (cut / kind).iterdir()) == sorted(p.name for p in (out / kind).iterdir())
    assert (cut / kind / "config.json").read_text() == (out / kind / "config.json").read_text()
    assert json.loads((cut / kind / "training.json").read_text())["parameters"] == results[kind].parameters
    one, two = (load_file(folder / kind / "model.safetensors") for folder in (cut, out))
    assert one.keys() == two.keys()
    for name, value in two.items():
        assert (one[name] - value).norm() < (1e-4 if exact else 0.06) * value.norm()


@pytest.mark.slow
def test_process_holds_half_of_everything_when_two_cut_it(cut):
    one, two = (json.loads((cut / f"held-{rank}.json").read_text()) for rank in (0, 1))
    assert set(one) == {"weights", "gradients", "states"}
    for name, (here, everything) in one.items():
        assert here + two[name][0] == everything and 0.4 < here / everything < 0.6


@pytest.mark.slow
def test_killed_run_goes_on_with_the_same_losses_when_weights_are_cut(cut, whole, corpus, tmp_path):
    assert not (cut / "killed").exists()
    shutil.copytree(cut / "killed.run", tmp_path / "killed.run")
    shutil.copytree(cut / "killed.run", tmp_path / "alone.run")
    ended = launch("torchrun", corpus, tmp_path, {"killed": {"changes": KINDS["muon"]}})
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert lines(tmp_path / "killed", "resumed")[0]["step"] in (6, 7)
    assert curve(tmp_path / "killed") == curve(cut / "muon")
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "killed", cut / "muon"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # A checkpoint is whole: one process goes on from it, too, and as the same run.
    train(corpus, tmp_path / "alone", KINDS["muon"])
    losses = [[loss for _, loss, _ in curve(out)] for out in (tmp_path / "alone", whole[0] / "muon")]
    assert lines(tmp_path / "alone", "resumed") and losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.fixture
def alone():
    """A group of this process alone, so that what is cut over it can be looked at here."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_muon_of_cut_matrices_equals_that_of_torch_when_stepped(alone, shape):
    from torch.distributed.tensor import Shard, distribute_tensor

    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(shape, generator=generator) for _ in range(4))
    plain = torch.nn.Parameter(start.clone())
    cut = torch.nn.Parameter(distribute_tensor(start.clone(), alone, [Shard(0)]))
    given = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.95, "nesterov": True, "adjust_lr_fn": "match_rms_adamw"}
    ours, theirs = ShardedMuon([cut], **given), torch.optim.Muon([plain], **given)
    for gradient in gradients:
        plain.grad, cut.grad = gradient.clone(), distribute_tensor(gradient.clone(), alone, [Shard(0)])
        ours.step()
        theirs.step()
    torch.testing.assert_close(cut.full_tensor(), plain, rtol=1e-5, atol=1e-6)
    assert (plain - start).abs().max() > 0.1
    assert ours.state_dict()["state"][0].keys() == theirs.state_dict()["state"][0].keys()


def test_one_process_holds_everything_and_says_so_when_weights_are_to_be_cut(corpus, tmp_path):
    notes = []
    params = replace(PARAMS, sharding="full", tokens=160)
    work = pretrain(corpus / "shards", corpus / "tokenizer", params, tmp_path / "model", base=BASE)
    drain(work, lambda event: notes.append(event.message) if isinstance(event, Note) else None)
    assert any("there is one process, which holds the whole model" in note for note in notes)
    assert isinstance(place(type("Any", (), {"model": None})(), "full"), Replicated)
    assert params.identity() == replace(params, sharding="none").identity()
    with pytest.raises(TrainError, match="sharding = 'half'; allowed: none, full"):
        replace(params, sharding="half").checked()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params, which pretrain does not do"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp_activation_checkpointing, which"),
        ("FSDP_RESHARD_AFTER_FORWARD", "full_shard", "are not possible: .*full_shard"),
    ],
)
def test_setting_of_the_launcher_is_refused_when_it_would_do_nothing(monkeypatch, name, value, said):
    monkeypatch.setenv(name, value)
    with pytest.raises(TrainError, match=said):
        reshards()


@pytest.mark.parametrize(("value", "expected"), [(None, True), ("true", True), ("false", False)])
def test_launcher_decides_whether_blocks_are_dropped_when_it_says(monkeypatch, value, expected):
    if value is not None:
        monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", value)
    assert reshards() is expected


def test_older_torch_is_refused_when_weights_are_to_be_cut(monkeypatch):
    monkeypatch.delattr("torch.distributed.fsdp.FSDPModule.set_force_sum_reduction_for_comms")
    with pytest.raises(TrainError, match="needs a newer torch than"):
        reshards()


def test_missing_accelerate_is_named_when_weights_are_to_be_cut(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtra, match="needs accelerate"):
        reshards()


def test_lost_process_is_told_from_other_faults_when_it_computes_too():
    with pytest.raises(ProcessLost, match="another process of this build has ended"), exchanging():
        raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    with pytest.raises(RuntimeError, match="shape"), exchanging():
        raise RuntimeError("shape mismatch")
