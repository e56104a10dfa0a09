"""The single-file form of a bundle: an uncompressed zip of its folder, unpacked into the user's cache when opened.

A zip is a stranger's word about paths and sizes. Only the names that the sealed manifest lists are written, each no
longer than the manifest says, into a new folder that takes its final name when it is complete.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from alambic import bundle_cache
from alambic.errors import BundleError, WorkspaceError
from alambic.manifest import MANIFEST, MAX_MANIFEST_BYTES, is_safe_path, parse_manifest

_CHUNK = 1 << 20
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the oldest date of a zip: the same bundle gives the same bytes
_AGAIN = "the file is damaged or unsafe: fetch it again, or build it again"


def pack(folder: Path, names: Sequence[str], path: Path) -> Path:
    """Write the files `names` of `folder` into a new zip at `path`.

    Raises:
        WorkspaceError: `path` exists or cannot be written.
    """
    if path.exists():
        raise WorkspaceError(f"{path}: exists already", hint="choose another name, or remove it first")
    scratch = path.with_name(path.name + ".tmp")
    try:
        with zipfile.ZipFile(scratch, "w", zipfile.ZIP_STORED) as archive:
            for name in names:
                info = zipfile.ZipInfo(name, _EPOCH)
                info.external_attr = 0o644 << 16
                info.file_size = (folder / name).stat().st_size
                with (folder / name).open("rb") as source, archive.open(info, "w") as target:
                    shutil.copyfileobj(source, target, _CHUNK)
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise WorkspaceError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def unpack(path: Path, *, check: Literal["fast", "full"]) -> Path:
    """Unpack the single-file bundle at `path` into the user's cache (once per content) and return the folder.

    Without a writable cache it goes to a temporary folder that is removed when the process ends.

    Raises:
        BundleError: the file is not a bundle, is damaged or is unsafe.
    """
    try:
        digest = _digest(path, fast=check == "fast")
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from error
    cache = bundle_cache.writable_cache("bundles")
    if cache is None:
        folder = Path(tempfile.mkdtemp(prefix="alambic-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _extract(path, folder)
        return folder
    folder = cache / digest[:32]
    if check == "full" or not (folder / MANIFEST).is_file():
        _extract_once(path, folder)
    return folder


def _digest(path: Path, *, fast: bool) -> str:
    resolved, stamps = path.resolve(), {"": bundle_cache.stamp(path)}
    known = bundle_cache.recall(resolved) if fast else None
    if known is not None and known[1] == stamps:
        return known[0]
    with path.open("rb", buffering=0) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if bundle_cache.stamp(path) == stamps[""]:
        bundle_cache.remember(resolved, digest, stamps)
    return digest


def _extract_once(path: Path, folder: Path) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        _extract(path, scratch)
        if folder.exists():  # verify asked for a fresh copy, or an earlier one lost its manifest
            shutil.rmtree(folder, ignore_errors=True)
        try:
            scratch.rename(folder)
        except OSError:
            if not (folder / MANIFEST).is_file():  # not merely another process that was first
                raise
    except OSError as error:
        raise BundleError(
            f"{path}: cannot be unpacked into {folder}: {error.strerror}",
            hint="free some space there, or set XDG_CACHE_HOME",
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _extract(path: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = _entries(path, archive)
            if MANIFEST not in entries:
                raise BundleError(f"{path}: not a bundle, it has no {MANIFEST}", hint=_AGAIN)
            raw = _read(path, archive, entries[MANIFEST], MAX_MANIFEST_BYTES)
            manifest = parse_manifest(raw, path / MANIFEST)
            stranger = sorted(set(entries) - {MANIFEST} - set(manifest.files))
            if stranger:
                raise BundleError(f"{path}: holds {stranger[0]!r}, which is not in its manifest", hint=_AGAIN)
            for name, entry in manifest.files.items():
                if name not in entries:
                    raise BundleError(f"{path}: {name}: missing", hint=_AGAIN)
                _write(path, archive, entries[name], (folder / name, entry.bytes))
            (folder / MANIFEST).write_bytes(raw)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: not a readable bundle file: {error}", hint=_AGAIN) from error


def _entries(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name, mode = info.filename, info.external_attr >> 16
        if name.endswith("/") and is_safe_path(name[:-1]) and info.file_size == 0:
            continue  # other zip programs list folders
        if not is_safe_path(name):
            raise BundleError(f"{path}: unsafe path {name!r}", hint=_AGAIN)
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise BundleError(f"{path}: {name}: is a link or a device; a bundle holds plain files only", hint=_AGAIN)
        if info.flag_bits & 0x1:
            raise BundleError(f"{path}: {name}: is encrypted", hint=_AGAIN)
        if name in entries:
            raise BundleError(f"{path}: {name}: twice in the file", hint=_AGAIN)
        entries[name] = info
    return entries


def _read(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int) -> bytes:
    with archive.open(info) as source:
        raw = source.read(limit + 1)
    if len(raw) > limit:
        raise BundleError(f"{path}: {info.filename}: larger than {limit} bytes", hint=_AGAIN)
    return raw


def _write(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: tuple[Path, int]) -> None:
    file, limit = target
    file.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with archive.open(info) as source, file.open("xb") as out:
        while chunk := source.read(_CHUNK):
            written += len(chunk)
            if written > limit:
                break
            out.write(chunk)
    if written != limit:
        raise BundleError(f"{path}: {info.filename}: {written} bytes or more, sealed with {limit}", hint=_AGAIN)
