"""A whole build with students of a tiny fine-tuned encoder, and the task files that are refused before it."""

import json

import numpy as np
import pytest

from alambic.build import build
from alambic.build.check import check_task
from alambic.build.export import model_of
from alambic.build.ladder import agree_recipes
from alambic.build.teaching import lessons_of
from alambic.bundle import open_bundle
from alambic.errors import DataError, TaskError, TrainError
from alambic.events import Note, drain
from alambic.model.encoder import Encoder
from alambic.model.student import depth
from alambic.task import load_task
from linear_task import FILLER, WORDS, messages, write_csv, write_task
from processor_clock import time_by_processor
from task_files import desk
from tiny_base import share_graphs, write_base

TASK = desk("""\
{data}
[base]
name = "./base"
[budget]
{budget}
""")
STUDENTS = """\
[[candidate]]
name = "finetune"
recipe = { epochs = 8, batch_size = 8, learning_rate = 1e-3, few_shot = "off" }
[[candidate]]
name = "distil"
recipe = { layers = 2, epochs = 4, batch_size = 8, teacher = "finetune + tfidf-svm", teacher_epochs = 8 }
[[candidate]]
name = "small"
step = "distil"
recipe = { layers = 1, epochs = 4, batch_size = 8, copies = 0, teacher_epochs = 8 }
[[candidate]]
name = "distil-static"
recipe = { width = 16, hidden = 16, epochs = 6, teacher_epochs = 8 }
"""


def task_file(folder, candidates, *, data="", budget='prefer = "p95_ms"', rows=None):
    text = TASK.format(data=data, budget=budget) + candidates
    path = write_task(folder, text=text, rows=messages(14) if rows is None else rows)
    if not (folder / "base").exists():
        write_base(folder / "base", [*" ".join(WORDS.values()).split(), *FILLER], layers=3)
    return path


@pytest.mark.slow
def test_build_tries_students_and_ships_one(tmp_path, tmp_path_factory, monkeypatch):
    time_by_processor(monkeypatch)
    more = [text for text, _ in messages(20, seed=7)]
    path = task_file(tmp_path, STUDENTS, data='unlabelled = "more.txt"')
    (tmp_path / "more.txt").write_text("\n".join([*more, messages(14)[0][0]]), "utf-8")
    events = []
    result = build(path, out=share_graphs(tmp_path / "run", tmp_path_factory), on_event=events.append)
    names = {c["name"] for c in result.to_dict()["candidates"]}
    assert names == {"finetune", "distil", "small", "distil-static"}
    assert any(
        "60 texts without labels (left out: 1 rows of the task)" in e.message for e in events if isinstance(e, Note)
    )
    # One training of the teacher a fold, whoever asks for it; its answers lie under its key, by text.
    stages = [path.name for path in (tmp_path / "run" / "stages").iterdir()]
    folds = {name.split("-")[0] for name in stages if name.startswith("finetune.fold")}
    assert len([name for name in stages if name.startswith("finetune.fold")]) == len(folds)
    teachers = list((tmp_path / "run" / "teachers").iterdir())
    with np.load(next(teachers[0].glob("*.npz"))) as part:
        assert len(set(part["digests"].tolist())) == len(part["digests"]) == len(part["logits"])
    bundle = open_bundle(tmp_path / "run" / "bundle")
    assert bundle.manifest.candidate == result.chosen != "finetune"
    assert bundle.manifest.parts[0].engine == "static" or result.chosen in ("distil", "small")


@pytest.mark.slow
def test_export_finds_the_student_and_not_its_teachers_of_two_seeds(tmp_path, tmp_path_factory):
    candidate = STUDENTS.split("[[candidate]]")[3].replace("layers = 1,", "layers = 1, seeds = 2,")
    path = task_file(tmp_path, f"[[candidate]]{candidate}", data='dev = "dev.csv"', budget="")
    write_csv(tmp_path / "dev.csv", messages(4, seed=3))
    result = build(path, out=share_graphs(tmp_path / "run", tmp_path_factory))
    model = model_of(open_bundle(result.bundle), tmp_path / "run")
    assert depth(Encoder.load(model)) == 1
    assert json.loads((model.parent / "stage.json").read_text("utf-8"))["name"] == "distil.all"
    teachers = (tmp_path / "run" / "stages").glob("finetune.all-*/stage.json")
    assert {json.loads(stage.read_text("utf-8"))["params"]["seed"] for stage in teachers} == {0, 1}


