"""GGUF files: every family gives the logits of transformers, every tokenizer its ids, every form what it promises."""

import json
import lzma
import shutil
import unicodedata

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from alambic.errors import BaseModelError, PackError
from alambic.events import Note, drain
from alambic.kinds.golden import GOLDEN_TEXTS
from alambic.kinds.golden_chats import GOLDEN_CHATS
from alambic.model.tokenizer import read_tokenizer
from alambic.pack.gguf import check, pack, quantise, write_gguf
from alambic.pack.gguf import tokenizer as words
from alambic.render import PLAIN_TEMPLATE, ChatTemplate
from gguf_models import CHATML, FAMILIES, ROWS, byte_level, make, sentencepiece_like, unigram

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

PROMPTS = [[3 + (7 * i * (n + 1)) % 630 for i in range(length)] for n, length in enumerate((2, 17, 90, 200))]
# llama.cpp looks GELU up in a table of half precision.
NEAR = {"gemma2": 0.01, "phi": 0.01, "starcoder2": 0.01}


def folder_of(tmp_path, name="model"):
    folder = tmp_path / name
    folder.mkdir()
    return folder


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf") / "model"
    folder.mkdir()
    model = make(folder, request.param)
    return request.param, model, drain(write_gguf(folder, folder.parent / "model.gguf", form="F32"))


def test_logits_are_those_of_transformers_when_in_full_precision(family):
    import torch

    name, model, file = family
    with check.opened(file.path, context=256) as server, torch.no_grad():
        for ids in PROMPTS:
            expected = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1).numpy()
            got = np.array([value for _, value in sorted(server.best(ids, ROWS))])
            assert np.abs(got - expected).max() < NEAR.get(name, 1e-3)


def test_greedy_tokens_are_those_of_transformers_when_in_full_precision(family):
    import torch

    name, model, file = family
    compared = 0
    for ids in PROMPTS:
        tokens, gaps = check.gguf_greedy(file.path, ids, 8)
        out = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=2)[0][len(ids) :]
        sure = next((i for i, gap in enumerate(gaps) if gap < 2 * NEAR.get(name, 1e-3)), len(gaps))
        assert tokens[:sure] == out.tolist()[:sure]
        compared += sure
    assert compared >= 24


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "model"
    folder.mkdir()
    return folder, make(folder, "llama")


@pytest.mark.parametrize(
    ("form", "near", "bits"), [("F16", 0.02, 16), ("BF16", 0.2, 16), ("Q8_0", 0.3, 8.5), ("Q4_0", 4.0, 4.5)]
)
def test_form_stays_near_the_model_and_has_its_size_when_written(llama, tmp_path, form, near, bits):
    import torch

    folder, model = llama
    file = drain(write_gguf(folder, tmp_path / "m.gguf", form=form))
    assert file.bytes == (tmp_path / "m.gguf").stat().st_size
    kinds = {t.name: (t.tensor_type.name, t.n_elements, t.n_bytes) for t in gguf.GGUFReader(file.path).tensors}
    kind, count, size = kinds["blk.0.ffn_up.weight"]
    assert (kind, size * 8 / count) == (form, bits)
    assert kinds["blk.0.attn_norm.weight"][0] == "F32"
    assert kinds["output.weight"][0] == ("Q8_0" if form.startswith("Q") else form)
    with check.opened(file.path, context=256) as server, torch.no_grad():
        worst = 0.0
        for ids in PROMPTS:
            expected = torch.softmax(model(torch.tensor([ids])).logits[0, -1], -1).double()
            logs = torch.tensor([value for _, value in sorted(server.best(ids, ROWS))], dtype=torch.double)
            worst = max(worst, float((expected * (expected.log() - logs)).sum()))
    assert worst < near


