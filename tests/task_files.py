"""Task files for the tests of builds: what they begin with, and a whole task whose answers repeat a text."""

from __future__ import annotations

from pathlib import Path

SCRATCH = 'name = "scratch"\nparameters = 100_000\nmax_tokens = 64'


def desk(rest: str) -> str:
    """Return the task file of a classifier; `rest` begins with further keys of [data], or another table."""
    return _head("desk", "classify") + rest


def echo(rest: str) -> str:
    """Return the task file of a model that writes; `rest` begins with further keys of [data], or another table."""
    return _head("echo", "generate") + rest


def write_echo(
    folder: Path, *, base: str = SCRATCH, answer: str = "", candidate: str = "finetune-int8", recipe: str = ""
) -> Path:
    """Write task.toml, with these lines in its tables, and rows.csv into `folder`; return the task's path."""
    words = ["cat", "dog", "mat", "sat", "ran", "the", "see", "def", "naïve", "garçon"]
    rows = [f"{a} {b} {c}" for a in words for b in words for c in ("on a", "to see", "and the") if a != b]
    (folder / "rows.csv").write_text("text;answer\n" + "".join(f"{row};{row}\n" for row in rows), "utf-8")
    tables = f'[base]\n{base}\n[answer]\nmax_tokens = 12\n{answer}\n[[candidate]]\nname = "{candidate}"\n{recipe}\n'
    path = folder / "task.toml"
    path.write_text(echo(tables), "utf-8")
    return path


def _head(name: str, kind: str) -> str:
    return f'[task]\nname = "{name}"\nkind = "{kind}"\nthreads = 1\n[data]\ntrain = "rows.csv"\n'
