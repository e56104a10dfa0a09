"""Fine-tuning of models that write: it learns, keeps the best, gives the same again, and refuses what cannot be."""

import json
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from alambic.errors import BaseModelError, TrainError
from alambic.events import Note, Progress, drain
from alambic.kinds.chat import Chat
from alambic.model.adapter import Adapter, merge_adapter, model_digest
from alambic.model.clone import clone
from alambic.model.decoder import Decoder
from alambic.model.seq2seq import load_writer
from alambic.train.lora import add_lora, chain_products
from alambic.train.sft import SftParams, finetune_chats
from alambic.train.sft_rates import default_epochs, default_rate, default_rows_a_step
from writing_task import swaps

CHATS = swaps()
TRAIN, DEV = CHATS[8:], CHATS[:8]
QUICK = {"epochs": 2, "learning_rate": 3e-3, "batch_size": 8, "threads": 1}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "llama"
    clone("llama-3.2-1b", folder, width=32)
    return folder


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "marian"
    clone("opus-mt-en-fr", folder, width=32)
    return folder


def train(base, out, *, chats=TRAIN, dev=DEV, on_event=None, **params):
    return drain(finetune_chats(base, chats, dev, params=SftParams(**{**QUICK, **params}), out=out), on_event)


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("method", ["full", "lora", "dora"])
def test_loss_on_dev_falls_and_the_model_opens_when_trained(base, tmp_path, method):
    result = train(base, tmp_path / "model", method=method, rank=8, learning_rate=1e-2)
    assert result.method == method
    assert result.best_dev < result.history[0].dev - 0.5
    assert result.bits_per_byte > 0 and result.tokens_per_second > 0
    assert (result.adapter is None) == (method == "full")
    opened = Decoder.load(tmp_path / "model")
    assert torch.isfinite(opened.logits([0, 1, 2])).all()
    json.dumps(result.to_dict())


def test_best_dev_is_what_transformers_computes_when_the_model_is_opened(base, tmp_path):
    result = train(base, tmp_path / "model", method="lora", rank=8)
    decoder = Decoder.load(tmp_path / "model", dtype=torch.float32)
    total = count = said = 0.0
    for chat in DEV:
        ids, learnt = decoder.labelled(chat)
        labels = torch.tensor([[i if learns else -100 for i, learns in zip(ids, learnt, strict=True)]])
        with torch.no_grad():
            loss = decoder.model(input_ids=torch.tensor([ids]), labels=labels).loss
        total, count = total + float(loss) * sum(learnt), count + sum(learnt)
        said += len(chat.completion.content.encode())
    assert total / count == pytest.approx(result.best_dev, abs=0.02)  # bf16 in training where the CPU has it
    assert total / said / 0.693147 == pytest.approx(result.bits_per_byte, abs=0.05)


def test_encoder_decoder_learns_when_trained(translator, tmp_path):
    result = train(translator, tmp_path / "model", method="full", label_smoothing=0.1)
    assert result.best_dev < result.history[0].dev - 0.5
    writer = load_writer(tmp_path / "model")
    assert len(writer.greedy(writer.source_ids("alpha beta"), max_tokens=5)) <= 5


@pytest.mark.parametrize(
    "name", ["gemma-2-2b", "ministral-3-3b", "phi-2", "stablelm-3b", "starcoder2-3b", "qwen2.5-0.5b"]
)
def test_one_step_lowers_the_loss_when_a_family_is_trained(tmp_path, name):
    clone(name, tmp_path / "base", width=32)
    rows = TRAIN[:4]
    result = train(tmp_path / "base", tmp_path / "model", chats=rows, dev=rows, epochs=1, batch_size=4, method="lora",
                   warmup=0.0)  # fmt: skip
    assert [point.step for point in result.history] == [0, 1]
    assert result.history[1].dev < result.history[0].dev


def test_weights_are_the_same_when_trained_again(base, tmp_path):
    first = train(base, tmp_path / "one", method="lora", seed=3)
    second = train(base, tmp_path / "two", method="lora", seed=3)
    assert first.history[-1].dev == second.history[-1].dev
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))
    train(base, tmp_path / "three", method="lora", seed=4)
    assert not same(weights(tmp_path / "one"), weights(tmp_path / "three"))