def test_weights_of_all_types_give_the_same_file_when_equal(tmp_path):
    import torch

    found = []
    for i, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16)):
        folder = folder_of(tmp_path, f"m{i}")
        model = make(folder, "llama").to(torch.bfloat16).to(torch.float16)
        model.to(dtype).save_pretrained(folder)
        drain(write_gguf(folder, tmp_path / f"{i}.gguf", form="Q8_0"))
        found.append([t.data.copy() for t in gguf.GGUFReader(tmp_path / f"{i}.gguf").tensors])
    for a, b in zip(found[0], found[1], strict=True):
        assert np.array_equal(a, b)


def test_output_matrix_is_left_out_when_tied(tmp_path):
    folder = folder_of(tmp_path)
    make(folder, "qwen2")
    drain(write_gguf(folder, tmp_path / "m.gguf", form="Q4_0"))
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert "output.weight" not in kinds
    assert kinds["token_embd.weight"] == "Q8_0" and kinds["blk.1.attn_q.weight"] == "Q4_0"


def test_rows_that_no_block_divides_are_in_half_precision_when_quantised():
    assert quantise.tensor_form("blk.0.ffn_down.weight", (64, 48), "Q4_0", tied=False) == "F16"
    assert quantise.tensor_form("blk.0.ffn_down.weight", (64, 64), "Q4_0", tied=False) == "Q4_0"


def test_a_tensor_is_the_same_when_written_in_pieces(monkeypatch, llama, tmp_path):
    drain(write_gguf(llama[0], tmp_path / "whole.gguf", form="Q4_0"))
    monkeypatch.setattr(quantise, "_AT_ONCE", 64 * 5)
    drain(write_gguf(llama[0], tmp_path / "pieces.gguf", form="Q4_0"))
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "pieces.gguf").read_bytes()


def field(path, key):
    entry = gguf.GGUFReader(path).fields[key]
    return entry.contents()


def test_metadata_are_the_models_when_written(llama, tmp_path):
    file = drain(write_gguf(llama[0], tmp_path / "m.gguf", form="F16", name="tickets"))
    said = {
        "general.name": "tickets", "llama.context_length": 512, "llama.rope.freq_base": 10000.0,
        "llama.attention.head_count_kv": 2, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": CHATML, "tokenizer.ggml.pre": "gpt-2", "general.file_type": 1,
    }  # fmt: skip
    assert {key: field(file.path, key) for key in said} == said


def test_template_in_the_file_has_no_clock_when_the_base_asks_for_one(tmp_path):
    folder = folder_of(tmp_path)
    make(folder, template="{{ strftime_now('%d %b %Y') }}" + CHATML)
    file = drain(write_gguf(folder, tmp_path / "m.gguf", form="F16"))
    assert field(file.path, "tokenizer.chat_template").startswith('{{ "26 Jul 2024" }}')


def test_context_ends_with_the_window_when_llama_cpp_has_none(tmp_path):
    folder = folder_of(tmp_path)
    make(folder, "mistral", sliding_window=128)
    assert drain(write_gguf(folder, tmp_path / "m.gguf", form="F16")).context_tokens == 128


