"""Models from nothing: of the size asked for, opened by every tool, with a tokenizer that loses nothing."""

import pytest
import torch
import transformers

from alambic.errors import BaseModelError
from alambic.events import drain
from alambic.kinds.chat import Chat, Message, ToolCall
from alambic.model.decoder import Decoder
from alambic.model.scratch import MARKS, SPECIAL, make_scratch
from alambic.model.seq2seq import load_writer
from alambic.train.sft import SftParams, finetune_chats
from writing_task import swaps

CHATS = swaps() * 20
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def decoder_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("scratch") / "model"
    make_scratch(CHATS, out, parameters=1_000_000)
    return out


@pytest.mark.parametrize(("shape", "wanted"), [("decoder", 700_000), ("decoder", 4_000_000),
                                               ("encoder-decoder", 1_500_000)])  # fmt: skip
def test_model_has_the_size_asked_for_when_made(tmp_path, shape, wanted):
    made = make_scratch(CHATS, tmp_path / "m", parameters=wanted, shape=shape)
    assert made["parameters"] == pytest.approx(wanted, rel=0.25)
    writer = load_writer(tmp_path / "m")
    assert writer.spec.parameters == made["parameters"]
    assert writer.spec.base["source"] == "scratch"


def test_size_follows_the_text_when_none_is_asked_for(tmp_path):
    made = make_scratch(CHATS, tmp_path / "m")
    assert 700_000 < made["parameters"] < 1_400_000
    assert made["context_tokens"] == 512


def test_any_text_comes_back_when_read_and_written(decoder_folder):
    decoder = Decoder.load(decoder_folder)
    text = "  Où ça ?\n\tdef f(x): return '🙂' # 12,5 %\r\n日本語\x00"
    assert decoder.decode(decoder.tokenize(text)[0]) == text
    assert all(len(decoder.tokenize(token)[0]) == 1 for token in (*SPECIAL, *MARKS))


def test_template_spends_one_token_a_turn_and_shows_calls_when_rendered(decoder_folder):
    decoder = Decoder.load(decoder_folder)
    call = ToolCall("weather", {"city": "Brest"})
    chat = Chat((
        Message("system", "S"), Message("user", "U"), Message("assistant", "", (call,)), Message("tool", "rain"),
        Message("assistant", "It rains."),
    ), (TOOL,))  # fmt: skip
    text = decoder.template.render(chat)
    assert text.endswith(
        '<|system|>S<|user|>U<|assistant|><tool_call>{"name": "weather", "arguments": {"city": "Brest"}}</tool_call>'
        "<|end|><|tool|>rain<|assistant|>It rains.<|end|>"
    )
    assert text.startswith('<|tools|>{"type": "function", "function": {"name": "weather"')
    ids, learnt = decoder.labelled(chat)
    said = decoder.decode([i for i, learns in zip(ids, learnt, strict=True) if learns])
    assert said == '<tool_call>{"name": "weather", "arguments": {"city": "Brest"}}</tool_call>It rains.'
    assert decoder.tokenizer.id_to_token(decoder.turn_end()) == "<|end|>"


def test_transformers_opens_it_when_made(decoder_folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(decoder_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(decoder_folder)
    decoder = Decoder.load(decoder_folder)
    messages = [message.to_dict() for message in CHATS[0].prompt.messages]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == decoder.prompt_ids(CHATS[0].prompt)
    assert model.config.model_type == "llama" and model.config.tie_word_embeddings
    assert all(size % 32 == 0 for size in (model.config.hidden_size, model.config.intermediate_size))


def test_files_are_the_same_when_made_again(decoder_folder, tmp_path):
    make_scratch(CHATS, tmp_path / "m", parameters=1_000_000)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "m" / name).read_bytes() == (decoder_folder / name).read_bytes()


def test_impossible_sizes_and_shapes_are_refused_when_asked_for(tmp_path):
    with pytest.raises(BaseModelError, match="the smallest model for this vocabulary has"):
        make_scratch(CHATS, tmp_path / "m", parameters=10_000)
    with pytest.raises(BaseModelError, match="allowed: decoder, encoder-decoder"):
        make_scratch(CHATS, tmp_path / "m", shape="rnn")


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["decoder", "encoder-decoder"])
def test_model_solves_its_task_when_trained_from_nothing(tmp_path, shape):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = swaps()
    asked_for = rows[::5]  # trained on: what is shown is that all parts work together, not that it generalises
    make_scratch(rows * 4, tmp_path / "base", parameters=700_000 if shape == "decoder" else 1_200_000, shape=shape)
    params = SftParams(epochs=60, batch_size=16, threads=1, dropout=0.0, learning_rate=2e-3, patience=0)
    result = drain(finetune_chats(tmp_path / "base", rows, asked_for, params=params, out=tmp_path / "m"))
    assert result.method == "full" and result.best_dev < 0.2
    writer = load_writer(tmp_path / "m")
    torch.set_num_threads(before)
    answers = []
    for chat in asked_for:
        asked = writer.prompt_ids(chat.prompt) if shape == "decoder" else writer.source_ids(writer.source_text(chat))
        answers.append(writer.decode(writer.greedy(asked, max_tokens=16)).strip() == chat.completion.content)
    assert all(answers)
