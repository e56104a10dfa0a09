"""Preferences in a task file: read in TRL's forms, split without leaks, checked, measured through an engine."""

import json
import math

import pytest

from alambic.build.writing.audit import check_writer
from alambic.build.writing.preferring import preference_lines
from alambic.cli.main import main
from alambic.data.chats import ChatDataset, ChatExample
from alambic.data.pair_check import check_pairs, render
from alambic.data.pairs import PreferenceDataset, PreferenceExample, read_pairs
from alambic.data.split_chats import ChatParts, read_parts
from alambic.data.split_pairs import read_pair_parts, split_pairs
from alambic.errors import DataError, EngineError, InputTooLong, TaskError
from alambic.events import drain
from alambic.kinds.chat import Chat, Message, ToolCall
from alambic.measure.preference import gained, measure_preference
from alambic.task import DataSpec, load_task
from alambic.train.sft_rates import default_preference_rate

TASK = """
[task]
name = "replies"
kind = "{kind}"
[data]
train = "rows.jsonl"
prompt = "Reply to: {{text}}"
[base]
name = "scratch"
parameters = 200_000
{rest}
"""
PREFERENCES = '[preferences]\nfile = "pairs.jsonl"\n'
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
THINGS = ("apples", "bridges", "cellars", "dragons", "engines", "ferries", "gardens", "harbours")
ASKED = [f"{thing} {number} please {thing[::-1]}" for thing in THINGS for number in NUMBERS]


def lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def task_of(tmp_path, rest=PREFERENCES, *, kind="generate", pairs=(), asked=ASKED[:40]):
    lines(tmp_path / "rows.jsonl", [{"prompt": text, "completion": f"yes {text}"} for text in asked])
    lines(tmp_path / "pairs.jsonl", pairs)
    (tmp_path / "task.toml").write_text(TASK.format(kind=kind, rest=rest), encoding="utf-8")
    return tmp_path / "task.toml"


def pair(text, chosen="Gladly.", rejected="No."):
    return {"prompt": text, "chosen": chosen, "rejected": rejected}


def example(text, chosen="Gladly.", rejected="No.", **more):
    return PreferenceExample(Chat.of(text), Message("assistant", chosen), Message("assistant", rejected), **more)


# --- the task file ---------------------------------------------------------------------------------------------------


def test_candidates_end_with_the_preferred_ones_when_a_task_has_preferences(tmp_path):
    names = [c.name for c in load_task(task_of(tmp_path)).candidates]
    assert names[-3:] == ["preferred-int4", "preferred-int8", "preferred"]
    sugar = load_task(task_of(tmp_path, PREFERENCES + "[recipe]\nepochs = 2\n"))
    assert [(c.name, c.recipe) for c in sugar.candidates] == [("finetune", {"epochs": 2}), ("preferred", {"epochs": 2})]
    assert load_task(task_of(tmp_path, "")).preferences is None


@pytest.mark.parametrize(
    ("rest", "kind", "fault"),
    [
        (PREFERENCES + "betta = 1\n", "generate", "task.toml:13: preferences.betta: unknown key; did you mean 'beta'"),
        (PREFERENCES + "beta = 0\n", "generate", "task.toml:13: preferences.beta = 0: "),
        (PREFERENCES + 'method = "dpo"\n', "generate", "preferences.method = 'dpo'; allowed: 'auto', 'full'"),
        (PREFERENCES, "extract", "preferences: do not apply to kind 'extract'"),
        (PREFERENCES + '[[candidate]]\nname = "nearest"\n', "chat", "no candidate learns from them"),
        ('[[candidate]]\nname = "preferred"\n', "generate", "'preferred' needs [preferences]"),
    ],
)
def test_preferences_that_cannot_be_followed_are_refused_with_their_line(tmp_path, rest, kind, fault):
    with pytest.raises(TaskError) as refused:
        load_task(task_of(tmp_path, rest, kind=kind))
    assert fault in str(refused.value)


# --- forms -----------------------------------------------------------------------------------------------------------


def test_scored_answers_to_one_prompt_become_pairs_best_against_worst_first(tmp_path):
    said = [("a", "good", 0.9), ("a", "fair", 0.6), ("a", "poor", 0.1), ("a", "also poor", 0.1), ("b", "alone", 1.0)]
    path = lines(tmp_path / "p.jsonl", [{"prompt": p, "completion": c, "score": s} for p, c, s in said])
    read = read_pairs(path, DataSpec(train=str(path)))
    found = [(e.chosen.content, e.rejected.content) for e in read.dataset]
    assert read.form == "scored" and found[:2] == [("good", "also poor"), ("fair", "poor")]
    assert set(found) == {("good", "also poor"), ("fair", "poor"), ("good", "poor"), ("fair", "also poor")}
    assert any("1 answers have no other side" in note for note in read.notes)  # b's; equal scores make no pair


