"""Conversations: splits locked, audit, preferences, public data."""

import json
import random

import pytest

from alambic.data.chat_check import check_chats, render
from alambic.data.chats import ChatDataset, ChatExample
from alambic.data.split_chats import read_parts, split_chats
from alambic.errors import DataError
from alambic.kinds.chat import Chat, Message, ToolCall
from alambic.task import load_task
from chat_rows import TOOLS, dataset, jsonl, pairs, read, said, sentence, talk

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
