"""Models that write: every family opens, saves, keeps its ids, and refuses what it cannot safely read."""

import json
import shutil

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from alambic.errors import BaseModelError, TemplateError
from alambic.kinds.chat import Chat, Message
from alambic.model.clone import ORIGINALS, clone
from alambic.model.clone_tokenizers import make_tokenizer
from alambic.model.decoder import Decoder
from alambic.model.seq2seq import FAMILIES, Seq2Seq, load_writer
from alambic.model.tokenizer import from_sentencepiece, read_tokenizer

CHAT = Chat.of("Hé, où est le 🙂 chien ?", completion="Là-bas, à 12 km.", system="Tu réponds.")
TWO = Chat((*CHAT.messages, Message("user", "Et après ?"), Message("assistant", "Rien.")))
DECODERS = [name for name, original in ORIGINALS.items() if original.config["model_type"] not in FAMILIES]
SEQ2SEQ = [name for name in ORIGINALS if name not in DECODERS]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clones(tmp_path_factory):
    """Return the folder of a clone, made at its first use."""
    root = tmp_path_factory.mktemp("clones")

    def folder(name):
        if not (root / name).exists():
            clone(name, root / name, width=32)
        return root / name

    return folder


@pytest.fixture
def llama(clones, tmp_path):
    return shutil.copytree(clones("llama-3.2-1b"), tmp_path / "llama")


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_is_the_same_when_saved_and_opened_again(clones, tmp_path, name):
    first = Decoder.load(clones(name))
    first.save(tmp_path / "saved")
    again = Decoder.load(tmp_path / "saved")
    ids, learnt = first.labelled(TWO)
    assert again.labelled(TWO) == (ids, learnt)
    assert (again.ends, again.context_tokens, again.turn_end()) == (first.ends, first.context_tokens, first.turn_end())
    assert torch.equal(again.logits(ids), first.logits(ids))


@pytest.mark.parametrize("name", DECODERS)
def test_saved_decoder_gives_transformers_the_same_prompt_and_tokens(clones, tmp_path, name):
    decoder = Decoder.load(clones(name))
    decoder.save(tmp_path / "saved")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    messages = [message.to_dict() for message in CHAT.prompt.messages]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert prompt == decoder.prompt_ids(CHAT.prompt)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager").eval()
    written = model.generate(torch.tensor([prompt]), max_new_tokens=8)[0, len(prompt) :].tolist()
    assert written == decoder.greedy(prompt, max_tokens=8)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_seq2seq_is_the_same_when_saved_and_opened_again(clones, tmp_path, name):
    first = Seq2Seq.load(clones(name))
    first.save(tmp_path / "saved")
    again = load_writer(tmp_path / "saved")
    assert isinstance(again, Seq2Seq)
    chat = Chat.of("A small dog.", completion="Un chien.")
    assert again.labelled(chat) == first.labelled(chat)
    source = first.source_ids("A small dog.")
    assert again.greedy(source, max_tokens=6) == first.greedy(source, max_tokens=6)


def test_all_turns_of_the_assistant_are_learnt_with_their_ends_when_labelled(clones):
    decoder = Decoder.load(clones("llama-3.2-1b"))
    ids, learnt = decoder.labelled(TWO)
    said = decoder.decode([i for i, learns in zip(ids, learnt, strict=True) if learns], skip_special=False)
    assert said == "Là-bas, à 12 km.</s>Rien.</s>"


@pytest.mark.parametrize("name", DECODERS)
def test_first_token_is_never_doubled_when_a_chat_is_tokenized(clones, name):
    decoder = Decoder.load(clones(name))
    first = decoder.tokenizer.token_to_id(decoder.template.special["bos_token"])
    assert decoder.labelled(CHAT)[0].count(first) - (first in decoder.ends) <= 1


def test_mistral3_gives_its_text_part_when_opened(clones, tmp_path):
    text = transformers.AutoModelForCausalLM.from_pretrained(clones("ministral-3-3b"))
    vision = transformers.PixtralVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16, image_size=28
    )
    config = transformers.Mistral3Config(text_config=text.config, vision_config=vision, image_token_index=3)
    whole = transformers.AutoModelForImageTextToText.from_config(config)
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.tie_weights()
    whole.save_pretrained(tmp_path / "whole")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(clones("ministral-3-3b") / name, tmp_path / "whole" / name)
    decoder = Decoder.load(tmp_path / "whole")
    ids = decoder.prompt_ids(CHAT.prompt)
    assert decoder.architecture == "ministral3"
    assert torch.equal(decoder.logits(ids), Decoder.load(clones("ministral-3-3b")).logits(ids))


def test_end_tokens_are_all_those_stated_when_files_name_several(llama):
    template = "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<pad>{% else %}{{ m.content }}:" \
               "{% endif %}{% endfor %}"  # fmt: skip
    (llama / "chat_template.jinja").write_text(template)
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 0]}))
    decoder = Decoder.load(llama)
    assert set(decoder.ends) == {0, 1, 2}
    assert decoder.turn_end() == 2


