"""Write a folder whole or not at all: beside first, moved into place at the end."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alambic.errors import PackError, WorkspaceError


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to write in; it becomes `out` if the block ends well, and is gone otherwise.

    Raises:
        PackError: `out` exists.
        WorkspaceError: it cannot be written (permissions, full disk); nothing is left behind.
    """
    if out.exists():
        raise PackError(f"{out}: exists already", hint="give another folder, or remove it first")
    beside = out.with_name(f".{out.name}.partial")
    try:
        # Left there only by a process that was killed.
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        yield beside
        os.replace(beside, out)
    except OSError as error:
        raise _cannot_write(out, error) from error
    except RuntimeError as error:
        # OpenVINO and ONNX report a full disk as a RuntimeError of their own.
        if _has_room(beside):
            raise
        raise _cannot_write(out, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _has_room(folder: Path) -> bool:
    """Tell whether a block can still be written, which free-space figures do not (quotas, file size limits)."""
    probe = folder / "probe"
    try:
        probe.write_bytes(b"\0" * 65536)
        probe.unlink()
    except OSError:
        return False
    return True


def _cannot_write(out: Path, error: OSError) -> WorkspaceError:
    why = error.strerror or str(error)
    return WorkspaceError(
        f"{out}: cannot be written: {why}; nothing was left there", hint="free some space, or choose another folder"
    )
