"""`alambic verify`: every byte of a bundle, and its golden predictions on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(bundle: Path, as_json: bool) -> None:
    """Rehash every file of BUNDLE, then check that its tokens and predictions are those of the build."""
    import alambic
    from alambic.bundle import verify as verify_files
    from alambic.engines.classify import ClassifyEngine
    from alambic.engines.golden import check_golden, check_golden_chats

    files = verify_files(bundle)
    with alambic.open(bundle) as engine:
        if isinstance(engine, ClassifyEngine):
            golden = check_golden(engine)
            said = f"{golden.n} golden texts: same tokens; probabilities within {golden.largest_difference:.2g}"
        else:
            golden = check_golden_chats(engine)
            said = f"{golden.n} golden conversations: same tokens"
    record = {"bundle": str(bundle), "files": files.files, "bytes": files.bytes, **golden.to_dict()}
    text = f"{files.files} files, {files.bytes:,} bytes: as sealed\n{said}"
    click.echo(json.dumps(record) if as_json else text)
