"""The report of a build: one HTML file that needs nothing else, and tells the choice in ten seconds.

What was chosen, why, and its figures come first; then the trade-off, all candidates, the errors, the data, the machine
and the commands. Candidates are compared on dev rows; the test figure of the chosen one stands apart.
"""

from __future__ import annotations

import os
import shlex
import string
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alambic.measure.frontier import Check, Choice, Point, check_limits, final_checks
from alambic.measure.limits import COSTS, sentence
from alambic.measure.machine import describe
from alambic.measure.metrics import Interval
from alambic.measure.metrics import title_of as metric_title
from alambic.measure.quality import Quality
from alambic.measure.written_figures import WrittenFigures
from alambic.report import answers, confidence, details, labels, plots
from alambic.report._html import esc, number, table, tree

if TYPE_CHECKING:
    from alambic.task import Budget


@dataclass(frozen=True)
class Report:
    """Everything the page shows.

    Attributes:
        task: name of the task.
        description: what the task is.
        choice: the outcome.
        points: all candidates, measured on dev rows.
        budget: what was asked.
        dev: quality of the chosen candidate on the rows that decided; its errors, or its worst answers, are shown.
        test: quality of the chosen bundle on rows that decided nothing; None when there are none.
        costs: `Costs.to_dict()` of the chosen bundle.
        audit: what the check of the data found, any JSON object; None leaves the section out.
        versions: libraries that made it.
        commands: argument lists that run it all again.
        notes: further sentences on the choice ("a linear model wins").
        created: date and time, as text.
        preferences: by candidate, how often it finds the better answer of a dev pair likelier.
        promises: what was asked of single answers (precision, label sets, scope), held against test.
        trust: calibration and decision on dev and test, `build.deciding` says which figures; empty where none apply.
        remarks: sentences on them.
        labels: the audit of the labels of the dev rows, `Ranking.to_dict()`; empty where there is none.
        shipped: the chosen bundle as measured on test rows after its last fit; None when it was not measured again.
    """

    task: str
    description: str
    choice: Choice
    points: tuple[Point, ...]
    budget: Budget
    dev: Quality | WrittenFigures
    test: Quality | WrittenFigures | None
    costs: Mapping[str, Any]
    audit: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    commands: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()
    created: str = ""
    shipped: Point | None = None
    preferences: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    promises: tuple[Check, ...] = ()
    trust: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    labels: Mapping[str, Any] = field(default_factory=dict)

    @property
    def final(self) -> tuple[Check, ...]:
        """What has the last word: the limits held against the test score and the bundle that ships."""
        if self.shipped is not None:
            return check_limits(self.shipped, self.budget)
        return final_checks(self.chosen, self.test.scores, self.budget) if self.test is not None else ()

    @property
    def chosen(self) -> Point:
        """The chosen candidate as it was measured on dev."""
        return next(point for point in self.points if point.name == self.choice.chosen)


def write_page(report: Report, path: Path) -> Path:
    """Write the page in one step: a reader never sees half of it.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(render_page(report), encoding="utf-8")
    scratch.replace(path)
    return path


def render_page(report: Report) -> str:
    """Return the page as text.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    template = resources.files("alambic.report").joinpath("page.html").read_text(encoding="utf-8")
    name = report.choice.chosen
    body = [
        f"<h1>{esc(report.task)}</h1>",
        f'<p class="quiet">{esc(report.description)}</p>' if report.description else "",
        _verdict(report),
        _figures(report),
        _section("Quality against time", _plot(report)),
        _section("All candidates", _candidates(report)),
        _section("Confidence", confidence.section(report.trust)) if report.trust else "",
        _section("Preferences (dev pairs)", answers.preferences(report.preferences, name))
        if report.preferences
        else "",
        *_details(name, report.dev),
        _section("Labels to review (dev rows)", labels.section(report.labels)) if report.labels else "",
        _section("Data", tree(report.audit)) if report.audit is not None else "",
        _section("Machine and versions", _machine(report)),
        _section("Run it again", _commands(report)) if report.commands else "",
    ]
    return string.Template(template).substitute(title=esc(f"{report.task}: {name}"), body="\n".join(filter(None, body)))


