"""Several processes train as one does: same rows, same divisor, same curve."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alambic.errors import TrainError
from alambic.events import Progress, drain
from alambic.model.clone import clone
from alambic.train.distributed import World, joined, total, world
from alambic.train.sft import SftParams, finetune_chats
from writing_task import swaps

SCRIPT = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_sft_processes import train
    train(Path({base!r}), {method!r}, Path(sys.argv[1]), Path(sys.argv[2]))
"""
# Accelerate's own launcher of several CPU processes; on GPUs `accelerate launch` is torchrun.
BY_ACCELERATE = (
    "import runpy, sys; from accelerate import debug_launcher; sys.argv = sys.argv[1:]; "
    "debug_launcher(lambda: runpy.run_path(sys.argv[0]), num_processes=2)"
)
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["-c", BY_ACCELERATE],
}


def test_process_is_alone_when_the_environment_names_no_other():
    with joined({}) as place:
        assert place == World(0, 1) == world()
        assert place.share([1, 2, 3]) == [1, 2, 3] and total([2.5]) == [2.5]
    assert World(1, 3).share(list(range(8))) == [1, 4, 7] and not World(1, 3).writes


def test_unreachable_processes_are_an_error_when_joined(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(TrainError, match="cannot meet"), joined({"WORLD_SIZE": "2"}):
        pass


def train(base, method, out, told):
    """Train in as many processes as there are; the one that writes tells the losses."""
    torch.set_num_threads(1)
    chats, losses = swaps(), []
    params = SftParams(epochs=2, learning_rate=3e-3, batch_size=9, threads=1, method=method)
    with joined() as place:
        work = finetune_chats(base, chats[8:], chats[:8], params=params, out=out)
        result = drain(work, lambda e: losses.append(e.values["loss"]) if isinstance(e, Progress) else None)
        if place.writes:
            dev = [point.dev for point in result.history]
            told.write_text(json.dumps({"size": place.size, "losses": losses, "dev": dev}))


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("launcher", "method"), [("torchrun", "full"), ("accelerate", "lora")])
def test_loss_curve_equals_that_of_one_process_when_two_train(tmp_path, launcher, method):
    clone("llama-3.2-1b", tmp_path / "base", width=32)
    script = tmp_path / "train.py"
    text = textwrap.dedent(SCRIPT)
    script.write_text(text.format(tests=str(Path(__file__).parent), base=str(tmp_path / "base"), method=method))
    train(tmp_path / "base", method, tmp_path / "one", tmp_path / "one.json")
    command = [sys.executable, *LAUNCHERS[launcher], str(script), str(tmp_path / "two"), str(tmp_path / "two.json")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")}
    assert (found["one"]["size"], found["two"]["size"]) == (1, 2)
    assert len(found["one"]["losses"]) == len(found["two"]["losses"]) == 12
    assert found["two"]["losses"] == pytest.approx(found["one"]["losses"], rel=5e-3)
    assert found["two"]["dev"] == pytest.approx(found["one"]["dev"], rel=5e-3)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0.1, atol=0.02)
