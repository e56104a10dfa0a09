"""Packing models that write: OpenVINO forms, their divergence, ONNX, Hugging Face, adapters."""

import json
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("optimum.intel", reason="needs alambic[generate]")

from alambic.engines.genai import GenAIWriter  # noqa: E402
from alambic.engines.graph import GraphWriter  # noqa: E402
from alambic.errors import BaseModelError, EngineError, InputTooLong, PackError, WorkspaceError  # noqa: E402
from alambic.events import Note, drain  # noqa: E402
from alambic.kinds.chat import Chat  # noqa: E402
from alambic.kinds.generation import GenerationRequest, Sampling  # noqa: E402
from alambic.kinds.golden_chats import GOLDEN_CHATS  # noqa: E402
from alambic.model.clone import clone  # noqa: E402
from alambic.model.seq2seq import load_writer  # noqa: E402
from alambic.pack import writer_openvino  # noqa: E402
from alambic.pack.writer_compare import EngineDecoder, PackedDecoder, compare_greedy, diverge  # noqa: E402
from alambic.pack.writer_openvino import EXACT, pack_openvino  # noqa: E402
from alambic.pack.writer_quantise import FORMS  # noqa: E402

ANSWERED = [chat for chat in GOLDEN_CHATS.values() if chat.completion is not None and not chat.tools][:24]
PAIRS = [chat for chat in ANSWERED if len(chat.messages) == 2][:12]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return clone("llama-3.2-1b", tmp_path_factory.mktemp("model") / "llama", width=64).folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return clone("opus-mt-en-fr", tmp_path_factory.mktemp("pairs") / "marian", width=32).folder


@pytest.fixture(scope="module")
def exact(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("exact") / "writer"
    return out, drain(pack_openvino(model, out, precision="fp32"))


@pytest.fixture(scope="module")
def paired(pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("paired") / "writer"
    return out, drain(pack_openvino(pairs, out, precision="fp32"))


@pytest.fixture
def exported_once(tmp_path_factory, monkeypatch):
    """Forms of `model`, and of `pairs`, differ in what is done to the same graphs, so these are exported once."""
    kept = tmp_path_factory.getbasetemp() / "exported"
    real = writer_openvino.export

    def export(writer, folder, *, half):
        made = kept / f"{writer.architecture}-half-{half}"
        if not made.exists():
            real(writer, made, half=half)
        shutil.copytree(made, folder, dirs_exist_ok=True)

    kept.mkdir(exist_ok=True)
    monkeypatch.setattr(writer_openvino, "export", export)


def prompts_of(writer, number=20):
    return [writer.prompt_ids(chat.prompt)[:80] for chat in list(GOLDEN_CHATS.values())[:number]]


def test_part_has_all_that_an_engine_needs_when_packed(exact):
    folder, part = exact
    assert (part.name, part.engine, part.folder) == ("writer", "openvino-genai", "writer")
    names = {path.name for path in folder.iterdir()}
    assert {"openvino_model.xml", "openvino_model.bin", "tokenizer.json", "chat_template.jinja"} <= names
    assert {"openvino_tokenizer.xml", "openvino_detokenizer.xml", "generation_config.json", "config.json"} <= names
    assert part.params["properties"] == dict(EXACT)
    assert part.params["end_ids"] == [1]
    assert part.params["ends"] == ["</s>"]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [1]
    json.dumps(part.params)


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_properties_are_all_stated_when_packed(precision):
    assert set(writer_openvino.PROPERTIES[precision]) == set(EXACT)


def test_tokens_equal_transformers_when_packed_in_full_precision(model, exact):
    writer = load_writer(model, dtype=torch.float32)
    prompts = prompts_of(writer)
    for packed in (exact[0], EngineDecoder(exact[0])):
        agreement = compare_greedy(writer, packed, prompts)
        assert agreement.equal, agreement.difference
        assert agreement.tokens >= 200


def test_difference_names_the_token_when_weights_are_another_models(tmp_path, exact):
    other = clone("llama-3.2-1b", tmp_path / "other", width=64, seed=7).folder
    agreement = compare_greedy(other, exact[0], prompts_of(load_writer(other), 3))
    assert not agreement.equal
    assert agreement.difference.startswith("prompt 0, token ")
    assert "the model writes" in agreement.difference


def test_tie_ends_a_prompt_when_two_logits_are_equal(model):
    class Other:
        def greedy(self, ids, *, max_tokens, ends):
            return [3] * max_tokens

    agreement = compare_greedy(model, Other(), [[5, 6, 7]], tie=float("inf"))
    assert (agreement.equal, agreement.ties) == (True, 1)


def test_nothing_diverges_when_packed_in_full_precision(model, exact):
    found = diverge(model, exact[0], ANSWERED)
    assert found.mean_kl < 1e-9
    assert found.same_top == 1.0
    assert found.packed_perplexity == pytest.approx(found.perplexity, rel=1e-5)


_SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("precision", "form", "most_kl", "most_share"),
    [
        ("fp16", None, 1e-4, 0.51),
        ("int8", None, 0.01, 0.3),
        ("int4", "int4", 0.5, 0.25),
        pytest.param("int8", "int8-sym", 0.01, 0.3, marks=_SLOW),
        pytest.param("int4", "int4-g32", 0.5, 0.25, marks=_SLOW),
        pytest.param("int4", "int4-g128", 0.5, 0.25, marks=_SLOW),
        pytest.param("int4", "int4-sym-g128", 0.5, 0.25, marks=_SLOW),
        pytest.param("int4", "int4-mixed", 0.5, 0.25, marks=_SLOW),
        pytest.param("int4", "int4-awq", 0.5, 0.25, marks=_SLOW),
        pytest.param("int4", "int4-gptq", 0.5, 0.25, marks=_SLOW),
        pytest.param("int4", "int4-gptq-scale", 0.5, 0.25, marks=_SLOW),
        pytest.param("int4", "int4-mixed-gptq", 0.5, 0.25, marks=_SLOW),
        pytest.param("int4", "int4-mixed-awq", 0.5, 0.25, marks=_SLOW),
    ],
)
@pytest.mark.usefixtures("exported_once")
def test_divergence_and_size_stay_within_bounds_when_packed(
    model, exact, tmp_path, precision, form, most_kl, most_share
):
    calibration = ANSWERED if form is not None and FORMS[form].calibrated else ()
    out = tmp_path / "writer"
    part = drain(pack_openvino(model, out, precision=precision, form=form, calibration=calibration))
    found = diverge(model, out, ANSWERED)
    assert 1e-12 < found.mean_kl < most_kl
    size = (out / "openvino_model.bin").stat().st_size
    assert size < most_share * (exact[0] / "openvino_model.bin").stat().st_size
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]
    if form is not None:
        assert part.params["form"]["name"] == form
        assert (part.params["form"]["calibration_rows"] > 0) == FORMS[form].calibrated