def _details(name: str, dev: Quality | WrittenFigures) -> list[str]:
    if isinstance(dev, WrittenFigures):
        return [
            _section(f"Worst answers of {esc(name)} ({_rows(dev)})", answers.worst(dev)),
            _section("How the scores were computed", tree({k: v for k, v in dev.signatures.items()})),
        ]
    return [
        _section(f"Confusion of {esc(name)} ({_rows(dev)})", details.confusion(dev)),
        _section(f"F1 of each label ({_rows(dev)})", details.per_class(dev)),
        _section(f"Most confident errors ({_rows(dev)})", _errors(dev)),
    ]


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n{content}</section>"


def _rows(quality: Quality | WrittenFigures) -> str:
    return f"{esc(quality.split)}, n = {quality.n:,}"


def _verdict(report: Report) -> str:
    choice = report.choice
    lines = [*choice.reasons, *report.notes, *report.remarks, *_tie_lines(choice)]
    if choice.missed is not None:
        lines += choice.missed.helps
    final = report.final
    if report.test is not None:
        shipped = report.shipped or replace(report.chosen, quality=report.test.scores)
        lines += [_last_word(check, shipped) for check in final if check.limit not in COSTS or not check.met]
    items = "".join(f"<li>{esc(line)}</li>" for line in lines)
    final = (*final, *report.promises)
    missed = choice.missed is not None or any(not check.met for check in final)
    return (
        f'<div class="verdict{" missed" if missed else ""}"><strong>{esc(choice.chosen)}</strong> '
        f'<span class="state">{_state(choice, final)}</span><ul>{items}</ul></div>'
    )


def _last_word(check: Check, shipped: Point) -> str:
    where = "The bundle that ships" if check.limit in COSTS else "On test, scored once"
    return f"{where}: {sentence(check, shipped)}"


def _state(choice: Choice, final: tuple[Check, ...]) -> str:
    if choice.missed is not None:
        return "The budget is missed; this is the nearest candidate."
    if any(not check.met for check in final):
        return "Chosen on dev, but misses a limit on test: the budget is missed."
    if not choice.checks[choice.chosen]:
        return "Chosen; no limit was set."
    if choice.surely:
        return "Meets every limit, and the 90% bounds do too."
    return "Meets every limit, but a 90% bound does not: it may miss one on other texts."


def _tie_lines(choice: Choice) -> list[str]:
    return [
        f"{tie.name} is tied with it in {metric_title(tie.metric)}: {100 * tie.difference.value:+.2f} points "
        f"({100 * tie.difference.low:+.2f} to {100 * tie.difference.high:+.2f}, n = {tie.difference.n})."
        for tie in choice.ties
    ]


def _figures(report: Report) -> str:
    quality = report.test or report.dev
    what = "on test rows" if report.test else "on dev rows"
    cards = [
        _card(metric_title(name), f"{score.value:.3f}", f"{score.low:.3f} to {score.high:.3f}, n = {score.n:,}", what)
        for name, score in quality.scores.items()
    ]
    speed = report.costs["speed"]
    what = "answer" if "tokens_per_second" in speed else "text"
    for name, title in (("p50_ms", f"p50 of one {what}"), ("p95_ms", f"p95 of one {what}")):
        spread = speed["intervals"][name]
        between = f"{number(spread['low'])} to {number(spread['high'])}, n = {spread['n']:,}"
        cards.append(_card(title, f"{number(speed[name])} ms", between))
    cards += _rates(speed)
    cards.append(_card("size", f"{number(report.costs['size_mb'])} MB", "whole bundle"))
    if "peak_ram_mb" in report.costs:
        cards.append(_card("peak memory", f"{number(report.costs['peak_ram_mb'])} MB", "fresh process, predicting"))
    if "cold_start_ms" in speed:
        cards.append(
            _card("cold start", f"{number(speed['cold_start_ms'])} ms", f"median of {speed['cold_start_n']} processes")
        )
    energy = report.costs["energy"]
    joules = energy.get("j_per_request")
    cards.append(_card("energy of one text", f"{number(joules)} J" if joules is not None else "–", energy["source"]))
    return f'<div class="figures">{"".join(cards)}</div>'


