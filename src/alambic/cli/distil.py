"""`alambic distil`: an encoder learns a further language from parallel sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Run folder.  [default: runs/<name>]")
@click.option("--data", type=click.Path(path_type=Path), help="Folder that the paths of [data] start from.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on stdout.")
def distil(config: Path, out: Path | None, data: Path | None, as_json: bool) -> None:
    """Teach an encoder a further language, as CONFIG (a TOML file) says.

    Interrupt it as you like: the same command goes on from there. The encoder is in the folder `encoder` of the run
    folder; write that path as [base] name of a task.
    """
    from alambic.build.distilling import distil_events
    from alambic.cli.progress import shown
    from alambic.distil_config import load_distil
    from alambic.events import drain

    loaded = load_distil(config, data=data)
    run = out if out is not None else Path("runs") / loaded.name
    with shown() as listener:
        outcome = drain(distil_events(loaded, run), listener)
    if as_json:
        click.echo(json.dumps({"encoder": str(outcome.encoder), **outcome.record}, ensure_ascii=False))
        return
    click.echo("\n".join(_summary(outcome.encoder, outcome.record)))


def _summary(encoder: Path, record: dict[str, Any]) -> list[str]:
    found, stages = record["retrieval"], record["stages"].values()
    minutes = sum(stage["seconds"] for stage in stages) / 60
    tokens = sum(stage["tokens"] for stage in stages)
    return [
        f"  pairs        {record['pairs']:,} learnt from, {record['held_out']:,} held out",
        f"  training     {tokens:,} tokens in {minutes:.1f} min",
        *_guesses(record["stages"].get("masked", {})),
        f"  retrieval    {found['from_new']:.1%} from the further language, {found['from_known']:.1%} into it "
        f"(the right one of {found['n']:,} held-out sentences is the nearest)",
        f"  encoder      {encoder}",
    ]


def _guesses(masked: dict[str, Any]) -> list[str]:
    """Return a line for each language whose masked tokens were guessed."""
    return [
        f"  guesses      {scores['after']['value']:.2f} nats a masked token of the {title} language, "
        f"{scores['before']['value']:.2f} before ({scores['guessed']:,} held-out tokens)"
        for title, key in (("further", "new"), ("known", "known"))
        if (scores := masked.get(key))
    ]
