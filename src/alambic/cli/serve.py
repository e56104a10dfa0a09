"""`alambic serve`: answer over HTTP, with a page to try."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import click

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
_LIMITS = ("max_body_bytes", "max_texts", "max_wait_ms", "queue_limit", "max_streams", "max_waiting")


@click.command()
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free port.")
@click.option("--api-key-env", default="ALAMBIC_API_KEY", show_default=True, help="Variable that holds the API key.")
@click.option("--allow-host", multiple=True, metavar="NAME", help="Accept this Host name too (behind a proxy).")
@click.option("--report", type=_FILE, help="Report to show; by default the one next to the first bundle.")
@click.option("--threads", type=click.IntRange(1), help="Threads of each engine.")
@click.option("--remote", is_flag=True, help="Send what bundles abstain from to the endpoints that they name.")
@click.option(
    "--max-body-bytes", default=1_000_000, show_default=True, type=click.IntRange(1), help="Body of a request."
)
@click.option("--max-texts", default=256, show_default=True, type=click.IntRange(1), help="Texts in one request.")
@click.option(
    "--max-wait-ms", default=2.0, show_default=True, type=click.FloatRange(0), help="Wait for a fuller batch."
)
@click.option("--queue-limit", default=1024, show_default=True, type=click.IntRange(1), help="Texts that may wait.")
@click.option(
    "--max-streams", default=16, show_default=True, type=click.IntRange(1), help="Answers a model writes at once."
)
@click.option(
    "--max-waiting", default=256, show_default=True, type=click.IntRange(0), help="Requests for answers that may wait."
)
@click.option("--json", "as_json", is_flag=True, help="Print the address as JSON once it answers.")
def serve(bundles: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Answer over HTTP for BUNDLE..., until Ctrl-C: labels, or texts in OpenAI's API.

    Classifiers answer POST /v1/classify and /v1/embeddings; models that write answer POST /v1/chat/completions,
    /v1/completions and /v1/responses. GET / is a page to try them; /health, /v1/models, /metrics and /report tell more.
    """
    from alambic.serve import models, server
    from alambic.serve.app import create_app
    from alambic.serve.limits import LOOPBACK_NAMES, Limits

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    key = os.environ.get(options["api_key_env"]) or None
    local = server.is_loopback(options["host"])
    limits = Limits(**{name: options[name] for name in _LIMITS})
    listener = server.listen(options["host"], options["port"])
    with listener, models.load(bundles, threads=options["threads"], remote=options["remote"]) as engines:
        app = create_app(
            engines,
            limits=limits,
            api_key=key,
            report=options["report"] or models.find_report(bundles[0]),
            hosts=LOOPBACK_NAMES | {name.lower() for name in options["allow_host"]} if local else None,
        )
        url = server.url_of(listener)
        if not local and key is None:
            note = f"note: anyone who can reach {url} may use it; set {options['api_key_env']} to ask for a key"
            click.secho(note, fg="yellow", err=True)
        server.run(app, listener, on_ready=lambda: _announce(url, list(engines), as_json=as_json))


def _announce(url: str, names: list[str], *, as_json: bool) -> None:
    click.echo(f"{', '.join(names)} on {url} (Ctrl-C stops it)", err=True)
    if as_json:
        click.echo(json.dumps({"url": url, "models": names}))
