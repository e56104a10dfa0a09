"""The stage [masked] of `alambic distil`: a student guesses masked words before it follows its teacher."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer
from torch.nn import functional

from alambic.build.distilling import distil_events
from alambic.cli.main import cli
from alambic.data.parallel import hold_out_lines
from alambic.distil_config import load_distil
from alambic.errors import DataError, TaskError, TrainError
from alambic.events import Progress, Skipped, drain
from alambic.model.bases import resolve
from alambic.model.encoder import Encoder
from alambic.train.masked import Lines, MaskedParams, _Guessing, learn_masked
from alambic.train.precision import autocast
from two_languages import KNOWN, rounds, sentences, write_config, write_teacher

TEXT = hold_out_lines(rounds(400).known, number=20)
MIXED = hold_out_lines(sentences(100).known, number=20)
TRAIN, HELD = Lines(TEXT[0], MIXED[0]), Lines(TEXT[1], MIXED[1])
QUICK = MaskedParams(tokens=12_000, batch_tokens=512, threads=1, evaluations=2, checkpoint_seconds=0.0)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def student(teacher_folder):
    return Encoder.load(resolve(str(teacher_folder)))


def learn(encoder, folder, params=QUICK, train=TRAIN, held_out=HELD):
    return learn_masked(encoder, train, held_out, params=params, checkpoint=folder / "c", key="k")


def test_guesses_get_better_when_learnt(student, tmp_path):
    events = []
    params = replace(QUICK, tokens=60_000, learning_rate=3e-3, embedding_rate=1e-2, head_rate=1e-2)
    done = drain(learn(student, tmp_path, params), events.append)
    assert done.new.before.value > 3.5  # sixty words, each as frequent
    assert done.new.after.high < done.new.before.low - 1.0
    assert done.new.after.low < done.new.after.value < done.new.after.high
    assert done.new.lines == 20 and done.new.guessed >= 20 and done.known is None
    assert done.history[-1].dev == pytest.approx(-done.new.after.value, rel=1e-3)
    assert events[-1].values["dev"] == pytest.approx(done.new.after.value, rel=1e-3)  # nats, not minus them
    assert done.tokens == pytest.approx(60_000, rel=0.1)
    assert not (tmp_path / "c").exists()


def test_only_the_word_embeddings_change_when_they_alone_learn(student, tmp_path):
    layer, table = student.backbone.encoder.layer[0].output.dense.weight, student.backbone.get_input_embeddings().weight
    before, rows = layer.detach().clone(), table.detach().clone()
    drain(learn(student, tmp_path, replace(QUICK, tokens=2_000, train="embeddings")))
    assert torch.equal(layer, before) and not torch.equal(table, rows)


def test_words_that_the_text_has_not_got_stay_where_they_are(student, tmp_path):
    rows = student.backbone.get_input_embeddings().weight.detach().clone()
    lines = Lines(tuple(text for text in rounds(400).known if KNOWN[-1] not in text))
    drain(learn(student, tmp_path, replace(QUICK, tokens=2_000), lines, Lines(lines.new[:20])))
    table, number = student.backbone.get_input_embeddings().weight, student.tokenizer.token_to_id
    assert torch.equal(table[number(KNOWN[-1])], rows[number(KNOWN[-1])])
    assert not torch.equal(table[number(KNOWN[0])], rows[number(KNOWN[0])])
    assert not torch.equal(table[number("[MASK]")], rows[number("[MASK]")])


def test_learning_goes_on_to_the_same_weights_when_it_was_killed(teacher_folder, tmp_path):
    whole, cut, again = (Encoder.load(resolve(str(teacher_folder))) for _ in range(3))
    first = drain(learn(whole, tmp_path / "one"))
    for event in learn(cut, tmp_path / "two"):
        if isinstance(event, Progress) and event.done == 9:
            break  # the process dies here
    del cut
    second = drain(learn(again, tmp_path / "two"))
    assert second.steps == first.steps > 12
    assert second.new == first.new
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_loss_is_the_cross_entropy_of_the_hidden_tokens_when_computed(student):
    run = _Guessing(student, TRAIN, HELD, QUICK)
    rows = [0, 1, 2]
    with torch.no_grad(), autocast():
        loss = float(run._loss(rows, number=2))
        numbers = [2 * len(run.windows) + i for i in rows]
        states, targets, guesses = run._guesses([run.windows[i] for i in rows], numbers)
        logits = states @ student.backbone.get_input_embeddings().weight.T + run.guesser.head.bias
    assert loss == pytest.approx(float(functional.cross_entropy(logits.float(), targets)), rel=0.02)
    assert guesses == [max(1, round(0.2 * len(run.windows[i]))) for i in rows]
    hidden = [run._chosen(run.windows[i], number) for i, number in zip(rows, numbers, strict=True)]
    wanted = np.concatenate([run.windows[i][h] for i, h in zip(rows, hidden, strict=True)])
    assert targets.tolist() == wanted.tolist()


def test_known_language_has_its_share_of_the_tokens_when_asked_for(student, tmp_path):
    run = _Guessing(student, TRAIN, HELD, replace(QUICK, known_share=0.5))
    new = sum(len(row) for row in run._windows(TRAIN.new))
    assert sum(map(len, run.windows)) == pytest.approx(2 * new, rel=0.02)  # there is less of it: read several times
    done = drain(learn(student, tmp_path, replace(QUICK, known_share=0.5, tokens=2_000)))
    assert done.known.lines == 20 and done.known.guessed >= 20


def test_long_lines_are_learnt_in_parts_and_no_token_is_lost(student):
    run = _Guessing(student, Lines((" ".join(KNOWN[:50]),)), HELD, replace(QUICK, max_tokens=22))
    assert [len(row) for row in run.windows] == [20, 20, 10]
    assert [student.tokenizer.id_to_token(i) for row in run.windows for i in row] == KNOWN[:50]


def test_a_tokenizer_without_a_mask_is_refused(student, tmp_path):
    text = student.tokenizer.to_str().replace("[MASK]", "[GONE]")
    student.tokenizer = Tokenizer.from_str(text)
    with pytest.raises(TrainError, match="no mask token"):
        drain(learn(student, tmp_path))


def test_a_kept_vocabulary_without_a_mask_is_refused_before_anything_slow(tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()
    write_teacher(folder)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text("utf-8").replace("[MASK]", "[GONE]"), "utf-8")
    config = write_config(tmp_path, folder, sentences(300), "[masked]\n")
    config.write_text(config.read_text("utf-8").replace("pieces = 1000", "keep = true"), "utf-8")
    with pytest.raises(TrainError, match="no mask token"):
        drain(distil_events(load_distil(config), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_held_out_lines_are_not_learnt_from_whatever_their_case():
    train, held = hold_out_lines(["Un chat.", "un chat.", "Deux chats.", "Trois.", "Quatre."], number=2)
    assert len(train) == len(held) == 2
    assert not {text.casefold() for text in train} & {text.casefold() for text in held}
    assert hold_out_lines(["Quatre.", "Trois.", "Deux chats.", "Un chat."], number=2)[1] == held
    with pytest.raises(DataError, match="too few to hold 3 out"):
        hold_out_lines(["a", "b", "c", "d"], number=3)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("mask_shar = 0.2", "c.toml:6: masked.mask_shar: unknown key; did you"),
        ("mask_share = 0.9", "masked.mask_share = 0.9"),
        ("known_share = 1.0", "masked.known_share = 1.0"),
        ('train = "layers"', "masked.train = 'layers'; allowed: 'all' or 'embeddings'"),
        ('learning_rate = 1e-3\ntrain = "embeddings"', "c.toml:6: masked.learning_rate: does not apply with train"),
    ],
)
def test_configuration_is_refused_with_its_line_when_wrong(tmp_path, table, said):
    (tmp_path / "c.toml").write_text(f'[distil]\nname = "x"\n[data]\npairs = "p"\n[masked]\n{table}\n', "utf-8")
    with pytest.raises(TaskError) as error:
        load_distil(tmp_path / "c.toml")
    assert said in str(error.value)


def test_shipped_encoder_is_that_of_its_recipe():
    bases = Path(__file__).parents[1] / "bases"
    recipe = load_distil(bases / "recipes" / "encoder-fr-en.toml")
    record = json.loads((bases / "src" / "alambic_bases" / recipe.name / "distil.json").read_text("utf-8"))
    assert record["config"] == recipe.digest
    assert recipe.masked is not None and list(record["stages"]) == ["masked", "embeddings", "all"]
    assert record["stages"]["masked"]["tokens"] >= recipe.masked.tokens


def test_command_guesses_before_it_follows_when_asked_to(teacher_folder, tmp_path):
    extra = "[masked]\ntokens = 3000\nbatch_tokens = 512\nheld_out = 30\nknown_share = 0.25\n"
    config = write_config(tmp_path, teacher_folder, sentences(300), extra)
    run = ["distil", str(config), "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(cli, [*run, "--json"])
    assert result.exit_code == 0, result.output
    stages = json.loads(result.stdout.splitlines()[-1])["stages"]
    assert list(stages) == ["masked", "embeddings", "all"]
    masked = stages["masked"]
    assert masked["new"]["lines"] == masked["known"]["lines"] == 30 and masked["tokens"] > 2500
    card = (tmp_path / "run" / "encoder" / "README.md").read_text("utf-8")
    assert f"it guessed masked tokens (Devlin et al. 2019) in {masked['tokens']:,} tokens" in card
    assert f"to {masked['new']['after']['value']:.2f} (95 % interval" in card
    manifests = {path.parent.name.split("-")[0]: json.loads(path.read_text("utf-8"))
                 for path in (tmp_path / "run" / "stages").glob("*/stage.json")}  # fmt: skip
    assert manifests["masked"]["inputs"]["before"] == manifests["vocabulary"]["key"]
    assert manifests["embeddings"]["inputs"]["before"] == manifests["masked"]["key"]
    again = CliRunner().invoke(cli, run)
    assert again.exit_code == 0 and "nats a masked token of the further language" in again.stdout


def test_stages_are_known_by_what_they_always_were_when_there_is_no_table(teacher_folder, tmp_path):
    """Found in the cache of runs made before there was [masked]: nothing of it may be in their keys."""
    config = write_config(tmp_path, teacher_folder, sentences(300))
    drain(distil_events(load_distil(config), tmp_path / "run"))
    manifests = {path.parent.name.split("-")[0]: json.loads(path.read_text("utf-8"))
                 for path in (tmp_path / "run" / "stages").glob("*/stage.json")}  # fmt: skip
    assert set(manifests) == {"vocabulary", "teacher", "embeddings", "all"}
    assert manifests["vocabulary"]["params"] == {"pieces": 1000}
    first = manifests["embeddings"]
    assert first["params"] == {
        "seed": 0, "train": "embeddings", "epochs": 0.2, "batch_tokens": 512, "learning_rate": 0.0,
        "embedding_rate": 4e-4, "warmup": 0.05, "weight_decay": 0.0, "contrast": 0.1, "temperature": 0.05,
        "max_tokens": 64, "evaluations": 6, "threads": None, "checkpoint_seconds": 0.0,
    }  # fmt: skip
    assert set(first["inputs"]) == {"text", "teacher", "base", "before"} and first["version"] == 1
    assert first["inputs"]["before"] == manifests["vocabulary"]["key"]
    events = []
    config.write_text(config.read_text("utf-8") + "[masked]\ntokens = 1000\nheld_out = 20\n", "utf-8")
    drain(distil_events(load_distil(config), tmp_path / "run"), events.append)
    assert [event.stage for event in events if isinstance(event, Skipped)] == ["vocabulary", "teacher"]
