"""The label audit: what is counted, how rows are ranked, what a whole audit writes."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from alambic.data.audit import confident_joint, doubt, pooled
from alambic.data.audit_rows import rank, row_id
from alambic.data.dataset import Dataset, Example
from alambic.measure.learning_curve import fit_curve, fit_power_law, law_at
from linear_task import TASK, WORDS, alambic, messages, write_csv, write_task

pytest.importorskip("rensa")


def noisy(n=1200, n_labels=6, flips=0.05, seed=0, sharp=4.0):
    """Probabilities of a good model, the labels given (some wrong), and which are wrong."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, n_labels, n)
    logits = rng.normal(0, 1.5, (n, n_labels))
    logits[np.arange(n), true] += sharp
    p = np.exp(logits)
    p /= p.sum(axis=1, keepdims=True)
    given = true.copy()
    bad = rng.choice(n, round(flips * n), replace=False)
    given[bad] = (true[bad] + rng.integers(1, n_labels, len(bad))) % n_labels
    return p, given, np.isin(np.arange(n), bad)


def rows_of(given, labels="abcdef", texts=None):
    texts = texts or [f"text number {i} of {i * 7919 % 1009} things {i * i}" for i in range(len(given))]
    examples = (Example(t, (labels[g],), f"d.csv:{i}") for i, (t, g) in enumerate(zip(texts, given, strict=True), 2))
    return Dataset(tuple(examples), tuple(labels))


def test_confident_joint_is_cleanlabs_when_given_the_same_probabilities():
    p, given, _ = noisy(n=300, n_labels=4, flips=0.1, seed=3, sharp=2.0)
    # compute_confident_joint(given, p, calibrate=True) of cleanlab 2.9.0, which rounds it to whole rows.
    cleanlab = [[41, 11, 9, 7], [14, 49, 10, 7], [11, 9, 53, 11], [4, 9, 11, 44]]
    assert np.abs(confident_joint(p, given) - np.array(cleanlab)).max() < 1.0
    assert np.allclose(confident_joint(p, given).sum(axis=1), np.bincount(given))


def test_share_and_chances_are_near_the_truth_when_labels_were_flipped():
    p, given, bad = noisy(sharp=5.0)
    found = doubt(p, given, rng=np.random.default_rng(0))
    assert abs(found.share - 0.05) < 0.015
    top = np.argsort(-found.score)[: bad.sum()]
    assert bad[top].mean() > 0.85
    assert abs(found.wrong[top].mean() - bad[top].mean()) < 0.1
    assert abs(found.wrong.sum() - bad.sum()) < 0.35 * bad.sum()


def test_chance_never_falls_as_the_score_rises():
    p, given, _ = noisy(seed=5)
    found = doubt(p, given, rng=np.random.default_rng(0))
    assert (np.diff(found.wrong[np.argsort(found.score)]) >= -1e-9).all()


def test_nothing_is_doubted_when_the_model_agrees_with_every_label():
    p, given, _ = noisy(flips=0.0, sharp=14.0)
    assert doubt(p, given, rng=np.random.default_rng(0)).share < 0.003


def test_pool_doubts_what_one_candidate_alone_is_sure_of():
    sure, other = np.array([[0.999, 0.001]]), np.array([[0.3, 0.7]])
    assert 0.5 < pooled([sure, other])[0, 0] < 0.999
    both = pooled([np.array([[0.9, 0.9]]), np.array([[0.9, 0.1]])], multi_label=True)
    assert both[0, 0] == pytest.approx(0.9) and both[0, 1] == pytest.approx(0.5)


def test_rows_are_ranked_by_gain_with_copies_as_one():
    p, given, bad = noisy()
    texts = [f"text number {i} of {i * 7919 % 1009} things {i * i}" for i in range(len(given))]
    first = int(np.flatnonzero(bad)[np.argsort(p[bad, given[bad]])[0]])
    twice = next(i for i in range(len(given)) if given[i] == given[first] and i != first)
    texts[twice] = texts[first]
    p[twice] = p[first]
    ranking = rank(rows_of(given, texts=texts), p, said_by=("model",))
    assert ranking.suspects[0].row == row_id(texts[first])
    assert (ranking.suspects[0].rows, ranking.suspects[0].labels) == (2, ("abcdef"[given[first]],))
    assert ranking.suspects[0].gain > ranking.suspects[1].gain >= ranking.suspects[2].gain
    assert len(ranking.suspects) == len(given) - 1
    price = ranking.price()
    assert price[0]["read"] == 10 and price[0]["found"] > 8 and price[-1]["read"] == len(ranking.listed)


