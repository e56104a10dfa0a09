"""Every family of encoders trains, is saved, and is loaded with the same answers."""

import re

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from alambic.data.dataset import Dataset, Example
from alambic.events import drain
from alambic.model.encoder import Encoder, pad
from alambic.train.finetune import FinetuneParams, finetune

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "red", "blue", "cat", "dog", "runs", "sits"]
SMALL = {"vocab_size": len(WORDS), "pad_token_id": 0, "max_position_embeddings": 24}
STANDARD = {**SMALL, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
FAMILIES = {
    "bert": transformers.BertConfig(**STANDARD),
    "roberta": transformers.RobertaConfig(**STANDARD),
    "xlm-roberta": transformers.XLMRobertaConfig(**STANDARD),
    "camembert": transformers.CamembertConfig(**STANDARD),
    "distilbert": transformers.DistilBertConfig(**SMALL, dim=32, n_layers=2, n_heads=4, hidden_dim=64),
    "modernbert": transformers.ModernBertConfig(
        **STANDARD, cls_token_id=1, bos_token_id=1, sep_token_id=2, eos_token_id=2, local_attention=8
    ),
    "deberta-v2": transformers.DebertaV2Config(**STANDARD, relative_attention=True, pos_att_type=["p2c", "c2p"]),
}
ROWS = tuple(Example(f"{c} {a} {v}", (c,)) for c in ("red", "blue") for a in ("cat", "dog") for v in ("runs", "sits"))
DATA = Dataset(ROWS, ("blue", "red"))


@pytest.fixture(params=FAMILIES)
def base(request, tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "base"
    transformers.AutoModel.from_config(FAMILIES[request.param]).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("mode", ["off", "on"])
def test_finetune_moves_every_layer_in_every_family(base, tmp_path, mode):
    params = FinetuneParams(steps=3, batch_size=4, learning_rate=1e-2, few_shot=mode, threads=1)
    drain(finetune(base, DATA, None, params=params, out=tmp_path / "model"))
    before, after = Encoder.load(base).state_dict(), Encoder.load(tmp_path / "model").state_dict()
    matrices = [name for name in before if re.search(r"layers?\.[01]\.", name) and before[name].ndim == 2]
    assert matrices
    assert [name for name in matrices if torch.equal(before[name], after[name])] == []
    ids, mask = pad([[1, 4, 6, 8, 2]], pad_id=0)
    assert Encoder.load(tmp_path / "model")(ids, mask).isfinite().all()
