"""Example and Dataset: what every reader returns and every step takes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Example:
    """One text with its labels.

    Attributes:
        text: normalised text, never empty.
        labels: one label, or zero or more when the task is multi-label.
        where: ``file:line`` of origin, for messages.
        group: rows of one group never fall on both sides of a split.
    """

    text: str
    labels: tuple[str, ...]
    where: str = ""
    group: str | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of text and labels; origin and group do not count."""
        body = "\x1f".join((self.text, *self.labels))
        return hashlib.sha256(body.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Dataset:
    """Examples with the full, sorted list of labels of the task (labels absent from a part are kept)."""

    examples: tuple[Example, ...]
    labels: tuple[str, ...]
    multi_label: bool = False

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    @property
    def texts(self) -> list[str]:
        """The texts, in order."""
        return [example.text for example in self.examples]

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the examples in order and of the label list."""
        h = hashlib.sha256(repr((self.labels, self.multi_label)).encode())
        for example in self.examples:
            h.update(example.digest.encode())
        return h.hexdigest()

    @property
    def counts(self) -> Counter[str]:
        """Number of examples per label."""
        return Counter(label for example in self.examples for label in example.labels)

    def take(self, indices: Sequence[int]) -> Dataset:
        """Return the examples at `indices`, with the same labels."""
        return Dataset(tuple(self.examples[i] for i in indices), self.labels, self.multi_label)

    def __add__(self, other: Dataset) -> Dataset:
        return Dataset(self.examples + other.examples, self.labels, self.multi_label)

    def targets(self) -> list[list[int]]:
        """Label indices of each example (a list of one index unless multi-label)."""
        index = {label: i for i, label in enumerate(self.labels)}
        return [[index[label] for label in example.labels] for example in self.examples]
