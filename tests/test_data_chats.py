"""Conversations: forms found and shown, bad rows named, splits locked, audit, preferences."""

import json
import random

import pytest

from alambic.data.chat_check import check_chats, render
from alambic.data.chats import ChatDataset, ChatExample
from alambic.data.pairs import read_pairs
from alambic.data.read_chats import read_chats
from alambic.data.split_chats import read_parts, split_chats
from alambic.errors import DataError
from alambic.kinds.chat import Chat, Message, ToolCall
from alambic.task import DataSpec, load_task

WORDS = [a + b for a in ("ka", "lo", "mi", "tu", "re", "po", "sa") for b in ("ban", "der", "gol", "fis", "nut", "vem")]
CALL = {"type": "function", "function": {"name": "now", "arguments": '{"zone": "Paris"}'}}
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]


def jsonl(folder, *rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def talk(*turns, **more):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)], **more}


def read(path, *, schema=None, system=None, prompt=None, **spec):
    return read_chats(path, DataSpec(train=str(path), **spec), schema=schema, system=system, prompt=prompt)


def said(chat):
    return [(message.role, message.content) for message in chat.messages]


def sentence(rng, words=9):
    return " ".join(rng.choice(WORDS) for _ in range(words))


def dataset(rows, seed=0):
    rng = random.Random(seed)
    return ChatDataset(
        tuple(ChatExample(Chat.of(sentence(rng), completion=sentence(rng)), f"a.jsonl:{i + 1}") for i in range(rows))
    )


def refused(path, **spec):
    with pytest.raises(DataError) as caught:
        read(path, **spec)
    return str(caught.value)


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


# --- parts and splits ------------------------------------------------------------------------------------------------


def task(folder, data, extra=""):
    path = folder / "task.toml"
    path.write_text(
        f'[task]\nname = "t"\nkind = "generate"\n[data]\ntrain = "{data}"\n{extra}\n[base]\nname = "scratch"\n'
        "parameters = 100000\n"
    )
    return load_task(path)


def test_folder_gives_train_valid_and_test(tmp_path):
    for name, count in (("train", 30), ("valid", 4), ("test", 5)):
        jsonl(tmp_path, *(talk(f"{name} {i}", "b") for i in range(count)), name=f"{name}.jsonl")
    parts = read_parts(task(tmp_path, "."), lock=None)
    assert [len(part) for part in (parts.train, parts.dev, parts.test)] == [30, 4, 5]


def test_dev_and_test_are_read_by_the_columns_of_train(tmp_path):
    jsonl(tmp_path, *({"body": f"b {i}", "note": f"n {i}"} for i in range(30)), name="train.jsonl")
    for name in ("valid", "test"):
        jsonl(tmp_path, {"note": "n", "body": "b", "title": "t"}, name=f"{name}.jsonl")
    parts = read_parts(task(tmp_path, "."), lock=None)
    assert said(parts.test.chats[0]) == [("user", "b"), ("assistant", "n")]


def test_training_rows_are_one_for_each_accepted_answer(tmp_path):
    for name in ("train", "valid", "test"):
        rows = ({"text": f"{name} {i}", "corrections": ["a", "b"]} for i in range(12))
        jsonl(tmp_path, *rows, name=f"{name}.jsonl")
    parts = read_parts(task(tmp_path, "."), lock=None)
    assert [len(part) for part in (parts.train, parts.dev, parts.test)] == [24, 12, 12]
    assert parts.test.references[0] == ["a", "b"]


def test_folder_with_two_dev_files_is_refused(tmp_path):
    for name in ("train", "valid", "dev"):
        jsonl(tmp_path, talk("a", "b"), name=f"{name}.jsonl")
    with pytest.raises(DataError, match=r"both valid.jsonl and dev.jsonl"):
        read_parts(task(tmp_path, "."), lock=None)


def test_folder_without_train_file_says_what_it_has(tmp_path):
    jsonl(tmp_path, talk("a", "b"), name="rows.jsonl")
    with pytest.raises(DataError, match=r"no train.jsonl in this folder \(it has rows.jsonl"):
        read_parts(task(tmp_path, "."), lock=None)


def cut(rows, dev=None, test=None, *, seed=0, lock=None, share=0.15):
    pytest.importorskip("rensa")
    return split_chats(rows, dev, test, seed=seed, lock=lock, test_share=share)


