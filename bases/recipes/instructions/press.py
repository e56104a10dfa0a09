"""Summaries and titles: news (OrangeSum's training part), help sheets (CNIL), invented documents."""

from __future__ import annotations

from collections.abc import Iterator

from instructions.frame import Frame
from instructions.grounded import Invented
from instructions.row import Row
from instructions.sentences import shorten, unglue
from instructions.sources import SOURCES, Library

_ARTICLE_TOKENS = 380
_LONGEST = 400  # characters of a summary


def news(frame: Frame, library: Library, *, summaries: int, titles: int, choices: int) -> Iterator[Row]:
    """Summaries, titles, and titles to choose among, each of articles of their own."""
    rows = library.rows("orangesum")
    frame.rng.shuffle(rows)
    made = {"summary": 0, "title": 0, "title_choice": 0}
    most = {"summary": summaries, "title": titles, "title_choice": choices}
    for number, row in enumerate(rows):
        family = next((name for name in most if made[name] < most[name]), None)
        if family is None:
            return
        text, cut = shorten(unglue(row["text"]), _ARTICLE_TOKENS - (70 if family == "title_choice" else 0))
        title, summary = unglue(row["title"]), unglue(row["summary"])
        if not text or not 10 < len(summary) < _LONGEST or not 10 < len(title) < 160:
            continue
        made[family] += 1
        about = {"group": f"orangesum:{row['id']}", "cut": cut}
        if family == "title_choice":
            wrong = [unglue(rows[(number + k) % len(rows)]["title"]) for k in (7, 19, 31)][: frame.rng.randint(1, 3)]
            found = _choice(frame, text, title, wrong)
        else:
            found = frame.row(family, frame.ask(family, text=text), summary if family == "summary" else title)
        yield found.by("orangesum", SOURCES["orangesum"].licence, **about)


def _choice(frame: Frame, text: str, title: str, wrong: list[str]) -> Row:
    offered = [title, *wrong]
    frame.rng.shuffle(offered)
    labels = "\n".join(f"- {one}" for one in offered)
    return frame.row("title", frame.ask("title_choice", text=text, labels=labels), title)


def sheets(frame: Frame, library: Library) -> Iterator[Row]:
    """Help sheets: the question that each answers, and its theme."""
    rows = library.rows("cnil_faq")
    themes = sorted({row["theme"] for row in rows if row.get("theme")})
    for row in rows:
        text, cut = shorten(unglue(row["text"]), _ARTICLE_TOKENS)
        title = unglue(row["title"])
        if not text or not title:
            continue
        found = []
        if title.endswith("?"):
            found.append(frame.row("title", frame.ask("title_question", text=text), title))
            found.append(frame.row("title", frame.ask("title", text=text), title))
        if row.get("theme") and len(themes) > 2:
            some = [theme for theme in themes if theme != row["theme"]]
            offered = [row["theme"], *frame.rng.sample(some, min(len(some), frame.rng.randint(2, 5)))]
            frame.rng.shuffle(offered)
            short = shorten(text, 250)[0] or text
            found.append(frame.row("classify", frame.ask("theme", text=short, labels=", ".join(offered)), row["theme"]))
        for one in found:
            yield one.by("cnil_faq", SOURCES["cnil_faq"].licence, group=f"cnil:{row['id']}", cut=cut)


def invented(frame: Frame, count: int) -> Iterator[Row]:
    """`count` summaries and titles of invented documents."""
    made = 0
    while made < count:
        document = Invented(frame)
        text = " ".join(document.sentences)
        title, summary = document.title, document.summary
        for family, answer in (("summary", summary), ("title", title)):
            if answer and made < count:
                made += 1
                row = frame.row(family, frame.ask(family, text=text), answer)
                yield row.by(row.source, row.licence, group=f"own:{text[:60]}")
