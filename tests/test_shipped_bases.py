"""The bases of our own that alambic-bases ships: what the catalogue says of them, and that everything opens them.

Without the package, or without the folder of a base in it, the tests of that base are skipped and say so.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from alambic.events import drain
from alambic.kinds.golden import GOLDEN_TEXTS
from alambic.model.bases import resolve
from alambic.model.catalogue import OURS, catalogue, packaged
from test_bases_packed import FRENCH, settled, write_task

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bases" / "src" / "alambic_bases"
sys.path.insert(0, str(ROOT / "bases" / "recipes"))

import make_encoder_card  # noqa: E402
import ship  # noqa: E402

SHIPPED = [entry for entry in catalogue().values() if entry.package == OURS.replace("-", "_")]
PAIRS = (
    ("Le chat dort sur le canapé.", "The cat is sleeping on the sofa."),
    ("Mon lave-linge ne vidange plus depuis hier.", "My washing machine has not drained since yesterday."),
    ("Où est mon colis ?", "Where is my parcel?"),
    ("Je voudrais être remboursé.", "I would like a refund."),
    ("Il pleut à Brest.", "It is raining in Brest."),
    ("La réunion est reportée à jeudi.", "The meeting is postponed to Thursday."),
    ("J'ai oublié mon mot de passe.", "I forgot my password."),
    ("Deux enfants jouent au ballon dans un parc.", "Two children are playing ball in a park."),
)


def each(kind):
    entries = [entry for entry in SHIPPED if entry.kind == kind]
    return pytest.mark.parametrize("entry", entries, ids=lambda entry: entry.name)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return what finds a base, unpacked once for this file; it skips the test where the base is not installed."""
    cache, found = tmp_path_factory.mktemp("cache"), {}

    def find(entry):
        if packaged(entry) is None:
            pytest.skip(f"{entry.name} is not installed: make setup, or pip install ./bases")
        if entry.name not in found:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("XDG_CACHE_HOME", str(cache))
                found[entry.name] = resolve(entry.name, kinds=(entry.kind,))
        return found[entry.name]

    return find


# ---- what is tracked -------------------------------------------------------------------------------------------------


def test_all_shipped_files_are_under_the_limit_and_each_folder_is_in_the_catalogue():
    assert ship._size(PACKAGE) < ship.LIMIT_MB * 1e6
    folders = {path.parent for path in PACKAGE.glob("*/packed.safetensors")}
    assert {folder.name for folder in folders} <= {entry.folder for entry in SHIPPED}
    assert not list(PACKAGE.glob("*/model.safetensors"))


def test_ship_writes_the_folder_and_the_facts_of_the_catalogue(tmp_path):
    from safetensors.numpy import save

    from alambic.model.bases_packed import unpack_folder

    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(save({"w": np.ones((4, 8), np.float32)}))
    (tmp_path / "package" / "x").mkdir(parents=True)
    (tmp_path / "package" / "x" / "old.json").write_text("{}")
    facts = ship.ship(model, "x", tmp_path / "package")
    assert facts["parameters"] == 32 and facts["stored"] == "int8"
    assert sorted(path.name for path in (tmp_path / "package").rglob("*")) == ["config.json", "packed.safetensors", "x"]
    assert unpack_folder(tmp_path / "package" / "x", sha256=facts["sha256"]).is_dir()

    text = '[[base]]\nname = "w"\nparameters = 1\n\n[[base]]\nname = "x"\nfolder = "x"\nparameters = 1\nyear = 2026\n'
    written = ship.with_facts(text, "x", facts)
    assert written.startswith('[[base]]\nname = "w"\nparameters = 1\n\n')
    assert f'sha256 = "{facts["sha256"]}"\n' in written and "parameters = 32\nyear = 2026\n" in written
    assert ship.with_facts(written, "x", facts) == written
    with pytest.raises(KeyError):
        ship.with_facts(text, "y", facts)


def test_ship_changes_nothing_when_the_limit_would_be_passed(tmp_path, monkeypatch):
    from safetensors.numpy import save

    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(save({"w": np.ones((400, 80), np.float32)}))
    (tmp_path / "package" / "x").mkdir(parents=True)
    (tmp_path / "package" / "x" / "old.json").write_text("{}")
    monkeypatch.setattr(ship, "LIMIT_MB", 0.01)
    with pytest.raises(SystemExit, match="over the limit"):
        ship.ship(model, "x", tmp_path / "package")
    assert [path.name for path in (tmp_path / "package").rglob("*")] == ["x", "old.json"]


def test_card_of_the_encoder_says_its_sources_figures_and_what_was_not_measured(tmp_path):
    record = {
        "name": "e", "teacher": {"name": "t", "licence": "apache-2.0"}, "pairs": 1234, "held_out": 1000,
        "more": {"known": 10, "new": 20}, "retrieval": {"n": 1000, "from_new": 0.976, "from_known": 0.98},
        "stages": {"embeddings": {"seconds": 1800.0, "tokens": 10}, "all": {"seconds": 5400.0, "tokens": 20}},
    }  # fmt: skip
    (tmp_path / "distil.json").write_text(json.dumps(record))
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 6, "hidden_size": 384, "vocab_size": 32000}')
    text = make_encoder_card.card(tmp_path, licence="apache-2.0", benchmark=None, watts=None)
    assert text.startswith("---\nlicense: apache-2.0\n") and "Not measured." in text and "Energy: unavailable" in text
    assert "French to English 97.6%" in text and "2.0 h of one thread for 30 tokens" in text
    assert all(source in text for _, source in make_encoder_card.SOURCES.values()) and "Tatoeba" in text
    page = "# Benchmark: encoder\n\n## Retrieval\n\n| a |"
    text = make_encoder_card.card(tmp_path, licence="apache-2.0", benchmark=page, watts=10.0)
    assert text.endswith("### Retrieval\n\n| a |\n") and "0.020 kWh at 10 W" in text
    assert "masked" not in text and "30 tokens of the stages embeddings, all." in text


