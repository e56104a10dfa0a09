"""The base of a task that names none: chosen by the language of its texts, and said why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alambic.data.language import languages_of
from alambic.model.catalogue import catalogue, how_to_install, packaged

AUTO = "auto"  # what a task says when it leaves the choice to `default_base`
ENGLISH = "all-minilm-l6-v2"
FRENCH = "alambic-encoder-fr-en"
_MIXED = 0.1  # share of French texts from which a task is mixed


@dataclass(frozen=True)
class DefaultBase:
    """Name of the base, and the reason to show; `missing` when the better one is not installed here."""

    name: str
    reason: str
    missing: bool = False


def default_base(texts: Sequence[str]) -> DefaultBase:
    """Choose the base for a task whose training texts are `texts`: ours where they are French or partly French."""
    counts = languages_of(texts)
    told, french = counts.total(), counts["fr"]
    seen = f"{french:,} of {told:,} texts are French by their function words"
    if not told or french / told < _MIXED or FRENCH not in catalogue():
        return DefaultBase(ENGLISH, f"base = {ENGLISH!r} ({seen}; name another under [base])")
    entry = catalogue()[FRENCH]
    if packaged(entry) is None:
        without = f"{FRENCH} knows French and is not installed here ({how_to_install(entry)})"
        return DefaultBase(ENGLISH, f"base = {ENGLISH!r}, though {seen}: {without}", missing=True)
    return DefaultBase(FRENCH, f"base = {FRENCH!r} ({seen}; name another under [base])")
