"""A pre-training from shards to a Model directory: it learns, goes on after a kill, and says what is wrong."""

import json
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alambic.errors import TrainError
from alambic.events import Note, Progress, drain
from alambic.model.decoder import Decoder
from alambic.train.pretrain import pretrain
from alambic.train.pretrain_params import PretrainParams
from pretrain_shards import curve, lines, make_corpus

PARAMS = PretrainParams(
    hidden=32, layers=2, heads=2, context=32, tokens=40 * 128, batch_tokens=128, micro_tokens=64, threads=1,
    checkpoint_minutes=1e-9, valid_every=10 * 128, valid_tokens=64, learning_rate=1e-2, muon_rate=1e-2, decay=0.25,
)  # fmt: skip
# Products in bf16, those of Muon among them, make a little of the order in which gradients are added up.
EXACT = replace(PARAMS, precision="f32", optimizer="adamw")
BASE = {"name": "tiny", "licence": "CC0"}
SCRIPT = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from alambic.events import Progress, drain
    from alambic.train.distributed import joined
    from alambic.train.pretrain import pretrain
    from test_pretrain_run import BASE, EXACT, PARAMS
    folder, out, stop = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    params = PARAMS if stop > 0 else EXACT
    def on(event):
        if isinstance(event, Progress) and event.done == stop:
            os.kill(os.getpid(), signal.SIGKILL)
    with joined():
        drain(pretrain(folder / "shards", folder / "tokenizer", params, out, base=BASE), on)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def start(corpus, out, params=PARAMS):
    return pretrain(corpus / "shards", corpus / "tokenizer", params, out, base=BASE)


@pytest.fixture(scope="module")
def whole(corpus):
    out = corpus / "whole"
    return drain(start(corpus, out))


def test_model_learns_and_opens_as_a_decoder_when_trained(whole, corpus):
    losses = [loss for _, loss, _ in curve(whole.model)]
    assert whole.finished and whole.step == len(losses) == 40 and whole.tokens == 40 * 128
    assert losses[0] == pytest.approx(5.77, abs=0.05) and losses[-1] < 4.2
    decoder = Decoder.load(whole.model)
    assert decoder.spec.context_tokens == 32 and decoder.spec.base["licence"] == "CC0"
    assert {decoder.tokenizer.token_to_id(t) for t in ("<|end|>", "<|endoftext|>")} <= set(decoder.ends)
    assert decoder.spec.parameters == whole.parameters
    record = json.loads((whole.model / "training.json").read_text())
    assert record["bits_per_byte"] == whole.bits_per_byte and set(record["sources"]) == {"fr", "en"}


def test_log_says_everything_when_read(whole):
    (run,) = lines(whole.model, "run")
    assert run["params"]["hidden"] == 32 and run["peak_source"] == "measured" and run["peak_flops"] > 1e9
    assert [line["step"] for line in lines(whole.model, "valid")] == [10, 20, 30, 40]
    assert lines(whole.model, "valid")[-1]["bits_per_byte"] == whole.bits_per_byte
    on_the_way = lines(whole.model, "valid")[:-1]
    assert all(line["tokens_per_second"] > 0 and 0 < line["utilisation"] < 1 for line in on_the_way)
    assert 0 < whole.utilisation < 1 and whole.tokens_per_second > 0
    kept = sorted(p.name for p in (whole.log.parent / "checkpoints").iterdir())
    assert kept == ["stable-step-00000030", "step-00000039", "step-00000040"]


