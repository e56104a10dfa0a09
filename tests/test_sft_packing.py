"""Packed rows learn exactly what they would learn alone, in every family; the streamed loss is the plain one."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from alambic.kinds.chat import Chat
from alambic.model.clone import ORIGINALS, clone
from alambic.model.decoder import Decoder
from alambic.model.seq2seq import FAMILIES, Seq2Seq, load_writer
from alambic.train.packing import Sample, _groups, attend, pack, padded, parts, rows_attention
from alambic.train.sft_loss import Head, each_loss, streamed_loss, token_losses
from alambic.train.sft_model import Learner
from alambic.train.sft_rows import rows_of

CHATS = [
    Chat.of("Hé, où est le 🙂 chien ?", completion="Là-bas, à 12 km."),
    Chat.of("a", completion="b c d"),
    Chat.of("Please put this longer text into French, would you? " * 2, completion="Oui !", system="Be kind."),
]
DECODERS = [name for name, original in ORIGINALS.items() if original.config["model_type"] not in FAMILIES]
SEQ2SEQ = [name for name in ORIGINALS if name not in DECODERS]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clones(tmp_path_factory):
    root = tmp_path_factory.mktemp("clones")

    def folder(name):
        if not (root / name).exists():
            clone(name, root / name, width=32)
        return root / name

    return folder


def alone(writer, sample):
    """Return the summed loss of one row by transformers' own forward and its eager attention."""
    if isinstance(writer, Seq2Seq):
        ids = torch.tensor([sample.ids])
        logits = writer.model(input_ids=torch.tensor([sample.source]), decoder_input_ids=ids[:, :-1]).logits
        return F.cross_entropy(logits[0], ids[0, 1:], reduction="sum")
    labels = [i if learns else -100 for i, learns in zip(sample.ids, sample.learnt, strict=True)]
    out = writer.model(input_ids=torch.tensor([sample.ids]), labels=torch.tensor([labels]))
    return out.loss * sample.n_learnt


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", DECODERS)
def test_loss_and_gradients_equal_those_of_rows_alone_when_batched(clones, name, packed):
    writer = Decoder.load(clones(name), dtype=torch.float32)
    writer.model.set_attn_implementation("eager")
    rows = rows_of(writer, CHATS, long="error", max_tokens=2000).samples
    expected = [alone(writer, row) for row in rows]
    sum(expected).backward()
    known = gradients(writer.model)
    learner = Learner(writer, method="lora", packed=packed)  # an adapter's way of computing: nothing in bf16
    loss = learner.loss(rows)
    loss.backward()
    assert float(loss) == pytest.approx(float(sum(expected)), rel=1e-6)
    torch.testing.assert_close(learner.losses(rows), torch.stack(expected).detach(), rtol=1e-6, atol=1e-5)
    found = gradients(writer.model)
    assert found.keys() == known.keys()
    for key, value in known.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5 * float(value.abs().max() + 1))


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_seq2seq_loss_equals_that_of_rows_alone_when_padded(clones, name):
    writer = load_writer(clones(name), dtype=torch.float32)
    rows = rows_of(writer, CHATS, long="error", max_tokens=2000).samples
    expected = torch.stack([alone(writer, row) for row in rows]).detach()
    learner = Learner(writer, method="lora", packed=True)
    assert not learner.packed
    torch.testing.assert_close(learner.losses(rows), expected, rtol=1e-6, atol=1e-5)


def test_rows_are_contaminated_when_their_boundaries_are_lost(clones):
    """The reference of the test above: without boundaries the same packed batch gives another loss."""
    writer = Decoder.load(clones("llama-3.2-1b"), dtype=torch.float32)
    rows = rows_of(writer, CHATS, long="error", max_tokens=2000).samples
    learner = Learner(writer, method="lora", packed=True)
    batch = pack(rows)
    states = writer.body(input_ids=batch.ids, position_ids=None, use_cache=False).last_hidden_state[0, batch.at]
    lost = token_losses(states, batch.targets, learner.head()).sum()
    assert abs(float(lost) - float(learner.loss(rows))) > 0.1


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_rows_attention_equals_attention_of_each_row_when_packed(window, cap):
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 21, 8), torch.randn(1, 2, 21, 8), torch.randn(1, 2, 21, 8)
    bounds = torch.tensor([0, 3, 4, 14, 21], dtype=torch.int32)[None, None, None]
    found, _ = rows_attention(None, query, key, value, bounds, scaling=0.3, sliding_window=window, softcap=cap)
    for a, b in ((0, 3), (3, 4), (4, 14), (14, 21)):
        scores = query[:, :, a:b] @ key[:, :, a:b].repeat_interleave(2, 1).transpose(-1, -2) * 0.3
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        far = torch.arange(b - a)[:, None] - torch.arange(b - a)
        seen = (far >= 0) & (far < (window or 99))
        expected = scores.masked_fill(~seen, -1e9).softmax(-1) @ value[:, :, a:b].repeat_interleave(2, 1)
        torch.testing.assert_close(found[:, a:b], expected.transpose(1, 2), rtol=1e-5, atol=1e-6)


