"""The decoder's own forward pass is transformers' one; a token sees its own document; the loss is the plain loss."""

import pytest
import torch
import torch.nn.functional as F

from alambic.train.pretrain_attention import bounds_of
from alambic.train.pretrain_model import Causal, hidden_states, new_decoder
from alambic.train.pretrain_optimiser import make_optimisers
from alambic.train.pretrain_params import PretrainParams
from alambic.train.sft_loss import Head, streamed_parts

torch.set_num_threads(1)
SPECIAL = {"bos_token_id": 0, "eos_token_id": 3, "pad_token_id": 1}
F32, BF16 = torch.float32, torch.bfloat16


def decoder(**changes):
    given = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "context": 48, "tokens": 1, "batch_tokens": 96}
    params = PretrainParams(**{**given, **changes})
    model = new_decoder(params, vocabulary=320, special=SPECIAL)
    with torch.no_grad():  # those that begin at zero would hide a wrong attention
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.normal_(0, 0.1)
    return model, params


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_hidden_states_equal_those_of_transformers_when_computed(kv_heads):
    model, _ = decoder(kv_heads=kv_heads)
    ids = torch.randint(4, 320, (3, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = hidden_states(model, ids, bounds_of(ids, end_id=0, dtype=F32), dtype=F32)
        half = hidden_states(model, ids, bounds_of(ids, end_id=0, dtype=BF16), dtype=BF16)
        theirs = model.model(input_ids=ids).last_hidden_state.flatten(0, 1)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    assert (half.float() - theirs).norm() / theirs.norm() < 0.02


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_token_sees_its_own_document_only_when_packed(dtype):
    model, _ = decoder()
    ids = torch.randint(4, 320, (1, 160), generator=torch.Generator().manual_seed(1))
    ids[0, 70] = 0
    other = ids.clone()
    other[0, :70] = torch.randint(4, 320, (70,))
    with torch.no_grad():
        one, two, alone, mixed = (
            hidden_states(model, x, bounds_of(x, end_id=end, dtype=dtype), dtype=dtype)
            for x, end in ((ids, 0), (other, 0), (ids[:, 70:], 0), (other, None))
        )
    assert torch.equal(one[70:], two[70:]) and not torch.equal(one[:70], two[:70])
    near = {"atol": 2e-5, "rtol": 1e-4} if dtype == F32 else {"atol": 0.1, "rtol": 0.05}
    torch.testing.assert_close(one[70:], alone, **near)  # positions are counted from elsewhere, and it is the same
    assert not torch.allclose(mixed[70:], two[70:], atol=0.1, rtol=0.05)


def test_loss_and_gradients_are_the_plain_ones_when_computed_in_parts(monkeypatch):
    monkeypatch.setattr("alambic.train.sft_loss._BLOCK_BYTES", 64 * 320 * 4)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 320, (150,), generator=generator)
    found = []
    for plain in (False, True):
        hidden = torch.randn(150, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        table = torch.randn(320, 64, generator=torch.Generator().manual_seed(2)).mul(0.3).requires_grad_()
        if plain:
            logits = hidden @ table.T
            entropy = F.cross_entropy(logits, targets, reduction="sum")
            loss = entropy + 0.01 * logits.logsumexp(1).square().sum()
        else:
            loss, entropy = streamed_parts(hidden, targets, Head(table), z_loss=0.01)
        loss.backward()
        found.append((loss.detach(), entropy.detach(), hidden.grad, table.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_objective_predicts_the_next_token_when_asked_for_its_loss():
    model, params = decoder(precision="f32", z_loss=0.0)
    objective = Causal(model, params, end_id=0, device=torch.device("cpu"))
    windows = torch.randint(4, 320, (2, 49), generator=torch.Generator().manual_seed(5)).numpy()
    loss, entropy = objective.loss(windows, [0, 1])
    ids = torch.from_numpy(windows)
    theirs = model(input_ids=ids, labels=ids).loss * 96
    torch.testing.assert_close(loss, theirs, atol=1e-2, rtol=1e-4)
    assert float(entropy) == pytest.approx(float(loss)) == pytest.approx(objective.nats(windows, [0, 1])[0], rel=1e-5)
    windows[:, 30:] = -1  # fills up a last window: not counted
    less, count = objective.nats(windows, [0, 1])
    assert less < float(loss) and count == 96 - 2 * 19


def test_a_new_model_gives_every_token_the_same_chance_when_made():
    params = PretrainParams(hidden=64, layers=2, heads=4, context=48, tokens=1, batch_tokens=96, seed=7)
    one, two = (new_decoder(params, vocabulary=320, special=SPECIAL) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    windows = torch.randint(4, 320, (2, 49)).numpy()
    loss, _ = Causal(one, params, end_id=0, device=torch.device("cpu")).loss(windows, [0, 1])
    assert float(loss) / 96 == pytest.approx(torch.tensor(320.0).log().item(), rel=0.02)


def test_muon_takes_the_matrices_of_blocks_only_when_made():
    model, params = decoder(optimizer="muon")
    muon, adamw = make_optimisers(model, params).parts
    names = {id(weight): name for name, weight in model.named_parameters()}
    by_muon = {names[id(weight)] for group in muon.param_groups for weight in group["params"]}
    by_adamw = {names[id(weight)]: group["weight_decay"] for group in adamw.param_groups for weight in group["params"]}
    assert len(by_muon) == 2 * 7 and all("_proj" in name for name in by_muon)
    assert set(by_adamw) == set(names.values()) - by_muon and set(by_adamw.values()) == {0.0}
    (only,) = make_optimisers(model, decoder(optimizer="adamw")[1]).parts
    decays = [group["weight_decay"] for group in only.param_groups]
    assert decays == [0.1, 0.0, 0.0] and len(only.param_groups[0]["params"]) == 14
