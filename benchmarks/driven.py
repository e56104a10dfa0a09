"""One engine in a process of its own, asked line by line: `python driven.py llama|wheel|bare MODEL THREADS`.

`llama` runs a GGUF file by llama-cpp-python, in its own virtual environment and through llama.cpp's own functions, so
that no Python stands between two tokens; `wheel` runs the same file by xllamacpp, through this project's engine; `bare`
runs a bundle by this project's engine. Each line read is `{"ids": [...], "text": "...", "answer": n}`, each line
written `{"first": s, "whole": s, "read": n, "written": n}`, in seconds and tokens. The first line tells what runs.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CONTEXT = 4096
Ask = Callable[[dict[str, Any]], dict[str, Any]]


def main() -> None:
    """Open, say so, answer until the input ends."""
    kind, model, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    about, ask = {"llama": _llama, "wheel": _wheel, "bare": _bare}[kind](model, threads)
    out = sys.stdout
    for found in itertools.chain([about], map(ask, map(json.loads, sys.stdin))):
        out.write(json.dumps(found) + "\n")
        out.flush()


def _llama(model: str, threads: int) -> tuple[dict[str, Any], Ask]:
    """Return llama.cpp as llama-cpp-python built it: batches of its default sizes, greedy, the prompt read anew."""
    import llama_cpp as native

    quiet = native.llama_log_callback(lambda *_: None)
    native.llama_log_set(quiet, None)
    native.llama_backend_init()
    loaded = native.llama_model_load_from_file(model.encode(), native.llama_model_default_params())
    if not loaded:
        sys.exit(f"llama.cpp cannot read {model}")
    params = native.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = _CONTEXT, threads, threads
    context = native.llama_init_from_model(loaded, params)
    greedy = native.llama_sampler_init_greedy()

    def read(ids: list[int]) -> int:
        array = (native.llama_token * len(ids))(*ids)
        if native.llama_decode(context, native.llama_batch_get_one(array, len(ids))):
            sys.exit("llama_decode failed")
        return int(native.llama_sampler_sample(greedy, context, -1))

    def ask(asked: dict[str, Any], quiet: Any = quiet) -> dict[str, Any]:  # it must live as long as this
        native.llama_memory_clear(native.llama_get_memory(context), True)
        start = time.perf_counter()
        token = read(asked["ids"])
        first = time.perf_counter() - start
        for _ in range(asked["answer"] - 1):
            token = read([token])
        whole = time.perf_counter() - start
        return {"first": first, "whole": whole, "read": len(asked["ids"]), "written": asked["answer"]}

    about = {
        "engine": f"llama-cpp-python {native.__version__}",
        "features": native.llama_print_system_info().decode().strip(),
        "batch": params.n_batch,
    }
    return about, ask


def _wheel(model: str, threads: int) -> tuple[dict[str, Any], Ask]:
    """Return xllamacpp; beside the file lies `part.json`, the parameters of the part."""
    from alambic.engines.bundle_writer import load_writer
    from alambic.manifest import PartSpec

    folder = Path(model).parent
    params = {**json.loads((folder / "part.json").read_text("utf-8")), "context_tokens": _CONTEXT}
    writer = load_writer(PartSpec("writer", "llamacpp", "writer", params), folder, threads=threads)
    return writer.describe(), _asker(writer)


def _bare(model: str, threads: int) -> tuple[dict[str, Any], Ask]:
    from alambic.engines.bundle_writer import open_writer

    writer = open_writer(Path(model), threads=threads)
    return writer.describe(), _asker(writer)


def _asker(writer: Any) -> Ask:
    from alambic.kinds.chat import Chat
    from alambic.kinds.generation import GenerationRequest, Sampling

    def ask(asked: dict[str, Any]) -> dict[str, Any]:
        request = GenerationRequest(chat=Chat.of(asked["text"]), sampling=Sampling(max_tokens=asked["answer"]))
        start = time.perf_counter()
        first, usage = None, None
        for chunk in writer.stream(request):
            first = first or time.perf_counter()
            usage = chunk.usage or usage
        whole = time.perf_counter() - start
        assert first is not None and usage is not None, "an answer has a last chunk, with counts"
        return {
            "first": first - start, "whole": whole, "read": usage.prompt_tokens, "written": usage.completion_tokens
        }  # fmt: skip

    return ask


if __name__ == "__main__":
    main()
