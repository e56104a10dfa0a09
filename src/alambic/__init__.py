"""alambic distils a task into a small language model that runs on a plain CPU.

    import alambic
    engine = alambic.open("runs/tickets/bundle")
    engine.predict(["my washing machine shows E18"])[0].label

Importing this package imports nothing heavy; each name below is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alambic.build import build
    from alambic.engines import open
    from alambic.errors import AlambicError
    from alambic.task import load_task

__version__ = "0.1.0"
__all__ = ["AlambicError", "build", "load_task", "open"]

_HOME = {
    "AlambicError": "alambic.errors",
    "build": "alambic.build",
    "load_task": "alambic.task",
    "open": "alambic.engines",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'alambic' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:  # building needs libraries that running a bundle does not
        from alambic import _extras

        if absent := _extras.missing(error):
            raise absent from error
        raise
