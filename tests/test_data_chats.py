"""Conversations: forms found and shown, bad rows named."""

import json
import random

import pytest

from alambic.errors import DataError
from alambic.kinds.chat import ToolCall
from chat_rows import CALL, TOOLS, jsonl, pairs, read, refused, said, talk

# --- forms -----------------------------------------------------------------------------------------------------------


def test_messages_are_read_with_tools_and_arguments_as_text(tmp_path):
    row = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "time?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "14:30", "tool_call_id": "c1"},
            {"role": "assistant", "content": "14:30", "weight": 1},
        ],
        "tools": TOOLS,
    }
    got = read(jsonl(tmp_path, row))
    chat = got.dataset.examples[0].chat
    assert [m.role for m in chat.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert chat.messages[2].tool_calls == (ToolCall("now", {"zone": "Paris"}),)
    assert chat.tools[0]["function"]["name"] == "now"
    assert got.form == "messages"
    assert "rows.jsonl: keys of messages not read: weight (1)" in got.notes


def test_older_function_calls_are_read_as_tool_calls(tmp_path):
    messages = [
        {"role": "user", "content": "time?"},
        {"role": "assistant", "content": "", "function_call": {"name": "now", "arguments": "{}"}},
        {"role": "function", "name": "now", "content": "14:30"},
        {"role": "assistant", "content": "14:30"},
    ]
    chat = read(jsonl(tmp_path, {"messages": messages})).dataset.examples[0].chat
    assert chat.messages[1].tool_calls == (ToolCall("now", {}),)
    assert chat.messages[2].role == "tool"


def test_sharegpt_is_read_with_its_calls(tmp_path):
    turns = [
        {"from": "human", "value": "time?"},
        {"from": "gpt", "value": "I look."},
        {"from": "function_call", "value": '{"name": "now", "arguments": {"zone": "Paris"}}'},
        {"from": "observation", "value": "14:30"},
        {"from": "gpt", "value": "14:30"},
    ]
    got = read(jsonl(tmp_path, {"conversations": turns, "system": "Be brief.", "tools": json.dumps(TOOLS)}))
    chat = got.dataset.examples[0].chat
    assert got.form == "sharegpt"
    assert [m.role for m in chat.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert (chat.messages[2].content, chat.messages[2].tool_calls[0].name) == ("I look.", "now")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Translate", "input": "pump", "output": "pompe"}, [("user", "Translate\n\npump")]),
        ({"instruction": "Translate", "input": "", "output": "pompe"}, [("user", "Translate")]),
        ({"instruction": "Why?", "context": "Paris", "response": "pompe"}, [("user", "Why?\n\nParis")]),
        (
            {"instruction": "c", "output": "pompe", "system": "S", "history": [["a", "b"]]},
            [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c")],
        ),
    ],
)
def test_alpaca_is_read_with_input_system_and_history(tmp_path, row, expected):
    got = read(jsonl(tmp_path, row))
    assert got.form == "alpaca"
    assert said(got.dataset.examples[0].chat) == [*expected, ("assistant", "pompe")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "b"},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    ],
)
def test_prompt_and_completion_are_read_as_texts_or_messages(tmp_path, row):
    got = read(jsonl(tmp_path, row))
    assert got.form == "completion"
    assert said(got.dataset.examples[0].chat) == [("user", "a"), ("assistant", "b")]


def test_two_columns_of_a_windows_csv_are_guessed_and_shown(tmp_path):
    path = tmp_path / "paires.csv"
    path.write_bytes("Réf;Message;Réponse\n12;Où êtes-vous ?;À côté\n14;Ça fuit;C’est noté\n".encode("cp1252"))
    got = read(path)
    assert said(got.dataset.examples[0].chat) == [("user", "Où êtes-vous ?"), ("assistant", "À côté")]
    assert got.dataset.where == ["paires.csv:2", "paires.csv:3"]
    assert "paires.csv: read as cp1252, separator semicolon" in got.notes
    assert "paires.csv: output = 'Réponse' (guessed from its name)" in got.notes
    assert "paires.csv: keys not read: Réf (2)" in got.notes


def test_columns_are_read_from_parquet_when_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"b": ["answer"], "a": ["question"]}), path)
    got = read(path, text="a", output="b")
    assert said(got.dataset.examples[0].chat) == [("user", "question"), ("assistant", "answer")]


