"""`alambic pretrain`: a model of one's own from raw text: corpus, tokenizer, shards, training."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("config", type=click.Path(path_type=Path), required=False)
@click.option("--out", type=click.Path(path_type=Path), help="Run folder.  [default: runs/<name>]")
@click.option(
    "--corpus", type=click.Path(path_type=Path), envvar="ALAMBIC_CORPUS", show_envvar=True,
    help="Folder that the paths of the sources start from.",
)  # fmt: skip
@click.option(
    "--test-sets", type=click.Path(path_type=Path), multiple=True, envvar="ALAMBIC_TEST_SETS", show_envvar=True,
    help="Folder of test sets whose texts must not be learnt; may be given several times.",
)  # fmt: skip
@click.option(
    "--only", type=click.Choice(("corpus", "tokenizer", "shards")), help="Stop once this is made; do not train."
)
@click.option("--minutes", type=click.FloatRange(min=0.1), help="Train so long, then stop with a checkpoint.")
@click.option("--dry-run", is_flag=True, help="Validate, look at the files, tell what would be done, and stop.")
@click.option("--schema", is_flag=True, help="Print the JSON Schema of the configuration, for editors.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on stdout.")
def pretrain(
    config: Path | None, out: Path | None, corpus: Path | None, test_sets: tuple[Path, ...], only: str | None,
    minutes: float | None, dry_run: bool, schema: bool, as_json: bool,
) -> None:  # fmt: skip
    """Train a model from raw text as CONFIG says.

    Interrupt it as you like: finished stages are kept, the training goes on from its last checkpoint, and the same
    command goes on from there.
    """
    from alambic.pretrain_config import json_schema, load_pretrain

    if schema:
        click.echo(json.dumps(json_schema(), indent=1))
        return
    if config is None:
        raise click.UsageError("name a configuration, or --schema")
    from alambic.build.crew import crew
    from alambic.build.pretraining import UNTIL, plan, pretrain_events
    from alambic.cli.progress import shown
    from alambic.events import drain

    with crew() as leads:
        if not leads:  # started by torchrun: this process has done its share of the training
            return
        loaded = load_pretrain(config, corpus=corpus, test_sets=test_sets)
        if dry_run:
            made = plan(loaded)
            click.echo(json.dumps(made.to_dict(), ensure_ascii=False) if as_json else made.text())
            return
        run = out if out is not None else Path("runs") / loaded.name
        until = next(name for name in UNTIL if name == (only or "train"))
        with shown() as listener:
            outcome = drain(pretrain_events(loaded, run, until=until, minutes=minutes), listener)
    click.echo(json.dumps(outcome.to_dict(), ensure_ascii=False) if as_json else outcome.text())