def test_text_part_is_written_when_the_model_has_other_senses_too(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    folder = folder_of(tmp_path)
    make(folder, "ministral3")
    drain(write_gguf(folder, tmp_path / "text.gguf", form="Q8_0"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    whole = {"model_type": "mistral3", "text_config": config, "vision_config": {"model_type": "pixtral"}}
    (folder / "config.json").write_text(json.dumps(whole), encoding="utf-8")
    held = {f"language_model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    held |= {"vision_tower.patch.weight": torch.ones(4, 4), "multi_modal_projector.linear.weight": torch.ones(4, 4)}
    save_file(held, folder / "model.safetensors")
    drain(write_gguf(folder, tmp_path / "whole.gguf", form="Q8_0"))
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "text.gguf").read_bytes()


def test_ends_and_special_tokens_are_the_decoders_when_it_saved_the_model(llama, tmp_path):
    from alambic.model.decoder import Decoder
    from alambic.pack.gguf.source import Source

    decoder = Decoder.load(llama[0])
    decoder.save(tmp_path / "saved")
    for folder in (llama[0], tmp_path / "saved"):
        source = Source.read(folder)
        assert set(source.ends) == set(decoder.ends)
        assert source.ends[0] == decoder.turn_end()
        assert source.template.source == decoder.template.source
        assert source.context_tokens == decoder.context_tokens
        named = {key: text for key, text in decoder.template.special.items() if key != "eos_token"}
        assert named.items() <= source.template.special.items()


# ------------------------------------------------------------------------------------------------------ tokenizers


def isolated(regex):
    return pre_tokenizers.Split(Regex(regex), "isolated")


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WAYS = {
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), {}),
    "starcoder": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                           pre_tokenizers.ByteLevel(add_prefix_space=False)]), {}),
    "qwen2": (pre_tokenizers.Sequence([isolated(words._QWEN2), BYTES]), {}),
    "llama-bpe": (pre_tokenizers.Sequence([isolated(words._LLAMA3), BYTES]), {"ignore_merges": True}),
    "dbrx": (pre_tokenizers.Sequence([isolated(words._LLAMA3), BYTES]), {}),
    "tekken": (pre_tokenizers.Sequence([isolated(words._TEKKEN), BYTES]), {"ignore_merges": True}),
    "deepseek-coder": (pre_tokenizers.Sequence(
        [isolated("[\r\n]"), isolated(r"\s?\p{L}+"), isolated(r"\s?\p{P}+"), isolated(words._HAN),
         pre_tokenizers.Digits(individual_digits=True), BYTES]), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(WAYS))
def test_ids_are_the_tokenizers_when_llama_cpp_reads_golden_texts(tmp_path, name):
    tokenizer = byte_level(WAYS[name][0], **WAYS[name][1])
    folder = folder_of(tmp_path)
    make(folder, tokenizer=tokenizer)
    file = drain(write_gguf(folder, tmp_path / "m.gguf", form="F16"))
    assert file.tokenizer == ("gpt2", name)
    # llama.cpp's own expression of Tekken takes a combining mark for no letter.
    marked = {text for text in GOLDEN_TEXTS if any(unicodedata.category(c) == "Mn" and c != "\ufe0f" for c in text)}
    differing = {d.text for d in check.differences(file.path, tokenizer, GOLDEN_TEXTS)}
    assert differing == (marked if name == "tekken" else set())
    assert any("combining marks" in limit for limit in file.limits) == (name == "tekken")


@pytest.mark.parametrize("prefix", [True, False])
def test_ids_are_the_tokenizers_when_it_is_of_sentencepieces_kind(tmp_path, prefix):
    tokenizer = sentencepiece_like(prefix)
    folder = folder_of(tmp_path)
    make(folder, tokenizer=tokenizer)
    file = drain(write_gguf(folder, tmp_path / "m.gguf", form="F16"))
    assert file.tokenizer == ("llama", "default")
    assert field(file.path, "tokenizer.ggml.add_space_prefix") is prefix
    assert [str(d) for d in check.differences(file.path, tokenizer, GOLDEN_TEXTS)] == []


def test_ids_are_the_tokenizers_but_for_stated_limits_when_it_is_a_unigram(tmp_path):
    tokenizer = unigram()
    folder = folder_of(tmp_path)
    make(folder, tokenizer=tokenizer, template="{% for m in messages %}{{ m.content }}{% endfor %}")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special), encoding="utf-8")
    file = drain(write_gguf(folder, tmp_path / "m.gguf", form="F16"))
    assert file.tokenizer == ("t5", "default") and len(file.limits) == 2
    limited = {t for t in GOLDEN_TEXTS if t.startswith(" ") or "> <" in t or len(set(t)) == 1}
    assert {d.text for d in check.differences(file.path, tokenizer, GOLDEN_TEXTS)} <= limited


