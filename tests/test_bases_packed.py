"""Bases shipped in 8 bits: packed, found in their package, unpacked once, refused when damaged; the default base."""

import hashlib
import json
import random
import sys

import numpy as np
import pytest
from safetensors.numpy import load, load_file, save

from alambic.build.prepare import find_base, read_rows, settle_base
from alambic.data.language import language_of, languages_of
from alambic.errors import BaseModelError, TaskError
from alambic.events import Note, drain
from alambic.model import bases, bases_default, bases_packed
from alambic.model.bases import resolve
from alambic.model.bases_packed import pack_folder, unpack_folder
from alambic.model.catalogue import CatalogueEntry
from alambic.task import load_task

CONFIG = {"model_type": "bert", "hidden_size": 32, "max_position_embeddings": 64}


@pytest.fixture
def model(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    tensors = {
        "embeddings.weight": rng.normal(size=(50, 32)).astype(np.float32) * rng.uniform(0.01, 9, (50, 1)).astype("f"),
        "zero.weight": np.zeros((3, 4), np.float32),
        "half.weight": rng.normal(size=(8, 8)).astype(np.float16),
        "norm.bias": rng.normal(size=32).astype(np.float32),
    }
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Normalize"}]')
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return folder


@pytest.fixture
def shipped(model, tmp_path, monkeypatch):
    """A package `some_bases` that ships the model as base ``x``, and its catalogue entry."""
    package = tmp_path / "site" / "some_bases"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    digest = pack_folder(model, package / "x")
    entry = CatalogueEntry("x", "some_bases", "x", None, digest, "apache-2.0", ("fr", "en"), 32, "")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(bases, "catalogue", lambda: {"x": entry})
    return package / "x"


def test_packing_keeps_each_row_within_half_a_step_of_its_scale(model, tmp_path):
    pack_folder(model, tmp_path / "packed")
    before = load_file(model / "model.safetensors")
    after = load_file(unpack_folder(tmp_path / "packed", sha256=None) / "model.safetensors")
    assert sorted(before) == sorted(after)
    for name, value in before.items():
        assert after[name].dtype == np.float32
        step = np.abs(value).max(-1, keepdims=True) / 127 if value.ndim == 2 else 0
        assert (np.abs(after[name] - value) <= step / 2 + 1e-6).all(), name
    assert (tmp_path / "packed" / "packed.safetensors").stat().st_size < 0.45 * (
        model / "model.safetensors"
    ).stat().st_size


def test_packing_is_the_same_when_done_twice(model, tmp_path):
    digests = {pack_folder(model, tmp_path / name) for name in "ab"}
    made = unpack_folder(tmp_path / "a", sha256=digests.copy().pop())
    assert digests == {hashlib.sha256((made / "model.safetensors").read_bytes()).hexdigest()}
    files = [(tmp_path / name / "packed.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_packing_refuses_whole_numbers(model, tmp_path):
    (model / "model.safetensors").write_bytes(save({"w": np.zeros((2, 2), np.int64)}))
    with pytest.raises(BaseModelError, match="w is int64"):
        pack_folder(model, tmp_path / "packed")


def test_resolve_unpacks_a_shipped_base_once_and_never_imports_its_package(shipped, monkeypatch):
    base = resolve("x")
    assert (base.source, base.normalize, base.max_tokens, base.licence) == (
        "package:some_bases",
        True,
        32,
        "apache-2.0",
    )
    assert (base.folder / "model.safetensors").is_file() and not (base.folder / "packed.safetensors").exists()
    assert "some_bases" not in sys.modules
    monkeypatch.setattr(bases_packed, "_unpacked", lambda path: pytest.fail("unpacked again"))
    assert resolve("x").digest == base.digest


def test_resolve_unpacks_again_when_the_cached_copy_is_damaged(shipped):
    base = resolve("x")
    content = bytearray((base.folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (base.folder / "model.safetensors").write_bytes(content)
    assert resolve("x").digest == base.digest


def test_resolve_refuses_a_shipped_base_when_one_bit_differs(shipped):
    content = bytearray((shipped / "packed.safetensors").read_bytes())
    content[-1] ^= 1
    (shipped / "packed.safetensors").write_bytes(content)
    with pytest.raises(BaseModelError, match=r"(?s)unpacks to SHA-256 .*reinstall alambic-bases"):
        resolve("x")


@pytest.mark.parametrize("damage", ["cut", "layout", "scales"])
def test_resolve_says_what_is_wrong_with_packed_weights_when_they_cannot_be_read(shipped, damage):
    path = shipped / "packed.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "layout":
        path.write_bytes(save(load(path.read_bytes()), metadata={"layout": "int3.v9"}))
    else:
        tensors = load(path.read_bytes())
        del tensors["embeddings.weight.scale"]
        path.write_bytes(save(tensors, metadata={"layout": "int8-rows.v1"}))
    said = {"cut": "cannot be read", "layout": "layout 'int3.v9'", "scales": "without its scales"}[damage]
    with pytest.raises(BaseModelError, match=said):
        resolve("x")


def test_resolve_unpacks_for_this_process_when_there_is_no_cache(shipped, monkeypatch):
    monkeypatch.setattr(bases_packed, "writable_cache", lambda name: None)
    monkeypatch.setattr(bases_packed, "_temporary", {})
    first, second = resolve("x"), resolve("x")
    assert first.folder == second.folder and (first.folder / "model.safetensors").is_file()


def test_resolve_and_pull_say_what_to_install_when_the_package_is_absent(monkeypatch):
    entry = CatalogueEntry("x", "no_such_bases", "x", None, None, "apache-2.0", ("fr",), 32, "")
    monkeypatch.setattr(bases, "catalogue", lambda: {"x": entry})
    for work in (lambda: resolve("x"), lambda: drain(bases.pull("x"))):
        with pytest.raises(BaseModelError, match=r"(?s)package no-such-bases.*pip install no-such-bases"):
            work()


# ---- the default -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Le four ne chauffe plus depuis hier soir", "fr"),
        ("allume la lumière du salon", "fr"),
        ("The washing machine shows E18 and does not drain", "en"),
        ("La lavadora no funciona y el técnico no ha venido", "es"),
        ("Die Waschmaschine ist kaputt und ich kann nicht waschen", "de"),
        ("E18", None),
        ("", None),
    ],
)
def test_language_is_told_by_function_words(text, language):
    assert language_of(text) == language


def test_languages_are_counted_on_a_spread_sample_when_texts_are_many():
    texts = ["the cat is on the roof"] * 9_000 + ["le chat est sur le toit"] * 3_000
    counts = languages_of(texts)
    assert 2_000 <= counts.total() <= 4_000
    assert counts["fr"] / counts.total() == pytest.approx(0.25, abs=0.01)


def write_task(folder, texts, base=""):
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(texts)]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / "task.toml").write_text(
        f'[task]\nname = "t"\nkind = "classify"\n[data]\ntrain = "t.jsonl"\ntext = "text"\nlabel = "label"\n{base}'
        '[[candidate]]\nname = "finetune"\n',
        "utf-8",
    )
    return load_task(folder / "task.toml")


def made_up(frame, n):
    """Texts of one language that are no near-duplicates of each other."""
    rng = random.Random(len(frame))
    return [frame.format(*("".join(rng.choices("abdegilmnoprstu", k=7)) for _ in range(6))) for _ in range(n)]


ENGLISH = made_up("the {} of {} is not {} and {} the {} {}", 40)
FRENCH = made_up("la {} de {} est dans le {} et {} pas {} {}", 40)


def settled(task):
    notes = []
    base = drain(settle_base(task, find_base(task), read_rows(task, lock=None)), notes.append)
    return base, [note for note in notes if isinstance(note, Note)]


@pytest.fixture
def with_ours(monkeypatch, shipped):
    """The catalogue has our French base, and its package is installed."""
    ours = CatalogueEntry(bases_default.FRENCH, "some_bases", "x", None, None, "apache-2.0", ("fr", "en"), 32, "")
    known = {**bases_default.catalogue(), ours.name: ours}
    monkeypatch.setattr(bases, "catalogue", lambda: known)
    monkeypatch.setattr(bases_default, "catalogue", lambda: known)


@pytest.mark.parametrize(
    ("texts", "name"), [(ENGLISH, bases_default.ENGLISH), (FRENCH, bases_default.FRENCH),
                        (ENGLISH + FRENCH[:10], bases_default.FRENCH), (ENGLISH + FRENCH[:2], bases_default.ENGLISH)]
)  # fmt: skip
def test_default_base_follows_the_language_of_the_texts(tmp_path, with_ours, texts, name):
    base, notes = settled(write_task(tmp_path, texts))
    assert base.name == name
    assert notes[-1].level == "info" and repr(name) in notes[-1].message and "are French" in notes[-1].message


def test_default_base_is_the_one_named_when_the_task_names_one(tmp_path, with_ours):
    base, notes = settled(write_task(tmp_path, FRENCH, '[base]\nname = "all-minilm-l6-v2"\n'))
    assert base.name == "all-minilm-l6-v2" and notes == []


def test_default_base_warns_when_the_package_of_ours_is_absent(tmp_path, monkeypatch):
    ours = CatalogueEntry(bases_default.FRENCH, "no_such_bases", "x", None, None, "apache-2.0", ("fr", "en"), 32, "")
    known = {**bases_default.catalogue(), ours.name: ours}
    monkeypatch.setattr(bases_default, "catalogue", lambda: known)
    base, notes = settled(write_task(tmp_path, FRENCH))
    assert base.name == bases_default.ENGLISH
    assert notes[-1].level == "warning" and "(pip install no-such-bases)" in notes[-1].message


def test_auto_is_refused_when_the_task_writes(tmp_path):
    write_task(tmp_path, ENGLISH)
    text = (
        (tmp_path / "task.toml").read_text("utf-8").replace('"classify"', '"generate"').replace('label = "label"\n', "")
    )
    (tmp_path / "task.toml").write_text(text + '[base]\nname = "auto"\n', "utf-8")
    with pytest.raises(TaskError, match="'auto' chooses among encoders"):
        load_task(tmp_path / "task.toml")