def test_two_columns_without_known_names_keep_their_order(tmp_path):
    got = read(jsonl(tmp_path, {"en": "dog", "fr": "chien", "source": "x"}, {"en": "cat", "fr": "chat", "source": "x"}))
    assert said(got.dataset.examples[0].chat) == [("user", "dog"), ("assistant", "chien")]
    assert any("the two columns of text, in their order" in note for note in got.notes)


def test_columns_that_cannot_be_told_are_an_error_that_lists_them(tmp_path):
    message = refused(jsonl(tmp_path, {"a": "x", "b": "y", "c": "z"}))
    assert "which column is" in message
    assert "'a', 'b', 'c'" in message
    assert "under [data]" in message


def test_column_that_is_not_there_gets_the_nearest(tmp_path):
    message = refused(jsonl(tmp_path, {"text": "a", "title": "b"}), output="titel")
    assert "no column 'titel' (data.output)" in message
    assert "did you mean 'title'?" in message


def test_prompt_is_written_from_columns_and_other_braces_stay(tmp_path):
    rows = {"city": "Lyon", "day": "lundi", "answer": "oui"}
    got = read(jsonl(tmp_path, rows), prompt='{day} in {city}, like {"a": 1} or {dy}?')
    example = got.dataset.examples[0]
    assert said(example.chat)[0] == ("user", 'lundi in Lyon, like {"a": 1} or {dy}?')
    assert example.asked == "lundi\nLyon"
    assert "rows.jsonl: data.prompt: no column 'dy': left as it stands" in got.notes


def test_prompt_text_stands_for_the_input_column_whatever_its_name(tmp_path):
    got = read(jsonl(tmp_path, {"message": "Ça fuit", "reply": "noté"}), prompt="Reply: {text}")
    assert said(got.dataset.examples[0].chat)[0] == ("user", "Reply: Ça fuit")


def test_prompt_without_a_column_is_refused(tmp_path):
    assert "names no column in braces" in refused(jsonl(tmp_path, {"text": "a", "title": "b"}), prompt="Reply: {}")


def test_prompt_over_whole_conversations_is_refused(tmp_path):
    assert "data.prompt is for columns" in refused(jsonl(tmp_path, talk("a", "b")), prompt="{text}!")


def test_system_message_is_added_where_a_row_has_none(tmp_path):
    own = {"messages": [{"role": "system", "content": "mine"}, *talk("a", "b")["messages"]]}
    chats = read(jsonl(tmp_path, talk("a", "b"), own), system="yours").dataset.chats
    assert [chat.messages[0].content for chat in chats] == ["yours", "mine"]


def test_several_accepted_answers_are_kept_and_learnt_one_by_one(tmp_path):
    got = read(jsonl(tmp_path, {"text": "He go", "corrections": ["He goes", "He went", "He goes"]}))
    assert got.dataset.references == [["He goes", "He went"]]
    assert [e.answer for e in got.dataset.each_answer()] == ["He goes", "He went"]
    assert [chat.completion for chat in got.dataset.prompts] == [None]


def test_expected_calls_are_the_answer_when_messages_end_with_a_question(tmp_path):
    tools = [{"name": "area", "parameters": {"type": "dict", "properties": {"r": {"type": "float"}}}}]
    row = {**talk("disc of 2?"), "tools": tools, "expected": [{"area": {"r": [2.0, 2], "unit": ["", "m"]}}]}
    chat = read(jsonl(tmp_path, row)).dataset.examples[0].chat
    assert chat.completion is not None
    assert chat.completion.tool_calls == (ToolCall("area", {"r": 2.0}),)
    parameters = chat.tools[0]["function"]["parameters"]
    assert (parameters["type"], parameters["properties"]["r"]["type"]) == ("object", "number")


def test_code_is_kept_exactly_but_for_its_line_ends(tmp_path):
    code = "    def f():\r\n\t\treturn 'e\u0301'\n\n"
    got = read(jsonl(tmp_path, {"prompt": "write\x00 f", "completion": code}))
    assert said(got.dataset.examples[0].chat) == [
        ("user", "write f"),
        ("assistant", "    def f():\n\t\treturn 'é'\n\n"),
    ]
    assert "rows.jsonl: 1 control characters removed; first: rows.jsonl:1" in got.notes
    assert any("begin or end with white space" in note for note in got.notes)


def test_mark_of_the_end_is_removed_from_answers_and_said(tmp_path):
    got = read(jsonl(tmp_path, {"prompt": "a", "completion": "b<|endoftext|>"}))
    assert got.dataset.examples[0].answer == "b"
    assert any("ended with a mark such as <|endoftext|>" in note for note in got.notes)


