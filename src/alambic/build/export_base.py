"""What `alambic export` does with a base: a name of the catalogue or a folder becomes another form, with its proof.

An encoder becomes an OpenVINO part (vectors of texts), ONNX, or a sentence-transformers folder; a model that writes
becomes GGUF, an OpenVINO folder, ONNX, or Hugging Face layout.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, get_args

from alambic import _extras
from alambic.errors import PackError
from alambic.events import Note, Work
from alambic.model.bases import Base, resolve
from alambic.model.catalogue import KINDS

_ENCODER_FORM = "openvino-fp16"


def export_base(name: str, form: str, out: Path, *, precision: str | None = None) -> Work[Path]:
    """Write the base `name` as `form` under `out`; what reads its tokens otherwise than training did is refused.

    Args:
        name: of the catalogue, or a folder.
        form: ``hf``, ``onnx``, ``openvino``, or of a decoder ``gguf``.
        out: folder to make; nothing is left there on failure.
        precision: of GGUF (Q8_0 when None) or of OpenVINO (int8 when None), for models that write.

    Raises:
        BaseModelError: the base is not on this machine or damaged.
        PackError: it has no such form, or the proof fails.
        WorkspaceError: `out` cannot be written.
    """
    base = resolve(name, offline=True, kinds=KINDS)
    if base.kind == "encoder":
        yield from _encoder(base, form, out, precision)
    elif form == "hf":
        from alambic.pack.writer_hf import export_hf

        export_hf(base.folder, out)
    elif form == "onnx":
        from alambic.pack.writer_onnx import export_onnx

        export_onnx(base.folder, out)
    else:
        yield from _proven(base, form, out, precision)
    return out


def _encoder(base: Base, form: str, out: Path, precision: str | None) -> Work[None]:
    if form == "gguf" or precision is not None:
        what = "form 'gguf'" if form == "gguf" else f"precision {precision!r} to choose"
        raise PackError(f"{base.name}: an encoder has no {what}", hint="--to openvino, onnx or hf")
    from alambic.model.encoder import Encoder
    from alambic.pack import hf, int8, onnx

    with tempfile.TemporaryDirectory(prefix="alambic-") as place:
        model = Path(place) / "model"
        Encoder.load(base).save(model)
        if form == "openvino":
            yield from int8.pack_form(_ENCODER_FORM, model, out)
        else:
            {"hf": hf.export, "onnx": onnx.export}[form](model, out)


def _proven(base: Base, form: str, out: Path, precision: str | None) -> Work[None]:
    """Pack a model that writes and prove it, llama.cpp's own tokenizer included where it is installed."""
    from alambic.pack.writer_proof import prove_writer

    others: dict[str, Any] = {}
    if form == "gguf":
        from alambic.pack import gguf
        from alambic.pack.gguf import check

        part = yield from gguf.pack(base.folder, out, form=precision or "Q8_0", name=base.name)  # type: ignore[arg-type]
        if _extras.available("xllamacpp"):
            others["llama.cpp"] = lambda texts: check.gguf_token_ids(out / gguf.FILE, texts)
        else:
            yield Note("not part of the proof: llama.cpp is not installed: pip install 'alambic[gguf]'")
    else:
        from alambic.pack.writer_openvino import Precision, pack_openvino

        if precision is not None and precision not in get_args(Precision):
            known = ", ".join(get_args(Precision))
            raise PackError(f"precision {precision!r} is not known to OpenVINO", hint=f"allowed: {known}")
        part = yield from pack_openvino(base.folder, out, precision=precision or "int8")  # type: ignore[arg-type]
    try:
        yield from prove_writer(base.folder, out, part, others=others)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