def test_baked_in_limits_of_a_tokenizer_are_cleared_when_read(llama):
    tokenizer = Tokenizer.from_file(str(llama / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=5, pad_id=2, pad_token="<pad>")
    tokenizer.save(str(llama / "tokenizer.json"))
    ids, _ = Decoder.load(llama).tokenize("one two three four five six")
    assert len(ids) > 5


def test_missing_shards_are_named_when_the_index_lists_them(llama):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    (llama / "model.safetensors").unlink()
    model.save_pretrained(llama, max_shard_size="100KB")
    gone = sorted(llama.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(BaseModelError, match=f"weight files are missing: {gone.name}"):
        Decoder.load(llama)


def test_pickled_weights_are_refused_with_the_way_out_when_opened(llama):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match="opening a pickle can run any code") as caught:
        Decoder.load(llama)
    assert "save_pretrained" in caught.value.hint


def test_unknown_kind_is_refused_with_the_known_ones_when_opened(llama):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(BaseModelError, match="'mamba'") as caught:
        load_writer(llama)
    assert "starcoder2" in caught.value.hint and "marian" in caught.value.hint


def test_weights_of_another_model_are_refused_when_opened(llama):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(BaseModelError, match=r"weights are missing, the first is 'model\.layers\.2"):
        Decoder.load(llama)


def test_tokenizer_that_is_only_code_is_refused_when_read(llama):
    (llama / "tokenizer.json").unlink()
    config = {"auto_map": {"AutoTokenizer": ["tokenization_xgen.XgenTokenizer", None]}}
    (llama / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="other than as code that comes with the base, which is never run"):
        Decoder.load(llama)


def test_tokenizer_larger_than_the_model_is_refused_when_opened(llama):
    tokenizer = Tokenizer.from_file(str(llama / "tokenizer.json"))
    tokenizer.add_tokens([f"<new{i}>" for i in range(100)])
    tokenizer.save(str(llama / "tokenizer.json"))
    with pytest.raises(BaseModelError, match="tokenizer and weights are of two different models"):
        Decoder.load(llama)


def test_template_with_a_syntax_error_is_refused_when_opened(llama):
    (llama / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}")
    with pytest.raises(TemplateError, match="chat template, line 1"):
        Decoder.load(llama)


def test_original_is_suggested_when_a_clone_is_misnamed(tmp_path):
    with pytest.raises(BaseModelError, match=r"no original is called 'qwen-2\.5-0\.5b'") as caught:
        clone("qwen-2.5-0.5b", tmp_path / "none")
    assert "did you mean 'qwen2.5-0.5b'" in caught.value.hint


@pytest.mark.parametrize(("folder", "vectors"), [
    ("deepseek-coder", "deepseek-coder"), ("starcoder2", "starcoder"), ("gpt2", "gpt-2"), ("qwen2.5", "qwen2"),
])  # fmt: skip
def test_real_tokenizer_gives_the_ids_of_llama_cpp_when_read(shared_data, folder, vectors):
    root = shared_data / "tokenizers"
    tokenizer = make_tokenizer(folder, "byte-bpe", root).tokenizer
    known = root / "llama.cpp_test_vectors" / f"ggml-vocab-{vectors}.gguf"
    texts = known.with_suffix(".gguf.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    expected = [[int(i) for i in line.split()] for line in known.with_suffix(".gguf.out").read_text().splitlines()]
    assert len(expected) > 40
    found = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts[: len(expected)]]
    assert found == expected


@pytest.mark.parametrize("name", ["mistral_v1", "mistral_v3", "mistral_v7"])
def test_sentencepiece_model_keeps_its_ids_when_converted(shared_data, tmp_path, name):
    import lzma

    import sentencepiece

    path = tmp_path / "tokenizer.model"
    path.write_bytes(lzma.decompress((shared_data / "tokenizers" / name / "tokenizer.model.xz").read_bytes()))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = from_sentencepiece(path)
    texts = ["Hello, world!", "  two  spaces ", "L'été à Noël, 12,5 % €", "日本語 🙂", "def f(x):\n\treturn x\n", "a"]
    assert [tokenizer.encode(t, add_special_tokens=False).ids for t in texts] == reference.encode(texts)
    assert [tokenizer.encode(t).ids[0] for t in texts] == [reference.bos_id()] * len(texts)
    # Its own space goes before each piece of text between special tokens, as in llama.cpp and Mistral's library.
    joined = tokenizer.encode("<s>one</s>two", add_special_tokens=False).ids
    assert joined == [1, *reference.encode("one"), 2, *reference.encode("two")]


@pytest.mark.parametrize("kind", ["spm-bpe", "unigram"])
def test_trained_sentencepiece_keeps_its_ids_when_converted(tmp_path, kind):
    import sentencepiece

    made = make_tokenizer(None, kind, None)
    (tmp_path / "tokenizer.model").write_bytes(made.spm)
    reference = sentencepiece.SentencePieceProcessor(model_proto=made.spm)
    texts = ["The quick brown fox", "  un  renard  brun ", "def add(a: int)", "l'été, 12,5 %"]
    found = [read_tokenizer(tmp_path).encode(text, add_special_tokens=False).ids for text in texts]
    assert found == reference.encode(texts)
