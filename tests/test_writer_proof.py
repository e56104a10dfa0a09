"""The round-trip proof of writers: it passes on what was packed, and names the token when anything was corrupted."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("optimum.intel", reason="needs alambic[generate]")

from tokenizers import Tokenizer, normalizers  # noqa: E402

from alambic.errors import PackError, TemplateError  # noqa: E402
from alambic.events import Note, drain  # noqa: E402
from alambic.kinds.chat import order_fault, parse_chat  # noqa: E402
from alambic.kinds.golden_chats import GOLDEN_CHATS  # noqa: E402
from alambic.model.clone import clone  # noqa: E402
from alambic.pack.writer_openvino import pack_openvino  # noqa: E402
from alambic.pack.writer_proof import prove_writer  # noqa: E402

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<start>model\n{% endif %}"
)
DATED = "{{ bos_token }}Today is {{ strftime_now('%d %b %Y') }}.\n" + (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return clone("llama-3.2-1b", tmp_path_factory.mktemp("model") / "llama", width=32).folder


@pytest.fixture(scope="module")
def packed(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "writer"
    return out, drain(pack_openvino(model, out, precision="fp16"))


@pytest.fixture
def part(packed, tmp_path):
    """A copy that a test may corrupt."""
    return Path(shutil.copytree(packed[0], tmp_path / "writer")), packed[1]


def with_template(model: Path, packed, tmp_path: Path, source: str):
    """Return model and part as if the base had brought `source`."""
    from alambic.render import pinned

    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    out = Path(shutil.copytree(packed[0], tmp_path / "writer"))
    (out / "chat_template.jinja").write_text(pinned(source), encoding="utf-8")
    return folder, out


def fails(model, folder, part) -> str:
    with pytest.raises(PackError) as caught:
        drain(prove_writer(model, folder, part))
    return str(caught.value)


def test_golden_chats_are_fifty_and_valid_when_read():
    assert len(GOLDEN_CHATS) == 50
    for name, chat in GOLDEN_CHATS.items():
        assert order_fault(chat) is None, name
        data = chat.to_dict(as_text=True)
        assert parse_chat(data["messages"], data.get("tools"), where=name) == chat


def test_proof_passes_and_is_written_when_nothing_changed(model, packed):
    folder, part = packed
    report = drain(prove_writer(model, folder, part))
    assert report.tokenizers == ("trained", "tokenizer.json", "transformers", "openvino_tokenizer.xml")
    assert (report.conversations, report.refused, report.ends) == (50, (), ("</s>",))
    assert report.texts > 80
    assert report.answers > 30
    assert json.loads((folder / "proof.json").read_text())["tokenizers"] == list(report.tokenizers)
    json.dumps(report.to_dict())


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("### User:", "### Usr:", "('r'), in training it was "),
        ("{{ eos_token }}", "", "in training it was 1 ('</s>')"),
        ("{{ eos_token }}", "{{ bos_token }}", "is 0 ('<s>'), in training it was 1 ('</s>')"),
        ("{{ bos_token }}", "", "in training it was 0 ('<s>')"),
    ],
)
def test_failure_names_the_token_when_the_template_is_corrupted(model, part, before, after, message):
    folder, spec = part
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text("utf-8").replace(before, after, 1), encoding="utf-8")
    said = fails(model, folder, spec)
    assert "golden conversation 'plain" in said
    assert "the part's template writes another text than the model's: token " in said
    assert message in said


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([2], "1 ('</s>'); the engine stops at 2 ('<pad>')"),
        ([], "1 ('</s>'); the engine stops at nothing"),
        ([1, 70], "the engine would stop at token 70 ("),
    ],
)
def test_failure_names_the_token_when_the_end_is_corrupted(model, part, ends, message):
    folder, spec = part
    assert message in fails(model, folder, dataclasses.replace(spec, params={**spec.params, "end_ids": ends}))


def test_failure_names_the_token_when_the_template_writes_no_end(model, packed, tmp_path):
    source = (packed[0] / "chat_template.jinja").read_text("utf-8").replace("{{ eos_token }}", "")
    folder, out = with_template(model, packed, tmp_path, source)
    said = fails(folder, out, packed[1])
    assert "golden conversation 'plain-answered': the answer ends with token " in said
    assert "the engine stops at 1 ('</s>')" in said


def test_failure_names_the_token_when_the_tokenizer_is_another(model, part):
    folder, spec = part
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(folder / "tokenizer.json"))
    said = fails(model, folder, spec)
    assert "golden conversation 'french-decomposed': tokenizer.json does not give the ids that training saw" in said


def test_failure_names_the_form_when_another_one_differs(model, packed):
    def shifted(texts):
        return [[7] for _ in texts]

    with pytest.raises(PackError, match=r"'plain': model\.gguf does not give the ids that training saw: token 0 is 7"):
        drain(prove_writer(model, *packed, others={"model.gguf": shifted}))


def test_failure_names_the_graph_when_its_ids_are_others(model, part):
    folder, spec = part
    broken = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    broken["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    from alambic import _extras
    from alambic.pack.writer_tokenizer import convert

    graph, _ = convert(Tokenizer.from_str(json.dumps(broken)))
    _extras.load("openvino").save_model(graph, str(folder / "openvino_tokenizer.xml"), compress_to_fp16=False)
    assert "openvino_tokenizer.xml does not give the ids that training saw: token " in fails(model, folder, spec)


def test_same_is_refused_on_both_sides_when_the_template_takes_no_system(model, packed, tmp_path):
    folder, out = with_template(model, packed, tmp_path, GEMMA)
    report = drain(prove_writer(folder, out, packed[1]))
    assert "system" in report.refused
    assert "plain" not in report.refused


def test_clock_is_stopped_on_both_sides_when_the_template_asks_for_the_day(model, packed, tmp_path):
    folder, out = with_template(model, packed, tmp_path, DATED)
    assert "2024" in (out / "chat_template.jinja").read_text("utf-8")
    assert drain(prove_writer(folder, out, packed[1])).refused == ()


def test_failure_is_clear_when_the_template_is_missing_or_broken(model, part):
    folder, spec = part
    (folder / "chat_template.jinja").write_text("{% if %}", encoding="utf-8")
    with pytest.raises((PackError, TemplateError), match="chat template"):
        drain(prove_writer(model, folder, spec))
    (folder / "chat_template.jinja").unlink()
    assert "chat_template.jinja: missing" in fails(model, folder, spec)


@pytest.mark.slow
def test_real_tokenizer_and_template_pass_when_there_is_one(tmp_path, shared_data):
    folder = clone("qwen2.5-0.5b", tmp_path / "model", width=32, tokenizers=shared_data / "tokenizers").folder
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    notes = []
    part = drain(pack_openvino(folder, tmp_path / "writer", precision="int8"), notes.append)
    report = drain(prove_writer(folder, tmp_path / "writer", part), notes.append)
    assert "transformers" in report.tokenizers
    assert "openvino_tokenizer.xml" in report.tokenizers
    assert "<|im_end|>" in report.ends
    assert [event for event in notes if isinstance(event, Note) and event.level == "warning"] == []


def test_encoder_decoder_passes_and_names_the_end_when_corrupted(tmp_path):
    folder = clone("t5-small", tmp_path / "model", width=32).folder
    part = drain(pack_openvino(folder, tmp_path / "writer", precision="fp16"))
    report = drain(prove_writer(folder, tmp_path / "writer", part))
    assert "turns" in report.refused
    assert report.answers > 20
    wrong = dataclasses.replace(part, params={**part.params, "end_ids": [0]})
    assert "1 ('</s>'); the engine stops at 0 ('<pad>')" in fails(folder, tmp_path / "writer", wrong)
