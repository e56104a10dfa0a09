"""The journal of an annotation: JSON lines, appended and on disk before the next key is read, never rewritten.

    {"v": 1, "seq": 3, "at": "2026-11-21T16:40:02Z", "by": "anna", "do": "label", "id": "9f…", "text": "…",
     "labels": […], "guess": ["billing", 0.62], "ms": 1840}

`do` is `labels` (the label names from here on), `rename`, `label`, `none` (none of these), `skip` or `undo` (of the
record `undoes`). What was decided is found by reading the records in order (`Decisions`).

Several processes may write one journal: each takes the file's lock, reads what the others added, appends one line and
waits until it is on disk. A line without its end was being written by a process that was killed: the next writer cuts
it off and says so. At most that one decision is lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, Literal, get_args

from alambic.errors import DataError, nearest

VERSION = 1
Verdict = Literal["label", "none", "skip"]
VERDICTS: tuple[str, ...] = get_args(Verdict)
_KINDS = {"labels", "rename", "undo", *VERDICTS}
_FAR = 1 << 40


def text_id(text: str) -> str:
    """Return the identity of a cleaned text: the first 16 hex digits of its SHA-256."""
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True)
class Decision:
    """What one annotator said of one text, last.

    Attributes:
        seq: number of its record.
        by: the annotator.
        id: of the text (`text_id`).
        text: the text itself, so that the journal alone is enough to export from.
        verdict: `label`, `none` (none of the labels holds) or `skip` (not decided).
        labels: the labels given; empty unless `label`.
        note: free words of the annotator.
        at: when, in UTC.
        guess: the model's first guess and its probability as they were shown, if any.
        ms: time from showing to deciding, in milliseconds.
    """

    seq: int
    by: str
    id: str
    text: str
    verdict: str
    labels: tuple[str, ...] = ()
    note: str | None = None
    at: str = ""
    guess: tuple[str, float] | None = None
    ms: int | None = None


@dataclass
class Decisions:
    """The state that the records of a journal lead to; `apply` takes them in order."""

    labels: dict[str, str] = field(default_factory=dict)  # name -> description
    stacks: dict[tuple[str, str], list[Decision]] = field(default_factory=dict)  # (annotator, text) -> oldest first
    timeline: dict[str, list[Decision]] = field(default_factory=dict)  # annotator -> in order, undone ones left out

    def apply(self, record: Mapping[str, Any]) -> None:
        """Take one record."""
        do = record["do"]
        if do == "labels":
            self.labels = dict(record["labels"])
        elif do == "rename":
            self._rename(record["old"], record["new"])
        elif do == "undo":
            self._undo(record["by"], record["undoes"])
        else:
            self._decide(_decision(record))

    def of(self, by: str, text: str) -> Decision | None:
        """Return what `by` said of the text with this id, last."""
        stack = self.stacks.get((by, text))
        return stack[-1] if stack else None

    def last(self, by: str) -> Decision | None:
        """Return the last decision of `by` that stands."""
        line = self.timeline.get(by)
        return line[-1] if line else None

    def standing(self) -> list[Decision]:
        """Return every decision that stands, one for each annotator and text, oldest first."""
        return sorted((stack[-1] for stack in self.stacks.values() if stack), key=lambda d: d.seq)

    def by_text(self) -> dict[str, list[Decision]]:
        """Return the standing decisions of each text, those skipped left out, in order of arrival."""
        found: dict[str, list[Decision]] = {}
        for decision in self.standing():
            if decision.verdict != "skip":
                found.setdefault(decision.id, []).append(decision)
        return found

    def names_used(self) -> dict[str, int]:
        """Count the standing decisions of each label name."""
        counts: dict[str, int] = {}
        for decision in self.standing():
            for name in decision.labels:
                counts[name] = counts.get(name, 0) + 1
        return counts

    def _decide(self, decision: Decision) -> None:
        self.stacks.setdefault((decision.by, decision.id), []).append(decision)
        self.timeline.setdefault(decision.by, []).append(decision)

    def _undo(self, by: str, seq: int) -> None:
        line = self.timeline.get(by, [])
        found = next((d for d in line if d.seq == seq), None)
        if found is not None:
            line.remove(found)
            stack = self.stacks[by, found.id]
            stack[:] = [d for d in stack if d.seq != seq]

    def _rename(self, old: str, new: str | None) -> None:
        """Give every decision of `old` the name `new`; with None those decisions go, and their texts come back."""
        for key, stack in self.stacks.items():
            self.stacks[key] = [d for d in (_renamed(d, old, new) for d in stack) if d is not None]
        for by, line in self.timeline.items():
            self.timeline[by] = [d for d in (_renamed(d, old, new) for d in line) if d is not None]
        if old in self.labels:
            described = self.labels.pop(old)
            if new is not None:
                self.labels.setdefault(new, described)


def _renamed(decision: Decision, old: str, new: str | None) -> Decision | None:
    if old not in decision.labels:
        return decision
    if new is None:
        return None
    names = dict.fromkeys(new if name == old else name for name in decision.labels)
    return replace(decision, labels=tuple(names))


def _decision(record: Mapping[str, Any]) -> Decision:
    guess = record.get("guess")
    return Decision(
        seq=record["seq"], by=record["by"], id=record["id"], text=record["text"], verdict=record["do"],
        labels=tuple(record.get("labels") or ()), note=record.get("note"), at=record["at"],
        guess=(guess[0], guess[1]) if guess else None, ms=record.get("ms"),
    )  # fmt: skip


class Journal:
    """A journal on disk and the decisions in it. Safe between threads, and between processes.

    Attributes:
        path: the file.
        decisions: what its records lead to, those of other processes included up to the last call.
        repaired: what was said of torn ends that were cut off, in order.
    """

    def __init__(self, path: Path) -> None:
        """Read the journal at `path`; a file that is not there yet is made by the first record.

        Raises:
            DataError: a line in the middle of it cannot be read, or it is of a newer version.
        """
        self.path = path
        self.decisions = Decisions()
        self.repaired: list[str] = []
        self._lock = threading.RLock()
        self._read_to = 0
        self._lines = 0
        self._seq = 0
        if path.exists():
            with self._held(create=False) as file:
                self._catch_up(file)

    def refresh(self) -> None:
        """Read what other processes have added."""
        if self.path.exists() and self.path.stat().st_size != self._read_to:
            with self._held(create=False) as file:
                self._catch_up(file)

    def append(self, do: str, **values: Any) -> int:
        """Write one record and return its number once it is on disk.

        Raises:
            DataError: the journal was damaged meanwhile, or cannot be written.
        """
        assert do in _KINDS
        with self._held(create=True) as file:
            self._catch_up(file)
            record = {"v": VERSION, "seq": self._seq + 1, "at": _now(), "do": do}
            record |= {name: value for name, value in values.items() if value is not None or name == "new"}
            line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
            file.seek(0, os.SEEK_END)
            try:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                raise DataError(
                    f"{self.path}: the decision could not be written: {error.strerror}",
                    hint="free some space; what was decided before is kept",
                ) from error
            self._take(record, len(line))
            return self._seq

    def decide(self, verdict: Verdict, *, by: str, text: str, labels: tuple[str, ...] = (), **more: Any) -> Decision:
        """Record a decision; `more` is `note`, `guess`, `ms`."""
        with self._lock:
            self.append(verdict, by=by, id=text_id(text), text=text, labels=list(labels) or None, **more)
            decision = self.decisions.last(by)
            assert decision is not None
            return decision

    def undo(self, by: str) -> Decision | None:
        """Take back the last decision of `by` that stands; None when there is none."""
        with self._lock:
            self.refresh()
            last = self.decisions.last(by)
            if last is not None:
                self.append("undo", by=by, undoes=last.seq)
            return last

    @contextlib.contextmanager
    def _held(self, *, create: bool) -> Iterator[IO[bytes]]:
        """Hold the file for this thread and this process."""
        with self._lock:
            try:
                if create:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                fresh = create and not self.path.exists()
                with open(self.path, "a+b" if create or os.access(self.path, os.W_OK) else "rb") as file, locked(file):
                    if fresh:
                        _sync_folder(self.path.parent)
                    yield file
            except OSError as error:
                raise DataError(
                    f"{self.path}: cannot be written ({error.strerror})", hint="name another file with --journal"
                ) from error

    def _catch_up(self, file: IO[bytes]) -> None:
        """Read the records that are new to us; cut off a last line without its end."""
        file.seek(0, os.SEEK_END)
        if file.tell() < self._read_to:
            raise DataError(
                f"{self.path}: the journal has become shorter than it was when it was read",
                hint="another program changed it: stop alambic, put the file back and start again",
            )
        file.seek(self._read_to)
        body = file.read()
        whole = body.rfind(b"\n") + 1
        for line in body[:whole].splitlines(keepends=True):
            self._take(_parse(line, f"{self.path.name}:{self._lines + 1}"), len(line))
        torn = len(body) - whole
        if torn and file.writable():
            file.truncate(self._read_to)
            os.fsync(file.fileno())
            self.repaired.append(
                f"{self.path.name}:{self._lines + 1}: the last line was cut short ({torn} bytes) by a process that "
                "was stopped while it wrote; it is removed, every line before it is whole"
            )

    def _take(self, record: Mapping[str, Any], size: int) -> None:
        self._read_to += size
        self._lines += 1
        if record:
            self._seq = max(self._seq, int(record["seq"]))
            self.decisions.apply(record)


def _parse(line: bytes, where: str) -> dict[str, Any]:
    if not line.strip():
        return {}
    hint = "put a copy of the journal back, or remove this line by hand"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not a record of an annotation: {error}", hint=hint) from error
    if not isinstance(record, dict) or not isinstance(record.get("v"), int) or not isinstance(record.get("seq"), int):
        raise DataError(f"{where}: not a record of an annotation: it has no version and number", hint=hint)
    if record["v"] > VERSION:
        raise DataError(f"{where}: written by a newer alambic (version {record['v']})", hint="upgrade alambic")
    do = record.get("do")
    if do not in _KINDS:
        raise DataError(f"{where}: unknown record {do!r}; {nearest(str(do), _KINDS)}", hint=hint)
    needed = {"labels": ("labels",), "rename": ("old", "new"), "undo": ("by", "undoes")}
    for name in needed.get(do, ("by", "id", "text", "at")):
        if name not in record:
            raise DataError(f"{where}: a record of {do!r} without {name!r}", hint=hint)
    return record


@contextlib.contextmanager
def locked(file: IO[bytes]) -> Iterator[None]:
    """Hold an open file against other processes; waits for its turn."""
    try:
        import fcntl
    except ImportError:  # Windows has no fcntl
        import msvcrt

        # A locked byte cannot be read by others: lock one that no journal reaches.
        file.seek(_FAR)
        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            file.seek(_FAR)
            msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined]
        return
    fcntl.flock(file.fileno(), fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file.fileno(), fcntl.LOCK_UN)


def _sync_folder(folder: Path) -> None:
    """Have the name of a new file on disk too, where folders can be synced."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
