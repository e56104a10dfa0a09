"""The parts of the serving benchmark that decide what is compared: the native build, the processes, the prompts."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import driven
import native
import serving
from alambic.bundle import seal
from alambic.engines.bundle_writer import open_writer
from alambic.kinds.chat import Chat
from alambic.kinds.generation import GenerationRequest
from alambic.manifest import Manifest, PartSpec, WriterSpec
from genai_model import part_params, tiny_model

posix = pytest.mark.skipif(os.name == "nt", reason="the stand-in for an interpreter is a shell script")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "FOLDER", tmp_path / "native")
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "native"


def interpreter(folder: Path, says: str, *, code: int = 0) -> None:
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    (folder / "bin" / "python").write_text(f"#!/bin/sh\necho '{says}'\nexit {code}\n")
    (folder / "bin" / "python").chmod(0o755)


def test_native_says_what_is_missing_when_no_compiler_is_there(place, monkeypatch):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert "no C++ compiler" in (native.missing() or "")
    monkeypatch.setenv("CXX", "/opt/c++")
    assert native.missing() is None


@posix
def test_native_is_kept_when_it_is_there(place, monkeypatch):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    interpreter(place, "CPU : AVX512 = 1 ")
    (place / "made.json").write_text(json.dumps(native._MADE))
    assert native.missing() is None
    assert native.build()["features"] == "CPU : AVX512 = 1"
    (place / "made.json").write_text(json.dumps({**native._MADE, "version": "0.0.1"}))
    assert native.missing() is not None, "another version is not the one that is compared with"


@posix
def test_native_stops_and_names_its_log_when_pip_fails(place, monkeypatch):
    real, asked = subprocess.run, []

    def run(command, **options):
        if command[1:3] == ["-m", "venv"]:
            return interpreter(place, "no matching distribution", code=1)
        asked.append((command, options.get("env")))
        return real(command, **options)

    monkeypatch.setattr(native.subprocess, "run", run)
    with pytest.raises(SystemExit, match=r"native\.log"):
        native.build()
    command, environment = asked[-1]
    assert command[-2:] == ["llama-cpp-python", f"llama-cpp-python=={native.VERSION}"]
    assert "-DGGML_NATIVE=ON" in environment["CMAKE_ARGS"]
    assert "no matching distribution" in Path(f"{place}.log").read_text()


def test_table_names_the_wheel_and_why_when_nothing_was_built():
    about = {"version": "1.2", "llama_cpp": "b1 abc"}
    said = serving._rival(about, "no C++ compiler on this machine")
    assert "xllamacpp 1.2" in said and "not the native build" in said and "no C++ compiler" in said


def test_rates_count_the_prompt_until_the_first_token_and_later_tokens_after_it():
    answer = {"first": 0.5, "whole": 2.5, "read": 500, "written": 41}
    assert serving._prompt_rate(answer) == 1000
    assert serving._generation_rate(answer) == 20


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    _, writer = tiny_model(tmp_path_factory)
    folder = tmp_path_factory.mktemp("bench") / "bundle"
    shutil.copytree(writer, folder / "writer")
    part = PartSpec("writer", "openvino-genai", "writer", part_params())
    manifest = Manifest(
        alambic="bench", name="shape", kind="chat", created="2026-01-01T00:00:00Z", entry="writer", parts=(part,),
        writer=WriterSpec(sampling={"max_tokens": 4}),
    )  # fmt: skip
    seal(folder, manifest)
    return folder


def test_llama_cpp_gets_the_ids_that_our_engine_reads(bundle):
    text = serving._text(40, 7)
    with open_writer(bundle, threads=1) as writer:
        assert serving._ids(bundle, text) == writer.token_ids(GenerationRequest(chat=Chat.of(text)))


def test_driven_engine_tells_times_and_counts(bundle, monkeypatch, capsys):
    text = serving._text(40, 7)
    asked = json.dumps({"text": text, "ids": [], "answer": 3})
    monkeypatch.setattr(sys, "argv", ["driven.py", "bare", str(bundle), "1"])
    lines: list[str] = []

    def asking():
        for number in range(2):  # whoever asks waits for the line before
            lines.extend(capsys.readouterr().out.splitlines())
            assert len(lines) == number + 1
            yield asked

    monkeypatch.setattr(sys, "stdin", asking())
    driven.main()
    about, *answers = map(json.loads, [*lines, *capsys.readouterr().out.splitlines()])
    assert about["engine"] == "openvino-genai" and about["threads"] == 1
    assert len(answers) == 2
    for answer in answers:
        assert 0 < answer["first"] <= answer["whole"]
        assert (answer["read"], answer["written"]) == (len(serving._ids(bundle, text)), 3)


def test_driven_llama_reads_each_prompt_anew_and_decodes_token_by_token(monkeypatch):
    read: list[object] = []
    fake = _fake_llama(read)
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    about, ask = driven._llama("model.gguf", 2)
    assert about["engine"] == "llama-cpp-python 9"
    assert fake.context == {"n_threads": 2, "n_threads_batch": 2}
    for _ in range(2):
        found = ask({"ids": [5, 6, 7], "answer": 3})
        assert (found["read"], found["written"]) == (3, 3)
    assert read == ["clear", [5, 6, 7], [42], [42]] * 2


def _fake_llama(read: list[object]) -> types.SimpleNamespace:
    """Return what `driven` uses of llama_cpp: it writes down what is decoded and always answers 42."""
    fake = types.SimpleNamespace(__version__="9", llama_token=ctypes.c_int32, context={})

    def opened(model, params):
        fake.context = {name: getattr(params, name) for name in ("n_threads", "n_threads_batch")}
        return object()

    fake.llama_log_callback = lambda function: function
    fake.llama_log_set = lambda callback, data: None
    fake.llama_backend_init = lambda: None
    fake.llama_model_default_params = types.SimpleNamespace
    fake.llama_model_load_from_file = lambda path, params: object()
    fake.llama_context_default_params = lambda: types.SimpleNamespace(n_batch=2048)
    fake.llama_init_from_model = opened
    fake.llama_sampler_init_greedy = object
    fake.llama_print_system_info = lambda: b"CPU : AVX2 = 1"
    fake.llama_get_memory = lambda context: "memory"
    fake.llama_memory_clear = lambda memory, data: read.append("clear")
    fake.llama_batch_get_one = lambda array, count: list(array)
    fake.llama_decode = lambda context, batch: read.append(batch)
    fake.llama_sampler_sample = lambda greedy, context, index: 42
    return fake
