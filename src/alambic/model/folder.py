"""A Model directory, or what belongs to one, written whole: beside first, then moved into place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_model(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write in, which takes the place of `folder` when the block ends well.

    A kill or an error before that leaves the old `folder` as it was; what lies beside it goes at the next writing.
    """
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(beside, folder)
