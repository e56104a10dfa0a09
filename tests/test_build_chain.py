"""Whole builds with a tiny encoder: one in which a chain of a linear model and the encoder wins, one that abstains.

Three texts of four are easy: words that texts of their label share. The others have words that no other text has, so
that only an encoder whose base knows what they mean can tell their label.
"""

import json
import random
import subprocess
import sys

import pytest

import alambic as package
from alambic.build import build
from alambic.bundle import open_bundle, verify
from linear_task import WORDS, alambic, write_csv, write_task
from processor_clock import time_by_processor
from task_files import desk
from tiny_base import share_graphs, write_base

pytestmark = pytest.mark.slow

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHAIN = desk("""\
dev = "dev.csv"
test = "test.csv"
{data}
[base]
name = "./base"
[budget]
{budget}
[[candidate]]
name = "finetune"
recipe = { epochs = 2, batch_size = 16, learning_rate = 1e-3, few_shot = "off" }
""")
LADDER = """\
[[candidate]]
name = "tfidf-svm"
[[candidate]]
name = "cascade"
recipe = { tolerance = 0.05 }
"""


class Desk:
    """Draws texts, no word of a hard one twice, and remembers what each word means."""

    def __init__(self) -> None:
        self.draw = random.Random(4)
        self.meanings = {word: label for label, words in WORDS.items() for word in words.split()}

    def rows(self, n: int) -> list[tuple[str, str]]:
        made = []
        for i in range(n):
            label = sorted(WORDS)[i % 3]
            words = self.draw.sample(WORDS[label].split(), 4) if i % 4 else [self.new(label) for _ in range(4)]
            made.append((" ".join(words), label))
        self.draw.shuffle(made)
        return made

    def new(self, meaning: str) -> str:
        word = "".join(self.draw.choices(LETTERS, k=7))
        self.meanings[word] = meaning
        return word


def task_of(folder, *, budget, data="", candidates=""):
    desk = Desk()
    text = CHAIN.replace("{budget}", budget).replace("{data}", data) + candidates
    task = write_task(folder, text=text, rows=desk.rows(120))
    for name, n in (("dev", 180), ("test", 90)):
        write_csv(folder / f"{name}.csv", desk.rows(n))
    other = [tuple([" ".join(desk.new("elsewhere") for _ in range(4))]) for _ in range(60)]
    write_csv(folder / "outside.csv", other, header=("message",))
    # Large enough that it is worth asking the linear model first.
    write_base(folder / "base", desk.meanings, layers=4, width=256, meanings=desk.meanings)
    return task


@pytest.fixture(scope="module")
def won(tmp_path_factory):
    """A finished build that the chain won, its folder, and the hard and easy texts of its test rows."""
    folder = tmp_path_factory.mktemp("won")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder / "home"))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        time_by_processor(patch)
        task = task_of(folder, budget='prefer = "mean_ms"\nquality = { accuracy = 0.9 }', candidates=LADDER)
        result = build(task, out=share_graphs(folder / "run", tmp_path_factory))
    rows = [line.split(",") for line in (folder / "test.csv").read_text("utf-8").splitlines()[1:]]
    easy = {word for words in WORDS.values() for word in words.split()}
    return result, rows, [text.split()[0] in easy for text, _ in rows]


def test_chain_of_a_linear_model_and_an_encoder_wins_where_it_is_as_good_in_less_time(won):
    result, rows, easy = won
    assert result.chosen == "cascade" and result.budget["met"]
    record = {c["name"]: c for c in result.to_dict()["candidates"]}
    ms = {name: c["speed"]["mean_ms"] for name, c in record.items()}
    assert ms["tfidf-svm"] < ms["cascade"] < ms["finetune"]
    with package.open(result.bundle) as engine:
        said = engine.predict([text for text, _ in rows])
        assert engine.stages == ("tfidf-svm", "finetune") and "embed" in engine.capabilities
    right = [one.label == label for one, (_, label) in zip(said, rows, strict=True)]
    assert sum(right) / len(right) >= 0.9
    # The linear model answers what it can; what it has no word of goes on.
    early = [one.answered_by == "tfidf-svm" for one in said]
    assert sum(e and s for e, s in zip(easy, early, strict=True)) > 0.7 * sum(easy)
    assert sum(not e and s for e, s in zip(easy, early, strict=True)) < 0.3 * (len(easy) - sum(easy))


def test_bundle_of_a_chain_with_an_encoder_is_whole_and_needs_no_training_stack(won):
    bundle = won[0].bundle
    assert {p.folder.split("/")[0] for p in open_bundle(bundle).manifest.parts} == {"tfidf-svm", "finetune"}
    assert verify(bundle).name == "desk"
    code = (
        "import sys, alambic\n"
        "engine = alambic.open(sys.argv[1])\n"
        "print(engine.predict(['invoice refund bank card'])[0].label)\n"
        "print([m for m in ('torch', 'transformers', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, timeout=600)
    assert done.stdout.split("\n")[:2] == ["billing", "[]"], done.stderr


def test_chain_with_an_encoder_is_shown_and_exported_as_one_file_only(won, tmp_path):
    bundle = won[0].bundle
    shown = alambic("show", bundle).out
    assert "tfidf-svm.classifier (tfidf-linear) from confidence 0." in shown and "then finetune." in shown
    ended = alambic("export", bundle, "--to", "onnx", "--out", tmp_path / "onnx")
    assert ended.code == 1 and "a cascade (tfidf-svm -> finetune) is no single model to export" in ended.err
    assert alambic("export", bundle, "--to", "file", "--out", tmp_path / "desk.alambic").code == 0
    one = json.loads(alambic("predict", tmp_path / "desk.alambic", "invoice refund bank card", "--json").out)
    assert (one["prediction"], one["answered_by"], one["abstained"]) == ("billing", "tfidf-svm", False)


def test_nearest_row_competes_for_the_scope_of_a_fine_tuned_bundle_with_reasons(tmp_path, tmp_path_factory):
    data = 'out_of_scope = "outside.csv"\nreasons = "rows"'
    run = share_graphs(tmp_path / "run", tmp_path_factory)
    result = build(task_of(tmp_path, budget="in_scope = 0.9", data=data), out=run)
    manifest = open_bundle(result.bundle).manifest
    figures = manifest.decision.facts["in_scope"]["auroc"]
    assert set(figures) == {"confidence", "max_logit", "energy", "nearest"}
    # What is told apart by meaning is told apart by vectors: the words of these texts mean something else.
    assert figures["nearest"] > 0.9
    assert next(p.params["how"] for p in manifest.parts if p.engine == "examples") == "vectors"
    with package.open(result.bundle) as engine:
        assert manifest.decision.scope in engine.scopes
        (near,) = engine.reasons(["invoice refund bank card"], n=1)[0]
        assert near.labels == ("billing",) and near.similarity > 0.5
