"""Model -> a folder in sentence-transformers' layout, for people who go on working with the Hugging Face libraries.

`SentenceTransformer(folder).encode(texts)` gives the logits (for a bare encoder, the embeddings), and
`transformers.AutoModel.from_pretrained(folder)` the encoder. The labels are in config.json, in the order of the logits.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic import _extras
from alambic.model.encoder import Encoder
from alambic.pack import graph
from alambic.pack.scratch import whole_folder

_MODULE = "sentence_transformers.models."


def export(model: Path, out: Path) -> Path:
    """Write the Model directory `model` as a sentence-transformers folder `out`, and return `out`.

    Raises:
        PackError: `out` exists.
        WorkspaceError: `out` cannot be written.
    """
    encoder = Encoder.load(model)
    with whole_folder(out) as folder:
        Encoder(encoder.backbone, encoder.tokenizer, replace(encoder.spec, labels=None)).save(folder / "encoder")
        for file in (folder / "encoder").iterdir():
            if file.name != "alambic.json":
                file.rename(folder / file.name)
        (folder / "encoder" / "alambic.json").unlink()
        (folder / "encoder").rmdir()
        _write_modules(encoder, folder)
        if encoder.spec.labels is not None:
            _write_labels(encoder, folder)
        (folder / "README.md").write_text(_readme(encoder), encoding="utf-8")
    return out


def _write_modules(encoder: Encoder, folder: Path) -> None:
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    _write(folder / "sentence_bert_config.json", {"max_seq_length": encoder.spec.max_tokens, "do_lower_case": False})
    (folder / "1_Pooling").mkdir()
    mean = encoder.spec.pooling == "mean"
    pooling = {"word_embedding_dimension": encoder.spec.hidden, "pooling_mode_cls_token": not mean}
    pooling |= {"pooling_mode_mean_tokens": mean, "pooling_mode_max_tokens": False}
    _write(folder / "1_Pooling" / "config.json", pooling)
    if encoder.spec.normalize:
        modules.append(("2_Normalize", "Normalize"))
        (folder / "2_Normalize").mkdir()
    head = graph.head_of(encoder)
    if head is not None:
        name = f"{len(modules)}_Dense"
        modules.append((name, "Dense"))
        _write_dense(folder / name, *head)
    listing = [
        {"idx": i, "name": str(i), "path": path, "type": _MODULE + kind} for i, (path, kind) in enumerate(modules)
    ]
    _write(folder / "modules.json", listing)


def _write_dense(folder: Path, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> None:
    folder.mkdir()
    config = {"in_features": weight.shape[1], "out_features": weight.shape[0], "bias": True}
    # The identity: what comes out are logits.
    _write(folder / "config.json", {**config, "activation_function": "torch.nn.modules.linear.Identity"})
    content = _extras.load("safetensors.numpy").save({"linear.weight": weight, "linear.bias": bias})
    (folder / "model.safetensors").write_bytes(content)


def _write_labels(encoder: Encoder, folder: Path) -> None:
    labels = encoder.spec.labels or ()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["id2label"] = {str(i): label for i, label in enumerate(labels)}
    config["label2id"] = {label: i for i, label in enumerate(labels)}
    _write(folder / "config.json", config)


def _readme(encoder: Encoder) -> str:
    what = "embeddings" if encoder.spec.labels is None else "logits, in the order of `id2label` in config.json"
    rule = "a sigmoid over each, and 0.5" if encoder.spec.multi_label else "the largest"
    answer = "" if encoder.spec.labels is None else f"\nThe answer is {rule}.\n"
    licence = encoder.spec.base.get("licence", "unknown")
    return (
        f"---\nlibrary_name: sentence-transformers\nlicense: {licence}\n---\n\n"
        "```python\nfrom sentence_transformers import SentenceTransformer\n"
        'SentenceTransformer("this-folder").encode(["a text"])\n```\n\n'
        f"gives {what}. Texts over {encoder.spec.max_tokens} tokens are cut there, "
        f"whatever the task file said.\n{answer}"
    )


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