def _rates(speed: Mapping[str, Any]) -> list[str]:
    if "batch_size" in speed:
        return [_card("in batches", f"{number(speed['per_second'])}/s", f"texts, {speed['batch_size']} at a time")]
    lengths = f"answers of {speed['tokens']:.0f} tokens, prompts of {speed['prompt_tokens']:.0f}"
    cards = [_card("first token", f"{number(speed['ttft_ms'])} ms", "median", f"n = {speed['n']:,}")]
    if "tokens_per_second" in speed:
        cards.append(_card("writes", f"{number(speed['tokens_per_second'])} tokens/s", lengths))
    return cards


def _card(title: str, value: str, *below: str) -> str:
    lines = "".join(f"<span>{esc(line)}</span>" for line in below)
    return f'<div class="figure"><span>{esc(title)}</span><b>{esc(value)}</b>{lines}</div>'


def _plot(report: Report) -> str:
    pictures = [
        f'<div class="plot {name}">{plots.tradeoff_svg(report.points, report.choice, report.budget, size=size)}</div>'
        for name, size in (("wide", plots.WIDE), ("narrow", plots.NARROW))
    ]
    return (
        "\n".join(pictures) + '<p class="quiet">Higher and further left is better. Bubble area: size of the bundle. '
        "Bars: 95% bootstrap intervals. Line: the frontier; grey candidates are beaten on every axis. "
        "Shaded: outside the budget.</p>"
    )


def _candidates(report: Report) -> str:
    choice, metrics = report.choice, list(report.points[0].quality)
    points = sorted(report.points, key=lambda p: -p.quality[choice.metric].value)
    head = ["candidate", "budget", *(f"{metric_title(name)} (dev)" for name in metrics)]
    head += ["p50 ms", "p95 ms", "mean ms", "size MB", "peak MB", "J a text", "frontier"]
    lines = [_candidate(point, metrics, choice) for point in points]
    marked = [i for i, point in enumerate(points) if point.name == choice.chosen]
    n = points[0].quality[choice.metric].n
    text = f'<p class="quiet">Compared on the {n:,} dev rows, with 95% intervals; the test rows decided nothing.</p>'
    if report.test is not None:
        said = ", ".join(f"{metric_title(k)} {_plain(v)}" for k, v in report.test.scores.items())
        text += f"<p><b>Test, scored once</b> ({_rows(report.test)}): {esc(choice.chosen)}, {said}.</p>"
    return table(head, lines, marked=marked, kind="candidates") + text


def _candidate(point: Point, metrics: list[str], choice: Choice) -> list[str]:
    failed = [check.limit for check in choice.checks[point.name] if not check.met]
    within = '<span class="yes">within</span>'
    sources = f"<small>{esc(point.energy_source)}</small>" if point.j_per_request is not None else ""
    return [
        esc(point.name) + ("<small>chosen</small>" if point.name == choice.chosen else ""),
        f'<span class="no">misses<small>{"<br>".join(map(esc, failed))}</small></span>' if failed else within,
        *(_spread(point.quality[name], "{:.3f}".format) for name in metrics),
        _spread(point.p50_ms, number),
        _spread(point.p95_ms, number),
        number(None) if point.mean_ms is None else _spread(point.mean_ms, number),
        number(point.size_mb),
        number(point.peak_ram_mb),
        number(point.j_per_request) + sources,
        "yes" if point.name in choice.frontier else "",
    ]


def _spread(interval: Interval, write: Any) -> str:
    return f"{write(interval.value)}<small>{write(interval.low)} to {write(interval.high)}</small>"


def _plain(interval: Interval) -> str:
    return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def _errors(dev: Quality) -> str:
    hint = "A confident error is often a wrong label in the data: look there first."
    return f'<p class="quiet">{hint}</p>{details.mistakes(dev)}'


def _machine(report: Report) -> str:
    machine = report.costs.get("machine", {})
    facts: dict[str, Any] = {"measured on": describe(machine), "python": machine.get("python")}
    facts["energy"] = report.costs["energy"].get("how")
    facts["versions"] = dict(report.versions or machine.get("versions", {}))
    if report.created:
        facts["built"] = report.created
    return tree({key: value for key, value in facts.items() if value})


def _commands(report: Report) -> str:
    return f"<pre>{esc(chr(10).join(shlex.join(command) for command in report.commands))}</pre>"