@pytest.mark.parametrize(("score", "fault"), [("high", "score 'high' is no number"), (None, "is no number")])
def test_row_is_named_when_its_score_is_no_number(tmp_path, score, fault):
    path = lines(tmp_path / "p.jsonl", [{"prompt": "a", "completion": "b", "score": score}])
    with pytest.raises(DataError, match=r"p\.jsonl:1: ") as refused:
        read_pairs(path, DataSpec(train=str(path)))
    assert fault in str(refused.value)


def test_words_of_the_prompt_are_written_once_around_a_text_when_the_task_has_them(tmp_path):
    talk = [{"role": "user", "content": "as it is"}]
    rows = [pair("raw"), pair("Reply to: whole"), {**pair("x"), "prompt": talk}]
    path = lines(tmp_path / "p.jsonl", rows)
    read = read_pairs(path, DataSpec(train=str(path), prompt="Reply to: {text}"))
    contents = [e.prompt.messages[-1].content for e in read.dataset]
    assert contents == ["Reply to: raw", "Reply to: whole", "as it is"]
    assert [e.asked for e in read.dataset] == ["raw", "whole", "as it is"]


# --- splits ----------------------------------------------------------------------------------------------------------


def test_no_pair_asks_what_test_asks_when_split(tmp_path):
    task = load_task(task_of(tmp_path, pairs=[pair(text) for text in ASKED]))
    rows = read_parts(task, lock=None)
    parts = read_pair_parts(task, rows, lock=tmp_path / "pairs.lock")
    asked = {name: {e.asked for e in part} for name, part in (("train", parts.train), ("dev", parts.dev))}
    held = {name: {e.asked for e in part} for name, part in (("dev", rows.dev), ("test", rows.test))}
    assert not asked["train"] & (held["dev"] | held["test"]) and not asked["dev"] & held["test"]
    assert not asked["train"] & asked["dev"] and len(parts.dev) >= len(held["dev"])
    assert len(parts.train) + len(parts.dev) + len(parts.left_out) == len(ASKED)
    assert parts.left_out[0].startswith("pairs.jsonl:")
    again = read_pair_parts(task, rows, lock=tmp_path / "pairs.lock")
    assert (again.train.digest, again.dev.digest) == (parts.train.digest, parts.dev.digest)


def rows_asking(**texts):
    made = {
        name: ChatDataset(tuple(ChatExample(Chat.of(t, completion="x"), group=g) for t, g in part))
        for name, part in texts.items()
    }
    return ChatParts(made["train"], made["dev"], made["test"], ())


def test_group_of_a_test_row_keeps_a_pair_out_when_it_asks_something_else():
    rows = rows_asking(train=[("quite other", "a")], dev=[("something", "b")], test=[("held back", "c")])
    pairs = PreferenceDataset(tuple(example(text, where=str(i), group="c" if i == 3 else None)
                                    for i, text in enumerate(ASKED[:30])))  # fmt: skip
    parts = split_pairs(pairs, None, rows, seed=0, lock=None)
    assert parts.left_out == ("3",) and len(parts.train) + len(parts.dev) == 29


def test_pairs_that_ask_what_the_given_dev_asks_are_not_learnt():
    rows = rows_asking(train=[("quite other", None)], dev=[("something", None)], test=[("held back", None)])
    pairs = PreferenceDataset(tuple(example(text) for text in ASKED[:20]))
    dev = PreferenceDataset((example(ASKED[3], "Yes."), example(ASKED[50])))
    parts = split_pairs(pairs, dev, rows, seed=0, lock=None)
    assert parts.dev.digest == dev.digest and ASKED[3] not in {e.asked for e in parts.train}
    assert len(parts.train) == 19


def test_too_few_pairs_are_refused(tmp_path):
    task = load_task(task_of(tmp_path, pairs=[pair(text) for text in ASKED[:5]]))
    with pytest.raises(DataError, match="5 pairs are too few"):
        read_pair_parts(task, read_parts(task, lock=None), lock=None)


# --- the check -------------------------------------------------------------------------------------------------------


