"""Fine-tuning on a two-layer encoder: what must hold whatever the base."""

import random
from dataclasses import replace

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from alambic.data.dataset import Dataset, Example
from alambic.engines import TextReader, load_part
from alambic.errors import TrainError, WorkspaceError
from alambic.events import Note, Progress, drain
from alambic.manifest import PartSpec
from alambic.model.encoder import Encoder
from alambic.train import finetune as module
from alambic.train.batches import rows_of
from alambic.train.finetune import FinetuneParams, finetune

COLOURS = ("red", "blue", "green")
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *COLOURS, "a", "the", "cat", "dog", "bird", "runs", "sits", "very", "far"]
QUICK = FinetuneParams(epochs=3, batch_size=8, learning_rate=1e-3, few_shot="off", checkpoint_seconds=0.0, threads=1)
STEPS = FinetuneParams(steps=2, batch_size=8, few_shot="off", threads=1)


@pytest.fixture
def base(tmp_path, capfd):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path / "base"
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    capfd.readouterr()
    return folder


def colours(n, seed=0, *, multi_label=False):
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        chosen = sorted(rng.sample(COLOURS, rng.choice([0, 1, 2]) if multi_label else 1))
        words = chosen + rng.choices(WORDS[7:], k=rng.randint(1, 6))
        rng.shuffle(words)
        rows.append(Example(" ".join(words), tuple(chosen), f"toy.csv:{i + 2}"))
    return Dataset(tuple(rows), tuple(sorted(COLOURS)), multi_label)


def weights(folder):
    encoder = Encoder.load(folder)
    return {name: value.clone() for name, value in encoder.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_finetune_learns_the_task(base, tmp_path):
    result = drain(finetune(base, colours(120), colours(60, 1), params=QUICK, out=tmp_path / "model"))
    assert result.best_dev > 0.9
    assert Encoder.load(result.model).spec.labels == ("blue", "green", "red")


def test_finetune_learns_several_labels(base, tmp_path):
    train, dev = colours(160, multi_label=True), colours(60, 1, multi_label=True)
    params = FinetuneParams(epochs=4, batch_size=8, learning_rate=2e-3, metric="micro_f1", threads=1)
    result = drain(finetune(base, train, dev, params=params, out=tmp_path / "model"))
    assert result.best_dev > 0.85
    assert Encoder.load(result.model).spec.multi_label


def test_finetune_gives_the_same_weights_when_the_seed_is_the_same(base, tmp_path):
    for name in ("one", "two"):
        drain(finetune(base, colours(60), colours(30, 1), params=QUICK, out=tmp_path / name))
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))


def test_finetune_gives_other_weights_when_the_seed_differs(base, tmp_path):
    for seed in (0, 1):
        params = FinetuneParams(seed=seed, steps=5, batch_size=8, few_shot="off", threads=1)
        drain(finetune(base, colours(60), None, params=params, out=tmp_path / str(seed)))
    assert not same(weights(tmp_path / "0"), weights(tmp_path / "1"))


@pytest.mark.parametrize("mode", ["off", "on"])
def test_finetune_ends_the_same_when_killed_and_run_again(base, tmp_path, mode):
    params = FinetuneParams(epochs=4, batch_size=8, few_shot=mode, checkpoint_seconds=0.0, threads=1)
    train, dev = colours(60), colours(30, 1)
    drain(finetune(base, train, dev, params=params, out=tmp_path / "whole"))
    killed = finetune(base, train, dev, params=params, out=tmp_path / "killed")
    for event in killed:
        if isinstance(event, Progress) and event.done == 2:
            break
    kept = tmp_path / "killed.checkpoint"
    kept.rename(tmp_path / "aside")  # kill -9 leaves the checkpoint and nothing else
    killed.close()
    (tmp_path / "aside").rename(kept)
    events = []
    drain(finetune(base, train, dev, params=params, out=tmp_path / "killed"), events.append)
    assert next(e.done for e in events if isinstance(e, Progress)) == 3
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


