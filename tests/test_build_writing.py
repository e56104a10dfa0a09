"""Builds of models that write: from a task file to a bundle that answers, by looking up and by a tiny new model."""

import json

import pytest

import alambic
from alambic.build import build
from alambic.bundle import open_bundle
from alambic.cli.main import main
from alambic.engines.bundle_writer import BundleWriter, open_writer
from alambic.errors import EngineError, TaskError
from alambic.kinds.chat import Chat, Message
from alambic.task import load_task

TASK = """
[task]
name = "colours"
kind = "generate"
[data]
train = "rows.csv"
prompt = "Translate: {{text}}"
system = "Be brief."
{base}
{candidates}
"""
SCRATCH = """
[base]
name = "scratch"
parameters = 200_000
max_tokens = 128
"""
COLOURS = {"red": "rouge", "blue": "bleu", "green": "vert", "black": "noir", "white": "blanc"}
THINGS = {"door": "porte", "car": "voiture", "house": "maison", "lamp": "lampe", "table": "table", "key": "clé"}
FRAMES = [("the {} {} is here", "la {1} {0} est ici"), ("I see a {} {}", "je vois une {1} {0}"),
          ("where is the {} {}?", "où est la {1} {0} ?")]  # fmt: skip


def rows():
    for english, french in FRAMES:
        for colour, couleur in COLOURS.items():
            for thing, chose in THINGS.items():
                yield english.format(colour, thing), french.format(couleur, chose)


def write_task(folder, *, base="", names=("nearest",), recipe=""):
    lines = "".join(f'[[candidate]]\nname = "{n}"\n' + (recipe if n != "nearest" else "") for n in names)
    (folder / "rows.csv").write_text("en;fr\n" + "".join(f"{a};{b}\n" for a, b in rows()), encoding="utf-8")
    (folder / "task.toml").write_text(TASK.format(base=base, candidates=lines), encoding="utf-8")
    return folder / "task.toml"


@pytest.fixture(scope="module")
def looked_up(tmp_path_factory):
    folder = tmp_path_factory.mktemp("looked")
    return build(write_task(folder), out=folder / "run")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    task = write_task(
        folder, base=SCRATCH, names=("nearest", "finetune-int8"), recipe="recipe = { epochs = 2, batch_size = 16 }\n"
    )
    return task, folder / "run", build(task, out=folder / "run")


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    return ended.value.code or 0


def test_looked_up_answer_is_one_of_the_known_when_asked(looked_up):
    with alambic.open(looked_up.bundle) as writer:
        assert isinstance(writer, BundleWriter)
        replies = writer.predict(["the red door is here", "where is the blue key?"])
    assert [reply.finish_reason for reply in replies] == ["stop", "stop"]
    assert {reply.content for reply in replies} <= {french for _, french in rows()}


def test_scores_are_shares_with_intervals_when_built(looked_up):
    (candidate,) = looked_up.candidates
    for name in ("chrf", "bleu", "rouge_l", "token_f1", "exact_match"):
        score = candidate["quality"][name]
        assert 0.0 <= score["low"] <= score["value"] <= score["high"] <= 1.0 and score["n"] == candidate["n"]
    assert candidate["quality"]["chrf"]["value"] > 0.4  # the frames repeat: a near one shares most of its letters
    assert open_bundle(looked_up.bundle).manifest.scores["test"]["n"] > 0


def test_rows_are_answered_into_a_file_when_predicted(looked_up, tmp_path):
    source, target = tmp_path / "in.csv", tmp_path / "out.jsonl"
    source.write_text("text,id\nthe red door is here,1\n,2\nI see a green lamp,3\n", encoding="utf-8")
    assert run("predict", looked_up.bundle, "--input", source, "--output", target) == 1  # one row has no text
    lines = [json.loads(line) for line in target.read_text("utf-8").splitlines()]
    assert [line["id"] for line in lines] == ["1", "2", "3"]
    assert lines[0]["prediction"] and lines[0]["finish_reason"] == "stop" and "error" in lines[1]