def test_every_form_is_tried_when_forms_are_tested():
    marks = test_divergence_and_size_stay_within_bounds_when_packed.pytestmark
    tried = {getattr(row, "values", row)[1] for mark in marks if mark.name == "parametrize" for row in mark.args[1]}
    assert tried >= set(FORMS) - {"int8"}


@pytest.mark.slow
@pytest.mark.usefixtures("exported_once")
def test_calibrated_form_is_taken_when_conversations_are_given(model, tmp_path):
    part = drain(pack_openvino(model, tmp_path / "writer", precision="int4", calibration=ANSWERED[:8]))
    assert part.params["form"]["name"] == "int4-mixed-gptq"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int2"}, "precision 'int2' is not known"),
        ({"precision": "int4", "form": "int4-gpt"}, "unknown form 'int4-gpt'"),
        ({"precision": "int8", "form": "int4-g32"}, "has int4 weights, not int8"),
        ({"precision": "int4", "form": "int4-awq"}, "calibrated and got no conversation"),
        ({"precision": "fp16", "form": "int4"}, "one of quantised weights"),
    ],
)
def test_pack_refuses_when_options_are_wrong(model, tmp_path, options, message):
    with pytest.raises(PackError, match=message):
        drain(pack_openvino(model, tmp_path / "writer", **options))
    assert list(tmp_path.iterdir()) == []