def test_difference_names_text_and_token_when_llama_cpp_does_not_normalise(tmp_path):
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    folder = folder_of(tmp_path)
    make(folder, tokenizer=tokenizer)
    events = []
    file = drain(write_gguf(folder, tmp_path / "m.gguf", form="F16"), events.append)
    assert file.limits == ("llama.cpp does not normalise texts (NFC)",)
    assert any(isinstance(event, Note) and "NFC" in event.message for event in events)
    found = check.differences(file.path, tokenizer, ("plain", "e\u0301"))
    assert [d.text for d in found] == ["e\u0301"] and found[0].at == 0


@pytest.mark.parametrize(
    ("way", "options"),
    [(isolated(r"\w+"), {}), (pre_tokenizers.Whitespace(), {}), (isolated(words._QWEN2), {"ignore_merges": True})],
)
def test_error_shows_the_steps_when_the_pre_tokenizer_is_unknown(tmp_path, way, options):
    folder = folder_of(tmp_path)
    make(folder, tokenizer=byte_level(pre_tokenizers.Sequence([way, BYTES]), **options))
    with pytest.raises(PackError, match=r"pre-tokenizer not known to llama.cpp: .*(w\+|Whitespace|ignore_merges)"):
        drain(write_gguf(folder, tmp_path / "m.gguf", form="F16"))
    assert list(tmp_path.iterdir()) == [folder]


REAL = [("gpt2", ()), ("gpt-neox", ()), ("minimind", ()), ("qwen2.5", ()), ("mistral_v1", ()), ("mistral_v7", ()),
        ("mistral_v3", ("tokenizer.json",))]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "without"), REAL, ids=[name for name, _ in REAL])
def test_ids_are_the_tokenizers_when_the_vocabulary_is_real(shared_data, tmp_path, name, without):
    source, folder = shared_data / "tokenizers" / name, folder_of(tmp_path)
    if not source.is_dir():
        pytest.skip(f"{source} is not there")
    for path in source.iterdir():
        if path.suffix == ".xz" and ".gguf" not in path.name and path.stem not in without:
            (folder / path.stem).write_bytes(lzma.decompress(path.read_bytes()))
        elif path.suffix == ".json":
            shutil.copy(path, folder)
    tokenizer = read_tokenizer(folder)
    for path in folder.iterdir():
        path.unlink()
    rows = tokenizer.get_vocab_size(with_added_tokens=True)
    make(folder, tokenizer=tokenizer, vocab_size=rows, hidden_size=32, num_hidden_layers=1, intermediate_size=32)
    special = {"eos_token": tokenizer.id_to_token(rows - 1)}
    (folder / "tokenizer_config.json").write_text(json.dumps(special), encoding="utf-8")
    file = drain(write_gguf(folder, tmp_path / "m.gguf", form="F16"))
    found = {d.text for d in check.differences(file.path, tokenizer, GOLDEN_TEXTS)}
    expected = {text for text in GOLDEN_TEXTS if "\u0301" in text} if name in ("gpt-neox", "qwen2.5") else set()
    if name == "qwen2.5":  # has the piece </s>, which llama.cpp always takes for an end
        expected |= {text for text in GOLDEN_TEXTS if "</s>" in text}
        assert any("</s>" in limit for limit in file.limits)
    assert found == expected


