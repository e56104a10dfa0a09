"""Pack a model folder into the data package, and print what the catalogue must say of it.

    python bases/recipes/ship.py MODEL NAME

MODEL is a folder in Hugging Face layout (one model.safetensors). Prints sha256, parameters and bytes for bases.toml.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from alambic.model.bases_packed import pack_folder
from alambic.model.bases_weights import count_stored, weight_files

_PACKAGE = Path(__file__).parents[1] / "src" / "alambic_bases"
_LIMIT_MB = 50.0  # of all tracked weights together


def main() -> None:
    """Pack, measure, print."""
    model, name = Path(sys.argv[1]), sys.argv[2]
    out = _PACKAGE / name
    shutil.rmtree(out, ignore_errors=True)
    digest = pack_folder(model, out)
    parameters = count_stored(weight_files(model))
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    total = sum(file.stat().st_size for file in _PACKAGE.rglob("*") if file.is_file()) / 1e6
    print(f'name = "{name}"\npackage = "alambic_bases"\nfolder = "{name}"\nsha256 = "{digest}"')
    print(f'parameters = {parameters:_}\nstored = "int8"\nbytes = {size:_}')
    if total > _LIMIT_MB:
        raise SystemExit(f"{total:.1f} MB in {_PACKAGE}: over the limit of {_LIMIT_MB:.0f} MB")
    print(f"# all of alambic-bases: {total:.1f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
