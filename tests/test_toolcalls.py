"""Tool calls out of text, in the form of each template."""

import json

import pytest

from alambic.engines.toolcalls import HERMES, Splitter, parse, style_of
from alambic.kinds.chat import ToolCall
from alambic.render import PLAIN_TEMPLATE, ChatTemplate

LLAMA = (
    "{{ bos_token }}{% if tools %}<|start_header_id|>system<|end_header_id|>\n\n{{ tools | tojson }}"
    "<|eot_id|>{% endif %}"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    '{% if m.tool_calls %}{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}{% else %}{{ m.content | trim }}{% endif %}'
    "<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% elif m.tool_calls %}"
    "[TOOL_CALLS] [{% for c in m.tool_calls %}{% if c.id|length != 9 %}{{ raise_exception('nine letters') }}{% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    "{% if not loop.last %}, {% endif %}{% endfor %}]</s>{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
ARGS = MISTRAL.replace("[TOOL_CALLS] [", "").replace(
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}',
    "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}",
).replace("{% if not loop.last %}, {% endif %}{% endfor %}]", "{% endfor %}")  # fmt: skip
MUTE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

CALL = '{"name": "f", "arguments": {"x": 1}}'


def plain(calls):
    return [(call.name, dict(call.arguments)) for call in calls]


@pytest.mark.parametrize(
    ("template", "style"),
    [
        (PLAIN_TEMPLATE, ("<tool_call>", "</tool_call>", "name", "arguments", "")),
        (LLAMA, ("", "", "name", "parameters", "")),
        (MISTRAL, ("[TOOL_CALLS]", "", "name", "arguments", "")),
        (ARGS, ("[TOOL_CALLS]", "", None, None, "[ARGS]")),
    ],
)
def test_style_is_read_off_a_template_when_it_writes_calls(template, style):
    found = style_of(ChatTemplate(template, {"bos_token": "<s>", "eos_token": "</s>"}))
    assert found is not None
    assert (found.begin, found.end, found.name_key, found.arguments_key, found.between) == style


def test_style_of_qwen_is_hermes_when_its_template_is_there(shared_data):
    config = json.loads((shared_data / "tokenizers" / "qwen2.5" / "tokenizer_config.json").read_text("utf-8"))
    assert style_of(ChatTemplate(config["chat_template"])) == HERMES
    other = json.loads((shared_data / "tokenizers" / "minimind" / "tokenizer_config.json").read_text("utf-8"))
    assert style_of(ChatTemplate(other["chat_template"])) == HERMES


def test_style_is_none_when_a_template_writes_no_calls():
    assert style_of(ChatTemplate(MUTE)) is None
    assert parse(f"<tool_call>{CALL}</tool_call>", None) == (f"<tool_call>{CALL}</tool_call>", ())


F = ("f", {"x": 1})
SPOKEN = [
    (PLAIN_TEMPLATE, f"<tool_call>{CALL}</tool_call>", "", [F]),
    (PLAIN_TEMPLATE, f"Now.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call>", "Now.", [F, F]),
    (PLAIN_TEMPLATE, f"<tool_call>{CALL}", "", [F]),  # the end mark is a special token that shows nothing
    (PLAIN_TEMPLATE, "<tool_call>{oops}</tool_call>", "<tool_call>{oops}</tool_call>", []),
    (PLAIN_TEMPLATE, '<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', []),
    (PLAIN_TEMPLATE, '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [F]),
    (PLAIN_TEMPLATE, "a < b <tool and </tool_call>", "a < b <tool and </tool_call>", []),
    (LLAMA, '{"name": "f", "parameters": {"x": 1}}', "", [F]),
    (LLAMA, '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g"}', "", [("f", {}), ("g", {})]),
    (LLAMA, '{"weather": "fine"}', '{"weather": "fine"}', []),
    (LLAMA, "It is fine {today}.", "It is fine {today}.", []),
    (MISTRAL, f"[TOOL_CALLS] [{CALL}, {CALL}]", "", [F, F]),
    (MISTRAL, "[TOOL_CALLS] [1, 2]", "[TOOL_CALLS] [1, 2]", []),
    (ARGS, '[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g[ARGS]{}', "", [("f", {"x": 1}), ("g", {})]),
]  # fmt: skip


@pytest.mark.parametrize(("template", "text", "content", "calls"), SPOKEN)
def test_calls_are_read_when_an_answer_is_complete(template, text, content, calls):
    said, found = parse(text, style_of(ChatTemplate(template)))
    assert (said, plain(found)) == (content, calls)
    assert len({call.id for call in found}) == len(found)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize(("template", "text", "content", "calls"), SPOKEN)
def test_calls_are_read_alike_when_the_text_comes_in_pieces(template, text, content, calls, size):
    splitter = Splitter(style_of(ChatTemplate(template)))
    pieces = [piece for i in range(0, len(text), size) for piece in splitter.push(text[i : i + size])]
    pieces += splitter.finish()
    assert "".join(piece for piece in pieces if isinstance(piece, str)).strip() == content
    assert plain(piece for piece in pieces if isinstance(piece, ToolCall)) == calls
    assert splitter.calls == len(calls)


def test_text_is_given_at_once_when_it_cannot_be_a_call():
    splitter = Splitter(HERMES)
    assert splitter.push("Hello <") == ["Hello "]
    assert splitter.push("b> <tool") == ["<b> "]
    assert splitter.push("_") == []
    assert splitter.push("box>") == ["<tool_box>"]
