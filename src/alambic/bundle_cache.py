"""What is remembered between runs in the user's cache: which bundle files were already hashed, and unpacked bundles.

Everything here is an optimisation. A cache that is missing, damaged or not writable costs time and never an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

Stamp = list[int]


def cache_folder() -> Path | None:
    """Return alambic's folder in the user's cache (`XDG_CACHE_HOME` first), or None when there is no home."""
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if xdg and Path(xdg).is_absolute():
        return Path(xdg) / "alambic"
    local = os.environ.get("LOCALAPPDATA", "")
    if sys.platform == "win32" and local:
        return Path(local) / "alambic" / "cache"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home / ("Library/Caches/alambic" if sys.platform == "darwin" else ".cache/alambic")


def writable_cache(name: str) -> Path | None:
    """Return the sub-folder `name` of the cache, created and private to the user, or None when it cannot be written."""
    root = cache_folder()
    if root is None:
        return None
    folder = root / name
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def stamp(path: Path) -> Stamp:
    """Return what changes when a file does: size, mtime, inode, ctime (which no program can set back)."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns]


def recall(path: Path) -> tuple[str, dict[str, Stamp]] | None:
    """Return (digest, stamps) last remembered for `path`, or None."""
    root = cache_folder()
    if root is None:
        return None
    try:
        data = json.loads((root / "seen" / _key(path)).read_text("utf-8"))
        return str(data["digest"]), {str(name): list(value) for name, value in data["stamps"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def remember(path: Path, digest: str, stamps: Mapping[str, Stamp]) -> None:
    """Remember that the content of `path` has `digest` as long as its files keep these `stamps`."""
    folder = writable_cache("seen")
    if folder is None:
        return
    text = json.dumps({"path": os.fspath(path), "digest": digest, "stamps": dict(stamps)})
    with suppress(OSError):
        handle, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors="surrogateescape") as file:
                file.write(text)
            os.replace(name, folder / _key(path))
        except OSError:
            os.unlink(name)
            raise


def _key(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:32] + ".json"
