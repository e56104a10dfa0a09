"""`alambic chat`: the conversation, its commands, Ctrl-C, and `--once` for scripts."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from alambic.bundle import Bundle, seal
from alambic.cli.chat import chat
from alambic.cli.conversation import Conversation, language, talk
from alambic.engines.bundle_writer import BundleWriter
from alambic.engines.tfidf_features import NORMALISATION
from alambic.kinds.generation import Sampling
from alambic.manifest import Manifest, PartSpec, WriterSpec
from fake_writer import FakeWriter

ANSWERS = ("Voilà.", "It is in the mail.")


def _manifest(kind: str = "chat", **writer: Any) -> Manifest:
    part = PartSpec("model", "nearest", "model", {"normalisation": NORMALISATION, "fallback": 0})
    return Manifest(
        alambic="0.1.0",
        name="replies",
        kind=kind,
        created="2026-01-01T00:00:00Z",
        entry="model",
        parts=(part,),
        writer=WriterSpec(**writer),
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A sealed bundle that looks its answers up: real, and without a model to load."""
    folder = tmp_path / "bundle"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "words.txt").write_text("invoice\n")
    for name, values in {"starts": [0, 1], "rows": [1], "weights": [1.0]}.items():
        kind = np.float32 if name == "weights" else np.int64
        np.save(folder / "model" / f"{name}.npy", np.array(values, dtype=kind))
    (folder / "model" / "answers.jsonl").write_text("".join(json.dumps(a) + "\n" for a in ANSWERS))
    return seal(folder, _manifest()).path


