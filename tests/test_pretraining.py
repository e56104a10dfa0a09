"""Pre-training from text to a model: stages that are kept, a report that accounts for everything, an open command."""

import hashlib
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner

from alambic.build import pretraining
from alambic.cli.main import cli
from alambic.data.corpus_rules import STOP_WORDS
from alambic.data.shards import open_shards
from alambic.errors import DataError
from alambic.events import Finished, Note, Skipped, drain
from alambic.model.tokenizer_training import START, encode_plain
from alambic.pretrain_config import load_pretrain

CORPUS = Path(__file__).parents[2] / "shared" / "corpus"
CONFIG = """
[pretrain]
name = "tiny"
threads = 1
[[source]]
name = "fr"
path = "fr.txt.xz"
language = "fr"
licence = "CC0-1.0"
[[source]]
name = "en"
path = "en.txt"
language = "en"
licence = "MIT"
[[source]]
name = "chat"
path = "chat.jsonl"
language = "fr"
licence = "CC-BY-4.0"
weight = 2
clean = { filters = false }
[mix]
languages = { fr = 0.75, en = 0.25 }
[tokenizer]
vocabulary = 600
sample_mb = 0.1
[model]
hidden = 32
layers = 1
heads = 2
context = 32
[train]
tokens = 2048
batch_tokens = 256
[valid]
share = 0.1
"""
SECRET = " ".join(f"secret{i}" for i in range(20))


def prose(language, seed, count=90):
    """Return function words of a language with invented words between them."""
    rng = random.Random(f"{language}{seed}")
    small = STOP_WORDS[language].split()
    invented = [
        f"{a}{b}{c}" for a in ("mo", "ti", "re") for b in ("lan", "ver", "sou") for c in ("te", "nir", "que", "l")
    ]
    return " ".join(rng.choice(small) if i % 2 else rng.choice(invented) + rng.choice(invented) for i in range(count))