def test_rare_label_weighs_more_when_the_task_is_judged_by_a_mean_over_labels():
    p, given, _ = noisy()
    given[:] = np.where(given == 5, np.where(np.arange(len(given)) % 10 == 0, 5, 4), given)
    rows = rows_of(given)
    plain, macro = (rank(rows, p, said_by=("m",), macro=m) for m in (False, True))

    def weight(ranking, label):
        found = [s.gain / s.wrong for s in ranking.listed if s.labels == (label,)]
        return np.mean(found)

    assert weight(plain, "f") == pytest.approx(1.0, abs=0.01)
    assert weight(macro, "f") > 2 * weight(macro, "a")


def test_contradictory_copies_are_doubted_on_the_unlikely_side_with_the_reason():
    p, given, _ = noisy(flips=0.0, sharp=9.0)
    texts = [f"text number {i} of {i * 7919 % 1009} things {i * i}" for i in range(len(given))]
    a = int(np.flatnonzero(given == 0)[0])
    b = int(np.flatnonzero(given == 1)[0])
    texts[b] = texts[a].upper()
    p[b] = p[a]
    ranking = rank(rows_of(given, texts=texts), p, said_by=("m",))
    suspect = ranking.suspects[0]
    assert (suspect.labels, suspect.suggested, suspect.where) == (("b",), ("a",), f"d.csv:{b + 2}")
    assert suspect.wrong > 0.9 and f"the same text is a at d.csv:{a + 2}" in suspect.why
    assert ranking.contradictions == {"exact": 1, "near": 0}


def test_several_labels_get_one_of_them_toggled():
    rng = np.random.default_rng(0)
    truth = rng.random((400, 3)) < 0.4
    p = np.clip(np.where(truth, 0.95, 0.05) + rng.normal(0, 0.02, truth.shape), 0.001, 0.999)
    given = truth.copy()
    given[7, 2] = not given[7, 2]
    names = np.array(["x", "y", "z"])
    examples = (Example(f"t {i} {i * 7919 % 1009}", tuple(names[g]), f"d:{i}") for i, g in enumerate(given))
    ranking = rank(Dataset(tuple(examples), ("x", "y", "z"), True), p, said_by=("m",))
    assert (ranking.suspects[0].where, ranking.suspects[0].suggested) == ("d:7", tuple(names[truth[7]]))


def test_power_law_is_found_when_errors_follow_one():
    sizes = np.array([100.0, 200, 400, 800, 1600])
    law = fit_power_law(sizes, (0.05 + 2.0 * sizes**-0.5)[None])
    assert law_at(law, 6400)[0] == pytest.approx(0.05 + 2.0 * 6400**-0.5, abs=1e-3)
    assert law[0][0] == pytest.approx(0.05, abs=5e-3)


def test_more_rows_bring_more_to_the_label_that_lacks_them():
    rng = np.random.default_rng(0)
    sizes, n = np.array([50, 100, 200, 400]), 3000
    truths = rng.integers(0, 2, n)
    errors = np.stack([np.where(truths == 0, 0.02, 3.0 * (s / 2) ** -0.7) for s in sizes])
    right = rng.random(n)[None] >= errors
    shares = np.stack([sizes / 2, sizes / 2], axis=1)
    curve = fit_curve(sizes, right, truths, shares, ("easy", "hard"), rows=500, counts=[250, 250])
    assert [gain.label for gain in curve.labels] == ["hard", "easy"]
    truth = 100 * (3.0 * 250**-0.7 - 3.0 * 350**-0.7)
    hard = curve.labels[0]
    assert hard.low <= truth <= hard.high and hard.high - hard.low < 3.0
    assert hard.overall == pytest.approx(hard.points * (truths == 1).mean(), abs=0.01)
    assert 0 < curve.overall.low <= curve.overall.points <= curve.overall.high


def test_audit_writes_the_flipped_rows_first_and_the_next_one_is_refused(tmp_path):
    rows, wrong = messages(40), {}
    names = sorted(WORDS)
    for i in range(0, len(rows), 20):
        text, label = rows[i]
        rows[i] = (text, names[(names.index(label) + 1) % 3])
        wrong[text] = label
    task = write_task(tmp_path, rows=rows)
    ended = alambic("check", task, "--audit", "--out", tmp_path / "run", "--json")
    assert ended.code == 0, ended.err
    said = json.loads(ended.out)
    # Rows set aside for test are not audited.
    suspects = said["labels"]["suspects"]
    test = len(rows) - said["labels"]["rows"]
    assert test == pytest.approx(0.15 * len(rows), abs=2)
    top = suspects[: len(wrong) - 2]
    assert sum(s["text"] in wrong for s in top) >= len(top) - 1
    assert all(s["suggested"] == [wrong[s["text"]]] for s in top if s["text"] in wrong)
    assert said["effect"]["changed"] >= 2 and said["curve"]["overall"]["rows"] == said["labels"]["rows"]
    lines = (tmp_path / "run" / "labels-to-review.csv").read_text("utf-8-sig").splitlines()
    assert lines[0].startswith("rank,decision,label,suggested,wrong,gain,rows,text,why,where,row")
    assert len(lines) == 1 + said["labels"]["listed"]
    again = alambic("check", task, "--audit", "--out", tmp_path / "run")
    assert again.code == 1 and "may hold decisions" in again.err
    other = alambic("check", task, "--audit", "--out", tmp_path / "run", "--output", tmp_path / "b.csv")
    assert other.code == 0 and "first to read:" in other.out and "100 more rows as they come" in other.out
    assert (tmp_path / "b.csv").read_text() == (tmp_path / "run" / "labels-to-review.csv").read_text()


