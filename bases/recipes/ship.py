"""Pack a model folder into the data package, and write into the catalogue what follows from its files.

    python bases/recipes/ship.py MODEL NAME

MODEL is a folder in Hugging Face layout (one model.safetensors). The entry NAME of src/alambic/model/bases.toml gets
its sha256, parameters and bytes; where there is none yet, what it must say is printed. The same model gives the same
files.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from alambic.model.bases_packed import pack_folder
from alambic.model.bases_weights import count_stored, weight_files
from alambic.model.catalogue_size import shape_of

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "bases" / "src" / "alambic_bases"
CATALOGUE = ROOT / "src" / "alambic" / "model" / "bases.toml"
LIMIT_MB = 50.0  # of all tracked weights together


def main() -> None:
    """Pack, check the size, write."""
    if len(sys.argv) != 3:
        raise SystemExit("usage: python bases/recipes/ship.py MODEL NAME")
    model, name = Path(sys.argv[1]), sys.argv[2]
    facts = ship(model, name, PACKAGE)
    text = CATALOGUE.read_text("utf-8")
    try:
        CATALOGUE.write_text(with_facts(text, name, facts), "utf-8", newline="\n")
        print(f"{CATALOGUE.relative_to(ROOT)}: {name}: {facts}")
    except KeyError:
        print(f"no entry {name!r} in {CATALOGUE.relative_to(ROOT)} yet; add one that says:", file=sys.stderr)
        print("\n".join(["[[base]]", *_lines({**_named(model, name), **facts})]))
    print(f"all of alambic-bases: {_size(PACKAGE) / 1e6:.1f} of {LIMIT_MB:.0f} MB", file=sys.stderr)


def ship(model: Path, name: str, package: Path) -> dict[str, Any]:
    """Write `package`/`name` in place of what is there, and return what the catalogue must say of it.

    Raises:
        SystemExit: all bases together would be over the limit; nothing was changed then.
    """
    beside, out = package / f".{name}.partial", package / name
    shutil.rmtree(beside, ignore_errors=True)
    digest = pack_folder(model, beside)
    total = _size(package) - (_size(out) if out.is_dir() else 0)
    if total > LIMIT_MB * 1e6:
        shutil.rmtree(beside)
        raise SystemExit(f"{name}: {total / 1e6:.1f} MB in {package} with it: over the limit of {LIMIT_MB:.0f} MB")
    shutil.rmtree(out, ignore_errors=True)
    beside.rename(out)
    parameters = count_stored(weight_files(model))
    return {"sha256": digest, "parameters": parameters, "stored": "int8", "bytes": _size(out)}


def with_facts(text: str, name: str, facts: dict[str, Any]) -> str:
    """Return the catalogue `text` with `facts` in the entry `name`, each on the line of its key or on a new one.

    Raises:
        KeyError: there is no such entry.
    """
    blocks = re.split(r"(?m)^(?=\[\[)", text)
    at = next((i for i, block in enumerate(blocks) if re.search(rf'(?m)^name = "{re.escape(name)}"$', block)), None)
    if at is None:
        raise KeyError(name)
    for key, line in reversed(list(zip(facts, _lines(facts), strict=True))):  # new lines then stand in their order
        blocks[at], found = re.subn(rf"(?m)^{key} = .*$", line, blocks[at], count=1)
        if not found:
            blocks[at] = re.sub(r"(?m)^(folder = .*)$", rf"\1\n{line}", blocks[at], count=1)
    return "".join(blocks)


def _named(model: Path, name: str) -> dict[str, Any]:
    config = json.loads((model / "config.json").read_text("utf-8"))
    shape = shape_of(config)
    known = {} if shape is None else {"shape": {key: value for key, value in vars(shape).items() if value}}
    return {"name": name, "package": PACKAGE.name, "folder": name, "architecture": config["model_type"], **known,
            "context_tokens": config.get("max_position_embeddings")}  # fmt: skip


def _lines(facts: dict[str, Any]) -> list[str]:
    return [f"{key} = {_toml(value)}" for key, value in facts.items()]


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:_}"
    return json.dumps(value)


def _size(folder: Path) -> int:
    """Return the bytes of all files of `folder` that a package would hold."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts)


if __name__ == "__main__":
    main()
