"""Splits: shares, strata, groups, and a lock that never moves a row."""

import json
import random

import pytest

from alambic.data.dataset import Dataset, Example
from alambic.data.split import split
from alambic.errors import DataError
from alambic.task import DataSpec

pytest.importorskip("rensa")
WORDS = [a + b for a in ("ka", "lo", "mi", "tu", "re", "po", "sa") for b in ("ban", "der", "gol", "fis", "nut", "vem")]


def sentence(rng, words=9):
    return " ".join(rng.choice(WORDS) for _ in range(words))


def dataset(rows, labels=5, seed=0, groups=None):
    rng = random.Random(seed)
    examples = [
        Example(sentence(rng), (f"l{i % labels}",), f"a.csv:{i + 2}", groups and f"g{rng.randrange(groups)}")
        for i in range(rows)
    ]
    return Dataset(tuple(examples), tuple(f"l{i}" for i in range(labels)))


def cut(data, dev=None, test=None, seed=0, lock=None, **spec):
    return split(data, dev, test, spec=DataSpec(train="a.csv", **spec), seed=seed, lock=lock)


def texts(part):
    return set(part.texts)


def test_parts_cover_every_row_once_when_nothing_is_given():
    data = dataset(400)
    parts = cut(data)
    assert sorted(parts.train.texts + parts.test.texts) == sorted(data.texts)
    assert parts.dev is None
    assert sorted(i for fold in parts.folds for i in fold) == list(range(len(parts.train)))
    assert len(parts.folds) == 5


def test_test_share_is_fifteen_percent_and_stratified():
    parts = cut(dataset(400))
    assert len(parts.test) == 60
    assert set(parts.test.counts.values()) == {12}
    assert {len(fold) for fold in parts.folds} <= {67, 68, 69}


def test_test_share_follows_the_task():
    assert len(cut(dataset(400), test_share=0.3).test) == 120


def test_dev_is_a_tenth_when_there_are_2000_training_rows():
    parts = cut(dataset(2500))
    assert parts.folds == ()
    assert abs(len(parts.dev) - 0.1 * (len(parts.dev) + len(parts.train))) <= 5
    assert max(parts.dev.counts.values()) - min(parts.dev.counts.values()) <= 2


def test_given_dev_and_test_are_taken_as_they_are():
    dev, test = dataset(20, seed=1), dataset(30, seed=2)
    parts = cut(dataset(100), dev, test)
    assert (parts.dev, parts.test, parts.folds, len(parts.train)) == (dev, test, (), 100)


def test_split_does_not_depend_on_the_order_of_rows():
    data = dataset(300)
    mixed = data.take(random.Random(3).sample(range(300), 300))
    assert texts(cut(data).test) == texts(cut(mixed).test)


def test_split_changes_with_the_seed():
    assert texts(cut(dataset(300)).test) != texts(cut(dataset(300), seed=1).test)


def folds_of(parts):
    return [{parts.train.texts[i] for i in fold} for fold in parts.folds]


@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates_stay_together(seed):
    rng = random.Random(seed)
    rows = []
    for i in range(80):
        text = sentence(rng, 20)
        rows += [Example(text, (f"l{i % 4}",)), Example(text + " ok", (f"l{i % 4}",)), Example(text.upper(), ("l0",))]
    parts = cut(Dataset(tuple(rows), ("l0", "l1", "l2", "l3")), seed=seed)
    sides = [texts(parts.test), *folds_of(parts)]
    for first, second, third in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert sum(any(r.text in side for r in (first, second, third)) for side in sides) == 1


def test_rows_of_one_group_stay_together():
    parts = cut(dataset(300, groups=30))
    sides = [{e.group for e in parts.test}] + [{parts.train.examples[i].group for i in f} for f in parts.folds]
    assert sum(map(len, sides)) == len(set().union(*sides))
    assert 30 <= len(parts.test) <= 60