def test_finetune_starts_over_when_the_checkpoint_is_of_other_parameters(base, tmp_path):
    work = finetune(base, colours(60), colours(30, 1), params=QUICK, out=tmp_path / "model")
    assert [e for e in (next(work) for _ in range(4)) if isinstance(e, Progress)]
    work.close()
    events = []
    params = FinetuneParams(steps=2, batch_size=8, few_shot="off", threads=1)
    drain(finetune(base, colours(60), None, params=params, out=tmp_path / "model"), events.append)
    assert next(e.done for e in events if isinstance(e, Progress)) == 1


def test_finetune_starts_over_when_a_kill_cut_the_checkpoint_short(base, tmp_path):
    cut = tmp_path / "model.checkpoint"
    cut.mkdir()
    (cut / "state.json").write_text('{"key": "12')
    events = []
    drain(finetune(base, colours(30), None, params=STEPS, out=tmp_path / "model"), events.append)
    assert next(e.done for e in events if isinstance(e, Progress)) == 1


def test_finetune_says_so_when_the_checkpoint_cannot_be_written(base, tmp_path):
    (tmp_path / "model.checkpoint.partial").write_text("a file where a folder must go")
    params = replace(STEPS, checkpoint_seconds=0.0)
    with pytest.raises(WorkspaceError, match=r"model.checkpoint: the checkpoint cannot be written"):
        drain(finetune(base, colours(30), None, params=params, out=tmp_path / "model"))


def test_finetune_leaves_no_checkpoint_when_done(base, tmp_path):
    drain(finetune(base, colours(30), colours(30, 1), params=QUICK, out=tmp_path / "run" / "model"))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["model"]


def test_finetune_keeps_the_best_when_closed(base, tmp_path):
    work = finetune(base, colours(60), colours(30, 1), params=QUICK, out=tmp_path / "model")
    for event in work:
        if isinstance(event, Progress):
            break
    work.close()
    assert Encoder.load(tmp_path / "model").spec.labels is not None


def test_finetune_returns_the_best_so_far_on_ctrl_c(base, tmp_path):
    work = finetune(base, colours(60), colours(30, 1), params=QUICK, out=tmp_path / "model")
    notes, result = [], None
    event = next(work)
    try:
        while True:
            third = isinstance(event, Progress) and event.done == 3
            event = work.throw(KeyboardInterrupt()) if third else next(work)
            notes += [event.message] if isinstance(event, Note) else []
    except StopIteration as stop:
        result = stop.value
    assert result.interrupted
    assert notes == ["finetune: stopped at step 3, the best so far is kept"]


def test_finetune_runs_the_steps_asked_when_there_is_no_dev(base, tmp_path):
    params = FinetuneParams(steps=7, batch_size=8, few_shot="off", threads=1)
    result = drain(finetune(base, colours(60), None, params=params, out=tmp_path / "model"))
    assert (result.steps, result.best_dev) == (7, None)


def test_finetune_reports_loss_dev_score_and_time_left(base, tmp_path):
    events = []
    drain(finetune(base, colours(60), colours(30, 1), params=QUICK, out=tmp_path / "model"), events.append)
    last = [e for e in events if isinstance(e, Progress)][-1]
    assert set(last.values) == {"loss", "dev", "best_dev"}
    assert last.seconds_left is not None


def test_finetune_leaves_word_embeddings_as_they_are(base, tmp_path):
    drain(finetune(base, colours(60), colours(30, 1), params=QUICK, out=tmp_path / "model"))
    name = "backbone.embeddings.word_embeddings.weight"
    assert torch.equal(weights(base)[name], weights(tmp_path / "model")[name])


def test_finetune_never_does_worse_on_dev_than_its_fitted_head(base, tmp_path):
    result = drain(finetune(base, colours(60), colours(30, 1), params=QUICK, out=tmp_path / "model"))
    assert result.best_dev >= result.history[0].dev
    assert result.history[0].step == 0


