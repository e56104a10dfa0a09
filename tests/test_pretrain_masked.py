"""The encoder's own forward pass is transformers' one, and it learns to guess."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from alambic.errors import TrainError
from alambic.events import drain
from alambic.model.encoder import Encoder
from alambic.train.pretrain import pretrain
from alambic.train.pretrain_attention import bounds_of
from alambic.train.pretrain_masked import Masked, choose_masked, encoder_states, new_encoder
from alambic.train.pretrain_params import PretrainParams
from pretrain_shards import make_corpus

torch.set_num_threads(1)
PARAMS = PretrainParams(
    hidden=64, layers=2, heads=4, context=48, objective="masked", tokens=30 * 192, batch_tokens=192, micro_tokens=96,
    threads=1, learning_rate=1e-2, muon_rate=1e-2, precision="f32", valid_every=10**9, z_loss=0.0,
)  # fmt: skip


def encoder():
    model = new_encoder(PARAMS, vocabulary=320, special={"bos_token_id": 0, "eos_token_id": 3, "pad_token_id": 1})
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("Wo.weight"):
                weight.normal_(0, 0.1)
    return model


def test_states_equal_those_of_transformers_when_computed():
    model = encoder()
    ids = torch.randint(4, 320, (3, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = model.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        for dtype, near in ((torch.float32, 1e-4), (torch.bfloat16, 0.02)):
            bounds = bounds_of(ids, end_id=0, dtype=dtype, causal=False)
            ours = encoder_states(model, ids, bounds, dtype=dtype)
            assert (ours - theirs).norm() / theirs.norm() < near


def test_token_sees_its_own_document_only_when_packed():
    model = encoder()
    ids = torch.randint(4, 320, (1, 48), generator=torch.Generator().manual_seed(1))
    ids[0, 20] = 0
    other = ids.clone()
    other[0, 21:] = 5
    with torch.no_grad():
        one, two = (
            encoder_states(model, x, bounds_of(x, end_id=0, dtype=torch.float32, causal=False), dtype=torch.float32)
            for x in (ids, other)
        )
    assert torch.equal(one[0, :20], two[0, :20]) and not torch.equal(one[0, 20:], two[0, 20:])


def test_a_share_of_the_tokens_is_masked_and_no_end_when_chosen():
    ids = np.random.default_rng(0).integers(0, 6, (40, 50))
    chosen = choose_masked(ids, range(40), share=0.3, end_id=0, seed=1)
    assert (chosen.sum(1) == 15).all() and not chosen[ids == 0].any()
    again = choose_masked(ids[7:9], [7, 8], share=0.3, end_id=0, seed=1)
    assert np.array_equal(again, chosen[7:9])
    assert not np.array_equal(choose_masked(ids[7:9], [8, 9], share=0.3, end_id=0, seed=1), chosen[7:9])
    assert choose_masked(np.full((1, 50), -1), [0], share=0.3, end_id=0, seed=1).sum() == 0


def test_loss_is_that_of_transformers_at_the_masked_tokens_when_computed():
    objective = Masked(encoder(), PARAMS, end_id=0, mask_id=2, device=torch.device("cpu"))
    windows = np.random.default_rng(3).integers(4, 320, (2, 48))
    chosen = torch.from_numpy(choose_masked(windows, [5, 6], share=0.3, end_id=0, seed=0))
    ids = torch.from_numpy(windows)
    logits = objective.model(input_ids=torch.where(chosen, 2, ids), attention_mask=torch.ones_like(ids)).logits
    theirs = F.cross_entropy(logits[chosen], ids[chosen], reduction="sum")
    loss, entropy = objective.loss(windows, [5, 6])
    assert float(loss) == pytest.approx(float(theirs), rel=1e-4) and float(entropy) == pytest.approx(float(loss))
    assert objective.counted(windows, [5, 6]) == int(chosen.sum()) == 28
    held = np.concatenate([np.full((2, 1), 9), windows], axis=1)
    assert objective.nats(held, [5, 6]) == (pytest.approx(float(theirs), rel=1e-4), 28)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("masked"))


def test_encoder_learns_and_opens_when_trained(corpus):
    work = pretrain(corpus / "shards", corpus / "tokenizer", PARAMS, corpus / "model", base={"name": "tiny"})
    result = drain(work)
    steps = [line for line in map(json.loads, result.log.read_text().splitlines()) if line["kind"] == "step"]
    assert steps[0]["loss"] == pytest.approx(np.log(320), abs=0.2) and steps[-1]["loss"] < 5.0
    opened = Encoder.load(corpus / "model")
    ids = opened.tokenize(["le chat noir"])[0]
    assert ids[0] == 0 and ids[1:] == opened.tokenizer.encode("le chat noir", add_special_tokens=False).ids
    vectors = opened.embed(["le chat noir dort", "a small dog runs"])
    assert vectors.shape == (2, 64) and np.isfinite(vectors).all() and not np.allclose(vectors[0], vectors[1])


def test_tokenizer_without_a_mask_is_refused_when_an_encoder_is_trained(corpus, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (corpus / "tokenizer" / name).read_text()
        (tmp_path / "tokenizer" / name).write_text(text if name == "tokenizer.json" else '{"eos_token": "<|end|>"}')
    with pytest.raises(TrainError, match="needs a mask_token"):
        drain(pretrain(corpus / "shards", tmp_path / "tokenizer", PARAMS, tmp_path / "model", base={"name": "tiny"}))
