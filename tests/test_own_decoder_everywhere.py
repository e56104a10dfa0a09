"""A decoder with our own tokenizer and template reads the same ids, and writes the same, in every engine.

The model is what `alambic pretrain` makes, small and with random weights: Llama's shape, byte-level BPE with digits
apart, our special tokens, two ends.
"""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("optimum.intel", reason="needs alambic[generate]")

from alambic.engines.bundle_writer import load_writer  # noqa: E402
from alambic.events import Note, drain  # noqa: E402
from alambic.kinds.chat import Chat  # noqa: E402
from alambic.kinds.generation import GenerationRequest, Sampling  # noqa: E402
from alambic.kinds.golden_chats import GOLDEN_CHATS  # noqa: E402
from alambic.model import tokenizer_training as training  # noqa: E402
from alambic.model.decoder import Decoder  # noqa: E402
from alambic.pack.writer_compare import EngineDecoder, compare_greedy  # noqa: E402
from alambic.pack.writer_openvino import pack_openvino  # noqa: E402
from alambic.pack.writer_proof import prove_writer  # noqa: E402
from alambic.train.pretrain_model import new_decoder  # noqa: E402
from alambic.train.pretrain_params import PretrainParams  # noqa: E402
from test_tokenizer_training import CHAT, TEXTS  # noqa: E402

CONTEXT = 512
SPELLED = Chat.of("Écris <|user|> ou <tool_call> 2 024 fois : « déjà »\n\n\tx = 12345 👍🏽")
ENDS = {training.START, training.END}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_model(folder, change):
    """Write a folder as `alambic pretrain` leaves it, after `change(model, tokenizer)`."""
    tokenizer = training.train_tokenizer(TEXTS * 4, vocabulary=700)
    special = {"bos_token_id": training.START, "eos_token_id": training.END, "pad_token_id": training.PAD}
    ids = {name: tokenizer.token_to_id(text) for name, text in special.items()}
    params = PretrainParams(hidden=64, layers=2, heads=4, kv_heads=2, context=CONTEXT, tokens=1)
    made = new_decoder(params, vocabulary=704, special=ids)
    made.generation_config.eos_token_id = sorted(tokenizer.token_to_id(text) for text in ENDS)
    torch.manual_seed(0)
    with torch.no_grad():
        change(made, tokenizer)
        made.get_output_embeddings().weight[700:] = 0  # rows that no token has are never the best
    made.save_pretrained(folder)
    training.save(tokenizer, folder, context_tokens=CONTEXT)
    return folder


def random_weights(model, tokenizer):
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.normal_(0, 0.3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("own") / "model", random_weights)


@pytest.fixture(scope="module")
def openvino(model, tmp_path_factory):
    out, notes = tmp_path_factory.mktemp("openvino") / "part", []
    part = drain(pack_openvino(model, out, precision="fp32"), notes.append)
    assert [note.message for note in notes if isinstance(note, Note)] == []  # both tokenizer graphs ship
    return out, part


@pytest.fixture(scope="module")
def llamacpp(model, tmp_path_factory):
    pytest.importorskip("xllamacpp", reason="needs alambic[gguf]")
    from alambic.pack.gguf import pack

    out, notes = tmp_path_factory.mktemp("llamacpp") / "part", []
    part = drain(pack(model, out, form="F32"), notes.append)
    assert [note.message for note in notes if isinstance(note, Note)] == []  # nothing is left out of the tokenizer
    return out, part


def requests():
    return [GenerationRequest(chat=chat) for chat in (CHAT.prompt, SPELLED, *(c.prompt for c in GOLDEN_CHATS.values()))]


def test_proof_finds_the_same_ids_in_every_form_when_packed_for_both_engines(model, openvino, llamacpp):
    from alambic.pack.gguf import check

    others = {"llama.cpp": lambda texts: check.gguf_token_ids(llamacpp[0] / "model.gguf", texts)}
    chats = {**GOLDEN_CHATS, "own": CHAT, "spelled": SPELLED}
    for folder, part in (openvino, llamacpp):
        report = drain(prove_writer(model, folder, part, chats=chats, others=others))
        expected = ("trained", "tokenizer.json", "transformers", "openvino_tokenizer.xml", "llama.cpp")
        assert report.tokenizers == tuple(name for name in expected if "xml" not in name or folder == openvino[0])
        assert set(report.ends) == ENDS and report.refused == () and report.answers > 20
    assert check.template_differences(
        llamacpp[0] / "model.gguf", training.own_template(), {name: chat.prompt for name, chat in chats.items()}
    ) == []  # fmt: skip


def test_engines_read_what_training_reads_when_asked(model, openvino, llamacpp):
    decoder = Decoder.load(model)
    expected = [decoder.prompt_ids(request.chat) for request in requests()]
    for folder, part in (openvino, llamacpp):
        writer = load_writer(part, folder, threads=1)
        try:
            assert [writer.token_ids(request) for request in requests()] == expected
        finally:
            writer.close()


def test_engines_write_what_transformers_writes_when_greedy(model, openvino, llamacpp):
    from alambic.pack.gguf import check

    decoder = Decoder.load(model, dtype=torch.float32)
    prompts = [decoder.prompt_ids(request.chat)[-60:] for request in requests()[:10]]

    class LlamaCpp:
        def greedy(self, ids, *, max_tokens, ends):
            return check.greedy(server, ids, max_tokens)[0]

    with check.opened(llamacpp[0] / "model.gguf", context=128) as server:
        for packed in (openvino[0], EngineDecoder(openvino[0]), LlamaCpp()):
            agreement = compare_greedy(decoder, packed, prompts)
            assert agreement.equal, agreement.difference
            assert agreement.tokens > 60


@pytest.mark.parametrize("end", sorted(ENDS))
def test_both_engines_stop_at_either_end_when_it_is_written(tmp_path, end):
    pytest.importorskip("xllamacpp", reason="needs alambic[gguf]")
    from alambic.pack.gguf import pack

    def end_after_role(model, tokenizer):
        """Blocks of a new decoder add nothing, so the likeliest token is the one whose vector is most like the last."""
        table = model.get_input_embeddings().weight
        table.normal_(0, 0.3)
        table[tokenizer.token_to_id(end)] = 3 * table[tokenizer.token_to_id("<|assistant|>")]

    model = write_model(tmp_path / "model", end_after_role)
    parts = {
        "openvino": drain(pack_openvino(model, tmp_path / "openvino", precision="int8")),
        "llamacpp": drain(pack(model, tmp_path / "llamacpp", form="Q8_0")),
    }
    for name, part in parts.items():
        writer = load_writer(part, tmp_path / name, threads=1)
        try:
            reply = writer.write([GenerationRequest(chat=CHAT.prompt, sampling=Sampling(max_tokens=8))])[0]
        finally:
            writer.close()
        assert (reply.text, reply.finish_reason) == ("", "stop"), name
