"""A student that follows an encoder into a further language: alignment, vocabulary, training, and the command."""

import json
import random
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from alambic.cli.main import cli
from alambic.data.parallel import ParallelText, hold_out, read_parallel
from alambic.errors import DataError, TaskError, TrainError
from alambic.events import Note, Progress, Skipped, drain
from alambic.model.bases import resolve
from alambic.model.encoder import Encoder
from alambic.model.vocabulary import count_words, train_vocabulary
from alambic.model.vocabulary_align import align_words
from alambic.model.vocabulary_company import alike
from alambic.model.vocabulary_start import special_tokens, start_embeddings, with_vocabulary
from alambic.train import crosslingual
from alambic.train.crosslingual import FollowParams, distance, follow, retrieval, teacher_vectors
from two_languages import KNOWN, NEW, sentences, write_config, write_teacher

QUICK = FollowParams(epochs=2.0, batch_tokens=512, learning_rate=3e-4, threads=1, evaluations=2, checkpoint_seconds=0.0)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def pairs():
    return hold_out(sentences(400), number=60)


@pytest.fixture(scope="session")
def started(teacher_folder, pairs):
    """The student before any training, as `(tokenizer, table)`."""
    torch.set_num_threads(1)
    train, _ = pairs
    teacher = Encoder.load(resolve(str(teacher_folder)))
    counts = count_words(train.known), count_words(train.new)
    tokenizer = train_vocabulary(counts, pieces=1_000)
    lexicon = align_words([t.split() for t in train.known], [t.lower().split() for t in train.new])
    table = teacher.backbone.get_input_embeddings().weight.detach().numpy()
    start = start_embeddings(
        tokenizer, teacher.tokenizer, table, known=counts[0], new=counts[1], lexicon=lexicon, neighbours={},
        special=special_tokens(teacher),
    )  # fmt: skip
    return tokenizer, start


def student(teacher_folder, started):
    teacher = Encoder.load(resolve(str(teacher_folder)))
    return with_vocabulary(teacher, started[0], started[1].table)


def targets(teacher_folder, texts, folder):
    teacher = Encoder.load(resolve(str(teacher_folder)))
    return drain(teacher_vectors(teacher, texts, folder, threads_used=1))


def rows_of(train):
    return [row for i, pair in enumerate(zip(train.known, train.new, strict=True)) for row in ((pair[0], i), (pair[1], i))]  # fmt: skip # noqa: E501


def blind(started):
    """The same student with random embeddings."""
    table = np.random.default_rng(0).normal(size=started[1].table.shape).astype(np.float32) * 0.2
    return started[0], replace(started[1], table=table)


def test_alignment_finds_the_translations_when_words_go_together():
    train = sentences(300)
    lexicon = align_words([t.split() for t in train.known], [t.lower().split() for t in train.new])
    assert all(lexicon[NEW[word]][0][0] == word for word in KNOWN)


def test_alignment_is_empty_when_every_pair_is_too_long():
    assert align_words([["a"] * 2 + [str(i) for i in range(60)]], [["b"]]) == {}


def test_company_finds_the_word_used_the_same_way_when_one_has_no_translation():
    rng = random.Random(0)
    said = [[f"w{rng.randrange(200)}" for _ in range(8)] for _ in range(400)]
    for i in range(400):  # "chien" and "toutou" stand between the same words, "loin" elsewhere
        said += [["un", "petit", ("chien", "toutou")[i % 2], "aboie", "fort"], ["il", "va", "loin", "très", "vite"]]
    found = alike(said, [f"w{i}" for i in range(200)] + ["chien", "loin", "un", "petit", "aboie", "fort"])
    assert found["toutou"][0][0] == "chien"


def test_vocabulary_keeps_case_and_accents_when_made(started):
    tokenizer, _ = started
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in ("zébois", "Zébois", "zebois")]
    assert ids[0] != ids[1] and ids[0] != ids[2] and ids[1] != ids[2]
    assert tokenizer.token_to_id("[PAD]") == 0
    assert tokenizer.encode("x").tokens[0] == "[CLS]"


def test_vocabulary_puts_the_padding_where_the_architecture_counts_from():
    counts = [count_words(sentences(50).known)]
    assert train_vocabulary(counts, pieces=1_000, pad_id=1).token_to_id("[PAD]") == 1
    with pytest.raises(TrainError, match="at least"):
        train_vocabulary(counts, pieces=10)


def test_start_copies_shared_words_and_takes_translations_when_they_are_known(teacher_folder, started):
    tokenizer, start = started
    teacher = Encoder.load(resolve(str(teacher_folder)))
    theirs = teacher.backbone.get_input_embeddings().weight.detach().numpy()
    whole = [w for w in KNOWN if tokenizer.token_to_id(w) is not None]
    assert len(whole) > 40
    for word in whole:
        own = theirs[teacher.tokenizer.token_to_id(word)]
        np.testing.assert_allclose(start.table[tokenizer.token_to_id(word)], own, atol=1e-5)
        other = tokenizer.token_to_id(NEW[word])
        if other is not None:
            near = start.table[other] @ own / np.linalg.norm(start.table[other]) / np.linalg.norm(own)
            assert near > 0.9
    np.testing.assert_array_equal(start.table[tokenizer.token_to_id("[SEP]")], theirs[3])
    assert start.sources["none"] < 0.01


