"""Students of a fine-tuned encoder on tiny models: what must hold whatever the base."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from alambic.data.dataset import Dataset, Example
from alambic.data.variants import variants
from alambic.engines import load_part
from alambic.errors import EngineError, TrainError
from alambic.events import Progress, drain
from alambic.model.encoder import Encoder
from alambic.model.student import check_smaller, depth, read_alike, same_pieces, shallower, spread, with_head_of
from alambic.train.distil import DistilParams, distil
from alambic.train.finetune import FinetuneParams, finetune
from alambic.train.lesson import Lesson, hard_loss, soft_loss
from alambic.train.relations import Relations, relation_loss
from alambic.train.states import States, mapped, state_loss
from alambic.train.static import StaticParams, distil_static, start_vectors
from alambic.train.teacher import digest_of, encoder_answers, mean_answers, teacher_answers

COLOURS = ("blue", "green", "red")
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *COLOURS, "a", "the", "cat", "dog", "bird", "runs", "sits", "very", "far"]
QUICK = DistilParams(epochs=4, batch_size=8, learning_rate=1e-3, threads=1, checkpoint_seconds=0.0)


def encoder(*, layers=3, hidden=32, heads=4, words=WORDS, seed=0, kind="bert"):
    torch.manual_seed(seed)
    shape = {"vocab_size": len(words), "pad_token_id": 0, "max_position_embeddings": 32}
    if kind == "distilbert":
        config = transformers.DistilBertConfig(dim=hidden, n_layers=layers, n_heads=heads, hidden_dim=64, **shape)
    elif kind == "modernbert":
        config = transformers.ModernBertConfig(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=64,
            bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, local_attention=8, **shape,
        )  # fmt: skip
    else:
        config = transformers.BertConfig(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=64, **shape
        )
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    return transformers.AutoModel.from_config(config), tokenizer


def saved(folder, **shape):
    backbone, tokenizer = encoder(**shape)
    backbone.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def colours(n, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        chosen = COLOURS[rng.integers(3)]
        words = [chosen, *rng.choice(WORDS[7:], size=rng.integers(1, 6))]
        rng.shuffle(words)
        rows.append(Example(" ".join(words), (chosen,), f"toy.csv:{i + 2}"))
    return Dataset(tuple(rows), COLOURS)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    params = FinetuneParams(epochs=4, batch_size=8, learning_rate=1e-3, few_shot="off", threads=1)
    drain(finetune(saved(folder / "base"), colours(120), colours(60, 1), params=params, out=folder / "model"))
    return Encoder.load(folder / "model")


def lesson_of(teacher, rows, folder, *, labelled=None):
    answers = drain(teacher_answers(encoder_answers(teacher, long="windows"), rows.texts, folder))
    return Lesson(rows, len(rows) if labelled is None else labelled, answers.logits, answers.vectors)


def accuracy(model, rows):
    with torch.no_grad():
        head = model.classify(torch.from_numpy(model.embed(rows.texts)))
    return float((head.argmax(1).numpy() == [t[0] for t in rows.targets()]).mean())


@pytest.mark.parametrize(
    ("layers", "of", "kept"), [(1, 6, (0,)), (2, 6, (0, 5)), (3, 6, (0, 2, 5)), (4, 12, (0, 4, 7, 11))]
)
def test_spread_takes_layers_evenly_with_both_ends(layers, of, kept):
    assert spread(layers, of) == kept


@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert"])
def test_shallower_gives_a_student_that_saves_and_opens(tmp_path, kind):
    whole = Encoder.load(saved(tmp_path / "base", layers=4, kind=kind)).with_head(COLOURS, multi_label=False)
    student = shallower(whole, 2)
    student.save(tmp_path / "student")
    again = Encoder.load(tmp_path / "student")
    assert (depth(whole), depth(again)) == (4, 2)
    np.testing.assert_allclose(again.embed(["the red cat"]), student.embed(["the red cat"]), atol=1e-6)


def test_shallower_refuses_one_layer_where_layers_are_of_two_kinds(tmp_path):
    with pytest.raises(TrainError, match="a student needs one of each"):
        shallower(Encoder.load(saved(tmp_path / "base", layers=4, kind="modernbert")), 1)


@pytest.mark.parametrize("layers", [0, 3, 4])
def test_shallower_refuses_a_student_as_large_as_its_teacher(teacher, layers):
    with pytest.raises(TrainError, match=rf"layers = {layers}: the teacher has 3, and its student needs 1 to 2"):
        shallower(teacher, layers)


def test_check_smaller_refuses_a_wider_student(teacher, tmp_path):
    wider = Encoder.load(saved(tmp_path / "wide", layers=2, hidden=64))
    with pytest.raises(TrainError, match="a student must be smaller"):
        check_smaller(wider, teacher)


def test_same_pieces_sees_through_vocabularies_of_one_size():
    plain, turned = encoder()[1], encoder(words=[*WORDS[:4], *reversed(WORDS[4:])])[1]
    assert plain.get_vocab_size() == turned.get_vocab_size()
    assert same_pieces(plain, encoder(seed=1)[1])
    assert not same_pieces(plain, turned)


def test_student_follows_its_teacher_on_texts_without_labels(teacher, tmp_path):
    rows, dev = colours(120, 2), colours(80, 3)
    bare = replace(rows, examples=tuple(Example(e.text, ()) for e in rows))
    student = with_head_of(Encoder.load(saved(tmp_path / "raw", layers=1, seed=5)), teacher)
    before = accuracy(student, dev)
    lesson = lesson_of(teacher, bare, tmp_path / "answers", labelled=0)
    params = replace(QUICK, epochs=10, learning_rate=3e-3)
    result = drain(distil(student, lesson, dev, params=params, out=tmp_path / "model", teacher=None))
    made = Encoder.load(tmp_path / "model")
    assert depth(made) == 1
    assert accuracy(made, dev) == pytest.approx(result.best_dev)
    assert before < 0.7
    assert result.best_dev > 0.9


def test_distil_ends_the_same_when_killed_and_run_again(teacher, tmp_path):
    lesson = lesson_of(teacher, colours(48), tmp_path / "answers")

    def work(name):
        return distil(
            shallower(teacher, 1), lesson, colours(30, 1), params=QUICK, out=tmp_path / name, teacher=None
        )  # fmt: skip

    drain(work("whole"))
    killed = work("killed")
    for event in killed:
        if isinstance(event, Progress) and event.done == 3:
            break
    kept = tmp_path / "killed.checkpoint"
    kept.rename(tmp_path / "aside")  # kill -9 leaves the checkpoint and nothing else
    killed.close()
    (tmp_path / "aside").rename(kept)
    events = []
    drain(work("killed"), events.append)
    assert next(e.done for e in events if isinstance(e, Progress)) == 4
    one, two = (Encoder.load(tmp_path / name).state_dict() for name in ("whole", "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_student_of_another_tokenizer_and_width_learns(teacher, tmp_path):
    words = [*WORDS[:4], *reversed(WORDS[4:])]
    other = Encoder.load(saved(tmp_path / "narrow", layers=1, hidden=16, heads=2, words=words))
    student = with_head_of(other, teacher)
    lesson = lesson_of(teacher, colours(120), tmp_path / "answers")
    params = replace(QUICK, epochs=20, learning_rate=5e-3, head_learning_rate=1e-2, embeddings="trained", patience=20)
    result = drain(distil(student, lesson, colours(60, 1), params=params, out=tmp_path / "model", teacher=None))
    assert result.best_dev > 0.8


@pytest.mark.parametrize("what", ["relations", "states"])
def test_relations_and_states_are_refused_when_student_and_teacher_read_other_tokens(teacher, tmp_path, what):
    words = [*WORDS[:4], *reversed(WORDS[4:])]
    student = with_head_of(Encoder.load(saved(tmp_path / "other", layers=1, words=words)), teacher)
    lesson = lesson_of(teacher, colours(20), tmp_path / "answers")
    params = replace(QUICK, **{what: 1.0})
    with pytest.raises(TrainError, match=f"{what}: student and teacher read other tokens"):
        drain(distil(student, lesson, None, params=params, out=tmp_path / "model", teacher=teacher))


def test_relations_draw_the_student_to_its_teacher(teacher, tmp_path):
    lesson = lesson_of(teacher, colours(64), tmp_path / "answers")
    student = shallower(teacher, 1)

    def distance(model):
        own, theirs = Relations(model), Relations(teacher)
        ids, mask = torch.tensor([[1, 4, 9, 12, 2, 0]]), torch.tensor([[1, 1, 1, 1, 1, 0]])
        with torch.no_grad():
            model.pool(ids, mask), teacher.pool(ids, mask)
            value = float(relation_loss(own, theirs, mask, heads=4))
        own.close(), theirs.close()
        return value

    before = distance(student)
    params = replace(QUICK, relations=5.0, epochs=6)
    drain(distil(student, lesson, colours(30, 1), params=params, out=tmp_path / "model", teacher=teacher))
    assert distance(teacher) == pytest.approx(0.0, abs=1e-5)
    assert distance(student) < 0.7 * before


@pytest.mark.parametrize(("layers", "of", "followed"), [(1, 3, (2,)), (2, 6, (2, 5)), (4, 12, (2, 5, 8, 11))])
def test_layers_follow_every_nth_of_the_teacher(layers, of, followed):
    assert mapped(layers, of) == followed


@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert"])
def test_states_are_the_library_s_own_and_their_loss_leaves_padding_out(tmp_path, kind):
    both = [Encoder.load(saved(tmp_path / str(n), layers=n, kind=kind, seed=n)) for n in (2, 4)]
    watched = [States(one) for one in both]
    ids, mask = torch.tensor([[1, 4, 9, 12, 2, 0]]), torch.tensor([[1, 1, 1, 1, 1, 0]])
    with torch.no_grad():
        for one, watch in zip(both, watched, strict=True):
            told = one.backbone(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
            for k in range(len(watch.kept) - 1):  # some families normalise what the last one gave
                assert torch.allclose(watch.of(k), told[k + 1], atol=1e-6)
        loss = float(state_loss(*watched, mask))
    expected = []
    for own, theirs in ((0, 1), (1, 3)):
        mine, truth = (watch.of(k)[0, :5] for watch, k in zip(watched, (own, theirs), strict=True))
        expected.append(float((mine - truth).square().mean() / truth.square().mean()))
    assert loss == pytest.approx(sum(expected) / 2, rel=1e-4)
    for watch in watched:
        watch.close()


def test_states_draw_the_student_to_its_teacher(teacher, tmp_path):
    lesson = lesson_of(teacher, colours(64), tmp_path / "answers")
    student = shallower(teacher, 1)

    def distance(model):
        own, theirs = States(model), States(teacher)
        ids, mask = torch.tensor([[1, 4, 9, 12, 2, 0]]), torch.tensor([[1, 1, 1, 1, 1, 0]])
        with torch.no_grad():
            model.pool(ids, mask), teacher.pool(ids, mask)
            value = float(state_loss(own, theirs, mask))
        own.close(), theirs.close()
        return value

    before = distance(student)
    params = replace(QUICK, states=5.0, relations=1.0, epochs=6)
    drain(distil(student, lesson, colours(30, 1), params=params, out=tmp_path / "model", teacher=teacher))
    assert distance(teacher) == pytest.approx(0.0, abs=1e-6)
    assert distance(student) < 0.7 * before


def test_states_are_refused_when_the_student_is_narrower(teacher, tmp_path):
    student = with_head_of(Encoder.load(saved(tmp_path / "narrow", layers=1, hidden=16)), teacher)
    lesson = lesson_of(teacher, colours(20), tmp_path / "answers")
    with pytest.raises(TrainError, match="states: the student is 16 wide and its teacher 32"):
        drain(distil(student, lesson, None, params=replace(QUICK, states=1.0), out=tmp_path / "m", teacher=teacher))


def test_soft_loss_is_zero_where_both_agree_and_grows_with_the_distance():
    teacher, far = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[-1.0, 0.0, 2.0]])
    losses = [float(soft_loss(x, teacher, softness=2.0, multi_label=False)) for x in (teacher, teacher + 3, far)]
    assert losses[0] == pytest.approx(0.0, abs=1e-6)
    assert losses[1] == pytest.approx(0.0, abs=1e-6)  # a constant changes no share
    assert losses[2] > 1.0


@pytest.mark.parametrize("multi_label", [False, True])
def test_hard_loss_says_nothing_of_texts_without_labels(multi_label):
    truths = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    logits = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    losses = hard_loss(logits, truths, torch.tensor([True, False, False]), multi_label=multi_label)
    assert losses[0] > 1.5
    assert losses[1:].tolist() == [0.0, 0.0]


def test_teacher_answers_are_computed_once_a_text(teacher, tmp_path):
    asked = []
    ask = encoder_answers(teacher, long="windows")

    def counting(texts):
        asked.extend(texts)
        return ask(texts)

    first = drain(teacher_answers(counting, ["a cat", "the dog", "a cat"], tmp_path))
    again = drain(teacher_answers(counting, ["red bird", "a cat"], tmp_path))
    assert asked == ["a cat", "the dog", "red bird"]
    assert np.array_equal(first.logits[0], again.logits[1])
    assert np.array_equal(first.logits[0], first.logits[2])
    assert digest_of("a cat") != digest_of("the dog")


def test_mean_answers_averages_shares_not_logits():
    sure, unsure = np.log([[0.9, 0.1]]).astype("f4"), np.log([[0.5, 0.5]]).astype("f4")
    np.testing.assert_allclose(np.exp(mean_answers([sure, unsure], multi_label=False)), [[0.7, 0.3]], atol=1e-6)


def test_static_student_learns_and_its_part_answers_the_same(teacher, tmp_path):
    rows, dev = colours(160), colours(80, 1)
    params = StaticParams(epochs=15, width=16, hidden=16, batch_size=16, learning_rate=1e-2, threads=1)
    lesson = lesson_of(teacher, rows, tmp_path / "answers")
    result, part = drain(distil_static(teacher, lesson, dev, params=params, out=tmp_path / "classifier"))
    reader = load_part(part, tmp_path / "classifier", threads=1)
    right = reader.run(dev.texts).argmax(1) == [t[0] for t in dev.targets()]
    assert result.best_dev > 0.9
    assert right.mean() == pytest.approx(result.best_dev, abs=0.02)


def test_static_part_refuses_arrays_that_do_not_fit(teacher, tmp_path):
    lesson = lesson_of(teacher, colours(20), tmp_path / "answers")
    params = StaticParams(steps=2, width=8, hidden=8, threads=1)
    _, part = drain(distil_static(teacher, lesson, None, params=params, out=tmp_path / "classifier"))
    np.save(tmp_path / "classifier" / "bias.npy", np.zeros(7, dtype="f4"))
    with pytest.raises(EngineError, match="shapes do not fit"):
        load_part(part, tmp_path / "classifier", threads=1)


def test_start_vectors_tell_tokens_apart(teacher):
    start = start_vectors(teacher, width=8)
    assert start.shape == (len(WORDS), 8)
    assert float(start.std()) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [({"epoch": 3}, "unknown key 'epoch'"), ({"embeddings": 3}, "embeddings = 3"), ({"softness": 0}, "softness"),
     ({"embeddings": "no"}, "allowed: frozen, trained")],
)  # fmt: skip
def test_distil_params_refuse_what_cannot_be(recipe, said):
    with pytest.raises(TrainError, match=said):
        DistilParams.from_recipe(recipe)


def test_variants_are_others_and_the_same_each_time():
    text = "please cancel the appointment on monday morning"
    made = variants(text, copies=4, seed=0)
    assert len(set(made)) == len(made) >= 3
    assert text not in made
    assert made == variants(text, copies=4, seed=0)
    assert made != variants(text, copies=4, seed=1)
    assert all(len(set(other.split()) & set(text.split())) >= 5 for other in made)


def test_variants_leave_alone_what_has_no_room_for_change():
    assert variants("ok no", copies=3, seed=0) == ()


def test_read_alike_is_true_for_a_student_of_the_same_layers(teacher):
    assert read_alike(shallower(teacher, 2), teacher, ["the red cat", "a dog"])
