"""Names to functions, imported on first use, so that a name from a file never imports anything outside our tables."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from alambic.errors import AlambicError, nearest


class Registry:
    """A closed table of `name -> "module:attribute"`."""

    def __init__(self, what: str, entries: Mapping[str, str]) -> None:
        self.what = what
        self._entries = dict(entries)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def get(self, name: str) -> Any:
        """Import and return the entry `name`.

        Raises:
            AlambicError: `name` is not in the table; the nearest name is given.
        """
        if name not in self._entries:
            raise AlambicError(f"unknown {self.what} {name!r}", hint=nearest(name, self._entries))
        module, _, attribute = self._entries[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
