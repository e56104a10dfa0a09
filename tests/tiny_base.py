"""A tiny BERT over given words, written as a base folder, and the graphs that builds trace of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors


def write_base(
    folder: Path,
    words: Iterable[str],
    *,
    layers: int = 2,
    width: int = 32,
    meanings: Mapping[str, str] | None = None,
) -> Path:
    """Write a base with random weights into `folder`.

    Args:
        folder: an absent folder.
        words: of its vocabulary; others are unknown to it.
        layers: of the encoder.
        width: of its vectors.
        meanings: of some words; those of one meaning lie near each other, as pretraining would have put them.
    """
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(set(words))]
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=2 * width, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModel.from_config(config)
    table = model.get_input_embeddings().weight
    directions = {name: torch.randn(width) * 0.05 for name in sorted(set((meanings or {}).values()))}
    with torch.no_grad():
        for word, meaning in (meanings or {}).items():
            table[vocabulary.index(word)] += directions[meaning]
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def share_graphs(run: Path, factory: pytest.TempPathFactory) -> Path:
    """Make the run folder `run`, in which traced graphs are kept with those of the other builds of this session.

    A graph depends on the architecture alone (`alambic.pack.graph`), and tracing takes longer than what is tested.
    """
    session = factory.getbasetemp()
    kept = (session.parent if "PYTEST_XDIST_WORKER" in os.environ else session) / "graphs"
    kept.mkdir(exist_ok=True)
    run.mkdir()
    with contextlib.suppress(OSError):  # a system that does not allow links traces anew
        (run / "graphs").symlink_to(kept, target_is_directory=True)
    return run
