"""How far an annotation is, in a few lines for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def describe(state: Mapping[str, Any]) -> str:
    """Return counts and agreement of `Session.state()`."""
    open_texts = state["total"] - state["given"] - state["answered"]
    lines = [
        f"{state['name']}: {state['answered']:,} of {state['total']:,} texts annotated, {state['given']:,} had labels, "
        f"{open_texts:,} to go; {state['none']} with none of the labels, {state['disputed']} disputed"
    ]
    width = max(len(one["name"]) for one in state["labels"])
    lines += [f"  {one['name']:<{width}} {one['count']:>6,}" for one in state["labels"]]
    lines += [f"by {one['name']}: {one['answered']:,} ({one['skipped']:,} skipped)" for one in state["annotators"]]
    alpha = state["agreement"]["alpha"]
    if alpha["n"]:
        lines.append(f"Krippendorff's alpha {_coefficient(alpha)}")
    for kappa in state["agreement"]["kappa"]:
        lines.append(f"Cohen's kappa, {' and '.join(kappa['between'])}: {_coefficient(kappa)}")
    return "\n".join([*lines, *state["notes"]])


def _coefficient(found: Mapping[str, Any]) -> str:
    if found["value"] is None or found["low"] is None:
        return f"cannot be told yet (n = {found['n']} with two or more answers)"
    interval = f"[{found['low']:.2f}, {found['high']:.2f}]"
    return f"{found['value']:.2f} {interval} (95 %, n = {found['n']} texts with two or more answers)"
