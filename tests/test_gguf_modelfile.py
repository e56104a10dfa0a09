"""Ollama's Modelfile: its Go template gives what the model's own template gives, or is left out."""

import shutil
import subprocess

import pytest

from alambic.kinds.chat import Chat, Message
from alambic.pack.gguf.modelfile import find_parts, modelfile
from alambic.render import PLAIN_TEMPLATE, ChatTemplate
from gguf_models import CHATML

_TURNS = "{% for m in messages %}"
_REPLY = "{% if add_generation_prompt %}"
LLAMA3 = (
    "{{ bos_token }}" + _TURNS + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + (m.content | trim) "
    "+ '<|eot_id|>' }}{% endfor %}" + _REPLY + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + _TURNS + "{% set role = 'model' if m.role == 'assistant' else m.role %}{{ '<start_of_turn>' + role + '\n' + "
    "(m.content | trim) + '<end_of_turn>\n' }}{% endfor %}" + _REPLY + "{{ '<start_of_turn>model\n' }}{% endif %}"
)  # fmt: skip
QWEN = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}" + CHATML
ZEPHYR = (
    _TURNS + "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    + _REPLY + "{{ '<|assistant|>\n' }}{% endif %}"
)  # fmt: skip


def mistral(place):
    return (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set sys = messages[0].content %}"
        "{% set turns = messages[1:] %}{% else %}{% set sys = '' %}{% set turns = messages %}{% endif %}"
        "{% for m in turns %}{% if m.role == 'user' %}{{ '[INST] ' }}{% if loop." + place + " and sys %}"
        "{{ sys + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}"
        "{% endfor %}"
    )


TEMPLATES = {
    "chatml": CHATML, "qwen": QWEN, "llama3": LLAMA3, "gemma": GEMMA, "zephyr": ZEPHYR, "plain": PLAIN_TEMPLATE,
    "mistral-first": mistral("first"), "mistral-last": mistral("last"),
}  # fmt: skip


def chat_template(source):
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, ("</s>",))


TALK = (Message("user", "Un"), Message("assistant", "Deux"), Message("user", 'Trois "guillemets"\n\\ fin'))
TALKS = {"one": TALK[:1], "three": TALK, "system": (Message("system", "Sois bref."), *TALK),
         "system-one": (Message("system", "Sois bref."), *TALK[:1])}  # fmt: skip


@pytest.mark.parametrize("talk", sorted(TALKS))
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_parts_give_the_text_of_the_template_when_found(name, talk):
    template = chat_template(TEMPLATES[name])
    parts = find_parts(template)
    assert parts is not None
    if name == "gemma" and talk.startswith("system"):
        assert parts.before_system is None
        return
    expected = template.render(Chat(TALKS[talk]), reply=True)
    assert parts.render(TALKS[talk]) == expected.removeprefix("<s>")


GO = """package main
import ("encoding/json"; "os"; "text/template")
type Message struct { Role string; Content string }
func main() {
  var d struct { Template string; System string; Messages []*Message }
  if err := json.NewDecoder(os.Stdin).Decode(&d); err != nil { panic(err) }
  t := template.Must(template.New("").Parse(d.Template))
  if err := t.Execute(os.Stdout, map[string]any{"System": d.System, "Messages": d.Messages}); err != nil { panic(err) }
}
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_go_itself_gives_the_text_of_the_template_when_installed(tmp_path, name):
    if shutil.which("go") is None:
        pytest.skip("Go is not installed")
    import json

    (tmp_path / "main.go").write_text(GO)
    template = chat_template(TEMPLATES[name])
    parts = find_parts(template)
    for talk in TALKS.values():
        if name == "gemma" and talk[0].role == "system":
            continue
        said = {
            "Template": parts.go(),
            "System": talk[0].content if talk[0].role == "system" else "",
            "Messages": [{"Role": m.role, "Content": m.content} for m in talk],
        }
        done = subprocess.run(
            ["go", "run", str(tmp_path / "main.go")], input=json.dumps(said), capture_output=True, text=True, check=True
        )
        assert done.stdout == template.render(Chat(talk), reply=True).removeprefix("<s>")


@pytest.mark.parametrize(
    "source",
    [
        _TURNS + "{{ loop.index ~ m.content }}{% endfor %}",
        _TURNS + "{{ m.role + m.content | upper }}{% endfor %}",
        _TURNS + "{{ '<' + m.role + '>' + m.content[:9] }}{% endfor %}",
        "{{ messages[-1].content }}",
    ],
)
def test_template_is_left_out_and_said_so_when_go_has_no_equal(source):
    template = chat_template(source)
    assert find_parts(template) is None
    text = modelfile(template, "model.gguf", context_tokens=512)
    assert 'TEMPLATE """' not in text
    assert "no equal form in Ollama's language" in text


def test_modelfile_is_whole_when_written():
    text = modelfile(chat_template(CHATML), "m.gguf", context_tokens=2048, system='Dis "oui".\nToujours')
    lines = text.splitlines()
    assert lines[0] == "FROM ./m.gguf"
    assert sum(line.startswith("TEMPLATE ") for line in lines) == 1
    assert 'PARAMETER stop "</s>"' in lines and "PARAMETER num_ctx 2048" in lines
    assert 'SYSTEM """Dis "oui".\nToujours"""' in text
    assert 'SYSTEM "a\\"\\"\\""' in modelfile(chat_template(CHATML), "m.gguf", context_tokens=1, system='a"""')
