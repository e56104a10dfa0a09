"""A model of the Qwen2.5-0.5B shape (random weights) in 8 bits: through our HTTP server, bare, and in llama.cpp.

Weights are random, so texts are noise and no answer ends early: what is timed is the work. llama.cpp comes from the
wheel of xllamacpp, which chooses its kernels at run time; a build of your own with GGML_NATIVE=ON may differ.
"""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from run import data_folder, say

MINUTES = 15
WHAT = "Qwen2.5-0.5B shape in int8: HTTP server against bare engine, 8 streams against 1, prompt kept, llama.cpp Q8_0"
_PROMPT, _ANSWER, _LONG = 512, 64, 1500
_ROUNDS = 12
_STREAMS = 8


def run(store: Any) -> str:
    """Make the bundle once, time everything in turn."""
    store.part("model", lambda: _make(store.folder))
    found = store.part("times", lambda: _times(store.folder))
    lines = [
        "| what | measured | bar |",
        "|---|---|---|",
        f"| whole answer through HTTP against the bare engine, {_PROMPT} tokens read, {_ANSWER} written | "
        f"{_percent(found['overhead'])} more time | <= 3 % |",
        f"| {_STREAMS} streams against 1 through HTTP, tokens/s of all | {_ratio(found['streams'])} times | >= 3.3 |",
        f"| first token, second request with the same {_LONG}-token prompt | {_percent(found['kept'])} of the first "
        "| <= 5 % |",
        f"| prompt, tokens/s, ours int8 against llama.cpp Q8_0 | {_ratio(found['prompt'])} times "
        f"({found['ours_prompt']:.0f} against {found['theirs_prompt']:.0f}) | >= 2.5 (native build) |",
        f"| generation, tokens/s, ours int8 against llama.cpp Q8_0 | {_ratio(found['generation'])} times "
        f"({found['ours_generation']:.1f} against {found['theirs_generation']:.1f}) | >= 0.95 (native build) |",
        "",
        f"Medians of {_ROUNDS} rounds, taken in turn in one run, with the range of the middle half of the rounds.",
    ]
    return "\n".join(lines)


