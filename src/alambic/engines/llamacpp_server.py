"""llama.cpp in this process, by the library xllamacpp: a model, its slots, and requests as JSON values.

The library always listens somewhere: here that is a Unix socket in a folder that only this user can enter (a port of
this machine, behind a random key, where there are no such sockets). Nothing is printed: its log is turned off.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alambic._extras import load
from alambic.errors import EngineError, InputTooLong

Json = dict[str, Any]
_LONGEST_PATH = 100  # bytes of a Unix socket's path
_TIMEOUT = 600.0
_SILENT = -1


class LlamaServer:
    """A GGUF file that is open. Safe to use from several threads; close it when done."""

    def __init__(
        self, file: Path, *, context: int, slots: int = 1, pool: int | None = None, threads: int | None = None,
        exact: bool = False,
    ) -> None:  # fmt: skip
        """Load a model.

        Args:
            file: the GGUF file.
            context: most tokens of prompt and answer of one request.
            slots: requests that are worked on at once.
            pool: tokens that all of them hold together; None: `context`.
            threads: of the computation; None lets llama.cpp choose.
            exact: keys and values in float32 and no fused attention, for proofs.

        Raises:
            EngineError: the file cannot be opened.
            MissingExtra: xllamacpp is not installed.
        """
        xllamacpp = load("xllamacpp")
        if not file.is_file():
            raise EngineError(f"{file}: missing", hint="build the bundle again")
        self.slots, self.context, self.pool = slots, context, max(context, pool or context)
        self.build = dict(xllamacpp.BUILD_INFO)
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.kv_unified = self.pool, slots, True
        params.n_batch = params.n_ubatch = 512  # a request can be given up between two batches of its prompt
        params.n_gpu_layers, params.fit_params, params.ctx_shift = 0, False, False
        params.cache_ram_mib = 0  # up to 8 GB of old prompts otherwise
        params.warmup, params.offline, params.ui, params.verbosity = False, True, False, _SILENT
        if threads is not None:
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        if exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.threads = threads
        self._key = secrets.token_urlsafe(24)
        self._folder = Path(tempfile.mkdtemp(prefix="alambic-"))
        self._address = _address(self._folder)
        params.api_keys, params.hostnames, params.port = [self._key], [self._address or "127.0.0.1"], 0
        self._gate, self._busy, self._closing = threading.Condition(), 0, False
        try:
            self._server: Any = xllamacpp.Server(params)
        except (RuntimeError, ValueError) as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise EngineError(
                f"{file}: llama.cpp cannot open this file ({error})", hint="build the bundle again"
            ) from error
        # Its loop may start after the constructor returns, and one that is told to stop before that never stops. An
        # answer is proof that it runs; it warms the model up too.
        self.complete({"prompt": [0], "max_tokens": 1, "cache_prompt": False})

    def complete(self, body: Mapping[str, Any], on_chunk: Callable[[Json], bool] | None = None) -> Json:
        """Run one request of llama.cpp's completions.

        Args:
            body: the request, with its prompt as ids.
            on_chunk: takes each piece as it is written and returns True to give the rest up; None: all at once.

        Returns:
            The whole answer, or the last chunk.

        Raises:
            InputTooLong: the prompt does not fit the context.
            EngineError: llama.cpp refuses the request.
        """
        last: Json = {}

        def take(chunk: Json) -> bool:
            last.clear()
            last.update(chunk)
            return "error" in chunk or self._closing or (on_chunk is not None and on_chunk(chunk))

        with self._gate:
            if self._closing:
                raise EngineError("the engine is closed")
            self._busy += 1
        try:
            if on_chunk is None:
                last = self._server.handle_completions(dict(body))
            else:
                self._server.handle_completions({**body, "stream": True, "return_progress": True}, take)
        finally:
            with self._gate:
                self._busy -= 1
                self._gate.notify_all()
        if "error" in last:
            raise _fault(last["error"])
        return last

    def token_ids(self, texts: Sequence[str], *, add_special: bool = False) -> list[list[int]]:
        """Return the ids that llama.cpp's own tokenizer gives; special tokens in a text are read as such."""
        found = []
        for text in texts:
            body = {"content": text, "add_special": add_special, "parse_special": True}
            found.append([int(i) for i in self._post("/tokenize", body)["tokens"]])
        return found

    def render(self, chat: Json) -> str:
        """Return the prompt that llama.cpp's own template engine writes for OpenAI's `messages` and `tools`."""
        return str(self._post("/apply-template", {**chat, "tool_choice": "none"})["prompt"])

    def best(self, ids: Sequence[int], count: int) -> list[tuple[int, float]]:
        """Return the `count` likeliest next tokens after `ids` with their log-probabilities, best first.

        llama.cpp leaves out those of a token that ends inside of a character, so it is made to write a letter; the
        log-probabilities are those before that.
        """
        letter = self.token_ids(["a"])[0][-1]
        body = {
            "prompt": list(ids),
            "max_tokens": 1,
            "temperature": 0.0,
            "n_probs": count,
            "logit_bias": [[letter, 1e9]],
        }
        entries = self.complete(body)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return [(int(entry["id"]), float(entry["logprob"])) for entry in entries]

    def close(self) -> None:
        """Give up what is under way and free the model."""
        with self._gate:
            if self._closing:
                return
            self._closing = True
            self._gate.wait_for(lambda: self._busy == 0)
        self._server = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def _post(self, path: str, body: Json) -> Json:
        connection = _Connection(self._address, self._server.listening_address)
        try:
            headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
            connection.request("POST", path, json.dumps(body).encode(), headers)
            answer = connection.getresponse()
            value: Json = json.loads(answer.read())
        except OSError as error:
            raise EngineError(f"llama.cpp does not answer ({error})") from error
        finally:
            connection.close()
        if answer.status != 200:
            raise _fault(value.get("error") or {})
        return value


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str | None, address: str) -> None:
        host, _, port = address.rpartition("//")[2].partition(":")
        super().__init__("localhost" if path else host, None if path else int(port), timeout=_TIMEOUT)
        self._path = path

    def connect(self) -> None:
        if self._path is None:
            super().connect()
            return
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _address(folder: Path) -> str | None:
    path = str(folder / "llama.sock")
    return path if hasattr(socket, "AF_UNIX") and len(os.fsencode(path)) <= _LONGEST_PATH else None


def _fault(error: Mapping[str, Any]) -> EngineError:
    message = str(error.get("message") or "no message")
    if error.get("type") == "exceed_context_size_error":
        return InputTooLong(f"the prompt has {error.get('n_prompt_tokens')} tokens, the context {error.get('n_ctx')}")
    return EngineError(f"llama.cpp: {message}")