# --- bad rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": "a", "completion": " \n"}, "rows.jsonl:2: the answer is empty"),
        ({"prompt": "", "completion": "b"}, "rows.jsonl:2: the input ('prompt') is empty"),
        ("{not json", "rows.jsonl:2: not JSON"),
    ],
)
def test_bad_row_is_named_by_file_and_line(tmp_path, row, fault):
    message = refused(jsonl(tmp_path, {"prompt": "a", "completion": "b"}, row))
    assert fault in message
    assert "rows.jsonl: 1 of 2 rows cannot be used" in message
    assert "hint:" in message


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([("user", "a"), ("assistant", "b"), ("user", "c")], "the last message is not the assistant's but a user's"),
        ([("assistant", "b")], "roles out of order: messages[0]"),
        ([("user", "a"), ("user", "b"), ("assistant", "c")], "roles out of order: messages[1]: two user messages"),
        ([("user", "a"), ("system", "b"), ("assistant", "c")], "a system message after the first place"),
        ([("user", "a"), ("tool", "b"), ("assistant", "c")], "no assistant message before it calls a tool"),
        ([("user", " "), ("assistant", "c")], "messages[0]: the user says nothing"),
        ([("robot", "a"), ("assistant", "c")], "messages[0]: role 'robot'"),
    ],
)
def test_roles_out_of_order_are_named(tmp_path, messages, fault):
    row = {"messages": [{"role": role, "content": content} for role, content in messages]}
    message = refused(jsonl(tmp_path, talk("a", "b"), row))
    assert "rows.jsonl:2: " in message
    assert fault in message


@pytest.mark.parametrize(
    ("calls", "fault"),
    [
        ([{"function": {"name": "now", "arguments": "{zone: 1}"}}], "arguments do not parse as JSON"),
        ([{"function": {"name": "now", "arguments": "[1]"}}], "arguments are list, not an object"),
        ([{"function": {"arguments": "{}"}}], "not a tool call"),
        ("[{", "tool_calls does not parse as JSON"),
    ],
)
def test_tool_calls_that_do_not_parse_are_named(tmp_path, calls, fault):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": calls}]}
    message = refused(jsonl(tmp_path, row))
    assert "rows.jsonl:1: messages[1].tool_calls" in message
    assert fault in message


def test_at_most_twenty_faults_are_listed(tmp_path):
    message = refused(jsonl(tmp_path, *[{"prompt": "a", "completion": ""}] * 30))
    assert message.count("the answer is empty") == 20
    assert "... and 10 more" in message


ODD = [
    None, "", "x", 0, 1.5, True, [], {}, "[{", "{}", [None], [[]], ["a"], {"role": "user"}, [{"role": "user"}],
    [{"role": "assistant", "content": None}], [{"from": "function_call", "value": "{"}], [{"from": 3}], "\ud800",
    [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [None]}],
    [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": 5}],
    [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, {"role": "assistant", "content": "yes"}],
    [{"start": 0, "end": 1, "label": "a"}], {"a": ["x"]}, [{"f": {"a": [1]}}], [{"name": "f", "parameters": 3}], 1e400,
]  # fmt: skip
KEYS = (
    "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "system", "history", "tools",
    "text", "tokens", "tags", "spans", "slots", "a", "chosen", "rejected", "label", "expected", "preferred_output",
)  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_any_row_is_read_or_refused_with_its_reason(tmp_path, seed):
    rng, schema = random.Random(seed), {"type": "object", "properties": {"a": {"type": "string"}}}
    read_some = 0
    for _ in range(80):
        path = jsonl(tmp_path, {key: rng.choice(ODD) for key in rng.sample(KEYS, rng.randint(1, 8))})
        for attempt in (
            lambda path=path: read(path),
            lambda path=path: read(path, schema=schema),
            lambda path=path: read(path, prompt="{text} {a}", system="S"),
            lambda path=path: pairs(path),
        ):
            try:
                read_some += len(attempt().dataset.digest) == 64
            except DataError as error:
                assert "rows.jsonl" in str(error)
    assert read_some


def test_preferences_given_to_learn_are_refused_with_the_way_out(tmp_path):
    assert 'output = "chosen"' in refused(jsonl(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"}))


def test_no_conversation_at_all_is_an_error(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\n")
    assert "rows.csv" in refused(path)