def test_pack_refuses_when_the_disk_is_too_full(model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(WorkspaceError, match="MB are free"):
        drain(pack_openvino(model, tmp_path / "writer", precision="int8"))


@pytest.mark.usefixtures("exported_once")
def test_nothing_is_left_when_export_fails(model, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise PackError("broken")

    monkeypatch.setattr(writer_openvino, "quantise", fail)
    with pytest.raises(PackError, match="broken"):
        drain(pack_openvino(model, tmp_path / "writer", precision="int8"))
    assert list(tmp_path.iterdir()) == []


def test_sixteen_bit_weights_are_packed_when_memory_is_short(model, tmp_path, monkeypatch):
    stored = tmp_path / "stored"
    load_writer(model).save(stored, dtype=torch.bfloat16)
    monkeypatch.setattr(writer_openvino, "_loaded_dtype", lambda parameters: None)
    drain(pack_openvino(stored, tmp_path / "writer", precision="fp16"))
    agreement = compare_greedy(stored, tmp_path / "writer", prompts_of(load_writer(stored), 8), tie=0.02)
    assert agreement.equal, agreement.difference


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    folder = clone("gemma-2-2b", tmp_path_factory.mktemp("gemma") / "model", width=32).folder
    out = folder.with_name("writer")
    return folder, out, drain(pack_openvino(folder, out, precision="fp32"))


def test_tokens_equal_transformers_when_attention_caps_its_scores(gemma):
    folder, out, part = gemma
    writer = load_writer(folder, dtype=torch.float32)
    agreement = compare_greedy(writer, out, prompts_of(writer, 10))
    assert agreement.equal, agreement.difference
    assert part.engine == "openvino-graph"


def test_tokens_equal_transformers_when_the_exporter_does_not_know_the_kind(tmp_path):
    folder = clone("ministral-3-3b", tmp_path / "model", width=32).folder
    part = drain(pack_openvino(folder, tmp_path / "writer", precision="fp32"))
    writer = load_writer(folder, dtype=torch.float32)
    agreement = compare_greedy(writer, EngineDecoder(tmp_path / "writer"), prompts_of(writer, 10))
    assert agreement.equal, agreement.difference
    assert part.engine == "openvino-genai"


@pytest.mark.slow
@pytest.mark.parametrize("original", ["ministral-8b", "starcoder2-3b", "gemma-2-2b"])
def test_tokens_equal_transformers_when_the_prompt_is_longer_than_the_window(tmp_path, original):
    folder = clone(original, tmp_path / "model", width=32).folder
    config = json.loads((folder / "config.json").read_text("utf-8"))
    prompts = [[(7 * i + j * j) % 300 + 5 for j in range(40)] for i in range(4)]
    whole = load_writer(folder, dtype=torch.float32).logits(prompts[0])
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": 8}), encoding="utf-8")
    writer = load_writer(folder, dtype=torch.float32)
    assert not torch.allclose(writer.logits(prompts[0])[-1], whole[-1], atol=1e-3)
    part = drain(pack_openvino(folder, tmp_path / "writer", precision="fp32"))
    forms = [tmp_path / "writer", *([EngineDecoder(tmp_path / "writer")] if part.engine == "openvino-genai" else [])]
    for packed in forms:
        agreement = compare_greedy(writer, packed, prompts)
        assert agreement.equal, agreement.difference


def test_detokenizer_ships_without_tokenizer_when_the_graph_reads_otherwise(tmp_path, shared_data):
    folder = clone("deepseek-coder-1.3b", tmp_path / "model", width=32, tokenizers=shared_data / "tokenizers").folder
    notes = []
    part = drain(pack_openvino(folder, tmp_path / "writer", precision="fp32"), notes.append)
    said = " ".join(event.message for event in notes if isinstance(event, Note))
    assert "openvino_tokenizer.xml: left out: token " in said
    assert not (tmp_path / "writer" / "openvino_tokenizer.xml").exists()
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    with GenAIWriter(tmp_path / "writer", part.params, threads=1) as engine:
        request = GenerationRequest(chat=Chat.of("x"), sampling=Sampling(json_schema=schema))
        assert set(json.loads(engine.write([request])[0].text)) == {"a"}


def test_encoder_decoder_equals_transformers_when_packed(pairs, paired):
    writer = load_writer(pairs, dtype=torch.float32)
    agreement = compare_greedy(writer, paired[0], [writer.source_ids(writer.source_text(chat)) for chat in PAIRS])
    assert agreement.equal, agreement.difference
    assert diverge(writer, paired[0], PAIRS).mean_kl < 1e-9
    assert (paired[1].engine, paired[1].params["shape"]) == ("openvino-graph", "encoder-decoder")


@pytest.mark.parametrize("name", ["barthez", "pegasus-xsum"])
def test_norms_before_each_part_equal_transformers_when_packed(tmp_path, name):
    writer = load_writer(clone(name, tmp_path / "base", width=32).folder, dtype=torch.float32)
    drain(pack_openvino(tmp_path / "base", tmp_path / "writer", precision="fp32"))
    prompts = [writer.source_ids(writer.source_text(chat)) for chat in PAIRS]
    agreement = compare_greedy(writer, tmp_path / "writer", prompts)
    assert agreement.equal, agreement.difference


@pytest.mark.parametrize("precision", ["int8", pytest.param("int4", marks=_SLOW)])
@pytest.mark.usefixtures("exported_once")
def test_encoder_decoder_stays_near_when_quantised(pairs, tmp_path, precision):
    part = drain(pack_openvino(pairs, tmp_path / "writer", precision=precision, calibration=PAIRS))
    assert 0 < diverge(pairs, tmp_path / "writer", PAIRS).mean_kl < 0.5
    assert part.params["form"]["calibration_rows"] == 0


def test_engine_writes_what_transformers_writes_when_an_encoder_decoder(pairs, paired):
    writer = load_writer(pairs, dtype=torch.float32)
    with GraphWriter(*paired[:1], paired[1].params, threads=1) as engine:
        requests = [GenerationRequest(chat=chat.prompt, sampling=Sampling(max_tokens=10)) for chat in PAIRS]
        for request, reply in zip(requests, engine.write(requests), strict=True):
            expected = writer.greedy(engine.token_ids(request), max_tokens=10)
            assert reply.text == writer.decode(expected)
            assert reply.usage.completion_tokens == len(expected)


def test_scores_are_those_of_the_tokens_written_when_a_graph_scores(gemma):
    _, out, part = gemma
    with GraphWriter(out, part.params, threads=1) as engine:
        request = GenerationRequest(chat=Chat.of("x"))
        ids = [*engine.token_ids(request), *engine._tokenizer.encode("an ox", add_special_tokens=False).ids]
        logits = torch.tensor(PackedDecoder(out).logits(ids)).log_softmax(-1)
        given = len(engine.token_ids(request))
        expected = [float(logits[i - 1, ids[i]]) for i in range(given, len(ids))]
        assert engine.score([request], ["an ox"])[0] == pytest.approx(expected, abs=1e-4)
        assert engine.score([request], [""]) == [[]]


def test_sampling_repeats_itself_when_the_seed_is_the_same(paired):
    with GraphWriter(paired[0], paired[1].params, threads=1) as engine:

        def texts(seed):
            sampling = Sampling(max_tokens=12, temperature=1.5, top_p=0.95, top_k=40, seed=seed, frequency_penalty=0.5)
            return [reply.text for reply in engine.write([GenerationRequest(chat=PAIRS[0].prompt, sampling=sampling)])]

        assert texts(1) == texts(1)
        assert len({texts(seed)[0] for seed in range(5)}) > 1


@pytest.mark.parametrize(
    ("chat", "sampling", "error", "message"),
    [
        (GOLDEN_CHATS["turns"], Sampling(), EngineError, "reads one user message, got user, assistant, user"),
        (GOLDEN_CHATS["tools-offered"], Sampling(), EngineError, "and tools"),
        (Chat.of("a " * 600), Sampling(), InputTooLong, "the model reads 512 of each"),
        (Chat.of("a"), Sampling(max_tokens=513), InputTooLong, "513 are to be written"),
        (Chat.of("a"), Sampling(json_schema={"type": "object"}), EngineError, "has no grammar"),
        (Chat.of("a"), Sampling(top_p=0.0), EngineError, "top_p is 0.0"),
    ],
)
def test_graph_refuses_when_asked_for_what_it_cannot_do(paired, chat, sampling, error, message):
    with GraphWriter(paired[0], paired[1].params, threads=1) as engine, pytest.raises(error, match=message):
        engine.write([GenerationRequest(chat=chat, sampling=sampling)])


def test_stream_ends_early_when_its_reader_leaves(paired):
    with GraphWriter(paired[0], paired[1].params, threads=1) as engine:
        stream = engine.stream(GenerationRequest(chat=Chat.of("a"), sampling=Sampling(max_tokens=500)))
        next(stream)
        stream.close()
        chunks = list(engine.stream(GenerationRequest(chat=Chat.of("a"), sampling=Sampling(max_tokens=3))))
        assert (chunks[-1].finish_reason, chunks[-1].usage.completion_tokens) == ("length", 3)


def test_marian_pair_is_refused_when_no_engine_reads_its_tokenizer(pairs, tmp_path, monkeypatch):
    load = writer_openvino.load_writer

    def with_pair(folder, dtype=None):
        writer = load(folder, dtype=dtype)
        writer.tokenizer = object()
        return writer

    monkeypatch.setattr(writer_openvino, "load_writer", with_pair)
    with pytest.raises(PackError, match="pair of SentencePiece files"):
        drain(pack_openvino(pairs, tmp_path / "writer", precision="fp32"))


def test_unknown_base_is_refused_when_packed(tmp_path):
    with pytest.raises(BaseModelError):
        drain(pack_openvino(tmp_path, tmp_path / "writer", precision="fp16"))
