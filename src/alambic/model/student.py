"""Smaller encoders out of larger ones: fewer layers of the same, and what a student and its teacher have in common."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import nn

from alambic.errors import TrainError
from alambic.model.encoder import Encoder


def depth(encoder: Encoder) -> int:
    """Return the number of layers."""
    return int(encoder.backbone.config.num_hidden_layers)


def spread(layers: int, of: int) -> tuple[int, ...]:
    """Return which `layers` of `of` a student starts from: evenly taken, the first and the last among them."""
    if layers == 1:
        return (0,)
    return tuple(round(i * (of - 1) / (layers - 1)) for i in range(layers))


def shallower(encoder: Encoder, layers: int) -> Encoder:
    """Return a copy of `encoder` with `layers` of its layers, evenly taken, and its head if it has one.

    Raises:
        TrainError: it has no more layers than that, or `layers` is under 1.
    """
    most = depth(encoder)
    if not 1 <= layers < most:
        raise TrainError(
            f"layers = {layers}: the teacher has {most}, and its student needs 1 to {most - 1}",
            hint="a student as large as its teacher is the teacher: use the candidate finetune",
        )
    kinds = getattr(encoder.backbone.config, "layer_types", None)
    kept = spread(layers, most) if not kinds else _both_kinds(spread(layers, most), kinds)
    backbone = copy.deepcopy(encoder.backbone)
    _keep(backbone, kept)
    config = backbone.config
    config.num_hidden_layers = layers
    if kinds:
        config.layer_types = [kinds[i] for i in kept]
    twin = Encoder(backbone, encoder.tokenizer, encoder.spec)
    if encoder.head is not None:
        twin.set_head(encoder.head.weight, encoder.head.bias)
    twin.eval()
    return twin


def _both_kinds(kept: tuple[int, ...], kinds: Sequence[str]) -> tuple[int, ...]:
    """Change the last layer for the nearest below of the other kind where ModernBERT's `kept` are of one kind only.

    transformers cannot open a configuration of layers that all look at the whole text.
    """
    if len({kinds[i] for i in kept}) == len(set(kinds)):
        return kept
    below = [i for i in range(kept[-1]) if kinds[i] != kinds[kept[-1]] and i not in kept]
    if len(kept) == 1 or not below:
        raise TrainError(
            f"layers = {len(kept)}: this architecture has layers of two kinds, and a student needs one of each",
            hint="layers = 2 or more",
        )
    return tuple(sorted((*kept[:-1], below[-1])))


def layers_of(backbone: nn.Module) -> nn.ModuleList:
    """Return the layers of a backbone, first to last.

    Raises:
        TrainError: they are not found.
    """
    return backbone.get_submodule(_place(backbone))


def _keep(backbone: nn.Module, kept: Sequence[int]) -> None:
    holder, _, name = _place(backbone).rpartition(".")
    layers = layers_of(backbone)
    setattr(backbone.get_submodule(holder), name, nn.ModuleList(layers[i] for i in kept))


def _place(backbone: nn.Module) -> str:
    most = int(backbone.config.num_hidden_layers)
    for name, module in backbone.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == most and name.endswith(("layer", "layers")):
            return str(name)
    raise TrainError(
        f"{backbone.config.model_type}: its {most} layers are not where they are looked for",
        hint="name another encoder as the student's base: recipe = { base = ... }",
    )


def with_head_of(student: Encoder, teacher: Encoder) -> Encoder:
    """Return `student` with the labels and the scale of `teacher`, and with its head where both are as wide."""
    labels = teacher.spec.labels
    assert labels is not None and teacher.head is not None, "the teacher of a classifier has a head"
    scale = teacher.spec.scale if student.spec.normalize else 1.0
    made = student.with_head(labels, multi_label=teacher.spec.multi_label, scale=scale)
    if student.spec.hidden == teacher.spec.hidden and student.spec.normalize == teacher.spec.normalize:
        made.set_head(teacher.head.weight, teacher.head.bias)
    return made


def check_smaller(student: Encoder, teacher: Encoder) -> None:
    """Refuse a student that computes as much for a text as its teacher; word tables, only looked up, do not count.

    Raises:
        TrainError: it is not smaller.
    """
    own, other = _computing(student), _computing(teacher)
    if own >= other:
        raise TrainError(
            f"the student has {own:,} weights in its layers and its teacher {other:,}: a student must be smaller",
            hint="fewer layers, or a narrower base: recipe = { layers = ..., base = ... }",
        )


def _computing(encoder: Encoder) -> int:
    table = encoder.backbone.get_input_embeddings().weight
    return sum(p.numel() for p in encoder.backbone.parameters() if p is not table)


def same_pieces(one: Tokenizer, other: Tokenizer) -> bool:
    """Tell whether each id stands for the same string in both; two vocabularies of one size may differ in all."""
    return dict(one.get_vocab(with_added_tokens=True)) == dict(other.get_vocab(with_added_tokens=True))


def read_alike(one: Encoder, other: Encoder, texts: Sequence[str]) -> bool:
    """Tell whether both read `texts` as the same ids, special tokens included; the maps of ids must agree too."""
    with torch.no_grad():
        return same_pieces(one.tokenizer, other.tokenizer) and one.tokenize(texts) == other.tokenize(texts)
