"""A small task with linear candidates only, the run it was built into, and the command line in this process."""

from __future__ import annotations

import contextlib
import csv
import io
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from alambic.build import build
from alambic.cli.main import main

WORDS = {
    "billing": "invoice refund charged payment price card amount credit bill paid receipt bank",
    "fault": "machine drain pump noise heater door error leak stopped broken drum filter",
    "visit": "appointment technician monday visit schedule cancel confirm morning date hour late postpone",
}
FILLER = "the my a please since today again we i it with for hello thanks can you".split()  # noqa: SIM905
RARE = ("the heating of the pool is lovely", "other")
TASK = """\
[task]
name = "desk"
kind = "classify"
[data]
train = "rows.csv"
[budget]
quality = { accuracy = 0.5 }
[[candidate]]
name = "majority"
[[candidate]]
name = "tfidf-svm"
"""


def messages(per_label: int = 14, *, seed: int = 0) -> list[tuple[str, str]]:
    """Return (text, label) rows that share words within a label and are no near duplicates."""
    draw = random.Random(seed)
    rows = []
    for label, words in WORDS.items():
        for _ in range(per_label):
            text = draw.sample(words.split(), 4) + draw.sample(FILLER, 4)
            draw.shuffle(text)
            rows.append((f"{' '.join(text)} {draw.randint(100, 999)}", label))
    draw.shuffle(rows)
    return rows


def write_csv(path: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("message", "team")) -> Path:
    """Write rows as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_task(folder: Path, *, text: str = TASK, rows: list[tuple[str, str]] | None = None) -> Path:
    """Write task.toml and rows.csv into `folder`; return the task's path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "rows.csv", [*messages(), RARE] if rows is None else rows)
    (folder / "task.toml").write_text(text, encoding="utf-8")
    return folder / "task.toml"


_built: dict[str, Any] = {}


def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder that holds a finished build of TASK, made once; tests copy what they change."""
    if "run" not in _built:
        folder = tmp_path_factory.mktemp("desk")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOME", str(folder / "home"))
            patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
            _built["result"] = build(write_task(folder), out=folder / "run")
        _built["run"] = folder / "run"
    run: Path = _built["run"]
    return run


@dataclass(frozen=True)
class Answer:
    """How a command ended."""

    code: int
    out: str
    err: str


def alambic(*argv: object, stdin: bytes = b"") -> Answer:
    """Run the command line in this process, as the `alambic` script would."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main([str(arg) for arg in argv])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    finally:
        sys.stdin = before
    return Answer(code, out.getvalue(), err.getvalue())