def test_student_finds_translations_before_training_only_when_started_from_the_teacher(teacher_folder, started, pairs):
    good = retrieval(student(teacher_folder, started), pairs[1])
    poor = retrieval(student(teacher_folder, blind(started)), pairs[1])
    assert good.mean > 0.5
    assert poor.mean < 0.2


@pytest.mark.parametrize("what", ["embeddings", "all"])
def test_follow_comes_nearer_to_the_teacher_when_trained(teacher_folder, started, pairs, tmp_path, what):
    train, held_out = pairs
    encoder = student(teacher_folder, blind(started))
    wanted = targets(teacher_folder, train.known, tmp_path / "t")
    layer = encoder.backbone.encoder.layer[0].output.dense.weight
    before, first = retrieval(encoder, held_out).mean, layer.detach().clone()
    params = replace(QUICK, train=what, embedding_rate=1e-2, epochs=6.0, temperature=0.02, contrast=1.0)
    done = drain(follow(encoder, rows_of(train), wanted, held_out, params=params, checkpoint=tmp_path / "c", key="k"))
    assert done.best_dev > before + 0.1
    assert done.best_dev == pytest.approx(retrieval(encoder, held_out).mean)
    assert torch.equal(layer, first) == (what == "embeddings")
    assert not (tmp_path / "c").exists()
    each = sum(len(row) for row in encoder.tokenize([text for text, _ in rows_of(train)]))
    assert done.tokens == 6 * each


def test_follow_goes_on_to_the_same_weights_when_it_was_killed(teacher_folder, started, pairs, tmp_path):
    train, held_out = pairs
    wanted = targets(teacher_folder, train.known, tmp_path / "t")

    def work(encoder, folder):
        return follow(encoder, rows_of(train), wanted, held_out, params=QUICK, checkpoint=tmp_path / folder, key="k")

    whole, cut, again = (student(teacher_folder, started) for _ in range(3))
    drain(work(whole, "one"))
    running = work(cut, "two")
    for event in running:
        if isinstance(event, Progress) and event.done == 5:
            break  # the process dies here: the checkpoint of step 5 or 4 is all that is left
    del cut
    drain(work(again, "two"))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_follow_refuses_a_teacher_of_another_width(teacher_folder, started, pairs, tmp_path):
    wanted = np.zeros((len(pairs[0]), 8), dtype=np.float16)
    work = follow(student(teacher_folder, started), rows_of(pairs[0]), wanted, pairs[1], params=QUICK,
                  checkpoint=tmp_path / "c", key="k")  # fmt: skip
    with pytest.raises(TrainError, match="8 wide"):
        drain(work)


def test_follow_leaves_long_sentences_out_and_counts_them(teacher_folder, started, pairs, tmp_path):
    train, held_out = pairs
    rows = [*rows_of(train), (" ".join(KNOWN), len(train))]
    wanted = np.concatenate([targets(teacher_folder, train.known, tmp_path / "t"), np.ones((1, 32), np.float16)])
    params = replace(QUICK, epochs=0.1, max_tokens=30)
    encoder = student(teacher_folder, started)
    done = drain(follow(encoder, rows, wanted, held_out, params=params, checkpoint=tmp_path / "c", key="k"))
    assert done.left_out == 1
    with pytest.raises(TrainError, match="up to 3 tokens"):
        params = replace(QUICK, max_tokens=3)
        drain(follow(encoder, rows, wanted, held_out, params=params, checkpoint=tmp_path / "c", key="k"))


def test_teacher_vectors_are_not_made_again_when_a_part_is_there(teacher_folder, tmp_path, monkeypatch):
    texts = sentences(30).known
    monkeypatch.setattr(crosslingual, "_PART", 10)
    first = targets(teacher_folder, texts, tmp_path)
    (tmp_path / "00001.npy").unlink()
    asked = []
    monkeypatch.setattr(
        Encoder, "embed", lambda self, t, **_: asked.append(len(t)) or np.zeros((len(t), 32), np.float32)
    )
    second = targets(teacher_folder, texts, tmp_path)
    assert asked == [10]
    assert (second[10:20] == 0).all() and (second[:10] == first[:10]).all()


