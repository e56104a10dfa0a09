"""An annotation under way: who sees which text next, what they say of it, how far it is and how well they agree."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from alambic.build.labelling.tutor import Tutor, View
from alambic.data.annotation_formats import Exported, export, settle
from alambic.data.annotations import VERDICTS, Decision, Journal
from alambic.data.clean import clean_name, clean_text
from alambic.data.label_pool import Pool
from alambic.errors import DataError, nearest
from alambic.measure.agreement import krippendorff_alpha, pairwise_kappa

_HELD_SECONDS = 900.0  # a text that is shown to somebody is not shown to another for that long
_MOST_GUESSES = 9
_RECENT = 100  # answers over which the tutor's guesses are judged
_MOST_NOTE = 2_000
_MOST_NAME = 64


class Session:
    """The state behind the page. Safe between threads; every answer is on disk when its method returns."""

    def __init__(
        self,
        name: str,
        pool: Pool,
        journal: Journal,
        labels: Mapping[str, str],
        *,
        multi_label: bool,
        tutor: Tutor | None,
        overlap: float = 0.1,
        notes: Sequence[str] = (),
    ) -> None:
        """Take up the annotation where the journal left it.

        Args:
            name: shown on the page.
            pool: the texts.
            journal: of the decisions.
            labels: names with descriptions.
            multi_label: a text may have several labels, or none.
            tutor: guesses and orders; without one, texts come in the order of the file.
            overlap: share of everyone's texts that somebody else has annotated too, for the agreement.
            notes: what was said when the texts were read.
        """
        self.name, self.pool, self.journal, self.labels = name, pool, journal, dict(labels)
        self.multi_label, self.overlap = multi_label, overlap
        self.notes = tuple(notes)
        self._tutor = tutor
        self._row = {one.id: i for i, one in enumerate(pool.texts)}
        self._held: dict[str, tuple[str, float]] = {}
        self._lock = threading.RLock()
        self._agreement: tuple[object, dict[str, Any]] = (None, {})
        self._tell()

    def next(self, by: str, *, besides: Collection[str] = ()) -> dict[str, Any] | None:
        """Return the most useful text for the annotator `by`, `besides` left out; None when all are done."""
        by = _checked_name(by)
        with self._lock:
            self.journal.refresh()
            self._let_go(by)
            voices = self.journal.decisions.by_text()
            mine = {text for (who, text), stack in self.journal.decisions.stacks.items() if who == by and stack}
            left_out = {*mine, *besides}
            second = self._second_opinion(by, voices, left_out)
            if second is not None:
                return self._show(second, by, "second")
            taken = left_out | voices.keys() | {text for text, (who, _) in self._held.items() if who != by}
            for row, why in self._view().order:
                one = self.pool.texts[row]
                if one.id not in taken and one.labels is None:
                    return self._show(one.id, by, why)
            for one in self.pool.texts:
                if one.id not in taken and one.labels is None:
                    return self._show(one.id, by, "file")
            return None

    def item(self, text: str, by: str) -> dict[str, Any]:
        """Return a text with the guesses for it and what `by` said of it.

        Raises:
            DataError: there is no such text.
        """
        row = self._row.get(text)
        with self._lock:
            said = self.journal.decisions.of(by, text)
        if row is None:
            if said is None:
                raise DataError(f"there is no text {text[:40]!r} in {self.name}")
            return {
                "id": text,
                "text": said.text,
                "guesses": [],
                "calibrated": False,
                "why": "gone",
                "mine": _told(said),
            }
        view = self._view()
        return {
            "id": text, "text": self.pool.texts[row].text, "guesses": self._guesses(view, row),
            "calibrated": bool(view.guesses and view.guesses.calibrated), "why": "back",
            "mine": None if said is None else _told(said),
        }  # fmt: skip

    def decide(
        self,
        by: str,
        text: str,
        verdict: str,
        labels: Sequence[str] = (),
        *,
        note: str | None = None,
        ms: int | None = None,
    ) -> Decision:
        """Record what `by` says of a text: `label`, `none` or `skip`; on disk when this returns.

        Raises:
            DataError: the verdict, a label, the text or the name of the annotator is not known or not allowed.
        """
        by, names = _checked_name(by), tuple(dict.fromkeys(map(clean_name, labels)))
        if verdict not in VERDICTS:
            raise DataError(f"no verdict {verdict!r}; {nearest(verdict, VERDICTS)}")
        unknown = next((name for name in names if name not in self.labels), None)
        if unknown is not None:
            raise DataError(f"no label {unknown!r}; {nearest(unknown, self.labels)}")
        if (verdict == "label") != bool(names) or (len(names) > 1 and not self.multi_label):
            raise DataError(f"verdict {verdict!r} with {len(names)} labels")
        with self._lock:
            row = self._row.get(text)
            shown = self.item(text, by)
            guesses = shown["guesses"]
            guess = (guesses[0]["label"], round(guesses[0]["p"], 4)) if guesses else None
            decision = self.journal.decide(
                verdict, by=by, text=shown["text"], labels=names, note=_checked_note(note), guess=guess, ms=ms  # type: ignore[arg-type]
            )  # fmt: skip
            self._held.pop(text, None)
            if row is not None:
                self._tell()
            return decision

    def undo(self, by: str) -> Decision | None:
        """Take back the last decision of `by`; None when there is none."""
        with self._lock:
            undone = self.journal.undo(_checked_name(by))
            if undone is not None:
                self._tell()
            return undone

    def history(self, by: str) -> list[dict[str, Any]]:
        """Return the standing decisions of `by`, oldest first, each text once."""
        with self._lock:
            last = {d.id: d for d in self.journal.decisions.timeline.get(by, [])}
        return [{"id": d.id, **_told(d)} for d in sorted(last.values(), key=lambda d: d.seq)]

    def export(self, form: str) -> Exported:
        """Return all annotations in `form`."""
        with self._lock:
            self.journal.refresh()
            return export(form, self.journal.decisions, multi_label=self.multi_label)

    def state(self) -> dict[str, Any]:
        """Return how far the annotation is, as JSON values."""
        with self._lock:
            self.journal.refresh()
            return self._state()

    def _state(self) -> dict[str, Any]:
        decisions = self.journal.decisions
        settled = settle(decisions)
        counts = Counter(name for one in settled for name in one.labels)
        given = Counter(name for one in self.pool.texts for name in one.labels or ())
        standing = decisions.standing()
        people = Counter(d.by for d in standing if d.verdict != "skip")
        skipped = Counter(d.by for d in standing if d.verdict == "skip")
        verdicts = Counter(one.verdict for one in settled)
        return {
            "name": self.name, "multi_label": self.multi_label,
            "labels": [
                {"name": name, "description": text, "count": counts[name] + given[name]}
                for name, text in self.labels.items()
            ],
            "total": len(self.pool.texts), "given": sum(one.labels is not None for one in self.pool.texts),
            "answered": sum(one.decisions[0].id in self._row for one in settled),
            "none": verdicts["none"], "disputed": verdicts["disputed"],
            "annotators": [
                {"name": who, "answered": people[who], "skipped": skipped[who]} for who in sorted({*people, *skipped})
            ],
            "agreement": self._agreed(), "tutor": self._tutor_state(), "journal": self.journal.path.name,
            "notes": [*self.notes, *self.journal.repaired],
        }  # fmt: skip

    def close(self) -> None:
        """Stop the tutor. The journal needs no closing."""
        if self._tutor is not None:
            self._tutor.close()

    def _second_opinion(self, by: str, voices: Mapping[str, list[Decision]], left_out: Collection[str]) -> str | None:
        """Return a text that somebody else annotated, when `by` has had too few of those."""
        mine = [found for found in voices.values() if any(d.by == by for d in found)]
        shared = sum(len(found) > 1 for found in mine)
        # The first to annotate has nothing to check; asked with the next text counted in.
        if self.overlap <= 0 or shared + 1 > self.overlap * (len(mine) + 1):
            return None
        once = (text for text, found in voices.items() if len(found) == 1 and text in self._row)
        return next((text for text in once if text not in left_out), None)

    def _show(self, text: str, by: str, why: str) -> dict[str, Any]:
        self._held[text] = (by, time.monotonic())
        return {**self.item(text, by), "why": why}

    def _let_go(self, by: str) -> None:
        """Give back what `by` looked at before, and what anyone has looked at for too long."""
        limit = time.monotonic() - _HELD_SECONDS
        self._held = {t: (who, since) for t, (who, since) in self._held.items() if who != by and since > limit}

    def _view(self) -> View:
        return self._tutor.view if self._tutor is not None else View(total=len(self.pool.texts))

    def _tell(self) -> None:
        """Give the tutor every answer that stands."""
        if self._tutor is None:
            return
        labels = {i: one.labels for i, one in enumerate(self.pool.texts) if one.labels is not None}
        closed = set(labels)
        for one in settle(self.journal.decisions):
            row = self._row.get(one.decisions[0].id)
            if row is None:
                continue
            closed.add(row)
            if one.verdict == "label" or (one.verdict == "none" and self.multi_label):
                labels[row] = one.labels
        self._tutor.tell(labels, frozenset(closed))

    def _guesses(self, view: View, row: int) -> list[dict[str, Any]]:
        if view.guesses is None or row >= len(view.guesses.probabilities):
            return []
        p = view.guesses.probabilities[row]
        names = list(self.labels)
        return [{"label": names[i], "p": float(p[i])} for i in (-p).argsort(kind="stable")[:_MOST_GUESSES]]

    def _agreed(self) -> dict[str, Any]:
        """Return alpha over all, kappa of each two; kept until a text with two answers changes."""
        several = {text: found for text, found in self.journal.decisions.by_text().items() if len(found) > 1}
        key = tuple(d.seq for found in several.values() for d in found)
        if self._agreement[0] != key:
            units = [[_value(d) for d in found] for found in several.values()]
            answers: dict[str, dict[str, object]] = {}
            for text, found in several.items():
                for d in found:
                    answers.setdefault(d.by, {})[text] = _value(d)
            pairs = pairwise_kappa(answers)
            told = [{"between": list(two), **asdict(kappa)} for two, kappa in pairs.items()]
            self._agreement = (key, {"alpha": asdict(krippendorff_alpha(units)), "kappa": told})
        return self._agreement[1]

    def _tutor_state(self) -> dict[str, Any] | None:
        if self._tutor is None:
            return None
        view = self._view()
        recent = [d for d in self.journal.decisions.standing() if d.guess and d.verdict == "label"][-_RECENT:]
        right = sum(d.guess is not None and d.guess[0] in d.labels for d in recent)
        low, high = _wilson(right, len(recent))
        return {
            "read": view.read, "total": view.total, "answers": view.answers, "seconds": round(view.seconds, 4),
            "calibrated": bool(view.guesses and view.guesses.calibrated), "error": view.error,
            "recent": {"n": len(recent), "right": right, "low": low, "high": high},
        }  # fmt: skip


def _told(decision: Decision) -> dict[str, Any]:
    return {"verdict": decision.verdict, "labels": list(decision.labels), "note": decision.note}


def _value(decision: Decision) -> tuple[str, ...]:
    return (decision.verdict, *sorted(decision.labels))


def _checked_name(by: object) -> str:
    name = clean_name(by) if isinstance(by, str) else ""
    if not name or len(name) > _MOST_NAME:
        raise DataError(f"an annotator has a name of 1 to {_MOST_NAME} characters, got {str(by)[:80]!r}")
    return name


def _checked_note(note: str | None) -> str | None:
    text = clean_text(note or "").text
    if len(text) > _MOST_NOTE:
        raise DataError(f"a note has at most {_MOST_NOTE} characters, got {len(text)}")
    return text or None


def _wilson(right: int, n: int) -> tuple[float, float]:
    """Return the 95% interval of a share (Wilson 1927)."""
    if not n:
        return 0.0, 1.0
    z, share = 1.959964, right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)
