"""Which tokens a step reads, how held-out text is scored, and what the figures of speed mean."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from alambic.data.shards import open_shards
from alambic.errors import TrainError
from alambic.train.pretrain_data import held_out, lay_out
from alambic.train.pretrain_params import PretrainParams
from alambic.train.pretrain_score import counted, score_shards
from alambic.train.pretrain_speed import flops_a_token, peak_of
from alambic.train.schedule import factor
from pretrain_shards import make_shards, make_tokenizer


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    make_tokenizer(folder / "tokenizer")
    return open_shards(make_shards(folder / "shards", folder / "tokenizer"))


def test_windows_are_the_same_when_laid_out_again_or_longer(shards):
    one = lay_out(shards, length=17, windows=300, seed=3)
    two = lay_out(shards, length=17, windows=900, seed=3)
    other = lay_out(shards, length=17, windows=300, seed=4)
    assert np.array_equal(one.read(40, 200), two.read(40, 200))
    assert not np.array_equal(one.read(0, 50), other.read(0, 50))


def test_every_stretch_has_each_sources_share_when_read(shards):
    owner = lay_out(shards, length=17, windows=4000, seed=0).owner
    for start in range(0, 4000, 40):
        assert (owner[start : start + 40] == 0).sum() == pytest.approx(30, abs=1)  # three quarters


def test_a_pass_reads_no_token_twice_and_almost_all_when_walked(shards):
    windows = lay_out(shards, length=16, windows=20_000, seed=0)
    tokens = shards.tokens("train", "en")
    per_pass = len(tokens) // 16 - 1
    numbers = np.flatnonzero(windows.owner == 1)[:per_pass]
    read = np.concatenate([windows.read(int(i), 1)[0] for i in numbers])
    counts = np.bincount(read, minlength=shards.vocabulary)
    whole = np.bincount(tokens, minlength=shards.vocabulary)
    assert (counts <= whole).all() and counts.sum() >= whole.sum() - 2 * 16


def test_a_source_shorter_than_a_window_is_read_round_when_laid_out(shards):
    rows = lay_out(shards, length=len(shards.tokens("train", "en")) + 5, windows=4, seed=0).read(0, 4)
    assert rows.shape == (4, len(shards.tokens("train", "en")) + 5)


def test_nothing_to_train_on_is_an_error_when_laid_out(shards):
    empty = tuple(replace(s, train=replace(s.train, tokens=0)) for s in shards.sources)
    with pytest.raises(TrainError, match="no tokens"):
        lay_out(replace(shards, sources=empty), length=16, windows=4, seed=0)


def test_held_out_tokens_are_each_predicted_once_when_all_are_read(shards):
    windows = held_out(shards, "fr", length=20, most=None)
    inputs, targets, known = counted(windows, end_id=shards.end_id)
    tokens = shards.tokens("valid", "fr")
    assert np.array_equal(targets[known], tokens)
    assert np.array_equal(inputs[known], np.concatenate([[shards.end_id], tokens[:-1]]))
    part = held_out(shards, "fr", length=20, most=60)
    assert len(part) == 3 and {row.tobytes() for row in part} <= {row.tobytes() for row in windows}


def test_bits_per_byte_are_those_of_a_uniform_model_when_scored(shards):
    def nats(windows, numbers):
        count = int((windows[:, 1:] >= 0).sum())
        return float(np.log(shards.vocabulary)) * count, count

    found = score_shards(shards, nats, length=20, most=None, rows=3)
    bits = {s.name: np.log2(shards.vocabulary) * s.valid.tokens / s.valid.utf8_bytes for s in shards.sources}
    assert {name: s.bits_per_byte for name, s in found.sources.items()} == pytest.approx(bits)
    whole = shards.total("valid")
    assert found.bits_per_byte == pytest.approx(np.log2(shards.vocabulary) * whole.tokens / whole.utf8_bytes)
    assert all(s.whole for s in found.sources.values())
    part = score_shards(shards, nats, length=20, most=40, rows=3)
    assert 20 < part.sources["fr"].tokens <= 40 and not part.sources["fr"].whole
    assert part.sources["fr"].bits_per_byte == pytest.approx(bits["fr"])


def test_operations_are_those_of_palm_when_counted_by_hand():
    # Appendix B of PaLM: 6 N + 12 L H Q T, for 8 layers of 512 at a context of 1,024.
    assert flops_a_token(weights=30_000_000, layers=8, width=512, context=1024) == 6 * 30e6 + 12 * 8 * 512 * 1024


def test_peak_is_unknown_when_no_data_sheet_says_it(monkeypatch):
    for name, flops in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12), ("Some other card", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_of(torch.device("cuda"), dtype=torch.bfloat16).flops == flops
    assert peak_of(torch.device("cuda"), dtype=torch.float32).source == "unknown"
    assert peak_of(torch.device("meta"), dtype=torch.bfloat16).source == "unknown"


def test_rate_stays_then_falls_to_its_end_when_scheduled():
    shares = [factor(i, total=100, warmup=0.1, shape="wsd", decay=0.3, final=0.1) for i in range(101)]
    assert shares[4] == 0.5 and shares[9:71] == [1.0] * 62
    assert shares[85] == pytest.approx(0.55) and shares[100] == pytest.approx(0.1)
    cosine = [factor(i, total=100, warmup=0.1, shape="cosine", final=0.2) for i in range(101)]
    assert cosine[55] == pytest.approx(0.6) and cosine[100] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"objective": "both"}, "causal, masked"), ({"heads": 3}, "whole width"), ({"kv_heads": 3}, "multiple"),
     ({"tokens": None}, "tokens or passes"), ({"batch_tokens": 8}, "less than one window"), ({"clip": 0.0}, "clip"),
     ({"warmup": 1.5}, "warmup"),
     ({"objective": "masked", "layers": 1}, "at least 2")],
)  # fmt: skip
def test_impossible_value_is_an_error_when_checked(changes, said):
    params = PretrainParams(hidden=32, layers=2, heads=4, context=16, tokens=1000)
    assert params.checked() is params
    with pytest.raises(TrainError, match=said):
        replace(params, **changes).checked()
