"""The task file: what is refused, and how it is said."""

import json
from pathlib import Path

import pytest

from alambic.errors import TaskError
from alambic.task import json_schema, load_task

GOOD = """\
[task]
name = "tickets"
kind = "classify"
[data]
train = "t.csv"
[budget]
quality = { macro_f1 = 0.8 }
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "task.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_the_whole_ladder_when_no_candidate_is_named(tmp_path):
    task = load_task(write(tmp_path, GOOD))
    ladder = ["majority", "tfidf-svm", "knn", "logreg", "finetune", "finetune-int8", "cascade"]
    assert [c.name for c in task.candidates] == ladder


def test_floor_metric_decides_when_one_is_given(tmp_path):
    assert load_task(write(tmp_path, GOOD)).metrics == ("macro_f1", "accuracy")


def test_recipe_is_one_finetune_candidate_when_bare(tmp_path):
    task = load_task(write(tmp_path, GOOD + "[recipe]\nepochs = 2\n"))
    assert [(c.name, c.recipe) for c in task.candidates] == [("finetune", {"epochs": 2})]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('train = "t.csv"', 'trian = "t.csv"', "task.toml:5: data.trian: unknown key; did you mean 'train'?"),
        ('train = "t.csv"', "", "task.toml:4: data.train: missing"),
        ('kind = "classify"', 'kind = "clasify"', "task.toml:3: task.kind = 'clasify'; allowed: 'classify'"),
        ("macro_f1 = 0.8", "macro_f1 = 88", "task.toml:7: budget.quality: macro_f1 = 88 is not a share"),
        ("macro_f1 = 0.8", "macro_f2 = 0.8", "unknown metric 'macro_f2'; did you mean 'macro_f1'?"),
        ("[budget]", "[buget]", "task.toml:6: buget: unknown key; did you mean 'budget'?"),
        ('name = "tickets"', 'name = "a b"', "task.toml:2: task.name = 'a b'"),
        ("[budget]", "[budget]\nsize_mb = 50\npeak_ram_mb = 20", "peak_ram_mb = 20 is under budget.size_mb = 50"),
        ("[budget]", '[budget]\nprefer = "quality"\ngive_up = 1', "contradicts prefer = 'quality'"),
        (
            "[budget]",
            '[[candidate]]\nname = "finetun"\n[budget]',
            "task.toml:7: candidate[0].name: 'finetun'; did you mean",
        ),
    ],
)
def test_fault_is_named_with_line_and_nearest_when_a_key_is_wrong(tmp_path, old, new, said):
    with pytest.raises(TaskError) as error:
        load_task(write(tmp_path, GOOD.replace(old, new)))
    assert said in str(error.value)


def test_all_faults_are_told_together_when_there_are_several(tmp_path):
    text = GOOD.replace("train", "trian").replace("classify", "clasify")
    with pytest.raises(TaskError) as error:
        load_task(write(tmp_path, text))
    assert "data.trian" in str(error.value) and "task.kind" in str(error.value)


def test_missing_file_names_the_neighbours_when_there_are_some(tmp_path):
    write(tmp_path, GOOD)
    with pytest.raises(TaskError, match=r"here there is task.toml"):
        load_task(tmp_path / "tsk.toml")


def test_broken_toml_gives_line_and_column(tmp_path):
    with pytest.raises(TaskError, match=r"not valid TOML: .*line 2"):
        load_task(write(tmp_path, "[task]\nname = = 3\n"))


def test_byte_order_mark_is_accepted(tmp_path):
    path = tmp_path / "task.toml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_task(path).name == "tickets"


def test_misuse_exits_two():
    assert TaskError("x").exit_code == 2


def test_schema_describes_every_key():
    schema = json_schema()
    assert json.dumps(schema)
    data = schema["$defs"]["DataSpec"]["properties"]
    assert all("description" in field for field in data.values())


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("examples/*/task.toml")), ids=str)
def test_example_task_is_valid(path):
    assert load_task(path).path_of(load_task(path).data.train).exists()