@pytest.fixture
def talking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str, FakeWriter]]:
    """Hold a conversation whose user types `lines`; return what stdout and stderr showed."""
    monkeypatch.setenv("LC_ALL", "C")

    def run(*lines: str | type[BaseException], kind: str = "chat", tty: bool = False, **writer: Any) -> Any:
        fake = FakeWriter()
        typed = iter(lines)

        def read(_prompt: str) -> str:
            line = next(typed, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("sys.stdin", io.StringIO())
        monkeypatch.setattr("sys.stdin.isatty", lambda: tty, raising=False)
        out = io.StringIO()
        model = BundleWriter(Bundle(tmp_path, _manifest(kind, **writer), tmp_path), fake)
        talk(Conversation(model), "replies", out=out, read=read)
        return out.getvalue(), capsys.readouterr().err, fake

    return run


def _messages(fake: FakeWriter, index: int = -1) -> list[tuple[str, str]]:
    request = fake.seen[index].chat
    assert request is not None
    return [(message.role, message.content) for message in request.messages]


def test_answers_go_to_stdout_and_times_to_stderr(talking: Callable[..., Any]) -> None:
    out, err, fake = talking("one", "two words")
    assert out == "You said: one\nYou said: two words\n"
    assert "2 tokens read in 2 ms, 4 written in" in err
    assert _messages(fake) == [("user", "one"), ("assistant", "You said: one"), ("user", "two words")]


def test_conversation_is_forgotten_when_reset(talking: Callable[..., Any]) -> None:
    _, err, fake = talking("one", "/reset", "two")
    assert _messages(fake) == [("user", "two")]
    assert "The conversation starts anew." in err


def test_system_prompt_is_used_when_set(talking: Callable[..., Any]) -> None:
    _, err, fake = talking("/system", "/system Be brief.", "one", system="Be kind.")
    assert _messages(fake) == [("system", "Be brief."), ("user", "one")]
    assert "No system prompt of yours" in err and "System prompt: Be brief." in err


def test_bundle_brings_its_own_system_prompt(talking: Callable[..., Any]) -> None:
    _, _, fake = talking("one", system="Be kind.")
    assert _messages(fake) == [("system", "Be kind."), ("user", "one")]


def test_each_text_is_asked_alone_when_the_task_is_text_to_text(talking: Callable[..., Any]) -> None:
    _, _, fake = talking("one", "two", kind="generate", prompt="Translate: {text}")
    assert _messages(fake) == [("user", "Translate: two")]


def test_line_goes_on_after_a_backslash(talking: Callable[..., Any]) -> None:
    _, _, fake = talking("one\\", "two")
    assert _messages(fake) == [("user", "one\ntwo")]


def test_conversation_is_saved_as_training_data_is_written(talking: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "talks.jsonl"
    _, err, _ = talking(f"/save {file}", "/system Brève.", "été", f"/save {file}", "/reset", "two", f"/save {file}")
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert [len(row["messages"]) for row in rows] == [3, 3]  # a system prompt outlives /reset
    assert rows[0]["messages"][:2] == [{"role": "system", "content": "Brève."}, {"role": "user", "content": "été"}]
    assert "There is nothing to save yet." in err and f"2 messages added to {file}" in err


def test_conversation_goes_on_when_it_cannot_be_saved(talking: Callable[..., Any], tmp_path: Path) -> None:
    out, err, _ = talking("one", f"/save {tmp_path / 'no' / 'such.jsonl'}", "/save", "two")
    assert "not saved: No such file or directory" in err and "Where to? /save FILE" in err
    assert out.endswith("You said: two\n")


def test_unknown_command_names_the_nearest(talking: Callable[..., Any]) -> None:
    _, err, fake = talking("/rest", "/help", "/quit", "never")
    assert "No command /rest; did you mean '/reset'?" in err and "/save FILE" in err
    assert fake.seen == []


def test_conversation_goes_on_after_an_error(talking: Callable[..., Any]) -> None:
    out, err, fake = talking("too long", "one")
    assert "error: the prompt has 900 tokens; the model reads 512" in err
    assert out == "You said: one\n"
    assert _messages(fake) == [("user", "one")]


def test_ctrl_c_at_the_prompt_ends_nothing(talking: Callable[..., Any]) -> None:
    out, _, _ = talking(KeyboardInterrupt, "one")
    assert out == "You said: one\n"


def test_ctrl_c_stops_the_answer_only(tmp_path: Path) -> None:
    # A shell starts what runs in the background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _interrupted(tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupted(tmp_path: Path) -> None:
    fake = FakeWriter()
    conversation = Conversation(BundleWriter(Bundle(tmp_path, _manifest(), tmp_path), fake))
    out = io.StringIO()

    def interrupt() -> None:
        fake.entered.wait(60)
        while "word" not in out.getvalue():
            time.sleep(0.005)
        signal.raise_signal(signal.SIGINT)

    # Python handles a signal in the main thread, whichever thread it was raised in.
    pressing = threading.Thread(target=interrupt)
    pressing.start()
    said = conversation.answer("endless", out)
    pressing.join()
    assert said.last is None and said.text.startswith("word")
    assert (fake.running, fake.closed_early) == (0, 1)
    assert conversation.messages[-1].content == said.text
    assert conversation.answer("next", io.StringIO()).text == "You said: next"


@pytest.mark.parametrize(("tty", "shown"), [(True, "[31m red\n"), (False, "\x1b[31m red\n")])
def test_terminal_obeys_nothing_that_the_model_writes(tmp_path: Path, tty: bool, shown: str) -> None:
    out = io.StringIO()
    out.isatty = lambda: tty  # type: ignore[method-assign]
    model = BundleWriter(Bundle(tmp_path, _manifest(), tmp_path), FakeWriter(answer="\x1b[31m red\n"))
    said = Conversation(model).answer("one", out)
    assert (out.getvalue(), said.text) == (shown, "\x1b[31m red\n")


def test_settings_replace_those_of_the_bundle(tmp_path: Path) -> None:
    fake = FakeWriter()
    manifest = _manifest(sampling={"temperature": 0.3, "max_tokens": 40})
    model = BundleWriter(Bundle(tmp_path, manifest, tmp_path), fake)
    for given in ({"temperature": 0.9, "max_tokens": None, "seed": 4}, {"temperature": None}, {"temperature": None}):
        Conversation(model, sampling=given).answer("one", io.StringIO())
    assert fake.seen[0].sampling == Sampling(temperature=0.9, max_tokens=40, seed=4)
    assert fake.seen[1].sampling.seed != fake.seen[2].sampling.seed


@pytest.mark.parametrize(
    ("values", "spoken"),
    [({"LC_ALL": "fr_FR.UTF-8"}, "fr"), ({"LC_ALL": "", "LANG": "fr_CA"}, "fr"), ({"LC_ALL": "C", "LANG": "fr"}, "en")],
)
def test_language_is_that_of_the_locale(values: dict[str, str], spoken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LC_MESSAGES", raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert language() == spoken


def test_greeting_is_french_in_a_french_terminal(talking: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "fr_FR.UTF-8")
    _, err, _ = talking("/help", tty=True)
    assert "replies répond ici ; rien ne quitte cette machine." in err and "oublier la discussion" in err


def test_prompt_stays_out_of_the_answers_when_stdout_is_a_file(talking: Callable[..., Any]) -> None:
    out, err, _ = talking("one\\", "two", tty=True)
    assert out == "You said: one\ntwo\n"
    assert "> . " in err


def test_once_prints_the_answer_only(bundle: Path) -> None:
    done = CliRunner().invoke(chat, [str(bundle), "--once", "the invoice?"])
    assert (done.exit_code, done.stdout) == (0, "It is in the mail.\n")
    assert "tokens read in" in done.stderr


def test_once_reads_stdin_when_told(bundle: Path) -> None:
    done = CliRunner().invoke(chat, [str(bundle), "--once", "-"], input="the\ninvoice?")
    assert (done.exit_code, done.stdout) == (0, "It is in the mail.\n")


def test_once_is_refused_when_empty(bundle: Path) -> None:
    done = CliRunner().invoke(chat, [str(bundle), "--once", " "])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "the text is empty" in done.stderr


def test_lines_of_a_pipe_are_answered_one_by_one(bundle: Path) -> None:
    program = "from alambic.cli.chat import chat; chat()"
    done = subprocess.run(
        [sys.executable, "-c", program, str(bundle)],
        input="the invoice?\nbonjour\n",
        capture_output=True,
        text=True,
        env=os.environ | {"LC_ALL": "C.UTF-8"},
        check=True,
    )
    assert done.stdout == "It is in the mail.\nVoilà.\n"


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []

    def run(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "alambic", "serve", *map(str, arguments), "--port", "0", "--json"]
        processes.append(subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return processes[-1]

    yield run
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_serve_answers_for_a_bundle_that_writes(bundle: Path, start: Callable[..., Any]) -> None:
    import httpx

    process = start(bundle)
    url = json.loads(process.stdout.readline())["url"]
    body = {"messages": [{"role": "user", "content": "the invoice?"}]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False).json()
    assert answer["choices"][0]["message"]["content"] == "It is in the mail."
    assert answer["model"] == "replies" and answer["system_fingerprint"].startswith("fp_")
    assert "v1/chat/completions" in httpx.get(url, timeout=60, trust_env=False).text
    card = httpx.get(f"{url}/v1/models/replies", timeout=60, trust_env=False).json()
    assert (card["alambic"]["kind"], card["alambic"]["tools"], card["created"]) == ("chat", False, 1_767_225_600)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