def test_a_student_as_large_as_its_teacher_is_refused_before_the_build(tmp_path):
    path = task_file(tmp_path, '[[candidate]]\nname = "distil"\nrecipe = { layers = 3 }\n')
    with pytest.raises(TaskError, match=r"layers = 3: its teacher ./base has 3, and a student must be smaller"):
        build(path, out=tmp_path / "run")
    assert not list((tmp_path / "run" / "stages").iterdir())


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (
            '{ base = "./wide" }',
            r"candidate 'distil': the student has [\d,]+ weights in its layers and its teacher [\d,]+",
        ),
        ('{ base = "./wide", layers = 9 }', r"candidate 'distil': layers = 9: .*wide has 2"),
    ],
)
@pytest.mark.parametrize("check", [False, True])
def test_a_student_wider_than_its_teacher_is_refused_before_the_build(tmp_path, recipe, said, check):
    path = task_file(tmp_path, f'[[candidate]]\nname = "distil"\nrecipe = {recipe}\n')
    write_base(tmp_path / "wide", FILLER, width=64)
    with pytest.raises(TaskError, match=said):
        drain(check_task(load_task(path))) if check else build(path, out=tmp_path / "run")
    assert not list((tmp_path / "run" / "stages").glob("*"))


@pytest.mark.parametrize("check", [False, True])
def test_unlabelled_text_in_another_language_is_refused_before_the_build(tmp_path, check):
    path = task_file(tmp_path, '[[candidate]]\nname = "distil"\n', data='unlabelled = "more.txt"')
    french = [
        "je ne trouve pas la facture de mon colis",
        "est ce que vous avez mon colis",
        "la facture est dans le colis",
    ]
    (tmp_path / "more.txt").write_text("\n".join(french), "utf-8")
    with pytest.raises(DataError, match=r"in a language \(fr\) that the training rows \(en\) are not in"):
        drain(check_task(load_task(path))) if check else build(path, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("candidates", "data", "said"),
    [
        ('[[candidate]]\nname = "knn"\n', 'unlabelled = "more.txt"', "data.unlabelled: no candidate learns from it"),
        ('[[candidate]]\nname = "x"\nstep = "distill"\n', "", r"candidate\[0\].step: 'distill'; .*'distil'"),
        ('[[candidate]]\nname = "knn"\nstep = "distil"\n', "", "'knn' is a step of its own"),
        ('[[candidate]]\nname = "x"\n', "", r"candidate\[0\].name: 'x'"),
    ],
)
def test_task_refuses_what_would_do_nothing(tmp_path, candidates, data, said):
    with pytest.raises(TaskError, match=said):
        load_task(task_file(tmp_path, candidates, data=data))


@pytest.mark.parametrize(
    ("step", "recipe", "said"),
    [
        ("distil", {"teacher": "bert"}, "teacher = 'bert': allowed are finetune, tfidf-svm"),
        ("distil", {"teacher": "tfidf-svm"}, "a student starts from finetune"),
        ("distil", {"teacher": 3}, "recipe of distil: teacher = 3; it is like 'finetune' by default"),
        ("distil", {"layers": 0}, "layers = 0"),
        ("distil", {"layers": "two"}, "recipe of distil: layers = 'two'; it is a whole number"),
        ("distil", {"seeds": True}, "recipe of distil: seeds = True"),
        ("distil-static", {"layers": 2}, "unknown key 'layers'"),
        ("distil-int8", {"softnes": 2.0}, "unknown key 'softnes'"),
    ],
)
def test_recipes_are_checked_before_anything_slow(step, recipe, said):
    with pytest.raises(TrainError, match=said):
        lessons_of(step, recipe)


@pytest.mark.parametrize(
    ("budget", "tried"), [("", False), ("p95_ms = 5", True), ('prefer = "size_mb"', True), ("build_minutes = 5", False)]
)
def test_students_are_tried_unasked_where_the_budget_speaks_of_what_they_save(tmp_path, budget, tried):
    names = [c.name for c in load_task(task_file(tmp_path, "", budget=budget)).candidates]
    assert ("distil-int8" in names) == ("distil-static" in names) == tried


def test_folds_agree_on_the_student_and_on_its_teacher():
    def refit(steps, rate):
        own = {"steps": 8, "schedule": 10, "learning_rate": rate, "few_shot": "off"}
        return {"layers": 2, "steps": steps, "schedule": 100, "learning_rate": 3e-4, "teachers": {"finetune": own}}

    agreed = agree_recipes([refit(50, 1e-4), refit(80, 2e-4), refit(60, 2e-4)])
    assert (agreed["steps"], agreed["layers"]) == (60, 2)
    assert "few_shot" not in agreed
    assert agreed["teachers"]["finetune"]["learning_rate"] == 2e-4
