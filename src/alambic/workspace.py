"""The run folder: stages cached by what made them, one build at a time, writes that survive a kill.

    runs/<task>/
      lock               held while a build runs
      splits.lock        which row went to which part
      stages/<name>-<key>/           a finished stage; `stage.json` was written last
      stages/<name>-<key>.part/      a stage that was running; resumable stages find their checkpoints here

A stage's key is a digest of its name and version, parameters, inputs (keys of other stages, digests of data) and the
versions of the libraries it uses. Nothing here knows what a stage does.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alambic.errors import WorkspaceError
from alambic.events import Finished, Skipped, Started, Work

_MANIFEST = "stage.json"
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


@dataclass(frozen=True)
class StageSpec:
    """What identifies a stage: change any of it and the stage runs again."""

    name: str
    params: Mapping[str, Any]
    inputs: Mapping[str, str]
    version: int = 1
    libraries: Sequence[str] = ()

    @property
    def key(self) -> str:
        """First 16 hex digits of the digest of the whole identity."""
        identity = {
            "name": self.name, "version": self.version, "params": self.params, "inputs": self.inputs,
            "libraries": {name: _version(name) for name in sorted(self.libraries)},
        }  # fmt: skip
        text = json.dumps(identity, sort_keys=True, ensure_ascii=False, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Stage:
    """A finished stage: its folder, its JSON result, its key and whether this build had to run it."""

    name: str
    key: str
    folder: Path
    result: dict[str, Any]
    ran: bool


class Workspace:
    """A run folder on disk; `ran` names the stages that had to run since it was opened."""

    def __init__(self, root: Path) -> None:
        """Create the folder.

        Raises:
            WorkspaceError: the folder cannot be created or written.
        """
        self.root = root
        self.stages = root / "stages"
        self.ran: list[str] = []
        self._made = not root.exists()
        with on_disk(root):
            self.stages.mkdir(parents=True, exist_ok=True)
            probe = root / ".write-probe"
            probe.write_bytes(b"")
            probe.unlink()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run folder for one build.

        Raises:
            WorkspaceError: another build holds it.
        """
        with on_disk(self.root), open(self.root / "lock", "a+b") as handle:
            if not _try_lock(handle.fileno()):
                hint = "wait for it to end, or give this one another folder with --out"
                raise WorkspaceError(f"{self.root}: another build is running here", hint=hint)
            try:
                yield
            except BaseException:
                self._remove_if_unused()
                raise

    def _remove_if_unused(self) -> None:
        """Leave no empty folder behind when what was asked could not even begin."""
        if (
            self._made
            and not any(self.stages.iterdir())
            and {p.name for p in self.root.iterdir()} <= {"lock", "stages"}
        ):
            shutil.rmtree(self.root, ignore_errors=True)

    def folder_of(self, spec: StageSpec) -> Path:
        """Where the finished stage `spec` is, or will be."""
        return self.stages / f"{spec.name}-{spec.key}"

    def find(self, spec: StageSpec) -> Stage | None:
        """Return the finished stage, or None when it is absent or its files are not as they were written."""
        folder = self.folder_of(spec)
        try:
            manifest = json.loads((folder / _MANIFEST).read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
            return None
        if manifest.get("files") != _sizes(folder):
            return None
        return Stage(spec.name, spec.key, folder, manifest["result"], ran=False)

    def run(
        self, spec: StageSpec, work: Callable[[Path], Work[dict[str, Any]]], *, resumable: bool = False
    ) -> Work[Stage]:
        """Run `work` in a fresh folder unless the stage is already done; yields its events.

        `work` gets the folder to write to and returns a JSON-able result. A resumable stage finds there what an
        interrupted run left; any other starts from an empty folder.
        """
        done = self.find(spec)
        if done is not None:
            yield Skipped(spec.name)
            return done
        yield Started(spec.name)
        began = time.perf_counter()
        folder = self.folder_of(spec)
        part = folder.with_name(folder.name + ".part")
        with on_disk(part):
            if not resumable:
                shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True, exist_ok=True)
            result = yield from work(part)
            seconds = time.perf_counter() - began
            _commit(spec, part, folder, result, seconds)
        self.ran.append(spec.name)
        yield Finished(spec.name, seconds)
        return Stage(spec.name, spec.key, folder, result, ran=True)


def _commit(spec: StageSpec, part: Path, folder: Path, result: dict[str, Any], seconds: float) -> None:
    manifest = {
        "name": spec.name, "version": spec.version, "key": spec.key, "params": dict(spec.params),
        "inputs": dict(spec.inputs), "libraries": {name: _version(name) for name in sorted(spec.libraries)},
        "seconds": round(seconds, 3), "result": result, "files": _sizes(part),
    }  # fmt: skip
    write_text(part / _MANIFEST, json.dumps(manifest, ensure_ascii=False, indent=1, default=str))
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into errors that say what to do."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some space and run the same command again: finished stages are kept"
            raise WorkspaceError(f"{where}: the disk is full", hint=hint) from error
        if error.errno in _REFUSED:
            hint = "give a place you can write to (--out, --output)"
            raise WorkspaceError(f"{where}: cannot be written ({error.strerror})", hint=hint) from error
        raise


def _sizes(folder: Path) -> dict[str, int]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != _MANIFEST)
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in files}


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _try_lock(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows has no fcntl
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
