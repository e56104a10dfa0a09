"""Tiny classifiers as OpenVINO and ONNX parts, and what they should answer, in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from alambic import _extras
from alambic.bundle import Bundle, Manifest, PartSpec, seal

LABELS = ("bill", "fault", "other")
WORDS = ["bill", "fault", "pump", "please", "my", "the", "is", "broken", "invoice", "wrong", "thanks", "leak"]
PAD, UNK, CLS, SEP = 0, 1, 2, 3
VOCABULARY = {"[PAD]": PAD, "[UNK]": UNK, "[CLS]": CLS, "[SEP]": SEP} | {w: i + 4 for i, w in enumerate(WORDS)}
RNG = np.random.default_rng(5)
TABLE = RNG.normal(size=(len(VOCABULARY), 8)).astype(np.float32)
WEIGHT = RNG.normal(size=(8, len(LABELS))).astype(np.float32)
PARAMS = {"output": "logits", "prefix_ids": [CLS], "suffix_ids": [SEP], "pad_id": PAD, "max_tokens": 8}
TEXTS = ["my pump is broken", "the invoice is wrong", "", "thanks", "unknown words here", "BILL  please", "fault " * 30]
Engines = ("openvino", "onnx")


def reference_ids(text: str) -> list[int]:
    return [CLS, *(VOCABULARY.get(word, UNK) for word in text.lower().split()), SEP]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference(text: str, *, room: int = 6) -> np.ndarray:
    """The slow way: equal windows, mean of their probabilities weighted by length."""
    body = reference_ids(text)[1:-1]
    n = max(1, -(-len(body) // room))
    windows = [[CLS, *body[len(body) * i // n : len(body) * (i + 1) // n], SEP] for i in range(n)]
    rows = np.stack([softmax(TABLE[window].mean(0) @ WEIGHT) for window in windows])
    return np.average(rows, axis=0, weights=[len(w) for w in windows])


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    # What some bases bake in; the engine must clear both.
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_openvino(folder: Path, *, head: bool, vectors: bool = False) -> None:
    ov = _extras.load("openvino")
    op = _extras.load("openvino.opset13")
    ids = op.parameter([-1, -1], np.int64, name="input_ids")
    mask = op.parameter([-1, -1], np.int64, name="attention_mask")
    for node, name in ((ids, "input_ids"), (mask, "attention_mask")):
        node.output(0).get_tensor().set_names({name})
    rows = op.gather(op.constant(TABLE), ids, op.constant(0))
    share = op.unsqueeze(op.convert(mask, "f32"), op.constant(2))
    total = op.reduce_sum(op.multiply(rows, share), op.constant(1))
    out = op.divide(total, op.reduce_sum(share, op.constant(1)))
    outs = [op.matmul(out, op.constant(WEIGHT), False, False)] if head else []
    outs += [out] if vectors or not head else []
    ov.save_model(ov.Model(outs, [ids, mask], "tiny"), str(folder / "model.xml"), compress_to_fp16=False)


def write_onnx(folder: Path, *, head: bool, vectors: bool = False) -> None:
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["maskf"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["maskf", "two"], ["share"]),
        helper.make_node("Mul", ["rows", "share"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "one"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["share", "one"], ["count"], keepdims=0),
        helper.make_node("Div", ["total", "count"], ["mean"]),
    ]
    if head:
        nodes.append(helper.make_node("MatMul", ["mean", "weight"], ["logits"]))
    names = [*(["logits"] if head else []), *(["mean"] if vectors or not head else [])]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(n, TensorProto.INT64, ["B", "T"]) for n in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", f"of {name}"]) for name in names],
        [
            numpy_helper.from_array(TABLE, "table"),
            numpy_helper.from_array(WEIGHT, "weight"),
            numpy_helper.from_array(np.array([2]), "two"),
            numpy_helper.from_array(np.array([1]), "one"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(folder / "model.onnx"))


def make(
    root: Path,
    engine: str,
    *,
    head: bool = True,
    vectors: bool = False,
    parts: tuple[PartSpec, ...] = (),
    **manifest: Any,
) -> Bundle:
    """Seal a bundle with the tiny model; `parts` come after it, their folders written by the caller."""
    folder = root / "encoder"
    folder.mkdir(parents=True)
    write_tokenizer(folder)
    (write_openvino if engine == "openvino" else write_onnx)(folder, head=head, vectors=vectors)
    params = PARAMS | {"output": "logits" if head else "embedding"} | ({"vectors": True} if vectors else {})
    first = PartSpec("encoder", engine, "encoder", params)
    values = {"alambic": "0.1.0", "name": "tiny", "created": "2026-01-01T00:00:00Z", "labels": LABELS}
    all_parts = (first, *parts)
    return seal(root, Manifest(**(values | {"entry": all_parts[-1].name, "parts": all_parts} | manifest)))