def test_distance_is_least_when_the_student_gives_the_target():
    teacher = torch.nn.functional.normalize(torch.randn(6, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    own = torch.arange(6)
    exact = distance(teacher * 3, teacher, own, contrast=0.0, temperature=0.05)
    assert float(exact) == pytest.approx(0.0, abs=1e-6)
    swapped = distance(teacher[[1, 0, 2, 3, 4, 5]], teacher, own, contrast=0.1, temperature=0.05)
    assert float(swapped) > float(distance(teacher, teacher, own, contrast=0.1, temperature=0.05)) + 0.1


def test_command_makes_an_encoder_that_a_task_can_name(teacher_folder, tmp_path):
    config = write_config(tmp_path, teacher_folder, sentences(300))
    result = CliRunner().invoke(cli, ["distil", str(config), "--out", str(tmp_path / "run"), "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout.splitlines()[-1])
    base = resolve(said["encoder"])
    assert base.normalize is False and base.pooling == "mean" and base.licence == "MIT"
    assert base.languages == ("xx", "yy") and base.max_tokens == 32
    encoder = Encoder.load(base)
    assert encoder.tokenizer.get_vocab_size() == encoder.backbone.config.vocab_size
    _, held_out = hold_out(read_parallel(tmp_path / "pairs.jsonl", known="en", new="fr"), number=40)
    assert retrieval(encoder, held_out).mean == pytest.approx(
        (said["retrieval"]["from_new"] + said["retrieval"]["from_known"]) / 2
    )


def test_second_run_does_no_work_and_a_changed_rate_trains_only_the_last_stage(teacher_folder, tmp_path):
    from alambic.build.distilling import distil_events
    from alambic.distil_config import load_distil

    events = []
    config = write_config(tmp_path, teacher_folder, sentences(300))
    drain(distil_events(load_distil(config), tmp_path / "run"))
    drain(distil_events(load_distil(config), tmp_path / "run"), events.append)
    names = ["vocabulary", "teacher", "embeddings", "all"]
    assert [e.stage for e in events if isinstance(e, Skipped)] == names
    assert not [e for e in events if isinstance(e, Progress)]
    events.clear()
    changed = write_config(tmp_path, teacher_folder, sentences(300), "learning_rate = 0.001\n")
    drain(distil_events(load_distil(changed), tmp_path / "run"), events.append)
    assert [e.stage for e in events if isinstance(e, Skipped)] == names[:-1]
    assert any(isinstance(e, Note) and "held out" in e.message for e in events)


def test_two_columns_are_read_in_their_order_when_none_is_named(tmp_path):
    (tmp_path / "p.tsv").write_text("source\tcible\nOne cat.\tUn chat.\nOne cat.\tUn chat.\n\tVide.\n", "utf-8")
    pairs = read_parallel(tmp_path / "p.tsv")
    assert (pairs.known, pairs.new) == (("One cat.",), ("Un chat.",))
    assert any("empty side" in note for note in pairs.notes) and any("before" in note for note in pairs.notes)


def test_pairs_are_refused_when_columns_or_rows_are_missing(tmp_path):
    (tmp_path / "three.csv").write_text("a,b,c\n1,2,3\n", "utf-8")
    with pytest.raises(DataError, match="which two columns"):
        read_parallel(tmp_path / "three.csv")
    with pytest.raises(DataError, match="no column 'd'"):
        read_parallel(tmp_path / "three.csv", known="a", new="d")
    with pytest.raises(DataError, match="too few to hold 50 out"):
        hold_out(sentences(30), number=50)


def test_held_out_sentences_are_in_no_training_pair_when_they_have_several_translations():
    rows = sentences(100)
    doubled = ParallelText(rows.known + rows.known, rows.new + tuple(f"{text} bis" for text in rows.new))
    train, held_out = hold_out(doubled, number=20)
    assert not {t.casefold() for t in held_out.known} & {t.casefold() for t in train.known}
    assert not {t.casefold() for t in held_out.new} & {t.casefold() for t in train.new}
    assert len(set(held_out.known)) == len(held_out) == 20


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[distil]\nname = "x"\n[data]\npairs = "p"\nknwon = "en"\n', "c.toml:5: data.knwon: unknown key; did you"),
        ('[distil]\nname = "x"\n', "data: missing"),
        ('[distil]\nname = "x"\n[data]\npairs = "p"\n[train]\nepochs = 0\n', "train.epochs = 0"),
        ('[distil]\nname = "x"\n[data]\npairs = "p"\n[vocabulary]\nkeep = true\npieces = 2000\n', "does not apply"),
    ],
)  # fmt: skip
def test_configuration_is_refused_with_its_line_when_wrong(tmp_path, text, said):
    from alambic.distil_config import load_distil

    (tmp_path / "c.toml").write_text(text, "utf-8")
    with pytest.raises(TaskError) as error:
        load_distil(tmp_path / "c.toml")
    assert said in str(error.value)


def test_two_runs_in_one_folder_are_refused(teacher_folder, tmp_path):
    from alambic.errors import WorkspaceError
    from alambic.workspace import Workspace

    config = write_config(tmp_path, teacher_folder, sentences(300))
    ready, end = threading.Event(), threading.Event()

    def hold():
        with Workspace(tmp_path / "run").locked():
            ready.set()
            end.wait(300)

    holder = threading.Thread(target=hold)
    holder.start()
    assert ready.wait(60)
    try:
        from alambic.build.distilling import distil_events
        from alambic.distil_config import load_distil

        with pytest.raises(WorkspaceError, match="another build"):
            drain(distil_events(load_distil(config), tmp_path / "run"))
    finally:
        end.set()
        holder.join()
