"""What a task promises of single answers, held against test and put into words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from alambic.kinds.decision import Decision
from alambic.measure.limits import Check
from alambic.task import Task


def promise_checks(task: Task, decision: Decision | None, trust: Mapping[str, Any]) -> tuple[Check, ...]:
    """Return one check for each promise of the task.

    A promise is met when the rows kept apart support it and test does not contradict it: the whole 95% interval of the
    test figure would have to lie under what was promised. Test alone could not decide: a promise kept exactly is
    missed by half of all test sets.
    """
    if decision is None:
        return ()
    checks = []
    for name in ("precision", "coverage", "in_scope"):
        wanted = getattr(task.budget, name)
        if wanted is None:
            continue
        seen = trust[name]
        supported = bool(decision.facts[name].get("kept", True))
        met = supported and seen["high"] >= wanted
        got = seen["value"]
        gap = 0.0 if met else math.log(max(1.0 - (got or 0.0), 1e-9) / (1.0 - wanted))
        checks.append(Check(name, wanted, got, met, met and seen["low"] >= wanted, max(gap, 0.0)))
    return tuple(checks)


def promise_sentences(decision: Decision | None, trust: Mapping[str, Any]) -> tuple[str, ...]:
    """Say what was promised, on how many rows it rests, and what test says; empty where nothing was asked."""
    if decision is None:
        return ()
    facts, lines = decision.facts, list[str]()
    if "precision" in facts:
        lines += [_precision(facts["precision"]), _precision_on_test(trust)]
    if "coverage" in facts:
        asked = facts["coverage"]
        lines.append(
            f"label sets: the true label is in the set for {_share(trust['coverage'])} of the test texts "
            f"(asked {asked['coverage']:g}, fitted on {asked['n']:,} rows kept apart), {trust['set_size']:.2f} labels "
            "on average"
        )
    if "in_scope" in facts:
        lines.append(_scope(decision, trust))
    return tuple(lines)


def _precision(found: Mapping[str, Any]) -> str:
    rows = f"{found['errors']:,} of {found['answered']:,} answers wrong on {found['n']:,} rows kept apart"
    bound = f"at most {100 * found['bound']:.2f} % wrong at {found['confidence']:.0%} confidence"
    if found["kept"]:
        return f"precision {found['precision']:g} is promised from confidence {found['threshold']:.4f}: {rows}, {bound}"
    return (
        f"precision {found['precision']:g} cannot be promised: no threshold is supported by the rows kept apart; the "
        f"nearest, confidence {found['threshold']:.4f}, has {rows}, {bound}. More rows, a better model or a lower "
        "precision would help"
    )


def _precision_on_test(trust: Mapping[str, Any]) -> str:
    if trust["precision"]["value"] is None:
        return "on test no text is answered: the threshold is higher than any confidence there"
    return (
        f"on test {_share(trust['answered'])} of the texts are answered, {_share(trust['precision'])} of them rightly"
    )


_SCORES = {
    "confidence": "the largest probability",
    "max_logit": "the largest logit",
    "energy": "the energy",
    "nearest": "how near the nearest training row is",
}


def _scope(decision: Decision, trust: Mapping[str, Any]) -> str:
    asked = decision.facts["in_scope"]
    how = "chosen on" if "auroc" in asked else "not chosen by measurement:"
    said = f"out of scope is told by {_SCORES[str(decision.scope)]} ({how} {asked['n_outside']:,} texts out of scope)"
    passed = f"on test {_share(trust['in_scope'])} of the task's texts pass (asked {asked['in_scope']:g})"
    caught = f", {_share(trust['caught'])} of the others are caught" if "caught" in trust else ""
    return f"{said}; {passed}{caught}"


def _share(figure: Mapping[str, Any]) -> str:
    if figure["value"] is None:
        return "none"
    return (
        f"{100 * figure['value']:.1f} % [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}] (n = {figure['n']:,})"
    )
