"""`alambic bases`: the base models that a task can name."""

from __future__ import annotations

import json

import click


@click.group(invoke_without_command=True)
@click.pass_context
def bases(ctx: click.Context) -> None:
    """List, show or fetch base models."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_bases)


@bases.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_bases(as_json: bool = False) -> None:
    """List the known bases; any BERT-like folder or hub id works too."""
    from dataclasses import asdict

    from alambic.cli.table import text_table
    from alambic.model.bases import catalogue

    entries = catalogue().values()
    if as_json:
        click.echo(json.dumps([asdict(e) for e in entries], ensure_ascii=False))
        return
    rows = [[e.name, ", ".join(e.languages), str(e.max_tokens), e.licence, e.summary] for e in entries]
    click.echo(text_table(["name", "languages", "tokens", "licence", "what"], rows))


@bases.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show_base(name: str, as_json: bool) -> None:
    """Check the base NAME (a known name, a folder, a hub id in the local cache) and say what it is."""
    _resolved(name, offline=True, as_json=as_json)


@bases.command("pull")
@click.argument("name")
@click.option("--revision", help="Commit or tag.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def pull_base(name: str, revision: str | None, as_json: bool) -> None:
    """Fetch the base NAME from the hub into the usual cache (HF_HOME, HF_TOKEN respected)."""
    _resolved(name, offline=False, revision=revision, as_json=as_json)


def _resolved(name: str, *, offline: bool, as_json: bool, revision: str | None = None) -> None:
    from alambic.model.bases import resolve

    base = resolve(name, offline=offline, revision=revision)
    record = {**base.to_dict(), "folder": str(base.folder), "pooling": base.pooling, "max_tokens": base.max_tokens}
    click.echo(json.dumps(record) if as_json else "\n".join(f"{k:<11} {v}" for k, v in record.items()))