@pytest.mark.parametrize(("rows", "dev"), [(60, 17), (120, 20), (600, 51)])
def test_dev_is_one_part_of_a_tenth_and_at_least_twenty_rows(rows, dev):
    data = dataset(rows)
    parts = cut(data)
    assert len(parts.dev) == dev
    assert len(parts.test) == rows * 15 // 100
    digests = [e.digest for part in (parts.train, parts.dev, parts.test) for e in part]
    assert sorted(digests) == sorted(e.digest for e in data)


def test_dev_has_at_most_a_thousand_rows():
    assert len(cut(dataset(12_000)).dev) == 1000


def test_rows_keep_their_part_when_others_are_added(tmp_path):
    lock, data = tmp_path / "splits.lock", dataset(400)
    first = cut(data.take(range(150)), lock=lock)
    second = cut(data, lock=lock)
    for name in ("train", "dev", "test"):
        assert {e.digest for e in getattr(first, name)} <= {e.digest for e in getattr(second, name)}
    assert any("150 rows keep their place, 250 new" in note for note in second.notes)


def test_another_wording_of_the_prompt_moves_no_row(tmp_path):
    rng = random.Random(1)
    path = jsonl(tmp_path, *({"text": sentence(rng), "title": sentence(rng)} for _ in range(80)))
    lock = tmp_path / "lock"
    before = cut(read(path, prompt="Title of {text}").dataset, lock=lock)
    after = cut(read(path, prompt="Give a title. {text}").dataset, lock=lock)
    assert before.test.where == after.test.where
    assert before.dev.where == after.dev.where


def test_near_duplicates_stay_together_and_a_shared_instruction_ties_nothing():
    rng = random.Random(2)
    head = "Translate the following sentence from English to French, and keep the names as they are: "
    prompts = [sentence(rng, 12) for _ in range(100)]
    prompts += [f"{prompt} !" for prompt in prompts[:20]]
    data = ChatDataset(tuple(ChatExample(Chat.of(head + p, completion="x y"), f"a:{i}") for i, p in enumerate(prompts)))
    parts = cut(data)
    place = {e.where: name for name in ("train", "dev", "test") for e in getattr(parts, name)}
    assert all(place[f"a:{i}"] == place[f"a:{100 + i}"] for i in range(20))
    assert len(parts.test) == 18


def test_rows_that_are_all_alike_are_kept_apart_by_equality_and_it_is_said():
    words = "the pump of the machine number {} is blocked again and the customer of the north shop called twice today"
    data = ChatDataset(
        tuple(ChatExample(Chat.of(f"{i}. " + words.format(i), completion="x"), f"a:{i}") for i in range(100, 200))
    )
    parts = cut(data)
    assert len(parts.test) == 15
    assert any("only equal ones are kept together" in note for note in parts.notes)


def test_too_few_conversations_are_refused():
    with pytest.raises(DataError, match="5 conversations are too few to split"):
        cut(dataset(5))


# --- audit -----------------------------------------------------------------------------------------------------------


def lengths(chats):
    return [(len(chat.prompt.messages[-1].content), len(chat.messages[-1].content)) for chat in chats]


def test_audit_counts_what_a_careful_person_would_look_at():
    pytest.importorskip("rensa")
    rng = random.Random(3)
    rows = [(sentence(rng), sentence(rng)) for _ in range(40)]
    rows[1] = rows[0]
    rows[2] = (rows[0][0], sentence(rng))
    rows[3] = ("lofis tunut", "lofis tunut")
    rows[4] = (sentence(rng), "ok")
    rows[5] = ("write to claire.dumont@example.fr about lofis", sentence(rng))
    rows[6] = (sentence(rng), sentence(rng, 200))
    train = ChatDataset(tuple(ChatExample(Chat.of(a, completion=b), f"a:{i}") for i, (a, b) in enumerate(rows)))
    strange = Chat((Message("user", "when"), Message("assistant", "", (ToolCall("then", {}),))), tuple(TOOLS))
    test = ChatDataset((ChatExample(Chat.of(rows[0][0], completion="z " * 9), "t:1"), ChatExample(strange, "t:2")))
    audit = check_chats({"train": train, "test": test}, count_tokens=lengths, limit=500)
    assert (audit.rows, audit.tools, audit.turns) == (42, 1, {"2": 42})
    assert audit.exact_duplicates.where == ("a:1",)
    assert audit.same_question.where == ("a:2", "t:1")
    assert audit.copied.where == ("a:3",)
    assert audit.short.where == ("a:4",)
    assert audit.personal["email"].where == ("a:5",)
    assert audit.strange_calls.where == ("t:2",)
    assert [alike.where for alike in audit.leak_examples] == ["t:1"]
    assert audit.leaks_exact.rows == 1
    assert audit.answer.longest == len(rows[6][1])
    assert audit.answer.longest_where == "a:6"
    assert audit.over is not None
    assert [row.split(":")[1] for row in audit.over] == ["6"]
    text = render(audit)
    assert "longer than the model reads (500 tokens): 1\n  a:6: " in text
    assert "claire" not in text
    json.dumps(audit.to_dict())