def test_curve_is_the_same_to_the_last_bit_when_killed_and_run_again(whole, corpus, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT).format(tests=str(Path(__file__).parent)))
    out = tmp_path / "model"
    ended = subprocess.run([sys.executable, str(script), str(corpus), str(out), "23"], capture_output=True, timeout=900)
    assert ended.returncode == -9 and not out.exists()
    # A checkpoint cut short, as a full disk or a power cut leaves it, is passed over.
    newest = sorted((tmp_path / "model.run" / "checkpoints").glob("step-*"))[-1]
    (newest / "tensors.pt").write_bytes((newest / "tensors.pt").read_bytes()[:1000])
    notes = []
    again = drain(start(corpus, out), lambda e: notes.append(e.message) if isinstance(e, Note) else None)
    assert "goes on from step 21 of 40" in notes[0]
    assert curve(out) == curve(whole.model)
    assert (again.bits_per_byte, again.loss) == (whole.bits_per_byte, whole.loss)
    one, two = (Decoder.load(path).model.state_dict() for path in (out, whole.model))
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_run_goes_on_when_its_sitting_or_its_reader_ends(whole, corpus, tmp_path):
    out = tmp_path / "model"
    work = start(corpus, out)
    for event in work:
        if isinstance(event, Progress) and event.done == 12:
            work.close()
    short = drain(start(corpus, out, replace(PARAMS, sitting_minutes=1e-9)))
    assert not short.finished and short.step == 12 and short.model.is_dir()
    assert drain(start(corpus, out)).finished and curve(out) == curve(whole.model)


def test_longer_run_goes_on_from_before_the_decay_when_asked(whole, corpus, tmp_path):
    out = tmp_path / "model"
    shutil.copytree(whole.log.parent, tmp_path / "model.run")
    longer = replace(PARAMS, tokens=60 * 128)
    found = drain(start(corpus, out, longer))
    assert found.finished and found.step == 60
    assert [line["step"] for line in lines(out, "resumed")] == [30] and len(curve(out)) == 60
    with pytest.raises(TrainError, match="another run; different: hidden"):
        drain(start(corpus, out, replace(longer, hidden=64)))


def test_checkpoint_after_the_decay_began_is_refused_when_the_run_is_longer(whole, corpus, tmp_path):
    shutil.copytree(whole.log.parent, tmp_path / "model.run")
    shutil.rmtree(tmp_path / "model.run" / "checkpoints" / "stable-step-00000030")
    with pytest.raises(TrainError, match="another length"):
        drain(start(corpus, tmp_path / "model", replace(PARAMS, tokens=60 * 128)))


def test_divergence_is_an_error_when_the_loss_is_no_number(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda weights, most: torch.tensor(float("nan")))
    with pytest.raises(TrainError, match="norm of its gradient nan, at step 1 of 40"):
        drain(start(corpus, tmp_path / "model"))
    assert not (tmp_path / "model").exists() and lines(tmp_path / "model", "diverged")


def test_jump_of_the_loss_is_noted_when_it_stands_out(corpus, tmp_path, monkeypatch):
    from alambic.train.pretrain_loop import PretrainLoop, State

    loop = PretrainLoop.__new__(PretrainLoop)
    loop.state, loop.log = State(), type("Silent", (), {"add": staticmethod(lambda *_, **__: None)})
    said = []
    for step in range(1, 101):
        loop.state.step = step
        said += list(loop._watch(6.5 if step == 90 else 4.0 + 0.01 * (step % 3)))
    assert loop.state.spikes == [90] and len(said) == 1 and "step 90" in said[0].message


def test_tokenizer_of_other_shards_is_refused_when_given(corpus, tmp_path):
    shutil.copytree(corpus / "tokenizer", tmp_path / "tokenizer")
    with open(tmp_path / "tokenizer" / "tokenizer.json", "a") as out:
        out.write("\n")
    with pytest.raises(TrainError, match="is not the tokenizer that made"):
        drain(pretrain(corpus / "shards", tmp_path / "tokenizer", PARAMS, tmp_path / "model", base=BASE))


@pytest.mark.slow
def test_curve_is_that_of_one_process_when_two_train(corpus, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT).format(tests=str(Path(__file__).parent)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(script), str(corpus), str(tmp_path / "two"), "-1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr[-3000:]
    one = drain(start(corpus, tmp_path / "one", EXACT))
    ours, theirs = curve(tmp_path / "two"), curve(tmp_path / "one")
    assert [step for step, *_ in ours] == list(range(1, 41))
    assert [loss for _, loss, _ in ours] == pytest.approx([loss for _, loss, _ in theirs], rel=1e-3)
    assert lines(tmp_path / "two", "run")[0]["processes"] == 2
    assert lines(tmp_path / "two", "end")[0]["bits_per_byte"] == pytest.approx(one.bits_per_byte, rel=1e-3)
