"""The reference engine, which only the build opens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from alambic.bundle import PartSpec
from alambic.engines import TextReader, open_part
from alambic.model.encoder import Encoder

VOCABULARY = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "pump": 4, "leaks": 5, "bill": 6, "wrong": 7}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, pad_token_id=0,
        max_position_embeddings=12,
    )  # fmt: skip
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    tokenizer.save(str(tmp_path / "base" / "tokenizer.json"))
    return tmp_path / "base"


def reader(folder: Path) -> TextReader:
    return open_part(PartSpec("model", "torch", folder.name), folder)


def test_torch_gives_the_embeddings_of_the_encoder(base: Path) -> None:
    texts = ["pump leaks", "bill", "", "wrong bill wrong pump"]
    with reader(base) as part:
        assert part.output == "embedding"
        np.testing.assert_allclose(part.run(texts), Encoder.load(base).embed(texts), atol=1e-5)


def test_torch_gives_logits_when_the_model_has_a_head(base: Path, tmp_path: Path) -> None:
    model = Encoder.load(base).with_head(["x", "y", "z"], multi_label=False).eval()
    model.save(tmp_path / "model")
    with torch.no_grad():
        expected = model(torch.tensor([[1, 4, 5, 2]]), torch.ones(1, 4, dtype=torch.long)).numpy()
    with reader(tmp_path / "model") as part:
        assert part.output == "logits"
        np.testing.assert_allclose(part.run(["pump leaks"]), expected, atol=1e-5)


def test_torch_cuts_windows_when_a_text_is_too_long(base: Path) -> None:
    limit = Encoder.load(base).spec.max_tokens
    text = "pump " * (limit * 2)
    with reader(base) as part:
        assert part.tokens is not None
        assert len(part.tokens.token_ids([text])[0]) > limit
        assert np.isfinite(part.run([text])).all()
