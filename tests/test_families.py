"""Every family of encoders, as a tiny random clone of its true kind: train, export, and the same tokens and outputs.

The tokenizers are trained here, of the type each family uses; with the public data folder, BERT's is its real one.
"""

import json
import lzma
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from alambic.engines import load_part
from alambic.events import drain
from alambic.kinds.golden import GOLDEN_TEXTS
from alambic.model.encoder import Encoder, pad
from alambic.pack import graph, onnx, openvino

pytestmark = pytest.mark.slow

BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
TEXTS = [
    "the machine does not drain",
    "le lave-linge ne vidange plus",
    "please send an invoice",
    "merci pour la facture",
]
LABELS = [0, 0, 1, 1]


def around(tokenizer, first, last):
    ids = [(name, tokenizer.token_to_id(name)) for name in (first, last)]
    return processors.TemplateProcessing(f"{first} $A {last}", f"{first} $A {last} $B {last}", ids)


def wordpiece():
    shared = Path(os.environ.get("ALAMBIC_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    real = shared / "tokenizers" / "bert-uncased" / "tokenizer.json.xz"
    if real.is_file():
        return Tokenizer.from_str(lzma.open(real, "rt", encoding="utf-8").read())
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=BERT_SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(GOLDEN_TEXTS, trainer)
    tokenizer.post_processor = around(tokenizer, "[CLS]", "[SEP]")
    return tokenizer


def byte_bpe(special, first, last):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(GOLDEN_TEXTS, trainer)
    tokenizer.post_processor = around(tokenizer, first, last)
    return tokenizer


def unigram(special, first, last, unknown):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" {2,}", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token=unknown, show_progress=False)
    tokenizer.train_from_iterator(GOLDEN_TEXTS, trainer)
    tokenizer.post_processor = around(tokenizer, first, last)
    return tokenizer


def roberta_like():
    return byte_bpe(ROBERTA_SPECIAL, "<s>", "</s>")


def xlm_like():
    return unigram(ROBERTA_SPECIAL, "<s>", "</s>", "<unk>")


STANDARD = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
STANDARD |= {"max_position_embeddings": 66}
DEBERTA = {
    "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "norm_rel_ebd": "layer_norm",
    "share_att_key": True, "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip
FAMILIES = {
    "bert": (wordpiece, "[PAD]", lambda **v: transformers.BertConfig(**STANDARD, **v)),
    "distilbert": (
        wordpiece, "[PAD]",
        lambda **v: transformers.DistilBertConfig(
            dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=66, **v
        ),
    ),
    "roberta": (roberta_like, "<pad>", lambda **v: transformers.RobertaConfig(**STANDARD, **v)),
    "xlm-roberta": (xlm_like, "<pad>", lambda **v: transformers.XLMRobertaConfig(**STANDARD, **v)),
    "camembert": (xlm_like, "<pad>", lambda **v: transformers.CamembertConfig(**STANDARD, **v)),
    "modernbert": (
        lambda: byte_bpe(BERT_SPECIAL, "[CLS]", "[SEP]"), "[PAD]",
        lambda **v: transformers.ModernBertConfig(
            **STANDARD, **v, local_attention=8, cls_token_id=2, bos_token_id=2, sep_token_id=3, eos_token_id=3
        ),
    ),
    "deberta-v2": (
        lambda: unigram(BERT_SPECIAL, "[CLS]", "[SEP]", "[UNK]"), "[PAD]",
        lambda **v: transformers.DebertaV2Config(**STANDARD, **DEBERTA, **v),
    ),
}  # fmt: skip


def clone(family, folder):
    make_tokenizer, pad_token, config = FAMILIES[family]
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "pad_token_id": tokenizer.token_to_id(pad_token)}
    transformers.AutoModel.from_config(config(**sizes)).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return Encoder.load(folder).with_head(["water", "paper"], multi_label=False)


def train_a_little(encoder):
    """Return the loss before and after a few steps."""
    ids, mask = pad(encoder.tokenize(TEXTS), pad_id=encoder.pad_id)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=5e-3)
    losses = []
    encoder.eval()  # without dropout, so that the losses compare
    for _ in range(4):
        loss = torch.nn.functional.cross_entropy(encoder(ids, mask), torch.tensor(LABELS))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[0], losses[-1]


@pytest.fixture(params=FAMILIES, scope="module")
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    encoder = clone(request.param, folder / "base")
    before, after = train_a_little(encoder)
    encoder.save(folder / "model")
    return folder, Encoder.load(folder / "model"), before, after


def test_training_lowers_the_loss_in_every_family(trained):
    _, _, before, after = trained
    assert after < before


_TRACED = {}


@pytest.fixture
def traced_once(monkeypatch):
    """The forms of both engines begin with the same tracing of a family, done once here."""
    real = graph.trace

    def trace(encoder, *, own_weights=False):
        key = encoder.spec.architecture, own_weights
        if key not in _TRACED:
            _TRACED[key] = real(encoder, own_weights=own_weights)
        return _TRACED[key]

    monkeypatch.setattr(graph, "trace", trace)


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("pack", [openvino.pack, onnx.pack], ids=["openvino", "onnx"])
def test_packed_clone_gives_the_ids_and_logits_of_torch_in_every_family(trained, pack, tmp_path):
    folder, encoder, _, _ = trained
    precision = "fp16" if pack is openvino.pack else "fp32"
    part = drain(pack(folder / "model", tmp_path / "part", precision=precision))
    proof = json.loads((tmp_path / "part" / "proof.json").read_text())
    assert proof["largest_difference"] < 1e-3
    runner = load_part(part, tmp_path / "part")
    assert runner.token_ids(GOLDEN_TEXTS) == encoder.tokenize(GOLDEN_TEXTS)
    rows = encoder.tokenize(TEXTS)
    with torch.no_grad():
        expected = encoder(*pad(rows, pad_id=encoder.pad_id)).numpy()
    # Half-precision weights move the logits of a clone by less than this.
    np.testing.assert_allclose(runner.infer(rows), expected, atol=5e-3)