def test_rows_of_like_length_attend_together_when_packed():
    lengths = [3, 3, 3, 4, 10, 11, 300]
    bounds = [0, *(sum(lengths[: i + 1]) for i in range(len(lengths)))]
    found = _groups(tuple(bounds), torch.device("cpu"))
    assert [(group.rows, group.width, group.spread is None) for group in found] == [(4, 4, False), (2, 11, False),
                                                                                   (1, 300, True)]  # fmt: skip
    torch.manual_seed(0)
    states = [torch.randn(1, heads, bounds[-1], 8).requires_grad_() for heads in (4, 2, 2)]
    together, _ = rows_attention(None, *states, torch.tensor(bounds, dtype=torch.int32)[None, None, None])
    parts_of = [[state[:, :, a:b] for state in states] for a, b in pairwise(bounds)]
    alone = [attend(*part, mask=None, scale=8**-0.5, dropout=0.0, window=None, cap=None) for part in parts_of]
    expected = torch.cat(alone, dim=2).transpose(1, 2)
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-6)
    torch.manual_seed(1)
    weights = torch.randn_like(together)
    ours = torch.autograd.grad((together * weights).sum(), states)
    theirs = torch.autograd.grad((expected * weights).sum(), states)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_products_equal_the_fused_kernel_when_rows_are_short():
    torch.manual_seed(0)
    states = [torch.randn(1, heads, 40, 16).bfloat16().requires_grad_() for heads in (6, 2, 2)]
    out = attend(*states, mask=None, scale=0.25, dropout=0.0, window=None, cap=None)
    again = [state.detach().float().requires_grad_() for state in states]
    expected = F.scaled_dot_product_attention(*again, is_causal=True, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.02)
    out.float().square().sum().backward()
    expected.square().sum().backward()
    for one, two in zip(states, again, strict=True):
        torch.testing.assert_close(one.grad.float(), two.grad, rtol=0.1, atol=0.15)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("block", [16, 10_000])
def test_streamed_loss_equals_the_plain_one_when_taken_in_blocks(monkeypatch, smoothing, cap, block):
    monkeypatch.setattr("alambic.train.sft_loss._block", lambda weight: block)
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(50, 8), torch.randn(30, 8), torch.randn(30)
    targets = torch.randint(0, 30, (50,))
    ours = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    plain = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    loss = streamed_loss(ours[0], targets, Head(ours[1], ours[2], cap=cap), smoothing=smoothing)
    logits = plain[0] @ plain[1].T + plain[2]
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)
    (2 * loss).backward()
    (2 * expected).backward()
    for one, two in zip(ours, plain, strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-5)
    if not smoothing:
        each = F.cross_entropy(logits, targets, reduction="none")
        torch.testing.assert_close(token_losses(hidden, targets, Head(weight, bias, cap=cap)), each.detach())


def test_each_loss_equals_the_plain_ones_when_rows_are_weighed(monkeypatch):
    monkeypatch.setattr("alambic.train.sft_loss._block", lambda weight: 16)
    torch.manual_seed(0)
    hidden, weight, bias, shares = torch.randn(50, 8), torch.randn(30, 8), torch.randn(30), torch.randn(50)
    targets = torch.randint(0, 30, (50,))
    ours = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    plain = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    (each_loss(ours[0], targets, Head(ours[1], ours[2], cap=2.0)) * shares).sum().backward()
    logits = 2.0 * torch.tanh((plain[0] @ plain[1].T + plain[2]) / 2.0)
    (F.cross_entropy(logits, targets, reduction="none") * shares).sum().backward()
    for one, two in zip(ours, plain, strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-5)


def test_first_token_and_prompt_are_never_targets_when_batched():
    rows = [Sample((5, 6, 7, 8), (True, False, True, True), 1), Sample((9, 4), (False, True), 1)]
    batch = pack(rows)
    assert (batch.at.tolist(), batch.targets.tolist(), batch.rows.tolist()) == ([1, 2, 4], [7, 8, 4], [0, 0, 1])
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1]]
    filled = padded(rows, pad_id=0)
    assert filled.ids.flatten()[filled.at].tolist() == batch.ids.flatten()[batch.at].tolist() == [6, 7, 9]


@pytest.mark.parametrize("packed", [True, False])
def test_parts_hold_every_row_once_and_stay_under_the_limit_when_split(packed):
    rows = [Sample(tuple(range(n)), (True,) * n, n) for n in (9, 3, 30, 4, 4, 12, 1)]
    found = list(parts(rows, most_tokens=16, packed=packed))
    assert sorted(row.n_tokens for part in found for row in part) == [1, 3, 4, 4, 9, 12, 30]
    for part in found:
        lengths = [row.n_tokens for row in part]
        size = sum(lengths) if packed else max(lengths) * len(lengths)
        assert size <= 16 or len(part) == 1