def test_bundle_is_measured_shown_and_verified_from_the_command_line(looked_up, tmp_path, capsys):
    data = tmp_path / "rows.csv"
    data.write_text("en,fr\n" + "".join(f'"{a}","{b}"\n' for a, b in rows()), encoding="utf-8")
    assert run("measure", looked_up.bundle, "--data", data, "--text", "en", "--output", "fr", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["n"] == 90 and figures["quality"]["chrf"]["value"] > 0.8  # it was looked up in most of these rows
    assert figures["speed"]["p95_ms"] > 0 and figures["peak_ram_mb"] > 0
    assert run("show", looked_up.bundle) == 0 and "generate" in capsys.readouterr().out
    assert run("verify", looked_up.bundle) == 0


def test_system_message_of_the_task_is_added_when_a_conversation_brings_none(looked_up):
    with open_writer(looked_up.bundle) as writer:
        asked = writer.request("a red door").chat
        own = writer.request(Chat((Message("system", "Mine."), Message("user", "x")))).chat
    assert [m.content for m in asked.messages] == ["Be brief.", "Translate: a red door"]
    assert [m.content for m in own.messages] == ["Mine.", "x"]


def test_classifier_and_writer_refuse_each_others_engine(looked_up):
    from alambic.engines import open_engine

    with pytest.raises(EngineError, match="kind 'generate' writes texts"):
        open_engine(looked_up.bundle)


@pytest.mark.slow
def test_new_model_is_trained_packed_and_measured_when_built(written):
    _, run_folder, result = written
    names = {candidate["name"]: candidate for candidate in result.candidates}
    made = names["finetune-int8"]
    assert made["speed"]["tokens_per_second"] > 0 and made["speed"]["ttft_ms"] > 0 and made["size_mb"] < 5
    assert (run_folder / "report.html").read_text("utf-8").count("Worst answers") == 1


@pytest.mark.slow
def test_nothing_is_done_again_when_nothing_changed(written):
    task, run_folder, first = written
    again = build(task, out=run_folder)
    assert not again.ran and again.chosen == first.chosen
    assert open_bundle(again.bundle).manifest.seal == open_bundle(first.bundle).manifest.seal


@pytest.fixture(scope="module")
def alone(written):
    """The same run with the trained model as its only candidate: its stages are kept, the choice is another."""
    task, run_folder, _ = written
    text = task.read_text("utf-8").replace('[[candidate]]\nname = "nearest"\n', "")
    task.with_name("alone.toml").write_text(text, encoding="utf-8")
    return build(task.with_name("alone.toml"), out=run_folder)


@pytest.mark.slow
def test_golden_conversations_have_the_tokens_of_the_build_when_verified(alone):
    assert alone.chosen == "finetune-int8"
    golden = open_bundle(alone.bundle).manifest.golden_chats
    assert len(golden) == 50 and all(sample.ids for sample in golden)
    assert run("verify", alone.bundle) == 0


@pytest.mark.slow
def test_exported_forms_read_the_same_tokens_when_opened_elsewhere(alone, tmp_path):
    pytest.importorskip("xllamacpp")
    from transformers import AutoTokenizer

    from alambic.engines.llamacpp import LlamaCppWriter  # noqa: F401  (its library is there)
    from alambic.pack.gguf.check import gguf_token_ids

    assert run("export", alone.bundle, "--to", "gguf", "--out", tmp_path / "gguf", "--precision", "F16") == 0
    assert run("export", alone.bundle, "--to", "hf", "--out", tmp_path / "hf") == 0
    text = "la porte rouge est ici 😀 <|end|>"
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")(text, add_special_tokens=False)["input_ids"]
    assert gguf_token_ids(file, [text]) == [theirs]
    assert (tmp_path / "gguf" / "Modelfile").read_text("utf-8").startswith("FROM")


@pytest.mark.slow
def test_two_bundles_are_compared_on_the_same_rows(alone, looked_up, tmp_path, capsys):
    data = tmp_path / "rows.csv"
    data.write_text("en,fr\n" + "".join(f'"{a}","{b}"\n' for a, b in list(rows())[:20]), encoding="utf-8")
    capsys.readouterr()
    named = ("--data", data, "--text", "en", "--output", "fr", "--json")
    assert run("compare", looked_up.bundle, alone.bundle, *named) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["n"] == second["n"] == 20 and "difference" not in first
    assert second["difference"]["metric"] == "chrf" and second["difference"]["value"] < 0


def test_task_is_refused_when_its_keys_do_not_fit_its_kind(tmp_path):
    path = tmp_path / "task.toml"
    path.write_text('[task]\nname="x"\nkind="generate"\n[data]\ntrain="a.csv"\nlabel="y"\n', encoding="utf-8")
    with pytest.raises(TaskError) as refused:
        load_task(path)
    assert "data.label: does not apply to kind 'generate'" in str(refused.value)
    assert "base.name: missing" in str(refused.value)


def test_task_is_refused_when_an_extraction_has_no_schema(tmp_path):
    path = tmp_path / "task.toml"
    path.write_text('[task]\nname="x"\nkind="extract"\n[data]\ntrain="a.csv"\n[base]\nname="b"\n', encoding="utf-8")
    with pytest.raises(TaskError, match=r"answer\.schema: kind 'extract' needs the JSON Schema"):
        load_task(path)


TOOLS = [{"type": "function", "function": {"name": "book", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def called(tmp_path_factory):
    """A chat task whose answers call a tool, or not."""
    folder = tmp_path_factory.mktemp("chat")
    lines = []
    for day in ("Monday", "Tuesday", "Friday", "jeudi", "samedi", "dimanche"):
        for verb in ("book me for", "please come", "réservez", "venez"):
            call = {"function": {"name": "book", "arguments": json.dumps({"day": day})}}
            answer = {"role": "assistant", "content": "", "tool_calls": [call]}
            lines.append({"messages": [{"role": "user", "content": f"{verb} {day}"}, answer], "tools": TOOLS})
    for thanks in ("thanks", "merci", "bye", "au revoir"):
        chat = [{"role": "user", "content": f"{thanks} a lot {i}"} for i in range(1)]
        lines += [{"messages": [*chat, {"role": "assistant", "content": f"{thanks}!"}], "tools": TOOLS}] * 3
    (folder / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    task = '[task]\nname = "booking"\nkind = "chat"\n[data]\ntrain = "chats.jsonl"\n[[candidate]]\nname = "nearest"\n'
    (folder / "task.toml").write_text(task, encoding="utf-8")
    return build(folder / "task.toml", out=folder / "run")


def test_tool_calls_are_scored_and_given_when_answers_call_tools(called):
    quality = called.candidates[0]["quality"]
    assert set(quality) == {"token_f1", "chrf", "exact_match", "tool_calls"}
    with alambic.open(called.bundle) as writer:
        reply = writer.predict(["please come Friday"])[0]
    assert reply.finish_reason == "tool_calls" and reply.tool_calls[0].name == "book" and reply.content == ""
    assert reply.text.startswith("<tool_call>") and set(reply.tool_calls[0].arguments) == {"day"}


def test_tool_calls_are_in_the_line_when_a_file_is_answered(called, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "please come Friday"}\n', encoding="utf-8")
    assert run("predict", called.bundle, "--input", source, "--output", target) == 0
    line = json.loads(target.read_text("utf-8"))
    assert line["finish_reason"] == "tool_calls" and line["tool_calls"][0]["function"]["name"] == "book"