def test_card_of_the_encoder_says_how_well_it_guesses_when_it_learnt_to():
    figures = {"lines": 9, "guessed": 1234, "before": {"value": 7.5}, "after": {"value": 4.25, "low": 4.0, "high": 4.5}}
    said = make_encoder_card._guesses({"tokens": 3_500_000, "new": figures})
    assert "in 3,500,000 tokens of text" in said[0] and "7.50 to 4.25 nats a guessed token of 9 held-out" in said[0]
    assert "(95 % interval 4.00 to 4.50, 1,234 tokens)" in said[0]
    assert make_encoder_card._guesses(None) == []


@pytest.mark.parametrize("entry", SHIPPED, ids=lambda entry: entry.name)
def test_shipped_base_is_what_the_catalogue_says(base, entry):
    found = base(entry)
    assert entry.sha256 is not None  # so the digest was checked
    assert (found.kind, found.architecture, found.parameters) == (entry.kind, entry.architecture, entry.parameters)
    assert found.context_tokens == entry.context_tokens and found.source == "package:alambic_bases"
    assert entry.bytes == ship._size(packaged(entry))
    card = (packaged(entry) / "README.md").read_text("utf-8")
    assert f"license: {entry.licence}\n" in card and entry.name in card


# ---- the encoder -----------------------------------------------------------------------------------------------------


@each("encoder")
def test_shipped_encoder_opens_in_transformers_and_gives_our_vectors(base, entry):
    import torch
    import transformers

    from alambic.model.encoder import Encoder

    found = base(entry)
    ours = Encoder.load(found)
    theirs = transformers.AutoTokenizer.from_pretrained(found.folder)
    assert [theirs(text)["input_ids"] for text in GOLDEN_TEXTS] == ours.tokenize(GOLDEN_TEXTS)
    texts = [text for pair in PAIRS for text in pair]
    batch = theirs(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = transformers.AutoModel.from_pretrained(found.folder)(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    mean = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).numpy()
    np.testing.assert_allclose(mean, ours.embed(texts), atol=1e-5)


@each("encoder")
def test_shipped_encoder_puts_translations_together_and_keeps_accents(base, entry):
    from alambic.model.encoder import Encoder

    encoder = Encoder.load(base(entry))
    french, english = (encoder.embed([pair[i] for pair in PAIRS]) for i in (0, 1))
    near = french @ english.T
    assert (near.argmax(1) == np.arange(len(PAIRS))).all() and (near.argmax(0) == np.arange(len(PAIRS))).all()
    accented, bare = encoder.tokenize(["été à Nîmes", "ete a Nimes"])
    assert accented != bare and encoder.tokenize(["Nîmes"]) != encoder.tokenize(["nîmes"])


@each("encoder")
def test_shipped_encoder_packs_to_openvino_with_its_proof(base, entry, tmp_path):
    from alambic.engines import open_part
    from alambic.model.encoder import Encoder
    from alambic.pack import int8

    encoder = Encoder.load(base(entry))
    encoder.save(tmp_path / "model")
    part = drain(int8.pack_form("openvino-fp16", tmp_path / "model", tmp_path / "part"))
    proof = json.loads((tmp_path / "part" / "proof.json").read_text("utf-8"))
    assert proof["tokenizers"] == ["tokenizer.json", "tokenizer.xml"] and proof["n"] == len(GOLDEN_TEXTS)
    texts = [text for pair in PAIRS for text in pair]
    vectors = open_part(part, tmp_path / "part", long="windows", threads=1).run(texts)
    np.testing.assert_allclose(vectors, encoder.embed(texts), atol=0.02)


@each("encoder")
def test_french_task_takes_the_shipped_encoder_when_it_names_none(base, entry, tmp_path):
    base(entry)
    found, notes = settled(write_task(tmp_path, FRENCH))
    assert found.name == entry.name and notes[-1].level == "info"  # and test_offline.py builds such a task


# ---- the decoder -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@each("decoder")
def test_shipped_decoder_reads_the_same_ids_in_every_engine(base, entry, tmp_path):
    import transformers

    from alambic.pack.gguf import check, write_gguf
    from alambic.pack.writer_openvino import pack_openvino
    from alambic.pack.writer_proof import prove_writer

    folder = base(entry).folder
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install 'alambic[gguf]'")
    part = drain(pack_openvino(folder, tmp_path / "part", precision="int8"))
    file = drain(write_gguf(folder, tmp_path / "model.gguf", form="Q8_0"))
    others = {"llama.cpp": lambda texts: check.gguf_token_ids(file.path, texts)}
    report = drain(prove_writer(folder, tmp_path / "part", part, others=others))
    assert report.tokenizers == ("trained", "tokenizer.json", "transformers", "openvino_tokenizer.xml", "llama.cpp")
    assert not report.left_out and file.limits == ()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == entry.architecture
