"""`alambic label`: annotate texts in a local page, the most useful first."""

from __future__ import annotations

import json
import logging
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from alambic.build.labelling.opening import Annotation

_FILE = click.Path(path_type=Path)
_FORMS = ("csv", "label-studio", "argilla")
_ASKED = ("texts", "labels", "text", "multi_label", "journal", "base", "overlap", "rename")


@click.command()
@click.argument("target", type=_FILE)
@click.option(
    "--texts", type=_FILE, help="File of the texts to annotate, when TARGET is a task that trains on another."
)
@click.option("--labels", help='Names, as "a, b, c", or a .toml file of name = "description".')
@click.option("--text", metavar="COLUMN", help="Column of the texts; guessed when absent.")
@click.option("--multi-label", is_flag=True, help="A text may have several labels, or none.")
@click.option("--journal", type=_FILE, help="Where decisions are kept; beside the texts when absent.")
@click.option("--base", help="Model of the guesses, as in a task file; `none` for none.")
@click.option(
    "--overlap", default=0.1, show_default=True, type=click.FloatRange(0, 1), help="Share seen by two people."
)
@click.option("--rename", multiple=True, metavar="OLD=NEW", help="A label name that changed; OLD= asks again.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8010, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free port.")
@click.option("--import", "taken", type=_FILE, help="Take over annotations of Label Studio, Argilla or a table; ends.")
@click.option("--export", "out", type=_FILE, help="Write the annotations to a new file; ends.")
@click.option("--form", type=click.Choice(_FORMS), default="csv", show_default=True, help="Form of the export.")
@click.option("--status", is_flag=True, help="Print counts and agreement; ends.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def label(target: Path, taken: Path | None, out: Path | None, status: bool, **options: Any) -> None:
    """Annotate the texts of TARGET, a task file or a file of texts, in a page on this machine.

    Each decision is on disk at once, in a journal beside the texts. The most useful text comes first, with a guess.
    """
    from alambic.build.labelling.opening import Ask, open_annotation

    annotation = open_annotation(Ask(target, **{name: options[name] for name in _ASKED}))
    if taken is not None:
        _take(annotation, taken, as_json=options["as_json"])
    if out is not None:
        _write(annotation, out, options["form"], as_json=options["as_json"])
    if status:
        _tell(annotation, as_json=options["as_json"])
    if taken is None and out is None and not status:
        _serve(annotation, options)


def _take(annotation: Annotation, path: Path, *, as_json: bool) -> None:
    from alambic.data.annotation_import import import_annotations

    known = {"labels": annotation.labels, "multi_label": annotation.multi_label}
    imported = import_annotations(path, annotation.journal, **known)  # type: ignore[arg-type]
    for note in imported.notes(path.name):
        click.echo(note, err=True)
    if as_json:
        click.echo(json.dumps({"tool": imported.tool, "added": imported.added, "left_out": len(imported.bad)}))


def _write(annotation: Annotation, out: Path, form: str, *, as_json: bool) -> None:
    from alambic.data.annotation_formats import export
    from alambic.errors import DataError
    from alambic.workspace import on_disk, write_text

    exported = export(form, annotation.journal.decisions, multi_label=annotation.multi_label)
    if out.exists():
        raise DataError(f"{out}: the file is there already", hint="name another one: no file is overwritten")
    with on_disk(out):
        write_text(out, exported.body)
    for note in (f"{exported.n} texts written to {out}", *exported.notes):
        click.echo(note, err=True)
    if as_json:
        click.echo(json.dumps({"file": str(out), "form": form, "n": exported.n}))


def _tell(annotation: Annotation, *, as_json: bool) -> None:
    from alambic.build.labelling.session import Session
    from alambic.build.labelling.status import describe

    known = {"multi_label": annotation.multi_label, "tutor": None, "notes": annotation.notes}
    session = Session(annotation.name, annotation.pool, annotation.journal, annotation.labels, **known)  # type: ignore[arg-type]
    state = session.state()
    click.echo(json.dumps(state, ensure_ascii=False) if as_json else describe(state))


def _serve(annotation: Annotation, options: dict[str, Any]) -> None:
    from alambic.build.labelling.opening import closing, start
    from alambic.cli.progress import shown
    from alambic.events import drain
    from alambic.serve import server
    from alambic.serve.annotate import create_annotation_app
    from alambic.serve.limits import LOOPBACK_NAMES

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    local = server.is_loopback(options["host"])
    token = None if local else secrets.token_urlsafe(16)
    listener = server.listen(options["host"], options["port"])
    with listener:
        with shown(quiet=options["as_json"]) as listen:
            session = drain(start(annotation), listen)
        with closing(session):
            app = create_annotation_app(session, token=token, hosts=LOOPBACK_NAMES if local else None)
            url = server.url_of(listener) + (f"/#{token}" if token else "")
            server.run(app, listener, on_ready=lambda: _announce(url, annotation, as_json=options["as_json"]))


def _announce(url: str, annotation: Annotation, *, as_json: bool) -> None:
    click.echo(f"{len(annotation.pool.texts):,} texts on {url} (Ctrl-C stops it; nothing is lost)", err=True)
    if as_json:
        click.echo(json.dumps({"url": url, "journal": str(annotation.journal.path)}))