def _percent(values: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{100 * middle:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _ratio(values: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def _make(folder: Path) -> dict[str, Any]:
    from alambic.bundle import seal
    from alambic.events import drain
    from alambic.manifest import Manifest, WriterSpec
    from alambic.model.clone import ORIGINALS, clone
    from alambic.pack.gguf import pack as pack_gguf
    from alambic.pack.writer_openvino import pack_openvino

    layers = ORIGINALS["qwen2.5-0.5b"].config["num_hidden_layers"]
    for name in ("model", "bundle", "gguf"):
        shutil.rmtree(folder / name, ignore_errors=True)
    clone("qwen2.5-0.5b", folder / "model", tokenizers=data_folder() / "tokenizers", layers=layers)
    part = drain(pack_openvino(folder / "model", folder / "bundle" / "writer", precision="int8"))
    manifest = Manifest(
        alambic="bench", name="shape", kind="chat", created="2026-01-01T00:00:00Z", entry=part.name, parts=(part,),
        writer=WriterSpec(sampling={"max_tokens": _ANSWER}),
    )  # fmt: skip
    seal(folder / "bundle", manifest)
    spec = drain(pack_gguf(folder / "model", folder / "gguf", form="Q8_0"))
    shutil.rmtree(folder / "model")
    (folder / "gguf.json").write_text(json.dumps({"params": spec.params}), "utf-8")
    return {"layers": layers}


def _times(folder: Path) -> dict[str, Any]:
    from alambic.engines.bundle_writer import load_writer, open_writer
    from alambic.manifest import PartSpec

    params = json.loads((folder / "gguf.json").read_text("utf-8"))["params"]
    params = {**params, "context_tokens": 4096}
    found: dict[str, Any] = {}
    with open_writer(folder / "bundle") as ours, _Served(folder / "bundle") as served:
        say("  HTTP against bare")
        pairs = [_pair(ours, served, i) for i in range(_ROUNDS + 1)][1:]
        found["overhead"] = [http / bare - 1.0 for http, bare in pairs]
        say("  streams")
        found["streams"] = [_together(served, i) for i in range(_ROUNDS // 2 + 1)][1:]
        say("  prompt kept")
        found["kept"] = [_kept(served, i) for i in range(_ROUNDS // 2 + 1)][1:]
    with open_writer(folder / "bundle") as ours:
        theirs = load_writer(PartSpec("writer", "llamacpp", "writer", params), folder / "gguf")
        say("  llama.cpp")
        rounds = [_against(ours, theirs, i) for i in range(_ROUNDS + 1)][1:]
        theirs.close()
    for name in ("prompt", "generation"):
        found[name] = [a[name] / b[name] for a, b in rounds]
        found[f"ours_{name}"] = statistics.median(a[name] for a, _ in rounds)
        found[f"theirs_{name}"] = statistics.median(b[name] for _, b in rounds)
    return found


def _text(tokens: int, number: int) -> str:
    """Return a text of about `tokens` tokens that no other number has from its first words on."""
    return f"{number} " + " ".join(f"w{(number * 7919 + i * 31) % 997}" for i in range(tokens // 4))


def _request(tokens: int, number: int, answer: int = _ANSWER) -> Any:
    from alambic.kinds.chat import Chat
    from alambic.kinds.generation import GenerationRequest, Sampling

    return GenerationRequest(chat=Chat.of(_text(tokens, number)), sampling=Sampling(max_tokens=answer))


def _whole(writer: Any, request: Any) -> tuple[float, float, Any]:
    """Return seconds until the first token, of the whole answer, and its usage."""
    start = time.perf_counter()
    first, usage = None, None
    for chunk in writer.stream(request):
        first = first or time.perf_counter()
        usage = chunk.usage or usage
    return (first or start) - start, time.perf_counter() - start, usage


def _pair(ours: Any, served: _Served, number: int) -> tuple[float, float]:
    """Ask the same of both, in an order that alternates; return seconds through HTTP and bare."""
    work = [
        lambda: served.ask(_text(_PROMPT, number))[1],
        lambda: _whole(ours, _request(_PROMPT, number))[1],
    ]
    if number % 2:
        bare, http_ = work[1](), work[0]()
    else:
        http_, bare = work[0](), work[1]()
    return http_, bare


def _together(served: _Served, number: int) -> float:
    """Return tokens a second of 8 streams over those of 1."""
    start = time.perf_counter()
    served.ask(_text(64, 10_000 + number))
    alone = _ANSWER / (time.perf_counter() - start)
    start = time.perf_counter()
    with ThreadPoolExecutor(_STREAMS) as pool:
        list(pool.map(served.ask, [_text(64, 20_000 + _STREAMS * number + i) for i in range(_STREAMS)]))
    return _STREAMS * _ANSWER / (time.perf_counter() - start) / alone


def _kept(served: _Served, number: int) -> float:
    text = _text(_LONG, 30_000 + number)
    first, _ = served.ask(text + " A", answer=4)
    second, _ = served.ask(text + " B", answer=4)
    return second / first


def _against(ours: Any, theirs: Any, number: int) -> tuple[dict[str, float], dict[str, float]]:
    rates = []
    for writer in (ours, theirs) if number % 2 else (theirs, ours):
        first, whole, usage = _whole(writer, _request(_PROMPT, 40_000 + number))
        rates.append(
            {"prompt": usage.prompt_tokens / first, "generation": (usage.completion_tokens - 1) / (whole - first)}
        )
    return (rates[0], rates[1]) if number % 2 else (rates[1], rates[0])


class _Served:
    """`alambic serve BUNDLE` in a process of its own."""

    def __init__(self, bundle: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "alambic", "serve", str(bundle), "--port", str(self.port)]
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

    def ask(self, text: str, *, answer: int = _ANSWER) -> tuple[float, float]:
        """Stream one answer; return seconds until its first piece, and of the whole."""
        body = json.dumps(
            {"messages": [{"role": "user", "content": text}], "max_tokens": answer, "temperature": 0, "stream": True}
        )
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        start = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise SystemExit(reply.read().decode()[:500])
        first = None
        while line := reply.readline():
            if first is None and b'"content":' in line and b'"role"' not in line:
                first = time.perf_counter()
        connection.close()
        return (first or time.perf_counter()) - start, time.perf_counter() - start

    def __enter__(self) -> _Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)