@pytest.mark.parametrize("change", [{"batch_tokens": 40}, {"packing": "off"}, {"checkpointing": "on"}])
def test_result_differs_by_rounding_only_when_computed_in_another_way(base, tmp_path, change):
    usual = train(base, tmp_path / "one", method="full", dev=TRAIN[:8])
    other = train(base, tmp_path / "two", method="full", dev=TRAIN[:8], **change)
    if change == {"packing": "off"}:  # its batches are of like length: another order
        assert other.best_dev == pytest.approx(usual.best_dev, abs=0.7)
    else:
        assert other.best_dev == pytest.approx(usual.best_dev, abs=0.03)


def test_chained_products_equal_those_of_peft_when_training(base):
    results = []
    for chained in (True, False):
        decoder = Decoder.load(base, dtype=torch.float32)
        add_lora(decoder.model, method="lora", rank=4, alpha=8, head=decoder.head, dropout=0.0 if chained else 1e-12)
        with torch.no_grad():
            for name, parameter in decoder.model.named_parameters():
                if "lora_B" in name:
                    torch.manual_seed(len(name))
                    parameter.normal_(std=0.1)
        decoder.model.eval()
        out = decoder.model(input_ids=torch.tensor([[3, 7, 9, 4]])).logits
        out.square().mean().backward()
        results.append((out, {n: p.grad for n, p in decoder.model.named_parameters() if p.requires_grad}))
    (one, ours), (two, theirs) = results
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert ours.keys() == theirs.keys() and len(ours) == 28
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-6)
    assert chain_products(torch.nn.Linear(2, 2)) == 0


def test_adapter_is_read_by_peft_and_equals_the_merged_model_when_saved(base, tmp_path):
    import peft

    result = train(base, tmp_path / "model", method="lora", rank=4)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = peft.PeftModel.from_pretrained(plain, str(result.adapter)).eval()
    ids = torch.tensor([[5, 9, 30, 7]])
    merged = Decoder.load(tmp_path / "model")
    torch.testing.assert_close(wrapped(ids).logits[0], merged.logits(ids[0].tolist()), rtol=1e-4, atol=1e-4)
    again = merge_adapter(result.adapter, base, tmp_path / "again")
    torch.testing.assert_close(
        wrapped(ids).logits[0], Decoder.load(again).logits(ids[0].tolist()), rtol=1e-4, atol=1e-4
    )
    assert Adapter.load(result.adapter).base["digest"] == model_digest(base)


def test_adapter_is_refused_with_both_digests_when_put_on_another_base(base, tmp_path):
    result = train(base, tmp_path / "model", method="lora", steps=1)
    other = tmp_path / "other"
    clone("llama-3.2-1b", other, width=32, seed=1)
    with pytest.raises(BaseModelError) as caught:
        merge_adapter(result.adapter, other, tmp_path / "merged")
    assert model_digest(base) in caught.value.message and model_digest(other) in caught.value.message
    assert not (tmp_path / "merged").exists()


def test_rows_that_are_too_long_are_refused_by_name_when_long_is_error(base, tmp_path):
    long = Chat.of("beta " * 50, completion="no")
    with pytest.raises(TrainError, match=r"1 of 3 rows are longer than 60 tokens: data.jsonl:2: \d+ tokens"):
        drain(finetune_chats(base, [CHATS[0], long, CHATS[1]], DEV, params=SftParams(**QUICK, max_tokens=60),
                             out=tmp_path / "m", where=["data.jsonl:1", "data.jsonl:2", "data.jsonl:3"]))  # fmt: skip


def test_rows_that_are_too_long_are_listed_when_left_out(base, tmp_path):
    notes = []
    long = Chat.of("beta " * 50, completion="no")
    result = train(base, tmp_path / "m", chats=[*TRAIN, long], long="leave_out", max_tokens=60, method="full",
                   on_event=lambda e: notes.append(e.message) if isinstance(e, Note) else None)  # fmt: skip
    assert len(result.left_out) == 1 and result.left_out[0].startswith(f"row {len(TRAIN) + 1}: ")
    assert any(result.left_out[0] in note for note in notes)


def test_row_without_an_answer_is_refused_when_read(base, tmp_path):
    with pytest.raises(TrainError, match="row 2: the assistant says nothing"):
        train(base, tmp_path / "m", chats=[CHATS[0], Chat.of("alpha")])


def test_conversation_is_refused_when_an_encoder_decoder_learns_it(translator, tmp_path):
    chat = Chat((*CHATS[0].messages, *CHATS[1].messages))
    with pytest.raises(TrainError, match="an encoder-decoder reads one user message"):
        train(translator, tmp_path / "m", chats=[chat])


