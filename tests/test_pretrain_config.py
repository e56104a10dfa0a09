"""The configuration of a pre-training: validated whole, every fault with its line."""

from pathlib import Path

import pytest

from alambic.errors import TaskError
from alambic.pretrain_config import CleanSpec, json_schema, load_pretrain

BASIC = """
[pretrain]
name = "tiny"
[[source]]
name = "fr"
path = "fr.txt"
language = "fr"
licence = "CC0-1.0"
clean = { min_words = 3 }
[[source]]
name = "en"
path = "en.txt"
language = "en"
licence = "CC0-1.0"
[model]
hidden = 64
layers = 2
heads = 2
[train]
tokens = 1000
"""


def load(tmp_path, text, **options):
    path = tmp_path / "c.toml"
    path.write_text(text, encoding="utf-8")
    return load_pretrain(path, **options)


def test_paths_start_from_the_file_or_from_the_option_when_loaded(tmp_path):
    config = load(tmp_path, BASIC, test_sets=(tmp_path / "t",))
    assert config.corpus == tmp_path.resolve() and config.test_sets == ((tmp_path / "t").resolve(),)
    named = BASIC.replace('name = "tiny"', 'name = "tiny"\ncorpus = "text"')
    assert load(tmp_path, named).corpus == (tmp_path / "text").resolve()
    assert load(tmp_path, named, corpus=tmp_path / "other").corpus == (tmp_path / "other").resolve()


def test_source_overrides_only_its_own_thresholds_when_asked(tmp_path):
    config = load(tmp_path, BASIC + "[clean]\ndigits = 0.1\n")
    assert config.cleaning(config.source[0]).min_words == 3
    assert config.cleaning(config.source[1]).min_words == CleanSpec().min_words
    assert {config.cleaning(source).digits for source in config.source} == {0.1}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (("hidden = 64", "hiden = 64"), r"c\.toml:16: model\.hiden: unknown key; did you mean 'hidden'"),
        (("layers = 2", "layers = 0"), r"c\.toml:17: model\.layers = 0: input should be greater"),
        (("heads = 2", "heads = 3"), r"hidden = 64 is no multiple of heads = 3"),
        (("tokens = 1000", ""), r"c\.toml:19: train: give tokens or passes"),
        (("tokens = 1000", "tokens = 9\npasses = 1"), "give tokens or passes"),
        (("tokens = 1000", 'tokens = 9\noptimizer = "lion"'), r"train\.optimizer = 'lion'; allowed: 'adamw' or 'muon'"),
        (('name = "en"', 'name = "fr"'), r"source\[1\]\.name: 'fr' is there twice"),
        (("min_words", "minwords"), r"c\.toml:9: source\[0\]\.clean\.minwords: unknown key; did you mean 'min_words'"),
        (("[model]", "[mix]\nlanguages = { fr = 1.0 }\n[model]"), "mix.languages has fr; the sources have en, fr"),
        (("[model]", "[mix]\nlanguages = { fr = 0.5, en = 0.4 }\n[model]"), "add up to 1"),
        (("[model]", "[modle]"), "modle: unknown key; did you mean 'model'"),
        (("[pretrain]", "[pretrain"), "not valid TOML"),
    ],
)
def test_fault_is_named_with_its_line_when_loaded(tmp_path, change, fault):
    with pytest.raises(TaskError, match=fault):
        load(tmp_path, BASIC.replace(*change))


def test_every_fault_is_told_at_once_when_there_are_several(tmp_path):
    with pytest.raises(TaskError) as caught:
        load(tmp_path, BASIC.replace("layers = 2", "layers = 0").replace("hidden = 64", "hidden = 1"))
    assert "model.layers" in str(caught.value) and "model.hidden" in str(caught.value)


def test_own_recipes_are_valid_when_loaded():
    recipes = sorted(Path(__file__).parents[1].glob("bases/*/decoder*.toml"))
    assert recipes
    for path in recipes:
        assert load_pretrain(path).model.objective == "causal"


def test_schema_describes_every_key_when_printed():
    schema = json_schema()
    assert set(schema["properties"]) >= {"pretrain", "source", "clean", "model", "train", "valid", "tokenizer"}
    fields = [field for table in schema["$defs"].values() for field in table["properties"].values()]
    assert fields and all("description" in field for field in fields)


def test_parameters_of_training_are_those_of_the_loop_when_given(tmp_path):
    from alambic.pretrain_config import ModelSpec, TrainSpec
    from alambic.train.pretrain_params import PretrainParams

    config = load(tmp_path, BASIC)
    given = {**config.model.model_dump(), **config.train.model_dump()}
    loop = PretrainParams(hidden=64, layers=2, heads=2, tokens=1000)
    assert PretrainParams(**given) == loop  # one set of defaults
    left = {"seed", "threads", "sitting_minutes"}  # of [pretrain] and of the command
    assert set(vars(loop)) - left == set(ModelSpec.model_fields) | set(TrainSpec.model_fields)
