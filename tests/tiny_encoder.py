"""A tiny encoder of random weights with a tokenizer of whole words, for builds that train."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from linear_task import FILLER, WORDS

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({*" ".join(WORDS.values()).split(), *FILLER})]


def save_tiny_encoder(folder: Path, *, layers: int) -> Path:
    """Write a BERT of `layers` layers, 32 wide, that knows the words of `linear_task`."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
