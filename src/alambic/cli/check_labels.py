"""`alambic check --audit` and `--apply`: the list of rows to review, written, and its decisions, applied."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alambic.cli.table import text_table
from alambic.errors import DataError

if TYPE_CHECKING:
    from alambic.build.audit import LabelAudit
    from alambic.data.audit_rows import Ranking
    from alambic.events import Work
    from alambic.measure.learning_curve import Curve, Gain
    from alambic.task import Task

_LIST = "labels-to-review.csv"
_SHOWN = 10
_LABELS_SHOWN = 8


def write_audit(task: Task, run: Path, output: Path | None) -> Work[tuple[dict[str, Any], str]]:
    """Audit the labels of `task` and write the rows to review; return the figures and the page of text.

    Raises:
        DataError: the file is there already: it may hold decisions.
    """
    from alambic.build.audit import audit_labels
    from alambic.data.audit_file import audit_text
    from alambic.workspace import on_disk, write_text

    path = output if output is not None else run / _LIST
    if os.path.lexists(path):
        raise DataError(
            f"{path}: is there already, and may hold decisions", hint="--apply it, or name another file with --output"
        )
    found = yield from audit_labels(task, run)
    listed = found.ranking.listed
    with on_disk(path):
        write_text(path, audit_text(listed, multi_label=task.multi_label))
    record = {**found.to_dict(), "written": str(path)}
    return record, _page(found, task, path)


def apply_audit(task: Task, decided: Path, output: Path | None) -> tuple[dict[str, Any], str]:
    """Write the training data with what `decided` says; return the figures and the text.

    Raises:
        DataError: the audit file or a decision of it cannot be used, or the new file is there already.
    """
    from alambic.data.audit_apply import apply_decisions
    from alambic.data.audit_file import read_decisions
    from alambic.data.read import read_dataset

    data = task.path_of(task.data.train)
    read = read_dataset(data, task.data, multi_label=task.multi_label)
    labels = sorted({*read.dataset.labels, *task.labels})
    decisions = read_decisions(decided, labels, multi_label=task.multi_label)
    done = apply_decisions(data, task.data, decisions, multi_label=task.multi_label, output=output)
    record = {**vars(done), "path": str(done.path), "notes": list(done.notes), "open": decisions.open,
              "missing": decisions.missing}  # fmt: skip
    lines = [
        f"{done.path}: {done.rows:,} rows; {done.relabelled:,} relabelled, {done.dropped:,} dropped, "
        f"{done.kept:,} kept as they were; {decisions.open:,} lines without a decision",
        *done.notes,
        f"{data} is as it was. To train on the new one: train = {os.path.relpath(done.path, task.root)!r} under [data]",
    ]
    return record, "\n".join(lines)


def _page(found: LabelAudit, task: Task, path: Path) -> str:
    ranking = found.ranking
    accuracy = ", ".join(f"{name} {100 * value:.1f} %" for name, value in found.accuracy.items())
    lines = [
        f"{ranking.rows:,} labels audited; out-of-fold accuracy against them: {accuracy}",
        f"about {ranking.share:.1%} look wrong ({ranking.share * ranking.rows:.0f} rows; confident learning alone says "
        f"{ranking.counted:.1%}); {len(ranking.listed):,} texts have one chance in ten or more",
    ]
    exact, near = ranking.contradictions["exact"], ranking.contradictions["near"]
    if exact or near:
        lines.append(f"{exact:,} texts stand under several labels, and {near:,} pairs of nearly equal texts do")
    lines += ["", *_price(ranking), *_effect(found), *_first(ranking)]
    if found.curve is not None:
        lines += ["", *_curve(found.curve)]
    lines += [
        "",
        f"{path}: write keep, relabel or drop under 'decision' (another label under 'suggested' where it is better),",
        f"then: alambic check {task.path} --apply {path}",
    ]
    return "\n".join(lines)


def _price(ranking: Ranking) -> list[str]:
    steps = ranking.price()
    if not steps:
        return ["no row is worth reading for its label alone"]
    rows = [[f"{step['read']:,}", f"{step['found']:.0f}", f"{step['last']:.2f}"] for step in steps]
    return text_table(["texts read", "wrong labels found (expected)", "by the last one"], rows).splitlines()


def _effect(found: LabelAudit) -> list[str]:
    effect = found.effect
    if effect is None:
        return []
    return [
        "",
        f"with the {effect.changed:,} labels that are likelier wrong than right changed as suggested, "
        f"{effect.candidate} goes from {100 * effect.before:.1f} to {100 * effect.after:.1f} % on the other rows "
        f"[{effect.low:+.2f}, {effect.high:+.2f} points, n = {effect.n:,}, out of fold]",
    ]


def _first(ranking: Ranking) -> list[str]:
    if not ranking.listed:
        return []
    lines = ["", "first to read:"]
    for s in ranking.listed[:_SHOWN]:
        text = " ".join(s.text.split())
        shown = text if len(text) <= 70 else text[:69] + "…"
        now, then = (", ".join(labels) or "no label" for labels in (s.labels, s.suggested))
        lines.append(f"  {s.wrong:.2f}  {now} -> {then}  {shown!r} ({s.where})")
    return lines


def _curve(curve: Curve) -> list[str]:
    from alambic.measure.learning_curve import MORE

    measured = ", ".join(f"{100 * a:.1f} % of {s:,}" for s, a in zip(curve.sizes, curve.accuracy, strict=True))
    lines = [
        f"learning curve (n = {curve.answers:,}, out of fold): {measured}",
        f"  {MORE} more rows as they come: {_gain(curve.overall)} of accuracy",
    ]
    for gain in curve.labels[:_LABELS_SHOWN]:
        lines.append(
            f"  {MORE} more of {gain.label} (has {gain.rows:,}): {_gain(gain)} of its recall, "
            f"{gain.overall:+.2f} overall"
        )
    if len(curve.labels) > _LABELS_SHOWN:
        lines.append(f"  {len(curve.labels) - _LABELS_SHOWN} more labels: --json")
    return lines


def _gain(gain: Gain) -> str:
    return f"{gain.points:+.2f} points [{gain.low:+.2f}, {gain.high:+.2f}]"