def test_label_seen_once_is_for_training():
    data = dataset(2600)
    rare = Example("une phrase unique et rare", ("rare",))
    parts = cut(Dataset((*data.examples, rare), (*data.labels, "rare")))
    assert rare in parts.train.examples


def test_few_rows_per_label_still_give_a_test():
    parts = cut(dataset(60, labels=20))
    assert 7 <= len(parts.test) <= 11
    assert all(parts.train.counts[f"l{i}"] >= 2 for i in range(20))


def test_several_labels_are_stratified():
    rng = random.Random(0)
    rows = [Example(sentence(rng), tuple(sorted(rng.sample(["a", "b", "c"], rng.randint(0, 2))))) for _ in range(600)]
    data = Dataset(tuple(rows), ("a", "b", "c"), multi_label=True)
    parts = cut(data)
    assert all(abs(parts.test.counts[name] - 0.15 * data.counts[name]) <= 3 for name in "abc")


@pytest.mark.parametrize("seed", range(3))
def test_later_rows_move_nothing_when_there_is_a_lock(tmp_path, seed):
    lock = tmp_path / "splits.lock"
    before = dataset(300, seed=seed)
    first = cut(before, lock=lock)
    extra = dataset(90, seed=seed + 50)
    second = cut(before + extra, lock=lock, seed=9)
    assert texts(first.test) == texts(second.test) & texts(before)
    assert 50 <= len(second.test) <= 66
    for old, new in zip(folds_of(first), folds_of(second), strict=True):
        assert old == new & texts(before)


def test_test_rows_stay_when_the_data_outgrows_the_folds(tmp_path):
    lock = tmp_path / "splits.lock"
    before = dataset(1000)
    first = cut(before, lock=lock)
    second = cut(before + dataset(2000, seed=5), lock=lock)
    assert texts(first.test) <= texts(second.test)
    assert second.dev is not None and second.folds == ()


def test_new_copy_of_a_test_row_goes_to_test(tmp_path):
    lock = tmp_path / "splits.lock"
    before = dataset(200)
    first = cut(before, lock=lock)
    copy = Example(first.test.texts[0] + " !", first.test.examples[0].labels)
    second = cut(Dataset((*before.examples, copy), before.labels), lock=lock)
    assert copy.text in texts(second.test)


def test_corrected_label_moves_nothing(tmp_path):
    lock = tmp_path / "splits.lock"
    before = dataset(200)
    first = cut(before, lock=lock)
    fixed = Dataset(
        tuple(Example(e.text, ("l0",) if i < 30 else e.labels) for i, e in enumerate(before)), before.labels
    )
    assert texts(cut(fixed, lock=lock).test) == texts(first.test)


def test_lock_is_left_alone_when_nothing_changed(tmp_path):
    lock = tmp_path / "deep" / "splits.lock"
    cut(dataset(50), lock=lock)
    before = (lock.read_bytes(), lock.stat().st_mtime_ns)
    cut(dataset(50), lock=lock)
    assert (lock.read_bytes(), lock.stat().st_mtime_ns) == before
    assert set(json.loads(lock.read_text())) == {"format", "rows"}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{oops", "cannot be read"),
        ("[]", "not a lock file of this version"),
        ('{"format": "splits.v9", "rows": {}}', "not a lock file of this version"),
        ('{"format": "splits.v1", "rows": {"a": "11"}}', "damaged"),
    ],
)
def test_damaged_lock_is_refused_and_kept(tmp_path, body, said):
    lock = tmp_path / "splits.lock"
    lock.write_text(body)
    with pytest.raises(DataError, match=said):
        cut(dataset(50), lock=lock)
    assert lock.read_text() == body


def test_too_few_rows_are_refused():
    with pytest.raises(DataError, match=r"a.csv: 3 rows are too few to split"):
        cut(dataset(3))


def test_rows_that_are_all_alike_are_refused():
    rows = tuple(Example("toujours la même phrase", (f"l{i % 2}",)) for i in range(30))
    with pytest.raises(DataError, match="near-duplicates of one another"):
        cut(Dataset(rows, ("l0", "l1")))
