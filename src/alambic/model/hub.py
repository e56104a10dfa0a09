"""Fetch a base from the Hub into its usual cache: resumable, hash-checked, safetensors only.

`huggingface_hub` gives addresses, headers, connections, errors and the cache's layout. Three things are added here,
because since 1.0 it neither resumes a file in another process nor hashes what arrives: the partial file keeps its name
between runs, every file is hashed against what the Hub states (SHA-256 of large files, git's SHA-1 of small ones), and
it becomes visible in the cache only then. The branch's name (`refs/`) is written last, so a half-fetched base is never
taken.

HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT (a mirror) hold as they do for `huggingface_hub`.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alambic._extras import load
from alambic.errors import BaseModelError
from alambic.events import Finished, Note, Progress, Started, Work
from alambic.model.bases_weights import weight_files

# What a base needs: weights, configuration, tokenizer, template, card and licence. Never code, never a pickle.
WANTED = (
    "model*.safetensors", "*.json", "*.txt", "*.model", "*.spm", "*.jinja", "*.md", "LICENSE*", "1_Pooling/config.json",
)  # fmt: skip
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".ot")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SPARE_BYTES = 50_000_000  # left free on the disk
_ATTEMPTS = 5
_FIRST_WAIT_S = 0.5
_POLL_SECONDS = 0.25
_UNKNOWN = -1  # a size that the listing does not give; `_completed` asks for it


@dataclass(frozen=True)
class HubFile:
    """One file of a repository, as the Hub describes it.

    Attributes:
        name: path inside the repository.
        size: bytes.
        sha256: of a large file, hex; None for a small one.
        sha1: git's identifier of a small file, hex.
    """

    name: str
    size: int
    sha256: str | None = None
    sha1: str | None = None

    @property
    def blob(self) -> str:
        """Name of the file's content in the cache."""
        return self.sha256 or self.sha1 or hashlib.sha256(self.name.encode()).hexdigest()


@dataclass(frozen=True)
class Pulled:
    """A base in the cache: its folder, the commit, its files, and how many bytes came over the wire just now."""

    folder: Path
    commit: str
    files: tuple[str, ...]
    fetched_bytes: int


def find_cached(hub_id: str, *, revision: str | None = None) -> Path | None:
    """Return the folder of `hub_id` in the cache when it holds a whole model, without opening a connection."""
    root = _repository(hub_id)
    revision = revision or "main"
    commit = revision
    if not _COMMIT.fullmatch(revision):
        try:
            commit = (root / "refs" / revision).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None
    if not _COMMIT.fullmatch(commit):
        return None
    folder = root / "snapshots" / commit
    if not (folder / "config.json").is_file():
        return None
    try:
        weight_files(folder)
    except BaseModelError:
        return None
    return folder


def offline() -> bool:
    """Tell whether HF_HUB_OFFLINE forbids connections."""
    return bool(load("huggingface_hub.constants").HF_HUB_OFFLINE)


def pull(
    hub_id: str,
    *,
    revision: str | None = None,
    files: Sequence[str] = (),
    sha256: Mapping[str, str] | None = None,
) -> Work[Pulled]:
    """Bring the files of `hub_id` into the cache, or what is missing of them.

    Args:
        hub_id: ``owner/name``.
        revision: commit, branch or tag.
        files: patterns of names to fetch instead of all that a base needs.
        sha256: expected SHA-256 (hex) by file name, beside what the Hub states.

    Raises:
        BaseModelError: not found, gated, pickled only, no room, or a file that is not what the Hub or `sha256` states.
    """
    started = time.perf_counter()
    if offline():
        raise BaseModelError(f"base {hub_id!r}: the Hub is switched off", hint="unset HF_HUB_OFFLINE")
    with _quiet():
        commit, listed = _describe(hub_id, revision)
        chosen = [_completed(hub_id, commit, file) for file in _choose(hub_id, listed, files)]
        _check_expected(chosen, sha256 or {})
        root = _repository(hub_id)
        missing = sum(file.size - _have(root, file) for file in chosen)
        _check_room(root, missing)
        yield Started(f"pull {hub_id}")
        if missing:
            yield Note(f"{hub_id}: {len(chosen)} files, {missing / 1e6:,.0f} MB to fetch")
        state = _State(sum(file.size for file in chosen), missing)
        for file in chosen:
            yield from _bring(hub_id, commit, root, file, (sha256 or {}).get(file.name), state)
        _name_revision(root, revision or "main", commit)
    yield Finished(f"pull {hub_id}", time.perf_counter() - started)
    return Pulled(root / "snapshots" / commit, commit, tuple(file.name for file in chosen), state.fetched)