def test_own_dev_and_test_files_are_not_audited(tmp_path):
    write_csv(tmp_path / "dev.csv", messages(6, seed=5))
    write_csv(tmp_path / "test.csv", messages(6, seed=6))
    text = TASK.replace('train = "rows.csv"', 'train = "rows.csv"\ndev = "dev.csv"\ntest = "test.csv"')
    task = write_task(tmp_path, text=text, rows=messages(14))
    ended = alambic("check", task, "--audit", "--out", tmp_path / "run", "--json")
    assert ended.code == 0, ended.err
    said = json.loads(ended.out)
    assert said["labels"]["rows"] == 42
    assert all(s["where"].startswith("rows.csv:") for s in said["labels"]["suspects"])


def test_audit_of_a_task_that_writes_is_misuse(tmp_path):
    (tmp_path / "task.toml").write_text(
        '[task]\nname="w"\nkind="chat"\n[data]\ntrain="c.jsonl"\n[base]\nname="qwen2.5-0.5b-instruct"\n'
    )
    ended = alambic("check", tmp_path / "task.toml", "--audit")
    assert ended.code == 2 and "for labels" in ended.err


def test_dataset_with_changed_labels_is_another_dataset():
    from alambic.build.audit import corrected

    rows = rows_of([0, 1, 0])
    after = corrected(rows, {(rows.examples[1].text, ("b",)): ("a",)})
    assert [e.labels for e in after] == [("a",), ("a",), ("a",)]
    assert replace(after.examples[1], labels=("b",)) == rows.examples[1] and after.digest != rows.digest


def test_frozen_vectors_answer_and_are_told_as_neighbours():
    from alambic.build.audit import folds_for
    from alambic.events import drain
    from alambic.train.audit import Material, auditors, by_size, out_of_fold

    rng = np.random.default_rng(0)
    true = rng.integers(0, 3, 120)
    vectors = (np.eye(3)[true] @ rng.normal(0, 1, (3, 16)) + rng.normal(0, 0.25, (120, 16))).astype(np.float32)
    given = true.copy()
    given[11] = (true[11] + 1) % 3
    material = Material(rows_of(given, labels="abc"), vectors)
    assert auditors(material) == ("logreg", "tfidf-svm") and auditors(Material(material.rows)) == ("tfidf-svm",)
    folds = folds_for(material.rows, seed=0)
    assert sorted(i for fold in folds for i in fold) == list(range(120))
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / "fit"
        p = drain(out_of_fold("logreg", material, folds, scratch=scratch))
        sizes, right, shares, asked = drain(by_size("logreg", material, folds[:2], (0.2, 0.5, 1.0), scratch=scratch))
        assert not scratch.exists()
    ranking = rank(material.rows, pooled([p]), said_by=("logreg",), vectors=vectors)
    first = ranking.suspects[0]
    assert (first.where, first.suggested) == ("d.csv:13", ("abc"[true[11]],))
    assert f"of its 10 nearest texts 10 are {'abc'[true[11]]} and 0" in first.why[-1]
    assert sizes.tolist() == sorted(sizes.tolist()) and right.shape == (3, len(folds[0]) + len(folds[1]))
    assert sorted(asked.tolist()) == sorted([*folds[0], *folds[1]])
    assert shares.sum(axis=1) == pytest.approx(sizes, abs=1) and right[-1].mean() > 0.9


def test_report_section_shows_the_rows_with_their_texts_escaped():
    from alambic.report.labels import section

    p, given, _ = noisy()
    texts = [f"<script>{i}</script> of {i * 7919 % 1009} things" for i in range(len(given))]
    found = rank(rows_of(given, texts=texts), p, said_by=("model",)).to_dict(most=5)
    page = section(found)
    assert "<script>" not in page and page.count("&lt;script&gt;") == 5
    assert f"{found['share']:.1%}" in page and f"{found['listed']:,} rows" in page
    assert "table" not in section({**found, "suspects": []})
