"""What leaves for other programs: Hugging Face folders, ONNX, LoRA adapters beside a shared base."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft", reason="needs alambic[generate]")

import numpy as np  # noqa: E402

from alambic import _extras  # noqa: E402
from alambic.errors import BaseModelError, PackError  # noqa: E402
from alambic.events import drain  # noqa: E402
from alambic.kinds.golden_chats import GOLDEN_CHATS  # noqa: E402
from alambic.model.adapter import merge_adapter, model_digest, save_adapter  # noqa: E402
from alambic.model.clone import clone  # noqa: E402
from alambic.model.seq2seq import load_writer  # noqa: E402
from alambic.pack import writer_onnx  # noqa: E402
from alambic.pack.writer_hf import ADAPTER, export_hf, write_adapter  # noqa: E402
from alambic.pack.writer_onnx import export_onnx  # noqa: E402
from alambic.pack.writer_openvino import EXACT, pack_openvino  # noqa: E402
from alambic.train.lora import add_lora  # noqa: E402

PROMPT = list(range(10, 40))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return clone("llama-3.2-1b", tmp_path_factory.mktemp("model") / "llama", width=64).folder


def adapted(base: Path, out: Path, *, method="lora", name="base", digest=None) -> Path:
    """Return an adapter with random matrices, as training would leave it."""
    writer = load_writer(base, dtype=torch.float32)
    wrapped = add_lora(writer.model, method=method, rank=4, alpha=16.0, head=writer.head)
    generator = torch.Generator().manual_seed(1)
    for key, value in wrapped.named_parameters():
        if "lora_B" in key:
            value.data.normal_(0, 0.3, generator=generator)
    return save_adapter(wrapped, out, base={"name": name, "digest": digest or model_digest(base)}, method=method).folder


def written(folder: Path, adapter: Path | None = None) -> list[int]:
    """Return the greedy answer of OpenVINO GenAI."""
    genai = _extras.load("openvino_genai")
    scheduler = genai.SchedulerConfig()
    scheduler.num_kv_blocks = 64
    properties, config = dict(EXACT), genai.GenerationConfig()
    config.max_new_tokens = 12
    if adapter is not None:
        put = genai.AdapterConfig(genai.Adapter(str(adapter)), 1.0)
        properties["adapters"] = config.adapters = put
    pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
    prompt = _extras.load("openvino").Tensor(np.array([PROMPT], dtype=np.int64))
    return list(pipeline.generate([prompt], [config])[0].m_generation_ids[0])


def test_folder_opens_in_transformers_when_exported(model, tmp_path):
    out = export_hf(model, tmp_path / "hf", precision="fp16")
    ours = load_writer(model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs.dtype == torch.float16
    assert theirs.generation_config.eos_token_id == list(ours.ends)
    for name in ("plain", "system", "turns", "emoji", "code"):
        chat = GOLDEN_CHATS[name].prompt
        ids = tokenizer.apply_chat_template(chat.to_dict()["messages"], add_generation_prompt=True)["input_ids"]
        assert ids == ours.prompt_ids(chat)
    config = json.loads((out / "tokenizer_config.json").read_text("utf-8"))
    assert config["chat_template"] == (out / "chat_template.jinja").read_text("utf-8")
    assert "AutoModelForCausalLM" in (out / "README.md").read_text("utf-8")
    with pytest.raises(PackError, match="exists already"):
        export_hf(model, out)
    with pytest.raises(PackError, match="precision 'int8' is not known"):
        export_hf(model, tmp_path / "other", precision="int8")


def test_encoder_decoder_opens_in_transformers_when_exported(tmp_path):
    folder = clone("t5-small", tmp_path / "model", width=32).folder
    out = export_hf(folder, tmp_path / "hf")
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(out)
    ours = load_writer(folder)
    ids = ours.source_ids("A dog runs.")
    answer = theirs.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False, num_beams=1)[0].tolist()[1:]
    assert answer == ours.greedy(ids, max_tokens=5)


def test_adapter_beside_its_base_writes_what_the_merged_model_writes_when_packed(model, tmp_path):
    adapter = adapted(model, tmp_path / "adapter")
    merged = merge_adapter(adapter, model, tmp_path / "merged")
    part = write_adapter(adapter, model, tmp_path / "part")
    drain(pack_openvino(model, tmp_path / "base", precision="fp32"))
    drain(pack_openvino(merged, tmp_path / "whole", precision="fp32"))
    expected = load_writer(merged, dtype=torch.float32).greedy(PROMPT, max_tokens=12)
    assert written(tmp_path / "whole") == expected
    assert written(tmp_path / "base", tmp_path / "part" / ADAPTER) == expected
    assert written(tmp_path / "base") != expected
    assert (part.params["rank"], part.params["base"]["digest"]) == (4, model_digest(model))


def test_adapter_is_refused_when_it_is_of_another_base(model, tmp_path):
    adapter = adapted(model, tmp_path / "adapter", digest="0" * 64)
    with pytest.raises(BaseModelError, match="belongs to base 'base'"):
        write_adapter(adapter, model, tmp_path / "part")


def test_adapter_is_refused_when_the_engine_cannot_add_it(model, tmp_path):
    adapter = adapted(model, tmp_path / "adapter", method="dora")
    with pytest.raises(PackError, match="DoRA adapter rescales whole columns") as caught:
        write_adapter(adapter, model, tmp_path / "part")
    assert caught.value.hint == "merge the adapter instead"


def test_encoder_decoder_is_refused_when_exported_to_onnx(tmp_path):
    folder = clone("t5-small", tmp_path / "model", width=32).folder
    with pytest.raises(PackError, match="encoder-decoders are not exported to ONNX"):
        export_onnx(folder, tmp_path / "onnx")
    with pytest.raises(PackError, match="precision 'int4' is not known"):
        export_onnx(folder, tmp_path / "onnx", precision="int4")


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "beside"), [("fp32", False), ("int8", True)])
def test_onnx_writes_what_transformers_writes_when_exported(model, tmp_path, monkeypatch, precision, beside):
    if beside:  # as for weights over 2 GB
        monkeypatch.setattr(writer_onnx, "_IN_ONE_FILE", 0)
    out = export_onnx(model, tmp_path / "onnx", precision=precision)
    decoder = load_writer(model, dtype=torch.float32)
    got = writer_onnx.OnnxDecoder(out / "model.onnx", decoder).greedy(PROMPT, max_tokens=8)
    expected = decoder.greedy(PROMPT, max_tokens=8)
    assert got == expected if precision == "fp32" else len(got) == len(expected)
    names = {path.name for path in out.iterdir()}
    assert {"model.onnx", "tokenizer.json", "chat_template.jinja", "README.md"} <= names
    assert not any(name.startswith("float.onnx") for name in names)
    assert any(name.startswith("model.onnx.data") for name in names) == beside


@pytest.mark.slow
def test_onnx_is_refused_when_its_tokens_are_not_the_models(model, tmp_path, monkeypatch):
    class Other:
        def __init__(self, *args):
            pass

        def greedy(self, ids, *, max_tokens, ends):
            return [3] * max_tokens

    monkeypatch.setattr(writer_onnx, "OnnxDecoder", Other)
    monkeypatch.setattr(writer_onnx, "trace", lambda decoder, path: None)
    with pytest.raises(PackError, match="the ONNX form is not the model: prompt 0, token 0"):
        export_onnx(model, tmp_path / "onnx")