VECTORS = {
    "gpt2": ("ggml-vocab-gpt-2.gguf", "gpt-2"),
    "deepseek-coder": ("ggml-vocab-deepseek-coder.gguf", "deepseek-coder"),
    "starcoder2": ("ggml-vocab-starcoder.gguf", "starcoder"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(VECTORS))
def test_ids_are_llama_cpps_own_test_vectors_when_the_vocabulary_is_real(shared_data, tmp_path, name):
    file, way = VECTORS[name]
    source, vectors = (
        shared_data / "tokenizers" / name / f"{file}.xz",
        shared_data / "tokenizers/llama.cpp_test_vectors",
    )
    if not source.is_file() or not vectors.is_dir():
        pytest.skip(f"{source} is not there")
    (tmp_path / "v.gguf").write_bytes(lzma.decompress(source.read_bytes()))
    fields = gguf.GGUFReader(tmp_path / "v.gguf").fields
    held = {key: fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges", "token_type")}
    added = [text for text, kind in zip(held["tokens"], held["token_type"], strict=True) if kind in (3, 4)]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(held["tokens"])},
                                     [tuple(merge.split(" ")) for merge in held["merges"]]))  # fmt: skip
    tokenizer.pre_tokenizer = WAYS[way][0]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in added])
    folder, rows = folder_of(tmp_path), len(held["tokens"])
    make(folder, tokenizer=tokenizer, vocab_size=rows, hidden_size=32, num_hidden_layers=1, intermediate_size=32)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": added[0]}), encoding="utf-8")
    written = drain(write_gguf(folder, tmp_path / "m.gguf", form="F16"))
    assert written.tokenizer == ("gpt2", way)
    texts = (vectors / f"{file}.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    lines = (vectors / f"{file}.out").read_text("utf-8").splitlines()
    expected = [[int(i) for i in line.split()] for line in lines]
    pairs = [(text, ids) for text, ids in zip(texts, expected, strict=False) if not any(t in text for t in added)]
    assert len(pairs) > 40
    assert check.gguf_token_ids(written.path, [text for text, _ in pairs]) == [ids for _, ids in pairs]
    assert [tokenizer.encode(text, add_special_tokens=False).ids for text, _ in pairs] == [ids for _, ids in pairs]


def test_round_trip_proof_takes_the_file_in_when_packed(tmp_path):
    from alambic.model.decoder import Decoder
    from alambic.pack.writer_proof import prove_writer

    (tmp_path / "base").mkdir()
    make(tmp_path / "base")
    Decoder.load(tmp_path / "base").save(tmp_path / "model")
    spec = drain(pack(tmp_path / "model", tmp_path / "part", form="Q8_0"))

    def read(texts):
        return check.gguf_token_ids(tmp_path / "part" / "model.gguf", texts)

    report = drain(prove_writer(tmp_path / "model", tmp_path / "part", spec, others={"llama.cpp": read}))
    assert "llama.cpp" in report.tokenizers and report.texts > 50
    wrong = {"llama.cpp": lambda texts: [[*ids[:-1], 7] for ids in read(texts)]}
    with pytest.raises(PackError, match=r"llama\.cpp"):
        drain(prove_writer(tmp_path / "model", tmp_path / "part", spec, others=wrong))


@pytest.mark.parametrize("source", [CHATML, PLAIN_TEMPLATE], ids=["chatml", "plain"])
def test_llama_cpp_writes_golden_chats_as_we_do_when_it_reads_the_template_in_the_file(tmp_path, source):
    folder = folder_of(tmp_path)
    make(folder, template=source)
    file = drain(write_gguf(folder, tmp_path / "m.gguf", form="Q8_0"))
    template = ChatTemplate(source, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    chats = {name: chat.prompt for name, chat in GOLDEN_CHATS.items()}
    assert check.template_differences(file.path, template, chats) == []
    if source is PLAIN_TEMPLATE:
        other = ChatTemplate(source.replace("### User", "### Client"), template.special)
    else:
        other = ChatTemplate(source.replace("assistant", "aide"), template.special)
    name, ours, theirs = check.template_differences(file.path, other, chats)[0]
    assert name in chats and ours != theirs


# -------------------------------------------------------------------------------------------------------- refusals


def test_form_is_refused_with_the_list_when_unknown(llama, tmp_path):
    with pytest.raises(PackError, match="GGUF form 'Q9' is not known") as caught:
        drain(write_gguf(llama[0], tmp_path / "m.gguf", form="Q9"))
    assert "Q8_0" in caught.value.hint


def test_k_form_is_refused_before_the_work_when_there_is_no_quantiser(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(quantise, "quantiser", lambda: None)
    with pytest.raises(PackError, match=r"Q4_K_M needs llama\.cpp's own quantiser"):
        drain(write_gguf(llama[0], tmp_path / "m.gguf", form="Q4_K_M"))


def test_k_form_is_written_by_the_program_when_it_is_there(llama, tmp_path, monkeypatch):
    program = tmp_path / "llama-quantize"
    program.write_text('#!/bin/sh\nprintf "%s %s" "$3" "$4" > "$2"\n')
    program.chmod(0o755)
    monkeypatch.setattr(quantise, "quantiser", lambda: str(program))
    out = tmp_path / "m.gguf"
    drain(write_gguf(llama[0], out, form="Q4_K_M", threads=2))
    assert out.read_text() == "Q4_K_M 2"
    program.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    with pytest.raises(PackError, match="llama-quantize could not write Q4_K_M: broken"):
        drain(write_gguf(llama[0], tmp_path / "n.gguf", form="Q4_K_M"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama-quantize", "m.gguf"]


def test_existing_file_is_refused_when_written(llama, tmp_path):
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(PackError, match="exists already"):
        drain(write_gguf(llama[0], tmp_path / "m.gguf", form="F16"))
    assert (tmp_path / "m.gguf").read_text() == "mine"


def edited(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"model_type": "gpt2"}, "model_type 'gpt2' has no GGUF form here"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_type 'longrope'"),
        ("gemma2", {"query_pre_attn_scalar": 224}, "query_pre_attn_scalar is 224"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu': llama.cpp computes llama with 'silu'"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused_when_configured(tmp_path, family, changes, message):
    folder = folder_of(tmp_path)
    make(folder, family)
    edited(folder, **changes)
    with pytest.raises(PackError, match=message):
        drain(write_gguf(folder, tmp_path / "m.gguf", form="F16"))
    assert list(tmp_path.iterdir()) == [folder]


def test_tensor_without_a_name_is_refused_when_written(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = folder_of(tmp_path)
    make(folder)
    path = folder / "model.safetensors"
    held = load_file(path)
    held["model.layers.0.extra.weight"] = held["model.norm.weight"].clone()
    save_file(held, path)
    with pytest.raises(PackError, match=r"'model.layers.0.extra.weight' has no name in GGUF for llama"):
        drain(write_gguf(folder, tmp_path / "m.gguf", form="F16"))


def test_damaged_weights_are_refused_when_read(tmp_path):
    folder = folder_of(tmp_path)
    make(folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 32)
    with pytest.raises(BaseModelError, match=r"model\.safetensors"):
        drain(write_gguf(folder, tmp_path / "m.gguf", form="F16"))


def test_weight_too_large_for_half_precision_is_refused_when_written(tmp_path):
    import torch

    folder = folder_of(tmp_path)
    model = make(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] = 1e6
    model.save_pretrained(folder)
    with pytest.raises(PackError, match="a weight of 1e\\+06 does not fit F16"):
        drain(write_gguf(folder, tmp_path / "m.gguf", form="F16"))
    drain(write_gguf(folder, tmp_path / "m.gguf", form="BF16"))


def test_part_has_everything_the_engine_needs_when_packed(llama, tmp_path):
    spec = drain(pack(llama[0], tmp_path / "part", form="Q8_0", name="tickets", system="Be brief."))
    names = sorted(path.name for path in (tmp_path / "part").iterdir())
    assert names == ["Modelfile", "chat_template.jinja", "model.gguf", "tokenizer.json"]
    assert spec.engine == "llamacpp"
    assert spec.params["end_ids"] == [2, 0] or spec.params["end_ids"] == [2]
    assert spec.params["ends"][0] == "<|im_end|>" and spec.params["context_tokens"] == 512
    json.dumps(spec.params)


def test_modelfile_stands_beside_the_file_when_packed(llama, tmp_path):
    drain(pack(llama[0], tmp_path / "part", form="Q8_0", system="Be brief."))
    text = (tmp_path / "part" / "Modelfile").read_text("utf-8")
    assert text.startswith("FROM ./model.gguf\n")
    assert "PARAMETER num_ctx 512\n" in text and 'PARAMETER stop "<|im_end|>"\n' in text
    assert 'SYSTEM """Be brief."""\n' in text
