"""Cutting ids into windows, and batches of like length."""

from __future__ import annotations

import pytest

from alambic.engines.windows import Cutter, batches
from alambic.errors import EngineError, InputTooLong


def cutter(mode: str = "windows", max_tokens: int | None = 6) -> Cutter:
    return Cutter(mode, max_tokens, prefix_ids=(101,), suffix_ids=(102,), pad_id=0)


def whole(n: int) -> list[int]:
    return [101, *range(n), 102]


@pytest.mark.parametrize("mode", ["windows", "head", "head_tail", "error"])
@pytest.mark.parametrize("n", [0, 1, 4])
def test_cut_keeps_a_text_that_fits(mode: str, n: int) -> None:
    assert cutter(mode).cut(whole(n)) == [whole(n)]


@pytest.mark.parametrize("n", [5, 8, 9, 40, 41])
def test_cut_windows_covers_everything_once_in_order(n: int) -> None:
    windows = cutter().cut(whole(n))
    assert [i for window in windows for i in window[1:-1]] == list(range(n))
    assert all(window[0] == 101 and window[-1] == 102 and len(window) <= 6 for window in windows)
    assert max(map(len, windows)) - min(map(len, windows)) <= 1


def test_cut_head_keeps_the_beginning() -> None:
    assert cutter("head").cut(whole(9)) == [[101, 0, 1, 2, 3, 102]]


def test_cut_head_tail_keeps_a_quarter_of_the_beginning() -> None:
    assert cutter("head_tail").cut(whole(9)) == [[101, 0, 6, 7, 8, 102]]


def test_cut_error_says_how_long_the_text_is() -> None:
    with pytest.raises(InputTooLong, match="the text has 11 tokens and the model reads 6"):
        cutter("error").cut(whole(9))


def test_cut_gives_one_pad_when_there_is_no_token() -> None:
    assert Cutter("windows", 6).cut([]) == [[0]]


def test_cut_refuses_ids_of_another_tokenizer() -> None:
    with pytest.raises(EngineError, match=r"does not put \[101\] before and \[102\] after"):
        cutter().cut(list(range(20)))


def test_cut_leaves_any_length_when_the_model_has_no_limit() -> None:
    assert cutter(max_tokens=None).cut(whole(999)) == [whole(999)]


def test_cutter_refuses_an_unknown_mode() -> None:
    with pytest.raises(EngineError, match="unknown way to cut long texts 'middle'"):
        cutter("middle")


def test_batches_hold_like_lengths_within_both_bounds() -> None:
    lengths = [9, 1, 5, 2, 9, 1, 30, 4]
    found = list(batches(lengths, max_rows=3, max_cells=20))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    assert [[lengths[i] for i in batch] for batch in found] == [[1, 1, 2], [4, 5], [9, 9], [30]]


def test_batches_are_none_for_no_row() -> None:
    assert list(batches([], max_rows=3, max_cells=20)) == []
