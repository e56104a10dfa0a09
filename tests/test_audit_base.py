"""A label audit with a base: its packed form gives the vectors, and a build in the same folder uses them again."""

import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from linear_task import FILLER, TASK, WORDS, alambic, messages, write_task

pytestmark = pytest.mark.slow


@pytest.fixture
def task(tmp_path):
    known = sorted({w for ws in WORDS.values() for w in ws.split()} | {*FILLER})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *known]
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.save(str(tmp_path / "base" / "tokenizer.json"))
    text = TASK.replace("[data]", 'threads = 1\n[base]\nname = "./base"\n[data]') + '[[candidate]]\nname = "logreg"\n'
    return write_task(tmp_path, text=text, rows=messages(16))


def test_audit_uses_the_packed_base_and_a_build_takes_its_stages(task, tmp_path):
    ended = alambic("check", task, "--audit", "--out", tmp_path / "run", "--json")
    assert ended.code == 0, ended.err
    assert list(json.loads(ended.out)["accuracy"]) == ["logreg", "tfidf-svm"]
    stages = tmp_path / "run" / "stages"
    before = {path.name for path in stages.iterdir() if path.name.startswith(("base-", "embed-"))}
    assert len(before) == 2
    built = alambic("build", task, "--out", tmp_path / "run", "--json")
    assert built.code in (0, 3), built.err
    assert {path.name for path in stages.iterdir() if path.name.startswith(("base-", "embed-"))} == before
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "Labels to review (dev rows)" in page and "rows that decided look wrong" in page
