"""The model beside the annotator, the session, its HTTP calls and the command; vectors are made up, no encoder runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

from alambic.build.labelling.encoder import VectorCache
from alambic.build.labelling.opening import Ask, open_annotation
from alambic.build.labelling.session import Session
from alambic.build.labelling.tutor import Tutor
from alambic.build.prepare import read_rows
from alambic.cli.label import label
from alambic.data.annotations import Journal, text_id
from alambic.data.label_pool import Pool, PoolText
from alambic.errors import DataError, TaskError
from alambic.serve.annotate import create_annotation_app
from alambic.serve.limits import LOOPBACK_NAMES
from alambic.task import load_task
from alambic.train.labelling import Guesses, Learner, Weights, next_texts

LABELS = {"billing": "money", "repair": "broken", "other": ""}
WORDS = {"money": 0, "broken": 1, "other": 2}


def embed(texts):
    """Place each text near the corner of the word it has, by a distance that the text decides."""
    noise = {text: np.random.default_rng(len(text)).normal(0, 0.1, 8) for text in texts}
    vectors = np.stack([noise[text] for text in texts])
    for row, text in enumerate(texts):
        for word, axis in WORDS.items():
            vectors[row, axis] += word in text
    return vectors.astype(np.float32)


def texts_of(n):
    words = ("money", "broken", "other")
    return [f"{words[i % 3]} {'x' * (i // 3)} {i}" for i in range(n)]


def make_pool(n=30):
    return Pool(tuple(PoolText(text_id(t), t, f"t.csv:{i}") for i, t in enumerate(texts_of(n))), ())


@pytest.fixture
def open_session(tmp_path):
    opened = []

    def start(pool=None, *, tutor=True, **more):
        pool = pool or make_pool()
        teacher = None
        if tutor:
            teacher = Tutor(embed, [t.text for t in pool.texts], LABELS, multi_label=False, cache=VectorCache("d", "t"))
        session = Session(
            "texts", pool, Journal(tmp_path / "j.jsonl"), LABELS, multi_label=False, tutor=teacher, **more
        )
        opened.append(session)
        if teacher is not None:
            assert teacher.settle(60).error is None
        return session

    yield start
    for session in opened:
        session.close()


def truth(text):
    return next(name for name, word in zip(LABELS, WORDS, strict=True) if word in text)


def test_guesses_follow_the_descriptions_before_any_answer():
    texts = texts_of(30)
    learner = Learner(embed(texts), embed(["money", "broken", "other"]), n_labels=3, multi_label=False)
    guesses = learner.fit(np.array([], dtype=np.intp), np.zeros((0, 3), dtype=bool))
    assert [list(LABELS)[i] for i in guesses.probabilities.argmax(axis=1)] == [truth(t) for t in texts]
    assert not guesses.calibrated and np.allclose(guesses.probabilities.sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("multi_label", [True, False])
def test_guesses_follow_the_answers_when_they_contradict_the_names(described, multi_label):
    texts = texts_of(60)
    learner = Learner(
        embed(texts), embed(["money", "broken", "other"]) if described else None, n_labels=3, multi_label=multi_label
    )
    rows = np.arange(30)
    swapped = np.zeros((30, 3), dtype=bool)
    swapped[rows, (rows + 1) % 3] = True  # the texts about money are "repair" here, and so on
    guesses = learner.fit(rows, swapped)
    assert guesses.calibrated
    assert ((guesses.probabilities.argmax(axis=1) == (np.arange(60) + 1) % 3)[30:]).all()


def test_only_labels_that_were_answered_are_guessed_when_there_are_no_descriptions():
    learner = Learner(embed(texts_of(12)), None, n_labels=3, multi_label=False)
    one = learner.fit(np.array([0]), np.eye(3, dtype=bool)[[1]]).probabilities
    assert (one.argmax(axis=1) == 1).all()
    two = learner.fit(np.array([0, 1]), np.eye(3, dtype=bool)[[0, 1]]).probabilities
    assert two[:, 2].max() < 1e-3 and two[0].argmax() == 0 and two[1].argmax() == 1


def test_next_texts_are_unsure_then_spread_then_rare():
    vectors = np.zeros((6, 4), dtype=np.float32)
    vectors[:, 0] = 1.0
    vectors[4] = vectors[5] = (0.0, 1.0, 0.0, 0.0)
    learner = Learner(vectors, None, n_labels=3, multi_label=False)
    p = np.array(
        [[0.5, 0.5, 0], [0.5, 0.5, 0], [0.99, 0.01, 0], [0.9, 0.1, 0], [0.6, 0.4, 0], [0, 0.1, 0.9]], dtype=np.float32
    )
    guesses = Guesses(p, calibrated=False, raw=p)
    everything = np.arange(6)
    plain = Weights(density=0, novelty=0, rarity=0)
    assert [row for row, _ in next_texts(guesses, learner, everything, [1, 1, 1], n=3, weights=plain)] == [0, 1, 4]
    spread = Weights(density=0, novelty=1, rarity=0)
    assert [row for row, _ in next_texts(guesses, learner, everything, [1, 1, 1], n=2, weights=spread)] == [0, 4]
    rare = Weights(density=0, novelty=0, rarity=4)
    assert next_texts(guesses, learner, everything, [9, 9, 0], n=1, weights=rare) == [(5, "rare")]
    assert next_texts(guesses, learner, np.array([], dtype=np.intp), [1, 1, 1], n=3) == []


def test_tutor_learns_in_the_background_and_asks_only_open_texts(open_session):
    session = open_session()
    first = session.next("anna")
    assert first["guesses"][0]["label"] == truth(first["text"]) and not first["calibrated"]
    for _ in range(21):
        item = session.next("anna")
        session.decide("anna", item["id"], "label", [truth(item["text"])], ms=5)
        view = session._tutor.settle(60)  # or what is asked next would be a matter of the machine's speed
    assert view.answers == 21 and view.guesses.calibrated
    answered = {d.id for d in session.journal.decisions.standing()}
    assert answered.isdisjoint(session.pool.texts[row].id for row, _ in view.order)
    state = session.state()
    assert state["answered"] == 21 and sum(one["count"] for one in state["labels"]) == 21
    assert state["tutor"]["recent"]["n"] == 21 and state["tutor"]["recent"]["right"] >= 20
    assert min(one["count"] for one in state["labels"]) >= 5


def test_tutor_reads_only_new_texts_when_vectors_are_kept():
    texts, read = texts_of(30), []

    def counted(asked):
        read.extend(asked)
        return embed(asked)

    for n, fresh in ((20, 20), (30, 10)):
        read.clear()
        tutor = Tutor(counted, texts[:n], LABELS, multi_label=False, cache=VectorCache("digest", "kept"))
        assert tutor.settle(60).read == n
        tutor.close()
        assert len(read) == fresh + len(LABELS)


def test_annotation_goes_on_in_file_order_and_says_why_when_the_tutor_fails(open_session, tmp_path):
    pool = make_pool(4)

    def fail(_texts):
        raise RuntimeError("no memory")

    tutor = Tutor(fail, [t.text for t in pool.texts], LABELS, multi_label=False, cache=VectorCache("d", "t"))
    session = Session("t", pool, Journal(tmp_path / "k.jsonl"), LABELS, multi_label=False, tutor=tutor)
    tutor.settle(60)
    assert session.next("anna")["text"] == pool.texts[0].text
    assert session.state()["tutor"]["error"] == "RuntimeError: no memory"
    session.close()


def test_two_annotators_get_different_texts_and_some_second_opinions(open_session):
    session = open_session(make_pool(12), tutor=False, overlap=0.34)
    seen = {"anna": [], "bob": []}
    held = session.next("anna")
    assert session.next("bob")["id"] != held["id"]
    for _ in range(6):
        for by in seen:
            item = session.next(by)
            seen[by].append((item["id"], item["why"]))
            session.decide(by, item["id"], "label", ["billing" if by == "anna" else "repair"])
    shared = {one for one, _ in seen["anna"]} & {one for one, _ in seen["bob"]}
    assert 1 <= len(shared) <= 4 and any(why == "second" for _, why in (*seen["anna"], *seen["bob"]))
    state = session.state()
    assert state["disputed"] == len(shared) == state["agreement"]["alpha"]["n"]
    assert state["agreement"]["kappa"][0]["between"] == ["anna", "bob"]
    assert [one["answered"] for one in state["annotators"]] == [6, 6]


def test_session_ends_and_undo_brings_the_text_back(open_session):
    session = open_session(make_pool(3), tutor=False)
    for verdict in ("label", "none", "skip"):
        item = session.next("anna")
        session.decide("anna", item["id"], verdict, ["other"] if verdict == "label" else [])
    assert session.next("anna") is None
    assert session.undo("anna").verdict == "skip"
    assert session.next("anna")["id"] == item["id"]
    assert session.next("bob") is None  # it is before anna's eyes
    assert [one["verdict"] for one in session.history("anna")] == ["label", "none"]
    for wrong in (("label", []), ("label", ["nope"]), ("label", ["other", "repair"]), ("none", ["other"]), ("odd", [])):
        with pytest.raises(DataError):
            session.decide("anna", item["id"], *wrong)
    with pytest.raises(DataError, match="name of 1 to 64"):
        session.next("  ")


@pytest.fixture
def client(open_session):
    app = create_annotation_app(open_session(tutor=False), token=None, hosts=LOOPBACK_NAMES)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        yield client


def test_calls_decide_undo_and_export_when_the_page_asks(client):
    item = client.get("/label/next", params={"by": "anna"}).json()["item"]
    body = {"by": "anna", "id": item["id"], "do": "label", "labels": ["repair"], "note": "n", "ms": 12}
    assert client.post("/label/decide", json=body).json() == {"seq": 1}
    assert client.get("/label/state").json()["answered"] == 1
    out = client.get("/label/export", params={"form": "csv"})
    assert out.text.splitlines()[1].endswith(",repair,anna,n") and "texts.csv.csv" in out.headers["content-disposition"]
    assert client.get("/label/item", params={"id": item["id"], "by": "anna"}).json()["item"]["mine"]["labels"] == [
        "repair"
    ]
    assert client.post("/label/undo", json={"by": "anna"}).json()["item"]["id"] == item["id"]
    assert client.get("/label/history", params={"by": "anna"}).json() == {"decisions": []}


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        ({"by": "anna", "id": "nope", "do": "skip"}, {}, 400),
        ({"by": 3, "id": "x", "do": "skip"}, {}, 400),
        ({"by": "anna", "id": "x", "do": "label", "labels": "billing"}, {}, 400),
        ({"by": "anna", "id": "x", "do": "skip", "ms": -1}, {}, 400),
        ({}, {"content-type": "text/plain"}, 415),
        ({}, {"sec-fetch-site": "cross-site"}, 403),
        ({}, {"host": "evil.example"}, 421),
    ],
)
def test_call_is_refused_when_it_is_wrong_or_not_from_the_page(client, body, headers, status):
    answer = client.post(
        "/label/decide", content=json.dumps(body), headers={"content-type": "application/json", **headers}
    )
    assert answer.status_code == status and answer.json()["error"]["message"]
    assert client.get("/label/state").json()["answered"] == 0


def test_calls_need_the_token_when_others_can_reach_the_page(open_session):
    app = create_annotation_app(open_session(tutor=False), token="s3cret", hosts=None)
    with TestClient(app) as client:
        assert client.get("/").status_code == 200
        assert client.get("/label/state").status_code == 401
        assert client.get("/label/state", headers={"Authorization": "Bearer s3cret"}).status_code == 200


def test_page_may_load_nothing_from_elsewhere(client):
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http" not in page.text.replace("http://www.w3.org/2000/svg", "")


@pytest.fixture
def texts_csv(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text("message\n" + "".join(f"text {i}\n" for i in range(5)))
    return path


def test_unlabelled_file_and_names_are_enough_and_remembered(texts_csv):
    opened = open_annotation(Ask(texts_csv, labels="a, b"))
    assert [t.text for t in opened.pool.texts] == [f"text {i}" for i in range(5)] and opened.labels == {
        "a": "",
        "b": "",
    }
    assert list(open_annotation(Ask(texts_csv)).labels) == ["a", "b"]
    opened.journal.decide("label", by="anna", text="text 1", labels=("b",))
    with pytest.raises(DataError, match="label names that are gone: 'b'"):
        open_annotation(Ask(texts_csv, labels="a,c"))
    renamed = open_annotation(Ask(texts_csv, labels="a,c", rename=("b=c",)))
    assert renamed.journal.decisions.names_used() == {"c": 1}
    for wrong in ("c", "b=c", "c=zzz"):
        with pytest.raises((DataError, TaskError)):
            open_annotation(Ask(texts_csv, labels="a,c", rename=(wrong,)))


def test_names_are_asked_for_when_nothing_tells_them(texts_csv):
    with pytest.raises(TaskError, match="0 label names are known") as caught:
        open_annotation(Ask(texts_csv))
    assert "--labels" in str(caught.value)


def write_task(folder: Path, rows: str, labels: str = '[labels]\nbilling = "money"\nrepair = ""\n') -> Path:
    (folder / "train.csv").write_text(rows, "utf-8")
    path = folder / "task.toml"
    path.write_text(
        f'[task]\nname = "t"\nkind = "classify"\n[data]\ntrain = "train.csv"\ntext = "text"\nlabel = "label"\n{labels}'
    )
    return path


def test_task_gives_names_and_what_is_labelled_already(tmp_path, texts_csv):
    task = write_task(tmp_path, "text,label\nmy bill,billing\nit leaks,\nodd,what\n")
    opened = open_annotation(Ask(task))
    assert {t.text: t.labels for t in opened.pool.texts} == {"my bill": ("billing",), "it leaks": None, "odd": None}
    assert any("'what'" in note for note in opened.notes)
    both = open_annotation(Ask(task, texts=texts_csv))
    assert len(both.pool.texts) == 8 and both.journal.path.name == "texts.labels.jsonl"


def test_build_refuses_a_label_that_the_task_does_not_list(tmp_path):
    task = load_task(write_task(tmp_path, "text,label\n" + "my bill,billing\nit leaks,repair\n" * 9 + "no,reapir\n"))
    with pytest.raises(DataError, match=r"train.csv:20: label 'reapir' is not in \[labels\]; did you mean 'repair'"):
        read_rows(task, lock=None)
    with pytest.raises(TaskError, match="labels: does not apply to kind 'chat'"):
        load_task(_chat_task(tmp_path))


def _chat_task(folder: Path) -> Path:
    path = folder / "chat.toml"
    path.write_text(
        '[task]\nname = "t"\nkind = "chat"\n[data]\ntrain = "x.jsonl"\n[base]\nname = "x"\n[labels]\na = ""\nb = ""\n'
    )
    return path


def test_command_imports_tells_and_exports(texts_csv, tmp_path):
    (tmp_path / "given.csv").write_text("text,label\ntext 0,a\ntext 1,b\n")
    run = CliRunner()
    asked = [str(texts_csv), "--labels", "a,b", "--json"]
    taken = run.invoke(label, [*asked, "--import", str(tmp_path / "given.csv")])
    assert json.loads(taken.stdout) == {"tool": "table", "added": 2, "left_out": 0}
    state = json.loads(run.invoke(label, [*asked, "--status"]).stdout)
    assert (state["answered"], state["total"]) == (2, 5)
    told = run.invoke(label, [str(texts_csv), "--status"]).stdout
    assert "2 of 5 texts annotated" in told and "by imported: 2" in told
    out = tmp_path / "out.csv"
    assert json.loads(run.invoke(label, [*asked, "--export", str(out)]).stdout)["n"] == 2
    assert out.read_text().splitlines()[1:] == ["text 0,a,imported,", "text 1,b,imported,"]
    again = run.invoke(label, [*asked, "--export", str(out)])
    assert isinstance(again.exception, DataError) and out.exists()