@dataclass
class _State:
    """Bytes in all, to fetch, and done so far; the worker counts, the generator shows."""

    total: int
    missing: int
    done: int = 0
    fetched: int = 0
    cancelled: bool = False
    started: float = field(default_factory=time.perf_counter)

    def progress(self, hub_id: str) -> Progress:
        rate = self.fetched / max(time.perf_counter() - self.started, 1e-3)
        left = (self.missing - self.fetched) / rate if rate > 0 else None
        return Progress(f"pull {hub_id} (MB)", self.done // 10**6, self.total // 10**6, {"MB/s": rate / 1e6}, left)


class _Cancelled(Exception):
    """The caller closed the generator."""


class _Counted:
    """The partial file, counting what is written and stopping when the caller has gone."""

    def __init__(self, file: Any, state: _State) -> None:
        self._file, self._state = file, state

    def write(self, data: bytes) -> int:
        if self._state.cancelled:
            raise _Cancelled
        self._state.done += len(data)
        self._state.fetched += len(data)
        return int(self._file.write(data))

    def restart(self) -> None:
        self._state.done -= self.tell()
        self._file.truncate(0)

    def tell(self) -> int:
        return int(self._file.seek(0, os.SEEK_END))


def _bring(hub_id: str, commit: str, root: Path, file: HubFile, expected: str | None, state: _State) -> Work[None]:
    """Fetch and check one file in a thread, telling how far it is, and link it into the snapshot."""
    with ThreadPoolExecutor(1, thread_name_prefix="pull") as pool:
        future = pool.submit(_fetch_checked, hub_id, commit, root, file, expected, state)
        try:
            while not wait([future], timeout=_POLL_SECONDS).done:
                yield state.progress(hub_id)
        finally:
            state.cancelled = not future.done()
    future.result()


def _fetch_checked(hub_id: str, commit: str, root: Path, file: HubFile, expected: str | None, state: _State) -> None:
    blob = root / "blobs" / file.blob
    pointer = root / "snapshots" / commit / file.name
    blob.parent.mkdir(parents=True, exist_ok=True)
    locks = root.parent / ".locks" / root.name
    locks.mkdir(parents=True, exist_ok=True)
    with load("huggingface_hub.utils").WeakFileLock(locks / f"{file.blob}.lock"):
        present = next((path for path in (blob, pointer) if path.is_file()), None)
        if present is not None and _fault(present, file, expected) is None:
            state.done += file.size
        else:
            _fetch(hub_id, commit, blob, file, expected, state)
        _link(blob, pointer)


def _fetch(hub_id: str, commit: str, blob: Path, file: HubFile, expected: str | None, state: _State) -> None:
    partial = blob.with_name(f"{blob.name}.alambic.incomplete")
    if partial.is_file() and partial.stat().st_size > file.size:
        partial.unlink()
    with partial.open("ab") as raw:
        state.done += raw.tell()
        _transfer(hub_id, commit, file, _Counted(raw, state), state)
        raw.flush()
        os.fsync(raw.fileno())
    fault = _fault(partial, file, expected)
    if fault is not None:
        partial.unlink()
        raise BaseModelError(
            f"{hub_id}/{file.name}: {fault}; what was fetched is removed",
            hint="pull it again; if it stays so, the mirror (HF_ENDPOINT) or a proxy changes the file",
        )
    os.replace(partial, blob)


def _transfer(hub_id: str, commit: str, file: HubFile, out: _Counted, state: _State) -> None:
    """Append what is missing of `file`, going on where a connection broke; give up when nothing comes any more."""
    httpx = load("httpx")
    url = load("huggingface_hub").hf_hub_url(hub_id, file.name, revision=commit)
    attempt = 0
    while out.tell() < file.size:
        before = state.fetched
        try:
            _append(url, out)
        except (httpx.HTTPError, OSError) as error:
            attempt = 1 if state.fetched > before else attempt + 1
            if attempt >= _ATTEMPTS or not _passing(error):
                raise _explained(hub_id, error) from error
            time.sleep(max(min(_FIRST_WAIT_S * 2**attempt, 8.0), _asked_wait_s(error)))


def _asked_wait_s(error: Exception) -> float:
    """Return the seconds that a busy server asks to wait, a minute at most."""
    value = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return min(float(value), 60.0) if value.isdigit() else 0.0


def _append(url: str, out: _Counted) -> None:
    """Ask for what follows the end of `out`, and write it as it arrives.

    Not by the client's own `http_get`: it hands over 10 MB at a time, and what lies between is lost when a line breaks.
    """
    utils, constants = load("huggingface_hub.utils"), load("huggingface_hub.constants")
    at = out.tell()
    # Compressed content would not be the bytes that the hash is of.
    headers = {**utils.build_hf_headers(), "Accept-Encoding": "identity", **({"Range": f"bytes={at}-"} if at else {})}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with utils.get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        utils.hf_raise_for_status(response)
        if at and response.status_code != 206:  # a server that ignores Range sends all again
            out.restart()
        for block in response.iter_bytes():
            out.write(block)


def _passing(error: Exception) -> bool:
    """Tell whether trying again may help: a broken connection, a server in trouble, a file that came short."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in (408, 429) or status >= 500
    return getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


def _fault(path: Path, file: HubFile, expected: str | None) -> str | None:
    """Say how the content of `path` differs from what was stated; None when it does not."""
    size = path.stat().st_size
    if size != file.size:
        return f"it has {size:,} bytes, the Hub says {file.size:,}"
    wanted = [(who, value.lower()) for who, value in (("the Hub", file.sha256), ("you", expected)) if value]
    with path.open("rb") as content:
        if wanted:
            found = hashlib.file_digest(content, "sha256").hexdigest()
            return next(
                (f"its SHA-256 is {found}, {who} said {value}" for who, value in wanted if found != value), None
            )
        if file.sha1 is None:
            return None
        # git names a file by the SHA-1 of its content behind a small header.
        digest = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
        while block := content.read(1 << 20):
            digest.update(block)
    return None if digest.hexdigest() == file.sha1 else f"its SHA-1 is {digest.hexdigest()}, the Hub said {file.sha1}"


def _link(blob: Path, pointer: Path) -> None:
    """Make the file appear in its snapshot, as `huggingface_hub` does: a relative link, or the file itself."""
    pointer.parent.mkdir(parents=True, exist_ok=True)
    if not blob.exists():
        return  # links do not work here: the pointer is the file, and was found good
    target = os.path.relpath(blob, pointer.parent)
    if pointer.is_symlink() and os.readlink(pointer) == target:
        return
    pointer.unlink(missing_ok=True)
    try:
        os.symlink(target, pointer)
    except OSError:
        os.replace(blob, pointer)


def _name_revision(root: Path, revision: str, commit: str) -> None:
    if revision == commit:
        return
    path = root / "refs" / revision
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(commit, encoding="ascii")


def _repository(hub_id: str) -> Path:
    name: str = load("huggingface_hub.file_download").repo_folder_name(repo_id=hub_id, repo_type="model")
    return Path(load("huggingface_hub.constants").HF_HUB_CACHE) / name


def _have(root: Path, file: HubFile) -> int:
    """Return the bytes of `file` that are there already, whole or partial."""
    blob = root / "blobs" / file.blob
    paths = (blob, blob.with_name(f"{blob.name}.alambic.incomplete"))
    return min(next((path.stat().st_size for path in paths if path.is_file()), 0), file.size)


def _check_room(root: Path, missing: int) -> None:
    there: Path = next(path for path in (root, *root.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if missing and missing + _SPARE_BYTES > free:
        raise BaseModelError(
            f"{there}: {missing / 1e9:.1f} GB are to be fetched, and {free / 1e9:.1f} GB are free",
            hint="make room, or set HF_HOME to a folder on a larger disk",
        )


def _describe(hub_id: str, revision: str | None) -> tuple[str, list[HubFile]]:
    """Ask the Hub for the commit behind `revision` and the files in it."""
    hub, httpx = load("huggingface_hub"), load("httpx")
    errors = load("huggingface_hub.errors")
    try:
        info = hub.HfApi().model_info(hub_id, revision=revision, files_metadata=True, timeout=30)
    except errors.HFValidationError as error:
        raise BaseModelError(f"base {hub_id!r} is not a Hub id ({error})", hint="a Hub id is owner/name") from error
    except (httpx.HTTPError, OSError) as error:
        raise _explained(hub_id, error, revision) from error
    listed = [
        HubFile(
            name=item.rfilename,
            size=_UNKNOWN if item.size is None else int(item.size),
            sha256=_digest(item.lfs.sha256 if item.lfs else None, 64),
            sha1=_digest(None if item.lfs else item.blob_id, 40),
        )
        for item in info.siblings or ()
        # These become paths on this machine, whatever server said them.
        if not {"", ".", ".."} & set(re.split(r"[/\\]", item.rfilename))
    ]
    if not _COMMIT.fullmatch(str(info.sha)):
        raise BaseModelError(f"base {hub_id!r}: the server gives {info.sha!r} for a commit", hint="try another mirror")
    return str(info.sha), listed


def _digest(value: object, digits: int) -> str | None:
    return value if isinstance(value, str) and re.fullmatch(rf"[0-9a-f]{{{digits}}}", value) else None


def _completed(hub_id: str, commit: str, file: HubFile) -> HubFile:
    """Ask for size and hash where the listing has none, as some mirrors do."""
    if file.size != _UNKNOWN and (file.sha256 or file.sha1):
        return file
    hub, httpx = load("huggingface_hub"), load("httpx")
    try:
        stated = hub.get_hf_file_metadata(hub.hf_hub_url(hub_id, file.name, revision=commit))
    except (httpx.HTTPError, OSError) as error:
        raise _explained(hub_id, error, commit) from error
    etag = str(stated.etag or "")
    if stated.size is None:
        raise BaseModelError(
            f"{hub_id}/{file.name}: the server does not say how large it is", hint="try another mirror"
        )
    return HubFile(
        file.name,
        int(stated.size),
        sha256=_digest(etag, 64),
        sha1=_digest(etag, 40),
    )


def _choose(hub_id: str, listed: Sequence[HubFile], patterns: Sequence[str]) -> list[HubFile]:
    """Return the files to fetch, small ones first; weights that only exist as pickles are refused here."""
    pickled = [file.name for file in listed if file.name.endswith(_PICKLED)]
    if patterns:
        chosen = [file for file in listed if any(fnmatch.fnmatchcase(file.name, pattern) for pattern in patterns)]
        unsafe = [file.name for file in chosen if file.name.endswith((*_PICKLED, ".py"))]
        if unsafe:
            raise BaseModelError(f"{hub_id}: {unsafe[0]} holds code or a pickle, which is never fetched")
        if not chosen:
            names = ", ".join(sorted(file.name for file in listed)[:20])
            raise BaseModelError(f"{hub_id}: no file is called {' or '.join(patterns)}", hint=f"it holds: {names}")
        return sorted(chosen, key=lambda file: file.size)
    # fnmatch lets * cross folders; a base's own files lie at the top.
    chosen = [
        file
        for file in listed
        for pattern in WANTED
        if fnmatch.fnmatchcase(file.name, pattern) and file.name.count("/") == pattern.count("/")
    ]
    # One whole file beside shards or beside other precisions of itself: the whole one is the model.
    if any(file.name == "model.safetensors" for file in chosen):
        chosen = [file for file in chosen if file.name == "model.safetensors" or ".safetensors" not in file.name]
    if not any(file.name.endswith(".safetensors") for file in chosen):
        if pickled:
            raise BaseModelError(
                f"base {hub_id!r}: the weights are pickled only ({pickled[0]}), and opening a pickle can run any code",
                hint=f"its discussions often hold a conversion ('Adding safetensors variant'): see "
                f"{_page(hub_id)}/discussions and give its number as --revision refs/pr/N",
            )
        raise BaseModelError(f"base {hub_id!r}: the repository holds no model.safetensors", hint=_page(hub_id))
    return sorted(dict.fromkeys(chosen), key=lambda file: (file.name.endswith(".safetensors"), file.size))


def _check_expected(chosen: Sequence[HubFile], expected: Mapping[str, str]) -> None:
    for file in chosen:
        if not (file.sha256 or file.sha1 or file.name in expected):
            raise BaseModelError(
                f"the server states no hash of {file.name}",
                hint=f"give it as --sha256 {file.name}=HEX, or another mirror",
            )
    for name, value in expected.items():
        if not re.fullmatch(r"[0-9a-fA-F]{64}", value):
            raise BaseModelError(f"the SHA-256 of {name} is {value!r}: 64 hexadecimal digits are expected")
        if name not in {file.name for file in chosen}:
            raise BaseModelError(f"a SHA-256 is given for {name}, which is not among the files to fetch")


def _explained(hub_id: str, error: Exception, revision: str | None = None) -> BaseModelError:
    """Turn an error of the Hub's client into one that says what to do; tokens never appear in it."""
    errors = load("huggingface_hub.errors")
    status = getattr(getattr(error, "response", None), "status_code", None)
    page = _page(hub_id)
    if isinstance(error, errors.GatedRepoError) or (status == 403):
        return BaseModelError(
            f"base {hub_id!r} is gated: its publisher asks you to accept the licence first",
            hint=f"accept it at {page}, then set HF_TOKEN to a token of that account "
            "(https://huggingface.co/settings/tokens)",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return BaseModelError(
            f"base {hub_id!r} has no revision {revision!r}", hint=f"its revisions: {page}/commits/main"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return BaseModelError(
            f"base {hub_id!r} is not on the Hub, or is private",
            hint="check the name, and HF_TOKEN if it is private; or give a local folder as base.name",
        )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if status is None and not isinstance(error, OSError):
        return BaseModelError(
            f"base {hub_id!r}: the Hub cannot be reached, or the connection broke ({reason})",
            hint="run the command again, it goes on where it stopped; a mirror is named by HF_ENDPOINT",
        )
    return BaseModelError(
        f"base {hub_id!r} cannot be downloaded: {reason}",
        hint="run the command again, it goes on where it stopped; or give a local folder as base.name",
    )


def _page(hub_id: str) -> str:
    # The publisher's page, whatever mirror the files come from.
    return f"https://huggingface.co/{hub_id}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the Hub client from drawing bars and from logging to the terminal; the library never prints."""
    utils, logs = load("huggingface_hub.utils"), load("huggingface_hub.utils.logging")
    shown, level = not utils.are_progress_bars_disabled(), logs.get_verbosity()
    utils.disable_progress_bars()
    logs.set_verbosity_error()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if shown:
            utils.enable_progress_bars()