def write_corpus(folder):
    folder.mkdir(parents=True)
    separator = "\n<|endoftext|>\n"
    french = [prose("fr", i) for i in range(60)]
    with lzma.open(folder / "fr.txt.xz", "wt", encoding="utf-8") as file:
        file.write(separator.join([*french, french[0], f"{prose('fr', 99)} {SECRET}", "Trop court."]))
    english = [prose("en", i) for i in range(40)]
    (folder / "en.txt").write_text(separator.join([*english, "Spells <|endoftext|> and <|user|>. " + prose("en", 98)]))
    rows = [{"prompt": f"Question {i} ?", "completion": prose("fr", 1000 + i, 20)} for i in range(20)]
    (folder / "chat.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    sets = folder.parent / "sets"
    sets.mkdir()
    (sets / "test.jsonl").write_text(json.dumps({"text": SECRET}))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Return a folder with a configuration, a corpus and test sets, and the shards made of them."""
    root = tmp_path_factory.mktemp("pretrain")
    write_corpus(root / "text")
    (root / "tiny.toml").write_text(CONFIG)
    outcome, _ = run(root)
    return root, outcome


def run(root, text=None, *, until="shards", **options):
    """Run the stages in `root`/run and return the outcome and the names of the stages that had to run."""
    if text is not None:
        (root / "tiny.toml").write_text(text)
    config = load_pretrain(root / "tiny.toml", corpus=root / "text", test_sets=(root / "sets",))
    events = []
    outcome = drain(pretraining.pretrain_events(config, root / "run", until=until, **options), events.append)
    return outcome, [event.stage for event in events if isinstance(event, Finished) and event.stage != "pretrain"]


@pytest.fixture
def own(given, tmp_path):
    """Return a copy of the finished run that a test may change."""
    shutil.copytree(given[0], tmp_path / "own")
    return tmp_path / "own"


def test_every_document_is_accounted_for_when_reported(given):
    _, outcome = given
    french = outcome.record["sources"]["fr"]
    assert {reason: found["documents"] for reason, found in french["dropped"].items()} == {
        "test_text": 1, "min_words": 1,
    }  # fmt: skip
    assert french["test_sets"] == {"test.jsonl": 1} and french["exact"]["documents"] == 1
    for source in outcome.record["sources"].values():
        parts = sum(source[part]["documents"] for part in ("train", "valid", "exact", "near"))
        assert parts == source["kept_documents"]
        dropped = sum(found["documents"] for found in source["dropped"].values())
        assert parts + dropped == source["documents"] == source["read_documents"]
    page = outcome.report.read_text("utf-8")
    assert "[test.jsonl] secret0 secret1" in page and "| test.jsonl | 1 |" in page
    assert json.loads((outcome.run / "corpus.json").read_text("utf-8")) == outcome.record


def test_shards_hold_the_documents_when_decoded(given):
    _, outcome = given
    from alambic.model.tokenizer import read_tokenizer

    tokenizer = read_tokenizer(outcome.tokenizer)
    shards = open_shards(outcome.shards)
    assert shards.end_id == tokenizer.token_to_id(START)
    digest = hashlib.sha256((outcome.tokenizer / "tokenizer.json").read_bytes()).hexdigest()
    assert shards.tokenizer_digest == digest
    texts = []
    for part in ("train", "valid"):
        ids, offsets = shards.tokens(part, "en"), shards.offsets(part, "en")
        for start, stop in pairwise(offsets.tolist()):
            assert ids[stop - 1] == shards.end_id and shards.end_id not in ids[start : stop - 1]
            texts.append(tokenizer.decode(ids[start : stop - 1].tolist(), skip_special_tokens=False))
        assert shards.source("en").counts(part).utf8_bytes == sum(
            len(text.encode()) for text in texts[len(texts) - len(offsets) + 1 :]
        )
    assert len(texts) == 41 and sum("<|endoftext|> and <|user|>" in text for text in texts) == 1
    user = tokenizer.token_to_id("<|user|>")
    assert (shards.tokens("train", "chat") == user).sum() == shards.source("chat").train.documents
    assert user not in shards.tokens("train", "en")


def test_mix_follows_weights_and_languages_when_shared_out(given):
    _, outcome = given
    shards = open_shards(outcome.shards)
    weights = {source.name: source.weight for source in shards.sources}
    tokens = {source.name: source.train.tokens for source in shards.sources}
    assert weights["en"] == pytest.approx(0.25) and weights["fr"] + weights["chat"] == pytest.approx(0.75)
    assert weights["chat"] / weights["fr"] == pytest.approx(2 * tokens["chat"] / tokens["fr"])


def test_nothing_runs_again_when_nothing_changed(own):
    assert run(own)[1] == []


def test_only_what_depends_on_it_runs_again_when_a_source_changes(own):
    rows = [{"prompt": "Autre ?", "completion": prose("fr", 5000 + i, 20)} for i in range(20)]
    (own / "text" / "chat.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert run(own)[1] == ["corpus-chat", "dedup", "tokenizer", "shards"]


@pytest.mark.parametrize(
    ("change", "ran"),
    [
        (("hidden = 32", "hidden = 64"), []),
        (("weight = 2", "weight = 3"), ["tokenizer", "shards"]),
        (("share = 0.1", "share = 0.2"), ["dedup", "tokenizer", "shards"]),
        (("vocabulary = 600", "vocabulary = 610"), ["tokenizer", "shards"]),
        (('licence = "MIT"', 'licence = "MIT"\nmb = 0.01'), ["corpus-en", "dedup", "tokenizer", "shards"]),
    ],
)
def test_only_what_depends_on_it_runs_again_when_the_configuration_changes(own, change, ran):
    assert run(own, CONFIG.replace(*change))[1] == ran


def test_two_runs_give_the_same_bytes_when_started_afresh(given, own):
    shutil.rmtree(own / "run")
    again, _ = run(own)
    first = given[1]
    for part in ("train", "valid"):
        for name in ("fr", "en", "chat"):
            assert (first.shards / part / f"{name}.bin").read_bytes() == (
                again.shards / part / f"{name}.bin"
            ).read_bytes()
    assert (first.tokenizer / "tokenizer.json").read_bytes() == (again.tokenizer / "tokenizer.json").read_bytes()


def test_given_tokenizer_is_used_when_named(given, own):
    shutil.copytree(given[1].tokenizer, own / "mine")
    outcome, _ = run(own, CONFIG.replace("vocabulary = 600", 'path = "mine"'))
    assert (outcome.tokenizer / "tokenizer.json").read_bytes() == (own / "mine" / "tokenizer.json").read_bytes()


def test_lossy_tokenizer_is_refused_when_named(given, own):
    folder = own / "lossy"
    shutil.copytree(given[1].tokenizer, folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**data, "normalizer": {"type": "Lowercase"}}))
    with pytest.raises(DataError, match="does not come back from its tokens"):
        run(own, CONFIG.replace("vocabulary = 600", 'path = "lossy"'))


def test_source_that_loses_every_document_is_refused_with_the_reasons_when_prepared(own):
    strict = CONFIG.replace('licence = "MIT"', 'licence = "MIT"\nclean = { min_words = 5000 }')
    with pytest.raises(DataError, match="corpus-en: no document is left to learn from: 41 min_words"):
        run(own, strict, until="corpus")


def test_missing_test_sets_are_said_when_none_is_named(own):
    config = load_pretrain(own / "tiny.toml", corpus=own / "text")
    events = []
    outcome = drain(pretraining.pretrain_events(config, own / "other", until="corpus"), events.append)
    assert any(isinstance(event, Note) and "no test sets" in event.message for event in events)
    assert "No test sets were named" in outcome.report.read_text()
    assert "test_text" not in outcome.record["sources"]["fr"]["dropped"]


def test_command_tells_the_plan_and_the_paths_when_asked(own):
    runner = CliRunner()
    args = ["pretrain", str(own / "tiny.toml"), "--corpus", str(own / "text"), "--test-sets", str(own / "sets")]
    made = json.loads(runner.invoke(cli, [*args, "--dry-run", "--json"]).stdout)
    assert made["tokens"] == 2048 and made["steps"] == 8 and made["test_files"] == 1
    assert made["parameters"] == 640 * 32 + (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    result = runner.invoke(cli, [*args, "--out", str(own / "run"), "--only", "shards", "--json"])
    record = json.loads(result.stdout)
    assert open_shards(Path(record["shards"])).vocabulary == 600 and record["model"] is None
    missing = runner.invoke(cli, ["pretrain", str(own / "tiny.toml"), "--dry-run"], env={"ALAMBIC_CORPUS": str(own)})
    assert missing.exception is not None and "no such file" in str(missing.exception)


def test_run_goes_on_when_killed(own):
    shutil.rmtree(own / "run")
    command = [sys.executable, "-m", "alambic", "pretrain", str(own / "tiny.toml"), "--corpus", str(own / "text"),
               "--out", str(own / "run"), "--only", "shards"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(own.glob("run/stages/corpus-en-*")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    config = load_pretrain(own / "tiny.toml", corpus=own / "text")
    events = []
    outcome = drain(pretraining.pretrain_events(config, own / "run", until="shards"), events.append)
    assert "corpus-fr" in [event.stage for event in events if isinstance(event, Skipped)]
    assert open_shards(outcome.shards).total("train").documents > 100


@pytest.mark.slow
def test_model_is_trained_in_sittings_and_opens_when_done(own):
    import transformers

    paused, _ = run(own, until="train", minutes=1e-9)
    assert paused.model is None and paused.training["finished"] is False
    outcome, ran = run(own, until="train")
    assert ran == ["train"] and outcome.training["finished"] and outcome.training["tokens"] == 2048
    assert 0 < outcome.training["bits_per_byte"] < 9
    assert set(outcome.training["sources"]) == {"fr", "en", "chat"}
    assert "million tokens trained on" in outcome.curve.read_text("utf-8") and str(outcome.curve) in outcome.text()
    planned = pretraining.plan(load_pretrain(own / "tiny.toml", corpus=own / "text"))
    assert outcome.training["parameters"] == planned.parameters
    assert run(own, until="train")[1] == []
    model = transformers.AutoModelForCausalLM.from_pretrained(outcome.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(outcome.model)
    assert model.config.vocab_size >= len(tokenizer) == 600 and tokenizer.chat_template
    record = json.loads((outcome.model / "alambic.json").read_text())
    assert record["base"]["licence"] == "CC-BY-4.0; CC0-1.0; MIT"


@pytest.mark.skipif(not CORPUS.is_dir(), reason=f"{CORPUS} is not there")
def test_real_documents_lose_nothing_when_prepared(tmp_path):
    recipe = Path(__file__).parents[1] / "bases" / "alambic-fr-en" / "decoder.toml"
    config = load_pretrain(recipe, corpus=CORPUS)
    kept = tuple(
        source.model_copy(update={"mb": 0.1}) for source in config.source if source.name in ("fr_docs", "fr_chat")
    )
    tokenizer = config.tokenizer.model_copy(update={"vocabulary": 1000})
    config = config.model_copy(update={"source": kept, "tokenizer": tokenizer,
                                       "mix": type(config.mix)()})  # fmt: skip
    outcome = drain(pretraining.pretrain_events(config, tmp_path / "run", until="shards"))
    from alambic.model.tokenizer import read_tokenizer

    shards, loaded = open_shards(outcome.shards), read_tokenizer(outcome.tokenizer)
    ids, offsets = shards.tokens("train", "fr_docs"), shards.offsets("train", "fr_docs")
    text = loaded.decode(ids[: offsets[1] - 1].tolist(), skip_special_tokens=False)
    assert encode_plain(loaded, [text], special=False) == [ids[: offsets[1] - 1].tolist()]
    assert shards.source("fr_chat").licence == "Apache-2.0" and os.path.getsize(outcome.report) > 500
