"""The rules that choose a packed form; nothing is packed here."""

import pytest

from alambic.data.dataset import Dataset
from alambic.errors import PackError
from alambic.events import drain
from alambic.pack import int8, openvino


def result(form, *, drop, low, p50_ms):
    return int8.FormResult(form, 0.9, drop, low, drop + 1, 0.99, p50_ms, 2 * p50_ms, 20.0, 500)


def test_fastest_form_is_kept_when_its_drop_is_small():
    best, why = int8.decide_form(
        [
            result("openvino-int8-weights", drop=0.0, low=-0.2, p50_ms=9.0),
            result("onnx-int8-dynamic", drop=0.2, low=0.1, p50_ms=3.0),
        ]
    )
    assert (best, why) == ("onnx-int8-dynamic", "fastest form that drops at most 0.2 points (it drops 0.20)")


def test_fast_form_is_passed_over_when_it_surely_drops_more():
    best, _ = int8.decide_form(
        [
            result("openvino-int8-weights", drop=0.0, low=-0.2, p50_ms=9.0),
            result("onnx-int8-dynamic", drop=1.5, low=0.6, p50_ms=3.0),
        ]
    )
    assert best == "openvino-int8-weights"


def test_form_that_drops_less_is_kept_when_a_faster_one_may_only_by_chance_drop_more():
    best, _ = int8.decide_form(
        [
            result("onnx-int8-dynamic", drop=0.0, low=-0.7, p50_ms=2.0),
            result("onnx-int8-signed", drop=1.3, low=0.0, p50_ms=1.2),
        ]
    )
    assert best == "onnx-int8-dynamic"


def test_form_is_kept_when_its_drop_cannot_be_told_from_none():
    best, why = int8.decide_form([result("onnx-int8-dynamic", drop=0.9, low=-0.1, p50_ms=3.0)])
    assert (best, why) == ("onnx-int8-dynamic", "fastest form whose drop of 0.90 points cannot be told from none")


def test_form_that_drops_least_is_kept_when_all_drop():
    best, why = int8.decide_form(
        [
            result("openvino-int8-static", drop=3.0, low=2.0, p50_ms=1.0),
            result("onnx-int8-dynamic", drop=2.0, low=1.0, p50_ms=3.0),
        ]
    )
    assert best == "onnx-int8-dynamic"
    assert why == "every form drops more than 0.2 points; this one drops least (2.00)"


def test_pack_form_gives_the_nearest_name_when_unknown(tmp_path):
    with pytest.raises(PackError, match="unknown form 'onnx-int8-dynamc'\n  hint: did you mean 'onnx-int8-dynamic'"):
        drain(int8.pack_form("onnx-int8-dynamc", tmp_path / "model", tmp_path / "part"))


def test_choose_refuses_when_no_row_decides(tmp_path):
    with pytest.raises(PackError, match="no labelled row to choose an 8-bit form on"):
        drain(int8.choose(tmp_path / "model", tmp_path / "part", Dataset((), ("a", "b")), calibration=["a"]))


def test_pack_says_what_is_allowed_when_the_precision_is_unknown(tmp_path):
    with pytest.raises(PackError, match=r"precision 'int4' is not known\n  hint: allowed: fp16, int8-weights, int8"):
        drain(openvino.pack(tmp_path / "model", tmp_path / "part", precision="int4"))


def test_pack_asks_for_texts_when_static_int8_has_none(tmp_path):
    with pytest.raises(PackError, match="'int8' needs texts to calibrate on"):
        drain(openvino.pack(tmp_path / "model", tmp_path / "part", precision="int8"))


@pytest.mark.parametrize("has_it", [False, True])
def test_forms_in_bf16_are_tried_only_where_the_engine_finds_it_in_the_cpu(has_it, monkeypatch):
    monkeypatch.setattr(int8, "has_bf16", lambda: has_it)
    in_bf16 = {"openvino-bf16", "openvino-int8-weights-bf16"}
    assert set(int8.FORMS) - set(int8.suited(int8.FORMS)) == (set() if has_it else in_bf16)