def test_finetune_stops_when_dev_does_not_rise(base, tmp_path):
    params = FinetuneParams(epochs=50, batch_size=8, learning_rate=0.0, head_learning_rate=0.5, patience=2, threads=1,
                            few_shot="off", warmup=0.0)  # fmt: skip
    result = drain(finetune(base, colours(40), colours(60, 1), params=params, out=tmp_path / "model"))
    assert result.history[-1].step < 50 * 5


def test_finetune_tries_both_ways_when_examples_are_few(base, tmp_path):
    params = FinetuneParams(epochs=2, batch_size=8, threads=1)
    result = drain(finetune(base, colours(30), colours(30, 1), params=params, out=tmp_path / "model"))
    assert result.mode in ("few-shot", "finetune")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "model"]


def test_finetune_stops_when_the_loss_is_not_a_number(base, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "objective", lambda logits, *_, **__: logits.sum(1) * float("nan"))
    work = finetune(base, colours(60), None, params=FinetuneParams(steps=3, few_shot="off"), out=tmp_path / "model")
    with pytest.raises(TrainError, match=r"(?s)the loss is nan at step 1 of 3.*lower learning_rate"):
        drain(work)


def test_finetune_mixes_the_base_back_in_when_examples_are_few(base, tmp_path):
    made = {}
    for share in (0.0, 0.5, 1.0):
        params = FinetuneParams(steps=4, few_shot="on", keep_base=share, threads=1)
        drain(finetune(base, colours(30), None, params=params, out=tmp_path / str(share)))
        made[share] = weights(tmp_path / str(share))["backbone.encoder.layer.0.output.dense.weight"]
    torch.testing.assert_close(made[0.5], (made[0.0] + made[1.0]) / 2)
    assert not torch.equal(made[0.0], made[1.0])


def test_finetune_refuses_one_label_only(base, tmp_path):
    data = Dataset((Example("a cat", ("red",)), Example("the dog", ("red",))), ("red",))
    with pytest.raises(TrainError, match="at least 2 labels, got 1 \\(red\\)"):
        drain(finetune(base, data, None, params=QUICK, out=tmp_path / "model"))


def test_finetune_names_the_row_when_a_text_is_too_long_and_long_is_error(base, tmp_path):
    rows = (Example("cat " * 40, ("red",), "toy.csv:2"), Example("dog", ("blue",), "toy.csv:3"))
    params = FinetuneParams(long="error", few_shot="off")
    with pytest.raises(TrainError, match=r"(?s)toy.csv:2: the text has 42 tokens and the model reads 16.*head_tail"):
        drain(finetune(base, Dataset(rows, ("blue", "red")), None, params=params, out=tmp_path / "model"))


@pytest.mark.parametrize("long", ["windows", "head", "head_tail"])
def test_finetune_takes_long_texts_as_the_task_says(base, tmp_path, long):
    rows = tuple(Example("cat " * 40 + c, (c,)) for c in ("red", "blue") for _ in range(8))
    params = FinetuneParams(long=long, steps=2, few_shot="off", threads=1)
    data = Dataset(rows, ("blue", "red"))
    assert drain(finetune(base, data, None, params=params, out=tmp_path / "model")).steps == 2


def test_params_refuse_an_unknown_key_with_the_nearest():
    with pytest.raises(TrainError, match=r"unknown key 'epoch'\n.*did you mean 'epochs'"):
        FinetuneParams.from_recipe({"epoch": 3})


def test_params_refuse_a_value_of_the_wrong_type():
    with pytest.raises(TrainError, match=r"warmup = 'long'; it is like 0\.1 by default"):
        FinetuneParams.from_recipe({"warmup": "long"})


@pytest.mark.parametrize(("rows", "epochs"), [(100, 8.0), (5_000, 5.0), (50_000, 3.0)])
def test_default_epochs_fall_when_rows_grow(rows, epochs):
    assert module.default_epochs(rows) == epochs


