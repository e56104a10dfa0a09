"""`alambic chat`: talk with a bundle that writes, in the terminal."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--once", metavar="TEXT", help="Answer TEXT (- reads stdin), print the answer only, and end.")
@click.option("--system", metavar="TEXT", help="System prompt; by default that of the bundle.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 takes the likeliest token; by default as built.")
@click.option("--max-tokens", type=click.IntRange(1), help="Most tokens of an answer; by default as built.")
@click.option("--seed", type=click.IntRange(0), help="Repeats an answer that chance decides.")
@click.option("--threads", type=click.IntRange(1), help="Threads of the engine.")
def chat(bundle: Path, once: str | None, system: str | None, threads: int | None, **sampling: Any) -> None:
    """Talk with BUNDLE: answers on stdout, times on stderr.

    Ctrl-C stops an answer, Ctrl-D quits; /help lists the commands.
    """
    from alambic.cli.conversation import Conversation, language, summary, talk
    from alambic.cli.conversation_words import WORDS
    from alambic.engines.bundle_writer import open_writer

    out = sys.stdout
    if isinstance(out, io.TextIOWrapper):  # a model may write what the terminal's encoding has not
        out.reconfigure(errors="replace")
    with open_writer(bundle, threads=threads) as writer:
        conversation = Conversation(writer, system=system, sampling=sampling)
        if once is None:
            talk(conversation, writer.bundle.manifest.name, out=out)
            return
        text = sys.stdin.read() if once == "-" else once
        if not text.strip():
            raise click.UsageError("--once: the text is empty")
        said = conversation.answer(text, out)
        out.write("\n")
        click.secho(summary(said, WORDS[language()]), dim=True, err=True)
        if said.last is None:
            raise click.Abort