def test_qlora_is_refused_with_the_way_out_when_there_is_no_gpu(base, tmp_path):
    with pytest.raises(TrainError, match=r"'qlora' needs a CUDA GPU \(training runs on cpu\)") as caught:
        train(base, tmp_path / "m", method="qlora", device="cpu")
    assert 'method = "lora"' in caught.value.hint


@pytest.mark.parametrize(("recipe", "message"), [
    ({"rnak": 8}, "unknown key 'rnak'"),
    ({"rank": "8"}, "rank = '8'"),
    ({"method": "sgd"}, "method = 'sgd'; allowed: auto, full, lora"),
    ({"rank": 0}, "rank = 0: expected more than 0"),
    ({"warmup": 1.5}, "warmup = 1.5: expected a share"),
    ({"shape": "step"}, "shape = 'step'; allowed: cosine"),
])  # fmt: skip
def test_recipe_is_refused_by_name_when_wrong(recipe, message):
    with pytest.raises(TrainError, match=re.escape(message)):
        SftParams.from_recipe(recipe, seed=0, threads=1, long="error")


def test_defaults_follow_size_and_kind_when_not_given():
    assert default_rate(5_000_000, method="full", new=True) > default_rate(5_000_000, method="full", new=False)
    assert default_rate(500_000_000, method="lora", new=False) == 2e-4
    assert default_rate(500_000_000, method="lora", new=False) > default_rate(500_000_000, method="full", new=False)
    assert default_epochs(100, new=True) > default_epochs(100, new=False) > default_epochs(50_000, new=False)
    assert default_rows_a_step(29_000, 30.0, new=True) == 68
    assert default_rows_a_step(10, 30.0, new=False) == 8


def test_training_stops_early_when_dev_only_rises(base, tmp_path):
    result = train(base, tmp_path / "m", method="full", learning_rate=0.5, epochs=20, patience=2, evaluations=1)
    assert len(result.history) < 15
    assert result.best_dev == min(point.dev for point in result.history)
    assert result.history[-1].dev > result.best_dev


def test_best_is_written_when_training_is_closed_half_way(base, tmp_path):
    work = finetune_chats(base, TRAIN, DEV, params=SftParams(**QUICK, method="full", evaluations=6), out=tmp_path / "m")
    seen = 0
    for event in work:
        seen += isinstance(event, Progress)
        if seen == 3:
            break
    work.close()
    assert not same(weights(tmp_path / "m"), weights(base))
    Decoder.load(tmp_path / "m")


def test_best_is_kept_when_interrupted(base, tmp_path):
    work = finetune_chats(base, TRAIN, DEV, params=SftParams(**QUICK, method="lora", evaluations=6), out=tmp_path / "m")
    event = next(event for event in work if isinstance(event, Progress))
    assert event.values["tokens_per_second"] > 0 and event.seconds_left > 0
    try:
        work.throw(KeyboardInterrupt)
        while True:
            next(work)
    except StopIteration as stop:
        result = stop.value
    assert result.interrupted and result.steps <= 1
    assert (tmp_path / "m" / "adapter" / "adapter_model.safetensors").is_file()


KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from alambic.events import Progress
    from test_sft_train import train_longer
    def listen(event):
        if isinstance(event, Progress) and event.stage == "sft" and event.done == 12:
            os.kill(os.getpid(), signal.SIGKILL)
    train_longer(Path({base!r}), Path(sys.argv[1]), {method!r}, listen)
"""


def train_longer(base, out, method, on_event=None):
    torch.set_num_threads(1)
    train(base, out, epochs=6, method=method, checkpoint_seconds=0.0, on_event=on_event)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_weights_are_the_same_when_training_was_killed(base, tmp_path, method):
    script, done = tmp_path / "train.py", []

    def listen(event):
        if isinstance(event, Progress) and event.stage == "sft":
            done.append(event.done)

    script.write_text(textwrap.dedent(KILLED).format(tests=str(Path(__file__).parent), base=str(base), method=method))
    train_longer(base, tmp_path / "whole", method)
    ended = subprocess.run([sys.executable, script, tmp_path / "cut"], timeout=600)
    assert ended.returncode == -signal.SIGKILL and not (tmp_path / "cut").exists()
    train_longer(base, tmp_path / "cut", method, listen)
    assert done[0] >= 10  # it went on
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert not (tmp_path / "cut.checkpoint").exists()