def test_refit_of_no_step_keeps_the_fitted_head_and_the_base(base, tmp_path):
    train = colours(24)
    drain(finetune(base, train, None, params=replace(STEPS, steps=0, schedule=60), out=tmp_path / "model"))
    tuned, given = weights(tmp_path / "model"), Encoder.load(base).state_dict()
    assert all(torch.equal(tuned[name], value) for name, value in given.items())
    assert tuned["head.weight"].abs().sum() > 0


def test_refit_follows_the_first_part_of_its_schedule(base, tmp_path):
    train, dev = colours(24), colours(12, seed=1)
    params = replace(QUICK, epochs=4, evaluations=3, learning_rate=1e-3)
    found = drain(finetune(base, train, dev, params=params, out=tmp_path / "found"))
    assert 0 < found.steps <= found.schedule == 12
    again = replace(params, steps=found.steps, schedule=found.schedule)
    drain(finetune(base, train, None, params=again, out=tmp_path / "again"))
    assert same(weights(tmp_path / "found"), weights(tmp_path / "again"))


@pytest.mark.parametrize(("line", "rate"), [(0.0, 1e-4), (1.1, 2e-4)])
def test_rate_is_lower_when_the_fitted_head_is_nearly_right(base, tmp_path, monkeypatch, line, rate):
    monkeypatch.setattr(module, "_NEARLY_RIGHT", line)
    params = replace(QUICK, learning_rate=None, epochs=1)
    result = drain(finetune(base, colours(24), colours(12, seed=1), params=params, out=tmp_path / "model"))
    assert result.learning_rate == rate


def test_refit_at_the_rate_found_gives_the_same_weights_as_stating_it(base, tmp_path):
    train, dev = colours(24), colours(12, seed=1)
    found = drain(finetune(base, train, dev, params=replace(QUICK, learning_rate=None), out=tmp_path / "found"))
    stated = replace(QUICK, learning_rate=found.learning_rate)
    drain(finetune(base, train, dev, params=stated, out=tmp_path / "stated"))
    assert same(weights(tmp_path / "found"), weights(tmp_path / "stated"))


def test_plain_way_trains_without_dropout_unless_it_is_asked_for(base, tmp_path):
    train = colours(24)
    for name, dropout in (("default", None), ("none", 0.0), ("some", 0.5)):
        drain(finetune(base, train, None, params=replace(STEPS, dropout=dropout), out=tmp_path / name))
    assert same(weights(tmp_path / "default"), weights(tmp_path / "none"))
    assert not same(weights(tmp_path / "default"), weights(tmp_path / "some"))


def test_labels_are_smoothed_when_there_are_many(base, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MANY_LABELS", 3)
    for name, smoothing in (("default", None), ("some", 0.1), ("none", 0.0)):
        params = replace(STEPS, label_smoothing=smoothing)
        drain(finetune(base, colours(24), None, params=params, out=tmp_path / name))
    assert same(weights(tmp_path / "default"), weights(tmp_path / "some"))
    assert not same(weights(tmp_path / "default"), weights(tmp_path / "none"))


@pytest.mark.parametrize("long", ["windows", "head", "head_tail"])
def test_training_reads_the_windows_that_the_engine_reads(base, long):
    words = " ".join(WORDS[4:] * 3)
    train = Dataset((Example(words, ("red",)), Example("a red cat", ("red",))), tuple(sorted(COLOURS)))
    encoder = Encoder.load(base)
    reader = TextReader(load_part(PartSpec("encoder", "torch", "encoder", {}), base), long=long)
    seen = []
    reader.tokens.infer = lambda windows, batch_size: seen.extend(windows) or torch.zeros(len(windows), 3).numpy()
    reader.read(train.texts)
    rows = rows_of(encoder, train, long=long)
    assert [list(row.ids) for row in rows] == seen
    assert len(rows) == (4 if long == "windows" else 2)
    assert sum(row.weight for row in rows if row.text == 0) == pytest.approx(1.0)
