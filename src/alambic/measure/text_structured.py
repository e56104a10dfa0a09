"""Counts behind the scores of structured answers: JSON and its fields, spans, tool calls. See text.py for the table."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from alambic.kinds.chat import ToolCall
from alambic.kinds.spans import Span
from alambic.measure.text_overlap import fold

Floats = NDArray[np.float64]
JSON_SIGNATURE = "parses as one JSON object or list (RFC 8259: no NaN, no key twice)"
FIELD_SIGNATURE = (
    "leaves by path, lists in any order; texts compared in NFC, case folded, white space folded; 3 equals 3.0; "
    "null and absent are equal"
)
SPAN_SIGNATURE = "CoNLL: a span counts when start, end and label are all exact"
TOOL_SIGNATURE = (
    "BFCL (AST): all calls and no other, in any order; each argument has an accepted value; texts compared without "
    "case and without ,./-_*^ and spaces"
)
_LOOSE = re.compile(r"[ ,./\-_*^]")


def parse_json(text: str) -> Any:
    """Parse strict JSON: one value, no NaN, no key twice.

    Raises:
        ValueError: it is anything else.
    """
    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def json_rows(predictions: Sequence[str], references: Sequence[Sequence[Any]]) -> Floats:
    """Count rows that are one JSON object or list."""
    return np.array([[float(isinstance(_value(text), dict | list))] for text in predictions])


def _value(prediction: Any) -> Any:
    """Return what a prediction or a reference holds; None for text that is no JSON."""
    if not isinstance(prediction, str):
        return prediction
    try:
        return parse_json(prediction)
    except ValueError:
        return None


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (path, normalised value) of every leaf of a JSON value; null yields nothing, nor does an empty list.

    A path is written ``buyer.lines[].price``: places in a list do not count.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner, f"{path}[]")
    elif value is not None:
        yield path, _leaf(value)


def _leaf(value: Any) -> str:
    if isinstance(value, bool):
        return f"bool:{value}"
    if isinstance(value, int | float):
        whole = isinstance(value, int) or value.is_integer()
        return f"number:{int(value) if whole else value!r}"
    return f"text:{fold(str(value)).casefold()}"


def field_rows(predictions: Sequence[Any], references: Sequence[Sequence[Any]]) -> Floats:
    """Return hits, true and predicted leaves of each row, [N, 3]; rows are JSON texts or values."""
    return _counted(predictions, references, _leaves)


def field_macro_rows(predictions: Sequence[Any], references: Sequence[Sequence[Any]]) -> Floats:
    """Return hits, true and predicted leaves of each row for each path, [N, 3P]."""
    return _counted_by(predictions, references, _leaves, lambda leaf: leaf[0])


def _leaves(value: Any) -> Counter[Any]:
    return Counter(leaves(_value(value)))


def span_rows(predictions: Sequence[Iterable[Span]], references: Sequence[Sequence[Iterable[Span]]]) -> Floats:
    """Return hits, true and predicted spans of each row, [N, 3]."""
    return _counted(predictions, references, _spans)


def span_macro_rows(predictions: Sequence[Iterable[Span]], references: Sequence[Sequence[Iterable[Span]]]) -> Floats:
    """Return hits, true and predicted spans of each row for each label, [N, 3L]."""
    return _counted_by(predictions, references, _spans, lambda span: span[2])


def _spans(value: Iterable[Span]) -> Counter[Any]:
    return Counter({(int(start), int(end), str(label)) for start, end, label in value})


def _counted(
    predictions: Sequence[Any], references: Sequence[Sequence[Any]], items: Callable[[Any], Counter[Any]]
) -> Floats:
    rows = np.zeros((len(predictions), 3))
    for i, (prediction, accepted) in enumerate(zip(predictions, references, strict=True)):
        said = items(prediction)
        true = _closest(said, map(items, accepted))
        rows[i] = (said & true).total(), true.total(), said.total()
    return rows


def _counted_by(
    predictions: Sequence[Any],
    references: Sequence[Sequence[Any]],
    items: Callable[[Any], Counter[Any]],
    group: Callable[[Any], Hashable],
) -> Floats:
    pairs = []
    for prediction, accepted in zip(predictions, references, strict=True):
        said = items(prediction)
        pairs.append((said, _closest(said, map(items, accepted))))
    names = sorted({str(group(item)) for pair in pairs for side in pair for item in side})
    at = {name: i for i, name in enumerate(names)}
    rows = np.zeros((len(pairs), 3, len(names)))
    for row, (said, true) in zip(rows, pairs, strict=True):
        for counts, side in zip(row, (said & true, true, said), strict=True):
            for item, count in side.items():
                counts[at[str(group(item))]] += count
    return rows.reshape(len(pairs), -1)  # N, 3P: hits of all groups first, as `macro_f1` splits them


def _closest(said: Counter[Any], accepted: Iterable[Counter[Any]]) -> Counter[Any]:
    """Return the accepted answer with the best F1."""
    return max(accepted, key=lambda true: 2.0 * (said & true).total() / max(1, said.total() + true.total()))


def _f1(both: Floats, true: Floats, said: Floats) -> Floats:
    total = true + said
    return np.divide(2.0 * both, total, out=np.zeros_like(both), where=total > 0)


def micro_f1(sums: Floats, n: int) -> Floats:
    """Return the F1 of all decisions pooled; rows without anything to find, and nothing found, count as right."""
    f1 = _f1(sums[:, 0], sums[:, 1], sums[:, 2])
    return np.where(sums[:, 1] + sums[:, 2] > 0, f1, 1.0)


def macro_f1(sums: Floats, n: int) -> Floats:
    """Return the mean F1 of the groups that are true or predicted somewhere."""
    both, true, said = np.split(sums, 3, axis=1)
    present = ((true + said) > 0).sum(axis=1)
    means = np.asarray(_f1(both, true, said).sum(axis=1) / np.maximum(present, 1), dtype=np.float64)
    return np.where(present > 0, means, 1.0)


def tool_rows(predictions: Sequence[Sequence[ToolCall]], references: Sequence[Sequence[Any]]) -> Floats:
    """Count rows whose calls, names and arguments, are exactly the expected ones.

    A reference is a list of calls: `ToolCall`, or BFCL's ``{name: {argument: [accepted values]}}``, where an accepted
    value ``""`` says that the argument may be left out.
    """
    return _tool_rows(predictions, references, _call_fits)


def tool_name_rows(predictions: Sequence[Sequence[ToolCall]], references: Sequence[Sequence[Any]]) -> Floats:
    """Count rows that call exactly the expected functions, whatever the arguments."""
    return _tool_rows(predictions, references, lambda call, expected: call.name == _expected(expected)[0])


def _tool_rows(
    predictions: Sequence[Sequence[ToolCall]],
    references: Sequence[Sequence[Any]],
    fits: Callable[[ToolCall, Any], bool],
) -> Floats:
    pairs = zip(predictions, references, strict=True)
    return np.array([[float(any(_matched(list(calls), list(row), fits) for row in rows))] for calls, rows in pairs])


def _matched(calls: list[ToolCall], expected: list[Any], fits: Callable[[ToolCall, Any], bool]) -> bool:
    """Tell whether calls and expectations can be paired off completely (augmenting paths)."""
    if len(calls) != len(expected):
        return False
    taken: dict[int, int] = {}

    def place(i: int, seen: set[int]) -> bool:
        for j, call in enumerate(calls):
            if j not in seen and fits(call, expected[i]):
                seen.add(j)
                if j not in taken or place(taken[j], seen):
                    taken[j] = i
                    return True
        return False

    return all(place(i, set()) for i in range(len(expected)))


def _expected(raw: Any) -> tuple[str, Mapping[str, Sequence[Any]]]:
    """Return name and accepted values of an expected call."""
    if isinstance(raw, ToolCall):
        return raw.name, {key: [value] for key, value in raw.arguments.items()}
    ((name, arguments),) = raw.items()
    return str(name), arguments


def _call_fits(call: ToolCall, expected: Any) -> bool:
    name, accepted = _expected(expected)
    if call.name != name or not set(call.arguments) <= set(accepted):
        return False
    for key, values in accepted.items():
        if key in call.arguments:
            if not any(_same(call.arguments[key], value) for value in values):
                return False
        elif "" not in values:
            return False
    return True


def _same(said: Any, accepted: Any) -> bool:
    if isinstance(said, str) and isinstance(accepted, str):
        return _loose(said) == _loose(accepted)
    if isinstance(said, bool) or isinstance(accepted, bool):
        return said is accepted
    if isinstance(said, int | float) and isinstance(accepted, int | float):
        return said == accepted
    if isinstance(said, list | tuple) and isinstance(accepted, list | tuple):
        return len(said) == len(accepted) and all(map(_same, said, accepted))
    if isinstance(said, Mapping) and isinstance(accepted, Mapping):
        return _object_fits(said, accepted)
    return said is None and accepted is None


def _object_fits(said: Mapping[str, Any], accepted: Mapping[str, Any]) -> bool:
    """Compare an object with BFCL's form, a list of accepted values for each key, or with a plain one."""
    if not set(said) <= set(accepted):
        return False
    for key, values in accepted.items():
        options = values if isinstance(values, list) else [values]
        if key not in said:
            if "" not in options:
                return False
        elif not (any(_same(said[key], option) for option in options) or _same(said[key], values)):
            return False
    return True


def _loose(text: str) -> str:
    return _LOOSE.sub("", unicodedata.normalize("NFC", text)).lower().replace("'", '"')
