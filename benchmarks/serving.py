"""A model of the Qwen2.5-0.5B shape (random weights): through our HTTP server, bare, and in llama.cpp, in turn.

Weights are random, so texts are noise and no answer ends early: what is timed is the work. llama.cpp is built from the
source package of llama-cpp-python for this very processor (`native`); where no compiler is, it comes from the wheel of
xllamacpp, which chooses its kernels at run time, and the table says so. Every engine runs in a process of its own, on
as many threads as there are cores, and waits while another one is asked.

ALAMBIC_BENCH_TINY=1 tries the program out on two narrow layers; its numbers mean nothing.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import native
from run import HERE, TINY, data_folder, say

MINUTES = 20
WHAT = (
    "Qwen2.5-0.5B shape in int8 and int4: HTTP server against bare engine and against llama.cpp Q8_0 and Q4_0, 8 "
    "streams against 1, first token of a kept prompt"
)
_STREAMS = 8
_PAUSE_S = 0.05  # between two engines: threads of the last one stop spinning


@dataclass(frozen=True)
class _Sizes:
    layers: int | None = None
    width: int | None = None
    prompt: int = 512
    answer: int = 64
    long: int = 1500
    rounds: int = 12


_SIZES = _Sizes(layers=2, width=64, prompt=64, answer=8, long=200, rounds=4) if TINY else _Sizes()
# Our precision: llama.cpp's, and the bars of prompt and generation.
_RIVALS = {"int8": ("Q8_0", 2.5, 0.95), "int4": ("Q4_0", 1.3, 0.9)}


def run(store: Any) -> str:
    """Build llama.cpp and the models once, time everything in turn."""
    why = native.missing()
    built = store.part("native", native.build) if why is None else None
    store.part("models", lambda: _make(store.folder))
    found = {
        form: store.part(f"{form}-in-turn", lambda form=form: _in_turn(store.folder, form, wheel=built is None))
        for form in _RIVALS
    }
    streams = store.part("streams", lambda: _streams(store.folder))
    kept = store.part("kept", lambda: _kept(store.folder))
    lines = ["| what | measured | bar |", "|---|---|---|"]
    for form in _RIVALS:
        lines += _rows(form, found[form])
    lines += [
        f"| int8, {_STREAMS} streams against 1 through HTTP, tokens/s of all | {_ratio(streams)} times | >= 3.3 |",
        f"| int8, first token, second request with the same {_SIZES.long}-token prompt and another end | "
        f"{_percent(kept['other'])} of the first ({kept['first_ms']:.0f} ms) | <= 5 % |",
        f"| the same, the very same prompt | {_percent(kept['same'])} of the first | |",
        "",
        f"Medians of {_SIZES.rounds} rounds after one to warm up, taken in turn in one run, {found['int8']['threads']} "
        "threads each, with the range of the middle half of the rounds. Prompt and generation of ours are timed by the "
        "client, through HTTP: prompt tokens over the time to the first piece of text, later tokens over the rest.",
        "",
        _rival(found["int8"]["about"], why),
    ]
    return "\n".join(lines)


def _rows(form: str, found: dict[str, Any]) -> list[str]:
    theirs, prompt, generation = _RIVALS[form]
    rows = [
        f"| {form}, whole answer through HTTP against the bare engine, {found['read']} tokens read, {_SIZES.answer} "
        f"written | {_percent(found['overhead'])} more time | <= 3 % |"
    ]
    for name, bar in (("prompt", prompt), ("generation", generation)):
        ours, other = found[f"ours_{name}"], found[f"theirs_{name}"]
        rows.append(
            f"| {name}, tokens/s, ours {form} against llama.cpp {theirs} | {_ratio(found[name])} times ({ours:.4g} "
            f"against {other:.4g}) | >= {bar} |"
        )
    return rows


def _rival(about: dict[str, Any], why: str | None) -> str:
    if why is None:
        flags = f"{native.CMAKE_ARGS} and CXXFLAGS={native.CXXFLAGS!r}"
        said = f"llama.cpp: {about['engine']}, built here from its source package with {flags}, called without Python"
        return f"{said} between two tokens: {about['features']}."
    said = f"llama.cpp: the wheel of xllamacpp {about['version']} ({about['llama_cpp']}), not the native build that the"
    return f"{said} bars are for: {why}."


def _percent(values: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{100 * middle:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _ratio(values: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def _make(folder: Path) -> dict[str, Any]:
    """Write the model once in each form: bundles for our engine, folders with a GGUF file for llama.cpp."""
    from alambic.bundle import seal
    from alambic.events import drain
    from alambic.manifest import Manifest, WriterSpec
    from alambic.model.clone import ORIGINALS, clone
    from alambic.pack.gguf import pack as pack_gguf
    from alambic.pack.writer_openvino import pack_openvino

    layers = _SIZES.layers or ORIGINALS["qwen2.5-0.5b"].config["num_hidden_layers"]
    for name in ("model", *_RIVALS, *(theirs for theirs, *_ in _RIVALS.values())):
        shutil.rmtree(folder / name, ignore_errors=True)
    clone(
        "qwen2.5-0.5b", folder / "model", tokenizers=data_folder() / "tokenizers", layers=layers, width=_SIZES.width
    )  # fmt: skip
    for form, (theirs, *_) in _RIVALS.items():
        part = drain(pack_openvino(folder / "model", folder / form / "writer", precision=form))
        manifest = Manifest(
            alambic="bench", name="shape", kind="chat", created="2026-01-01T00:00:00Z", entry=part.name, parts=(part,),
            writer=WriterSpec(sampling={"max_tokens": _SIZES.answer}),
        )  # fmt: skip
        seal(folder / form, manifest)
        spec = drain(pack_gguf(folder / "model", folder / theirs, form=theirs))
        (folder / theirs / "part.json").write_text(json.dumps(spec.params), "utf-8")
    shutil.rmtree(folder / "model")
    return {"layers": layers}


def _in_turn(folder: Path, form: str, *, wheel: bool) -> dict[str, Any]:
    """Ask the server, the bare engine and llama.cpp the same, in an order that turns; return what each round found."""
    theirs = folder / _RIVALS[form][0] / "model.gguf"
    rival = _Driven("wheel", theirs) if wheel else _Driven("llama", theirs, python=native.python())
    with _Served(folder / form) as served, _Driven("bare", folder / form) as bare, rival:
        say(f"  {form}: HTTP, bare, llama.cpp")
        rounds = [_round(served, bare, rival, folder / form, i) for i in range(_SIZES.rounds + 1)][1:]
    found: dict[str, Any] = {"about": rival.about, "threads": _threads()}
    found["read"] = round(statistics.median(ours["read"] for ours, *_ in rounds))
    found["overhead"] = [ours["whole"] / alone["whole"] - 1.0 for ours, alone, _ in rounds]
    for name, rate in (("prompt", _prompt_rate), ("generation", _generation_rate)):
        found[name] = [rate(ours) / rate(other) for ours, _, other in rounds]
        found[f"ours_{name}"] = statistics.median(rate(ours) for ours, *_ in rounds)
        found[f"theirs_{name}"] = statistics.median(rate(other) for *_, other in rounds)
    return found


def _round(served: _Served, bare: _Driven, rival: _Driven, bundle: Path, number: int) -> list[dict[str, Any]]:
    text = _text(_SIZES.prompt, 40_000 + number)
    asked = {"text": text, "ids": _ids(bundle, text), "answer": _SIZES.answer}
    work = [lambda: served.ask(text), lambda: bare.ask(asked), lambda: rival.ask(asked)]
    answers: list[Any] = [None] * len(work)
    for i in range(len(work)):
        time.sleep(_PAUSE_S)
        turn = (i + number) % len(work)
        answers[turn] = work[turn]()
    return answers


def _ids(bundle: Path, text: str) -> list[int]:
    """Return what the model reads of a message, by the tokenizer and the template of the bundle."""
    from tokenizers import Tokenizer

    from alambic.kinds.chat import Chat
    from alambic.render import ChatTemplate, pinned

    writer = bundle / "writer"
    params = json.loads((bundle / "bundle.json").read_text("utf-8"))["parts"][0]["params"]
    template = ChatTemplate(
        pinned((writer / "chat_template.jinja").read_text("utf-8")), params["special"], tuple(params["ends"])
    )
    tokenizer = Tokenizer.from_file(str(writer / "tokenizer.json"))
    return list(tokenizer.encode(template.render(Chat.of(text), reply=True), add_special_tokens=False).ids)


def _prompt_rate(answer: dict[str, Any]) -> float:
    return float(answer["read"] / answer["first"])


def _generation_rate(answer: dict[str, Any]) -> float:
    return float((answer["written"] - 1) / (answer["whole"] - answer["first"]))


def _streams(folder: Path) -> list[float]:
    with _Served(folder / "int8") as served:
        return [_together(served, i) for i in range(_SIZES.rounds + 1)][1:]


def _together(served: _Served, number: int) -> float:
    """Return tokens a second of 8 streams over those of 1."""
    start = time.perf_counter()
    one = served.ask(_text(64, 10_000 + number))["written"]
    alone = one / (time.perf_counter() - start)
    texts = [_text(64, 20_000 + _STREAMS * number + i) for i in range(_STREAMS)]
    start = time.perf_counter()
    with ThreadPoolExecutor(_STREAMS) as pool:
        written = sum(answer["written"] for answer in pool.map(served.ask, texts))
    return float(written / (time.perf_counter() - start) / alone)


def _kept(folder: Path) -> dict[str, Any]:
    """Return first-token times of later requests over that of the first, which read the whole prompt."""
    with _Served(folder / "int8") as served:
        rounds = [_again(served, i) for i in range(_SIZES.rounds + 1)][1:]
    return {
        "other": [other / first for first, other, _ in rounds],
        "same": [same / first for first, _, same in rounds],
        "first_ms": 1000 * statistics.median(first for first, *_ in rounds),
    }


def _again(served: _Served, number: int) -> list[float]:
    text = _text(_SIZES.long, 30_000 + number)
    times = []
    for end in (" A", " B", " B"):
        times.append(served.ask(text + end, answer=4)["first"])
        time.sleep(_PAUSE_S)
    return times


def _text(tokens: int, number: int) -> str:
    """Return a text of about `tokens` tokens that no other number has from its first words on."""
    return f"{number} " + " ".join(f"w{(number * 7919 + i * 31) % 997}" for i in range(tokens // 4))


def _threads() -> int:
    return os.cpu_count() or 1


class _Driven:
    """An engine in a process of its own that `driven` opens and asks."""

    def __init__(self, kind: str, model: Path, *, python: Path = Path(sys.executable)) -> None:
        command = [str(python), str(HERE / "driven.py"), kind, str(model), str(_threads())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._read()

    def ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Have one answer written; return its times and counts."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"an engine ended with exit code {self._process.wait()}: {self._process.args}")
        found: dict[str, Any] = json.loads(line)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)


class _Served:
    """`alambic serve BUNDLE` in a process of its own."""

    def __init__(self, bundle: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "alambic", "serve", str(bundle), "--port", str(self.port)]
        command += ["--threads", str(_threads())]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(600):
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                time.sleep(0.2)
        raise SystemExit("the server did not start")

    def ask(self, text: str, *, answer: int | None = None) -> dict[str, Any]:
        """Stream one answer; return seconds until its first piece of text and of the whole, and its tokens."""
        body = json.dumps({
            "messages": [{"role": "user", "content": text}], "max_tokens": answer or _SIZES.answer, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True},
        })  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        start = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise SystemExit(reply.read().decode()[:500])
        first, last = None, b""
        while line := reply.readline():
            if first is None and b'"content":' in line and b'"role"' not in line:
                first = time.perf_counter()
            last = line if b'"choices":[]' in line else last
        whole = time.perf_counter() - start
        connection.close()
        usage = json.loads(last.removeprefix(b"data: "))["usage"]
        return {
            "first": (first or time.perf_counter()) - start, "whole": whole, "read": usage["prompt_tokens"],
            "written": usage["completion_tokens"],
        }  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)
