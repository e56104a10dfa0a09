"""Preferences: the chosen answer gains on the rejected one, from the base as reference."""

import math

import pytest
import torch
import torch.nn.functional as F

from alambic.errors import TrainError
from alambic.events import Progress, drain
from alambic.kinds.chat import Chat, Message
from alambic.model.clone import clone
from alambic.model.decoder import Decoder
from alambic.train.dpo import DpoParams, Pair, prefer_chats
from writing_task import WORDS

PAIRS = [
    Pair(Chat.of(f"{a} {b}"), Message("assistant", f"yes {a}"), Message("assistant", f"no {b}"))
    for a in WORDS for b in WORDS if a != b
]  # fmt: skip
TRAIN, DEV = PAIRS[8:], PAIRS[:8]
QUICK = {"epochs": 2, "learning_rate": 6e-3, "batch_size": 8, "threads": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "llama"
    clone("llama-3.2-1b", folder, width=32)
    return folder


def answer_logprob(decoder, pair, answer):
    ids, learnt = decoder.labelled(Chat((*pair.prompt.messages, answer)))
    steps = F.log_softmax(decoder.logits(ids), dim=-1)
    return sum(float(steps[i - 1, ids[i]]) for i in range(1, len(ids)) if learnt[i])


def margin(decoder, reference, pair):
    gained = [
        answer_logprob(decoder, pair, a) - answer_logprob(reference, pair, a) for a in (pair.chosen, pair.rejected)
    ]
    return gained[0] - gained[1]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_margin_grows_when_preferences_are_learnt(base, tmp_path, method):
    result = drain(prefer_chats(base, TRAIN, DEV, params=DpoParams(**QUICK, method=method), out=tmp_path / "m"))
    assert result.history[0].dev == pytest.approx(math.log(2), abs=1e-3)  # the model is its own reference at first
    assert result.best_dev < 0.5 and result.accuracy == 1.0
    tuned, reference = Decoder.load(tmp_path / "m", dtype=torch.float32), Decoder.load(base, dtype=torch.float32)
    margins = [margin(tuned, reference, pair) for pair in DEV]
    assert min(margins) > 0
    assert 0.1 * sum(margins) / len(margins) == pytest.approx(result.margin, rel=0.1)
    assert (result.adapter is None) == (method == "full")


def test_model_moves_less_when_beta_is_larger(base, tmp_path):
    margins = []
    for beta in (0.05, 5.0):
        drain(prefer_chats(base, TRAIN, DEV, params=DpoParams(**QUICK, beta=beta), out=tmp_path / f"{beta}"))
        tuned, reference = Decoder.load(tmp_path / f"{beta}"), Decoder.load(base)
        margins.append(sum(margin(tuned, reference, pair) for pair in DEV))
    assert margins[0] > margins[1] > 0


def test_result_is_the_same_when_learnt_again_in_other_parts(base, tmp_path):
    first = drain(prefer_chats(base, TRAIN, DEV, params=DpoParams(**QUICK), out=tmp_path / "one"))
    again = drain(prefer_chats(base, TRAIN, DEV, params=DpoParams(**QUICK), out=tmp_path / "two"))
    parts = drain(prefer_chats(base, TRAIN, DEV, params=DpoParams(**QUICK, batch_tokens=100), out=tmp_path / "three"))
    assert first.best_dev == again.best_dev
    assert first.best_dev == pytest.approx(parts.best_dev, abs=0.02)


def test_progress_tells_margin_and_accuracy_when_learning(base, tmp_path):
    seen = []
    drain(prefer_chats(base, TRAIN, DEV, params=DpoParams(**QUICK), out=tmp_path / "m"),
          lambda e: seen.append(e.values) if isinstance(e, Progress) else None)  # fmt: skip
    assert seen[-1]["accuracy"] == 1.0 and seen[-1]["margin"] > seen[0]["margin"]


def test_pairs_without_an_answer_or_sense_are_refused_when_read(base, tmp_path):
    empty = Pair(TRAIN[0].prompt, TRAIN[0].chosen, Message("assistant", ""))
    with pytest.raises(TrainError, match=r"pair 2 \(rejected\): the assistant says nothing"):
        drain(prefer_chats(base, [TRAIN[0], empty], DEV, params=DpoParams(**QUICK), out=tmp_path / "m"))
    with pytest.raises(TrainError, match="expected beta over 0"):
        drain(prefer_chats(base, TRAIN, DEV, params=DpoParams(beta=0.0), out=tmp_path / "m"))
