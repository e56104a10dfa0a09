"""Open, verify and seal bundles: a folder with `bundle.json`, or the same folder in one `.alambic` file.

Light: no torch, no engine. Opening a stranger's bundle is safe: every file is checked against the sealed manifest, no
path leaves the folder, and nothing in it is code or pickle. The first open hashes every file; later ones compare size,
mtime and inode with what was remembered; `verify` always hashes. What a bundle computes is for `alambic.engines`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alambic import bundle_cache
from alambic.errors import BundleError, WorkspaceError
from alambic.manifest import (
    FORMAT,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    FileEntry,
    Golden,
    Manifest,
    PartSpec,
    check_structure,
    parse_manifest,
    seal_of,
)

__all__ = [
    "FORMAT",
    "MANIFEST",
    "SCRATCH",
    "Bundle",
    "FileEntry",
    "Golden",
    "Manifest",
    "PartSpec",
    "VerifyReport",
    "open_bundle",
    "seal",
    "to_file",
    "user_cache",
    "verify",
]

# Names that are never part of a bundle: left by systems and by interrupted writes.
SCRATCH = frozenset({".DS_Store", "Thumbs.db", "desktop.ini", "bundle.json.tmp"})
_AGAIN = "the bundle is damaged: fetch it again, or build it again"


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files were checked.

    Attributes:
        path: its folder (for the single-file form, where it was unpacked).
        manifest: what it says about itself.
        source: what the caller named: the folder, or the `.alambic` file.
    """

    path: Path
    manifest: Manifest
    source: Path

    @property
    def parts(self) -> tuple[PartSpec, ...]:
        """The parts of the bundle."""
        return self.manifest.parts

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole bundle, manifest included."""
        return sum(entry.bytes for entry in self.manifest.files.values()) + (self.path / MANIFEST).stat().st_size

    def folder(self, part: PartSpec) -> Path:
        """Return the folder of `part`."""
        return self.path / part.folder


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` read; it exists only when everything fitted.

    Attributes:
        path: what was verified.
        name: name of the task.
        files: number of files hashed, `bundle.json` included.
        bytes: their size.
        seal: the seal that was checked.
    """

    path: Path
    name: str
    files: int
    bytes: int
    seal: str


def open_bundle(path: str | os.PathLike[str], *, check: Literal["fast", "full"] = "fast") -> Bundle:
    """Open the bundle at `path`, a folder or a single file.

    Args:
        path: folder that holds `bundle.json`, or a `.alambic` file.
        check: `fast` hashes the files only if they changed since the last time; `full` always does.

    Raises:
        BundleError: it is missing, damaged, tampered with, unsafe or made by a newer version.
    """
    source = Path(path)
    if source.is_file() and source.name != MANIFEST:
        from alambic.bundle_file import unpack

        folder = unpack(source, check=check)
    else:
        folder = source.parent if source.name == MANIFEST else source
    manifest = _read_manifest(folder)
    _check_files(folder.resolve(), manifest, full=check == "full")
    return Bundle(folder, manifest, source)


def verify(path: str | os.PathLike[str]) -> VerifyReport:
    """Hash every file of the bundle at `path` again and compare it with the sealed manifest.

    Raises:
        BundleError: naming every file that does not fit.
    """
    bundle = open_bundle(path, check="full")
    return VerifyReport(
        path=bundle.source,
        name=bundle.manifest.name,
        files=len(bundle.manifest.files) + 1,
        bytes=bundle.size_bytes,
        seal=bundle.manifest.seal,
    )


def seal(folder: str | os.PathLike[str], manifest: Manifest) -> Bundle:
    """Write the checksums of all files under `folder` and the sealed manifest, last and in one step.

    Args:
        folder: folder that already holds the files of every part (and README.md, if any).
        manifest: its `files` and `seal` are computed here, whatever they hold.

    Raises:
        BundleError: a part's folder is missing, a file is a link or has an unsafe name.
        WorkspaceError: the manifest cannot be written.
    """
    root = Path(folder)
    files = {}
    for name in sorted(_walk(root)):
        file = root / name
        files[name] = {"sha256": _sha256(file), "bytes": file.stat().st_size}
    data: dict[str, Any] = manifest.model_dump(mode="json") | {"files": files}
    data["seal"] = seal_of(data)
    sealed = parse_manifest(json.dumps(data).encode(), root / MANIFEST)
    for part in sealed.parts:
        if not (root / part.folder).is_dir():
            raise BundleError(f"{root}: part {part.name!r} has no folder {part.folder!r}")
    _write(root / MANIFEST, json.dumps(data, indent=1, allow_nan=False) + "\n")
    return Bundle(root, sealed, root)


