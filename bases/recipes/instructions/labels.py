"""Classification by instruction: the names of the labels are given, and the answer is one of them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from instructions.frame import Frame
from instructions.grammar import capital, pick
from instructions.row import Row
from instructions.sources import SOURCES, Library

_NONE_SHARE = 0.08  # of the rows whose label is not among those offered
_STYLE_SHARES = (0.75, 0.25)  # names as words, names as they are written in the data


def sets(frame: Frame, library: Library, counts: dict[str, int], *, wording: str = "classify") -> Iterator[Row]:
    """Rows of public sets, as many of each as asked for, labels in turn so that rare ones are not lost."""
    for name, count in counts.items():
        by_label: dict[str, list[str]] = defaultdict(list)
        for row in library.rows(name):
            by_label[row["label"]].append(" ".join(row["text"].split()))
        for texts in by_label.values():
            frame.rng.shuffle(texts)
        labels = sorted(by_label)
        made = deepest = 0
        while labels and made < count and any(len(texts) > deepest for texts in by_label.values()):
            for label in labels:
                if made < count and len(by_label[label]) > deepest:
                    made += 1
                    text = by_label[label][deepest]
                    row = offered(frame, text, label, labels, wording=wording)
                    yield row.by(name, SOURCES[name].licence, group=f"{name}:{text[:60]}")
            deepest += 1


def offered(frame: Frame, text: str, label: str, labels: list[str], *, wording: str = "classify") -> Row:
    """Return a row that offers some of the labels, the right one among them but for a few rows that say so."""
    others = [other for other in labels if other != label]
    wrong = frame.rng.sample(others, min(len(others), frame.rng.randint(1, 9)))
    absent = len(wrong) > 1 and frame.rng.random() < _NONE_SHARE
    names = wrong if absent else [label, *wrong]
    frame.rng.shuffle(names)
    as_words = frame.rng.random() < _STYLE_SHARES[0]
    shown = [_words(name) if as_words else name for name in names]
    asked = frame.ask(wording, text=text, labels=", ".join(shown), list="\n".join(f"- {name}" for name in shown))
    told = _words(label) if as_words else label
    if absent or frame.rng.random() < _NONE_SHARE:
        # Said before the text where the wording begins with the labels, after everything otherwise.
        asked += "\n" + frame.one("none").strip()
    return frame.row("classify", asked, frame.one("none_answer") if absent else told)


def _words(label: str) -> str:
    """Return a label as words: HassTurnOn, transfer_timing and such."""
    label = label.removeprefix("Hass")
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label).replace("_", " ").strip().lower().rstrip("?")


def messages(frame: Frame, count: int) -> Iterator[Row]:
    """`count` invented messages with the labels of their topic."""
    openers, closers = (frame.text[name]["list"] for name in ("openers", "closers"))
    seen: set[str] = set()
    while len(seen) < count:
        topic = pick(frame.rng, frame.text["topics"])
        label = pick(frame.rng, sorted(topic["labels"]))
        said = frame.fill(pick(frame.rng, topic["labels"][label]))
        opener = frame.fill(pick(frame.rng, openers))
        said = said[:1].lower() + said[1:] if opener.endswith(", ") and not said[1:2].isupper() else said
        more = ""
        if frame.rng.random() < 0.25:
            more = " " + frame.fill(pick(frame.rng, topic["labels"][label]))
        text = capital(opener + said + more) + frame.fill(pick(frame.rng, closers))
        if text in seen:
            text += f" ({frame.fill('<ville>')})"
        seen.add(text)
        yield offered(frame, text, label, sorted(topic["labels"])).by(
            "written for this project", "Apache-2.0", group=f"message:{said}"
        )
