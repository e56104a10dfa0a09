"""`alambic bases`: the base models that a task can name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

_KINDS = ("encoder", "decoder", "seq2seq", "remote")


def _filters(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option("--memory", type=click.FloatRange(min=0), metavar="GB", help="Ask for another machine's memory."),
        click.option("--fits", is_flag=True, help="Only what runs in the memory that is free here, at int4 or better."),
        click.option("--licence", help="Part of the licence's name."),
        click.option("--language", metavar="CODE", help="Such as fr."),
        click.option("--kind", type=click.Choice(_KINDS), help="encoder, decoder, seq2seq or remote."),
    ):
        command = option(command)
    return command


@click.group(invoke_without_command=True)
@_filters
@click.pass_context
def bases(ctx: click.Context, /, **filters: Any) -> None:
    """List, show or fetch base models."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_bases, **filters)


@bases.command("list")
@_filters
def list_bases(
    kind: str | None, language: str | None, licence: str | None, fits: bool, memory: float | None, as_json: bool
) -> None:
    """List the known bases, and at which precision each fits in memory.

    Any folder or hub id of their families works too.
    """
    from alambic.cli import bases_text
    from alambic.model.catalogue import catalogue, free_memory_bytes, remotes, select

    free = free_memory_bytes() if memory is None else int(memory * 1e9)
    if fits and free is None:
        raise click.UsageError("this system does not tell its free memory; say how much there is with --memory")
    own = None if kind == "remote" else kind
    chosen = select(
        catalogue().values(), kind=own, language=language, licence=licence, fits_bytes=free if fits else None
    )
    chosen = [] if kind == "remote" else chosen
    far = [] if kind not in (None, "remote") or language or licence or fits else list(remotes().values())
    if as_json:
        click.echo(json.dumps(bases_text.listing(chosen, far, free), ensure_ascii=False))
    else:
        click.echo(bases_text.table(chosen, far, free))
        click.echo(bases_text.legend(free), err=True)


@bases.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show_base(name: str, as_json: bool) -> None:
    """Say what is known of the base NAME, and check it if it is on this machine.

    NAME is a known name, a folder, or a hub id in the local cache.
    """
    from alambic.cli import bases_text

    facts = bases_text.facts_of(name)
    click.echo(json.dumps(facts, ensure_ascii=False) if as_json else bases_text.page(facts))


@bases.command("pull")
@click.argument("name")
@click.option("--revision", help="Commit, branch or tag.")
@click.option("--files", multiple=True, metavar="PATTERN", help="Only the files of these names; can be repeated.")
@click.option("--sha256", multiple=True, metavar="[FILE=]HEX", help="Expected hash of a file (model.safetensors).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def pull_base(name: str, revision: str | None, files: tuple[str, ...], sha256: tuple[str, ...], as_json: bool) -> None:
    """Fetch the base NAME from the hub into the usual cache, checked by hash; run again, it goes on where it stopped.

    HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT (a mirror) are respected.
    """
    from alambic.cli import bases_text
    from alambic.cli.progress import shown
    from alambic.events import drain
    from alambic.model.bases import pull

    expected = dict(bases_text.hash_of(text) for text in sha256)
    with shown() as listen:
        pulled = drain(pull(name, revision=revision, files=files, sha256=expected), listen)
    record = bases_text.pulled(name, pulled)
    click.echo(json.dumps(record, ensure_ascii=False) if as_json else bases_text.page(record))
