"""A label audit with a base: its packed form gives the vectors, and a build in the same folder uses them again."""

import json

import pytest

from linear_task import FILLER, TASK, WORDS, alambic, messages, write_task
from tiny_base import share_graphs, write_base

pytestmark = pytest.mark.slow


@pytest.fixture
def task(tmp_path):
    write_base(tmp_path / "base", [*" ".join(WORDS.values()).split(), *FILLER])
    text = TASK.replace("[data]", 'threads = 1\n[base]\nname = "./base"\n[data]') + '[[candidate]]\nname = "logreg"\n'
    return write_task(tmp_path, text=text, rows=messages(16))


def test_audit_uses_the_packed_base_and_a_build_takes_its_stages(task, tmp_path, tmp_path_factory):
    share_graphs(tmp_path / "run", tmp_path_factory)
    ended = alambic("check", task, "--audit", "--out", tmp_path / "run", "--json")
    assert ended.code == 0, ended.err
    assert list(json.loads(ended.out)["accuracy"]) == ["logreg", "tfidf-svm"]
    stages = tmp_path / "run" / "stages"
    before = {path.name for path in stages.iterdir() if path.name.startswith(("base-", "embed-"))}
    assert len(before) == 2
    built = alambic("build", task, "--out", tmp_path / "run", "--json")
    assert built.code in (0, 3), built.err
    assert {path.name for path in stages.iterdir() if path.name.startswith(("base-", "embed-"))} == before
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "Labels to review (dev rows)" in page and "rows that decided look wrong" in page