def to_file(bundle: Bundle, path: str | os.PathLike[str]) -> Path:
    """Write `bundle` as one file (an uncompressed zip, the same bytes each time) and return its path.

    Raises:
        WorkspaceError: `path` exists or cannot be written.
    """
    from alambic.bundle_file import pack

    return pack(bundle.path, (MANIFEST, *sorted(bundle.manifest.files)), Path(path))


def user_cache(name: str) -> Path | None:
    """Return the sub-folder `name` of alambic's cache (`XDG_CACHE_HOME` first), or None when it cannot be written."""
    return bundle_cache.writable_cache(name)


def _read_manifest(folder: Path) -> Manifest:
    file = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(
            f"{folder}: no such bundle", hint="give the folder that holds bundle.json, or a .alambic file"
        )
    if file.is_symlink():
        raise BundleError(f"{file}: is a symbolic link; a bundle holds plain files only")
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError as error:
        raise BundleError(f"{folder}: not a bundle, it has no {MANIFEST}", hint="alambic build makes one") from error
    except OSError as error:
        raise BundleError(f"{file}: cannot be read: {error.strerror}") from error
    if len(raw) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{file}: larger than {MAX_MANIFEST_BYTES} bytes: this is no alambic bundle")
    return parse_manifest(raw, file)


def _check_files(root: Path, manifest: Manifest, *, full: bool) -> None:
    """Compare the files with the manifest, by hash unless their stamps are the remembered ones."""
    check_structure(manifest, root)
    problems = list(_layout_problems(root, manifest))
    if problems:
        raise BundleError("\n".join(problems), hint=_AGAIN)
    stamps = {name: bundle_cache.stamp(root / name) for name in manifest.files}
    if not full and bundle_cache.recall(root) == (manifest.seal, stamps):
        return
    for name, entry in manifest.files.items():
        try:
            digest = _sha256(root / name)
        except OSError as error:
            problems.append(f"{root / name}: cannot be read: {error.strerror}")
            continue
        if digest != entry.sha256:
            problems.append(
                f"{root / name}: changed since the bundle was sealed: "
                f"SHA-256 is {digest[:12]}…, sealed with {entry.sha256[:12]}…"
            )
    if problems:
        raise BundleError("\n".join(problems), hint=_AGAIN)
    # A file rewritten while it was hashed must not be remembered as good.
    if all(bundle_cache.stamp(root / name) == stamps[name] for name in manifest.files):
        bundle_cache.remember(root, manifest.seal, stamps)


def _layout_problems(root: Path, manifest: Manifest) -> Iterator[str]:
    for name, entry in manifest.files.items():
        file = root / name
        if any(parent.is_symlink() for parent in (file, *file.parents[: name.count("/")])):
            yield f"{file}: is, or is reached by, a symbolic link; a bundle holds plain files only"
        elif not file.is_file():
            yield f"{file}: missing"
        elif (size := file.stat().st_size) != entry.bytes:
            yield f"{file}: {size} bytes, sealed with {entry.bytes}: truncated or changed"
    for part in manifest.parts:
        folder = root / part.folder
        for name in _walk(folder) if folder.is_dir() else ():
            if f"{part.folder}/{name}" not in manifest.files:
                yield f"{folder / name}: not in the manifest; it was added after the bundle was sealed"


def _walk(root: Path) -> Iterator[str]:
    """Yield the files under `root` that belong to a bundle, relative, with forward slashes."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in (*folders, *names):
            if os.path.islink(os.path.join(folder, name)):
                raise BundleError(f"{Path(folder, name)}: is a symbolic link; a bundle holds plain files only")
        for name in names:
            if name not in SCRATCH and not name.startswith(".") and not (folder == str(root) and name == MANIFEST):
                yield Path(folder, name).relative_to(root).as_posix()


def _sha256(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(path.name + ".tmp")
    try:
        with scratch.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise WorkspaceError(
            f"{path}: cannot be written: {error.strerror}", hint="free some space, or choose another folder"
        ) from error
