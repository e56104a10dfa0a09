"""A hub on this machine, whole or broken."""

import contextlib
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import numpy as np
from huggingface_hub import constants
from safetensors.numpy import save

from alambic.events import drain
from alambic.model import hub

ID = "someone/small-model"
COMMIT = "c" * 40
OTHER = "d" * 40
CONFIG = {"model_type": "llama", "hidden_size": 32, "max_position_embeddings": 64}


def base_files(megabytes=1):
    rows = np.arange(megabytes * 250_000, dtype=np.float32)
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "tokenizer.json": b"{}",
        "README.md": b"---\nlicense: mit\nlanguage: fr\n---\n",
        "model.safetensors": save({"w": rows}),
        "pytorch_model.bin": b"a pickle",
        "modeling_evil.py": b"import os",
        "onnx/model.onnx": b"graph",
        "original/params.json": b"{}",
    }


class FakeHub(ThreadingHTTPServer):
    """Speaks the part of the Hub that a download needs: model information, resolve, a store behind a redirect."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = base_files()
        self.refuse = None  # (status, X-Error-Code) for every file
        self.refuse_info = None
        self.commit = COMMIT
        self.gated = False
        self.cut_after = []  # bytes after which a transfer breaks, one entry a transfer
        self.ignores_range = False
        self.corrupt = False
        self.busy = 0  # answers of 429 before the store serves
        self.describes = True  # tells sizes and hashes in the listing
        self.token = None
        self.delay = 0.0  # seconds between 64 kB
        self.slow_after = None  # bytes after which these are 0.1 seconds
        self.ranges, self.asked, self.tokens, self.sent = [], [], [], 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        server, path = self.server, unquote(urlsplit(self.path).path)
        server.tokens.append(self.headers.get("Authorization"))
        if found := re.fullmatch(rf"/api/models/{ID}(?:/revision/(.+))?", path):
            self.information(found[1])
        elif found := re.fullmatch(rf"/{ID}/resolve/([^/]+|refs/pr/\d+)/(.+)", path):
            self.resolve(found[2], body=body)
        elif found := re.fullmatch(r"/store/(.+)", path):
            self.store(found[1])
        else:
            self.refusal(404, "RepoNotFound")

    def information(self, revision):
        server = self.server
        if server.refuse_info:
            return self.refusal(*server.refuse_info)
        if revision not in (None, "main", "v1", "refs/pr/7", COMMIT):
            return self.refusal(404, "RevisionNotFound")
        siblings = [{"rfilename": name, **(described(name, data) if server.describes else {})}
                    for name, data in server.files.items()]  # fmt: skip
        self.reply(
            200, json.dumps({"id": ID, "sha": server.commit, "gated": server.gated, "siblings": siblings}).encode()
        )

    def resolve(self, name, *, body):
        server = self.server
        if server.refuse:
            return self.refusal(*server.refuse)
        if server.token is not None and self.headers.get("Authorization") != f"Bearer {server.token}":
            return self.refusal(401, "GatedRepo")
        if name not in server.files:
            return self.refusal(404, "EntryNotFound")
        data, facts = server.files[name], described(name, server.files[name])
        headers = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if "lfs" in facts:
            headers |= {"X-Linked-Etag": f'"{facts["lfs"]["sha256"]}"', "X-Linked-Size": str(len(data)),
                        "Location": f"{server.url}/store/{name}"}  # fmt: skip
            return self.reply(302, b"", **headers)
        if body:
            server.asked.append(name)
        self.reply(200, data, ETag=f'"{facts["blobId"]}"', **headers)

    def store(self, name):
        server = self.server
        data = server.files[name]
        if server.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if server.busy:
            server.busy -= 1
            return self.reply(429, b"", **{"Retry-After": "7"})
        asked = self.headers.get("Range")
        server.asked.append(name)
        server.ranges.append(asked)
        start = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked and not server.ignores_range else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        stop = min(len(data), start + server.cut_after.pop(0)) if server.cut_after else len(data)
        for at in range(start, stop, 65536):
            piece = data[at : min(at + 65536, stop)]
            try:
                self.wfile.write(piece)
            except OSError:
                break
            server.sent += len(piece)
            slow = server.slow_after is not None and server.sent > server.slow_after
            time.sleep(0.1 if slow else server.delay)
        if stop < len(data):
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()

    def refusal(self, status, code):
        self.reply(status, b"", **{"X-Error-Code": code})

    def reply(self, status, data, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle(self):
        with contextlib.suppress(OSError, ValueError):
            super().handle()

    def log_message(self, *args):
        pass


def described(name, data):
    """The facts that the Hub's listing gives of a file."""
    oid = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    large = name.endswith((".safetensors", ".bin"))
    lfs = {"lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}} if large else {}
    return {"size": len(data), "blobId": oid, **lfs}


def running_hub(monkeypatch, tmp_path):
    """A hub on loopback; the client's settings, read once on import, point to it."""
    fake = FakeHub()
    thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", fake.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub, "_FIRST_WAIT_S", 0.0)
    yield fake
    fake.shutdown()
    fake.server_close()
    thread.join()


def pull(**options):
    return drain(hub.pull(ID, **options))


def repository(tmp_path):
    return tmp_path / "hub" / "models--someone--small-model"


def partial(tmp_path):
    return [path.name for path in (repository(tmp_path) / "blobs").glob("*.incomplete")]