def test_audit_names_every_row_that_is_too_long():
    pytest.importorskip("rensa")
    audit = check_chats({"train": dataset(60)}, count_tokens=lengths, limit=10)
    assert audit.over is not None
    assert len(audit.over) == 60
    assert "and 40 more" in render(audit)


def test_audit_counts_words_and_no_long_rows_when_no_model_is_known():
    pytest.importorskip("rensa")
    audit = check_chats({"train": dataset(20)})
    assert (audit.whole.unit, audit.over, audit.prompt.p50, audit.whole.p99) == ("words", None, 9, 18)


# --- preferences -----------------------------------------------------------------------------------------------------


def pairs(path, **more):
    return read_pairs(path, DataSpec(train=str(path)), **more)


def as_message(role, content):
    return [{"role": role, "content": content}]


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"prompt": "Sky?", "chosen": "blue", "rejected": "green"}, "explicit prompt"),
        (
            {
                "prompt": as_message("user", "Sky?"),
                "chosen": as_message("assistant", "blue"),
                "rejected": as_message("assistant", "green"),
            },
            "explicit prompt",
        ),
        (
            {
                "chosen": as_message("user", "Sky?") + as_message("assistant", "blue"),
                "rejected": as_message("user", "Sky?") + as_message("assistant", "green"),
            },
            "implicit prompt",
        ),
        (
            {"chosen": "\n\nHuman: Sky?\n\nAssistant: blue", "rejected": "\n\nHuman: Sky?\n\nAssistant: green"},
            "implicit prompt",
        ),
        ({"chosen": "Sky? blue", "rejected": "Sky? green"}, "implicit prompt"),
        (
            {
                "input": {"messages": as_message("user", "Sky?")},
                "preferred_output": as_message("assistant", "blue"),
                "non_preferred_output": as_message("assistant", "green"),
            },
            "openai",
        ),
    ],
)
def test_pair_is_read_in_every_form(tmp_path, row, form):
    got = pairs(jsonl(tmp_path, row), system="S")
    (example,) = got.dataset
    assert got.form == form
    assert said(example.prompt) == [("system", "S"), ("user", "Sky?")]
    assert (example.chosen.content, example.rejected.content) == ("blue", "green")
    assert said(got.dataset.chosen[0])[-1] == ("assistant", "blue")


def test_unpaired_answers_to_one_prompt_become_pairs(tmp_path):
    rows = [("a", "good", True), ("a", "bad", False), ("a", "worse", False), ("b", "alone", True)]
    path = jsonl(tmp_path, *({"prompt": p, "completion": c, "label": x} for p, c, x in rows))
    got = pairs(path)
    assert [(e.chosen.content, e.rejected.content) for e in got.dataset] == [("good", "bad"), ("good", "worse")]
    assert any("1 answers have no other side" in note for note in got.notes)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "rows.jsonl:1: the answer is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"chosen": "yes", "rejected": "no"}, "have no beginning in common"),
        ({"prompt": "a", "completion": "b", "label": "maybe"}, "label 'maybe' is neither true nor false"),
        ({"text": "a", "label": "b"}, "no preferences: the columns are 'text', 'label'"),
    ],
)
def test_bad_pair_is_named(tmp_path, row, fault):
    with pytest.raises(DataError) as caught:
        pairs(jsonl(tmp_path, row))
    assert fault in str(caught.value)


# --- public data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "rows", "columns", "form"),
    [
        ("nl2bash/dev.jsonl", 1307, ("text", "command"), "columns"),
        ("multi30k_en_fr/dev.jsonl", 1014, ("en", "fr"), "columns"),
        ("bfcl/parallel.jsonl", 200, ("messages", "tools", "expected"), "messages"),
    ],
)
def test_public_file_is_read_without_being_told_how(shared_data, file, rows, columns, form):
    got = read(shared_data / file)
    assert (len(got.dataset), got.columns, got.form) == (rows, columns, form)