def test_audit_tells_lengths_repeats_and_contrary_pairs(tmp_path):
    whole = [*(example(text, "a longer answer", "short", where=f"f:{i}") for i, text in enumerate(ASKED[:30])),
             example(ASKED[0], "a longer answer", "short", where="f:30"),
             example(ASKED[1], "short", "a longer answer", where="f:31")]  # fmt: skip
    rows = rows_asking(train=[("other", None)], dev=[("something", None)], test=[("held back", None)])
    parts = split_pairs(PreferenceDataset(tuple(whole)), None, rows, seed=0, lock=None, form="explicit prompt")
    audit = check_pairs(parts, count_tokens=lambda chats: [(4, len(c.messages[-1].content)) for c in chats], limit=18)
    assert (audit.pairs, audit.repeated.rows, audit.contrary.rows) == (32, 1, 1)
    assert (audit.chosen.p50, audit.rejected.p50, audit.longer) == (15, 5, round(31 / 32, 4))
    assert len(audit.over) == 32 and audit.over[0].endswith(": 19 tokens")
    assert any("the longer one in 97%" in line for line in audit.advice)
    assert "say the contrary of an earlier pair: 1" in render(audit) and json.dumps(audit.to_dict())


def test_command_reports_the_pairs_and_names_their_faults(tmp_path, capsys):
    path = task_of(tmp_path, pairs=[pair(text) for text in ASKED])
    with pytest.raises(SystemExit) as ended:
        main(["check", str(path), "--json"])
    found = json.loads(capsys.readouterr().out)["preferences"]
    assert not ended.value.code and found["pairs"] + found["left_out"]["rows"] == 80 and found["chosen"]["p50"] == 1
    lines(tmp_path / "pairs.jsonl", [pair("a"), pair("b", "same", "same"), pair("c", ""), pair("d", rejected=[
        {"role": "user", "content": "what?"}])])  # fmt: skip
    with pytest.raises(DataError) as refused:
        drain(check_writer(load_task(path)))
    for text in ("pairs.jsonl:2: chosen and rejected are the same", "pairs.jsonl:3: the answer is empty",
                 "pairs.jsonl:4: rejected has"):  # fmt: skip
        assert text in str(refused.value)


# --- measuring -------------------------------------------------------------------------------------------------------


class Scores:
    """An engine that finds each letter of an answer as likely as its table says."""

    capabilities = frozenset({"score"})

    def __init__(self, table, most=100):
        self.table, self.most = table, most

    def score(self, prompts, continuations):
        if any(len(text) > self.most for text in continuations):
            raise InputTooLong("too long")
        return [[math.log(self.table[letter]) for letter in text] for text in continuations]


def test_accuracy_is_that_of_whole_answers_and_of_their_bytes_when_measured():
    pairs = [example("q", "aa", "b"), example("q", "a", "b"), example("q", "b", "a"), example("q", "ab", "ba")]
    score = measure_preference(Scores({"a": 0.5, "b": 0.4}), pairs)
    assert score.accuracy.value == (0 + 1 + 0 + 0.5) / 4  # two likely letters together are less likely than one
    assert score.per_byte.value == (1 + 1 + 0 + 0.5) / 4
    assert score.margins[1] == pytest.approx(math.log(0.5 / 0.4)) and score.n == 4 and score.left_out == 0


def test_pairs_that_cannot_be_scored_are_counted_when_measured():
    call = Message("assistant", "", tool_calls=(ToolCall("book", {}),))
    pairs = [example("q", "a", "b"), PreferenceExample(Chat.of("q"), call, Message("assistant", "b")),
             example("q", "a" * 9, "b")]  # fmt: skip
    score = measure_preference(Scores({"a": 0.5, "b": 0.4}, most=5), pairs)
    assert (score.n, score.left_out, [m is None for m in score.margins]) == (1, 2, [False, True, True])
    engine = Scores({})
    engine.capabilities = frozenset()
    with pytest.raises(EngineError, match="no log-probabilities"):
        measure_preference(engine, pairs)


def test_gain_is_the_share_of_pairs_that_moved_the_right_way():
    share = gained([1.0, 0.0, None, 3.0], [0.0, 1.0, 1.0, 2.0])
    assert share.value == pytest.approx(2 / 3) and share.n == 3
    scores = {"preferred": {"accuracy": share.to_dict(), "gained": share.to_dict(), "against": "finetune"}}
    assert "against finetune the better answer gained in 66.7 %" in preference_lines(scores)[0]


def test_rate_of_preferences_follows_that_of_fine_tuning():
    assert default_preference_rate(1_500_000_000, method="full", new=False) == pytest.approx(1e-6)
    assert default_preference_rate(1_500_000_000, method="lora", new=False) == pytest.approx(1e-5)
    assert default_preference_rate(5_000_000, method="full", new=True) == pytest.approx(7.5e-5)
