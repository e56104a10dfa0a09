"""The tokenizer of our own models: loses nothing, and gives the same ids in every engine."""

import json

import pytest
import transformers
from tokenizers import Tokenizer

from alambic import _extras, render
from alambic.errors import BaseModelError
from alambic.events import drain
from alambic.kinds.chat import Chat, Message, ToolCall
from alambic.kinds.golden import GOLDEN_TEXTS
from alambic.model import tokenizer_training as training
from alambic.pack import writer_tokenizer
from alambic.pack.gguf import check, write_gguf

HARD = (
    "L’été à Nîmes : « déjà » 20\u202f000\u00a0€ !", "e\u0301 n'est pas é", "👩‍👩‍👧 🇫🇷 👍🏽",
    "\u200bzéro\u200d", "a\r\nb\r\n\r\n\tc",
    "def f(x):\n    if x:\n        return [i ** 2 for i in x]\n\n\n", "1234567890 3,14",
    "  deux  espaces  ", "日本語 العربية",
    "\x00\x01", "", "Œuvre naïve, cœur ; l'aujourd'hui d'autrefois", "ﬁ ﬂ ½ ²", "\ufeff",
)  # fmt: skip
TEXTS = [
    *GOLDEN_TEXTS, *HARD,
    "Le technicien vérifie la chaudière, puis il coupe l'eau et démonte la vanne de l'appareil.",
    "The engineer checks the boiler, then closes the water and takes the valve of the device apart.",
    "for i in range(10):\n        print(i)\n",
]  # fmt: skip
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells it.", "parameters": {"type": "object"}},
}
CALL = ToolCall("weather", {"city": "Brest"})
CHAT = Chat((
    Message("system", "Réponds en français."), Message("user", "Quel temps à Brest ?"),
    Message("assistant", "", (CALL,)), Message("tool", "pluie"), Message("assistant", "Il pleut."),
), (TOOL,))  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer")
    training.save(training.train_tokenizer(TEXTS * 4, vocabulary=700), out, context_tokens=128)
    return out


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_texts_come_back_exactly_when_decoded(tokenizer):
    assert training.first_loss(tokenizer, [*HARD, *GOLDEN_TEXTS]) is None


def test_loss_is_found_when_a_tokenizer_normalises():
    from tokenizers import normalizers

    lossy = training.train_tokenizer(TEXTS, vocabulary=600)
    lossy.normalizer = normalizers.NFC()
    at, text, back = training.first_loss(lossy, ["plain", "xe\u0301"])
    assert (at, text, back) == (1, "e\u0301", "é")


def test_special_tokens_are_one_id_and_text_that_spells_them_is_not_when_plain(tokenizer):
    for token in training.SPECIAL:
        assert training.encode_plain(tokenizer, [token], special=True) == [[tokenizer.token_to_id(token)]]
        spelled = training.encode_plain(tokenizer, [token], special=False)[0]
        assert len(spelled) > 1 and tokenizer.decode(spelled) == token
    assert tokenizer.encode_special_tokens is False  # as it was
    assert all(len(tokenizer.encode(mark).ids) == 1 for mark in training.MARKS)
    assert len([token for token in training.SPECIAL if "spare" in token]) == training.SPARE == 64


def test_digits_are_alone_and_runs_of_spaces_together_when_cut(tokenizer):
    tokens = tokenizer.encode("x = 2024\n        y").tokens
    assert [t for t in tokens if t.strip("Ġ").isdigit()] == ["2", "0", "2", "4"]
    assert "Ġ" * 7 in tokens


def test_vocabulary_is_as_asked_and_the_same_again_when_trained(tokenizer, folder):
    assert tokenizer.get_vocab_size() == 700
    assert training.train_tokenizer(TEXTS * 4, vocabulary=700).to_str() == tokenizer.to_str()
    with pytest.raises(BaseModelError, match="at least"):
        training.train_tokenizer(TEXTS, vocabulary=300)


def test_template_writes_roles_tools_and_ends_when_rendered(folder):
    template = render.read_template(folder)
    text = template.render(CHAT)
    assert text.endswith(
        '<|system|>Réponds en français.<|user|>Quel temps à Brest ?<|assistant|><tool_call>{"name": "weather", '
        '"arguments": {"city": "Brest"}}</tool_call><|end|><|tool|>pluie<|assistant|>Il pleut.<|end|>'
    )
    assert text == training.own_template().render(CHAT) and text.startswith('<|tools|>{"type"')
    assert [text[start:stop] for start, stop in training.own_template().spans(CHAT)][-1] == "Il pleut.<|end|>"


def test_transformers_gives_the_same_ids_when_it_opens_the_folder(folder, tokenizer):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.is_fast and (theirs.eos_token, theirs.pad_token) == (training.END, training.PAD)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
    data = CHAT.to_dict()
    rendered = theirs.apply_chat_template(data["messages"], tools=data["tools"], tokenize=False)
    assert rendered == training.own_template().render(CHAT)


def test_openvino_gives_the_same_ids_when_converted(folder, tokenizer, tmp_path):
    _extras.load("openvino_tokenizers")
    texts = [text for text in TEXTS if text and "\x00" not in text] + [training.own_template().render(CHAT)]
    faults = writer_tokenizer.write_graphs(tokenizer, tmp_path, texts, template=render.read_template(folder))
    assert faults == {}
    assert writer_tokenizer.read_graph(tmp_path / "openvino_tokenizer.xml")(texts) == [
        tokenizer.encode(text).ids for text in texts
    ]


def test_llama_cpp_gives_the_same_ids_and_prompts_when_converted(folder, tokenizer, tmp_path):
    pytest.importorskip("xllamacpp")
    model = tmp_path / "model"
    config = transformers.LlamaConfig(
        vocab_size=704, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(training.START), eos_token_id=tokenizer.token_to_id(training.END),
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    training.save(tokenizer, model, context_tokens=128)
    file = drain(write_gguf(model, tmp_path / "m.gguf", form="F16"))
    assert file.tokenizer == ("gpt2", "qwen2") and file.limits == ()
    rendered = training.own_template().render(CHAT)
    assert [str(d) for d in check.differences(file.path, tokenizer, [*TEXTS, rendered])] == []
    assert check.template_differences(file.path, training.own_template(), {"chat": CHAT.prompt}) == []


def test_configuration_names_no_beginning_to_be_added_when_written(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert (config["add_bos_token"], config["model_max_length"]) == (False, 128)
