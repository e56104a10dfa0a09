"""What `alambic export` does for forms that need the trained model, which stays in the run folder.

A classifier becomes ONNX or a sentence-transformers folder. A model that writes becomes GGUF (with a Modelfile for
Ollama), ONNX, Hugging Face layout, or the OpenVINO folder that is in its bundle already.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from alambic.bundle import Bundle
from alambic.errors import BundleError, PackError
from alambic.events import Work


def export_model(bundle: Bundle, form: str, out: Path, *, run: Path, precision: str | None = None) -> Work[Path]:
    """Write the model that `bundle` was packed from as `form` under `out`.

    Args:
        bundle: an open bundle.
        form: ``hf``, ``onnx``, or of a model that writes also ``gguf`` and ``openvino``.
        out: folder to make.
        run: run folder that holds the model.
        precision: of a GGUF file: a form of `alambic.pack.gguf`, Q8_0 when None.

    Raises:
        BundleError: the bundle holds no encoder, or its run folder does not hold the model it was made from.
    """
    if bundle.manifest.writer is not None:
        done = yield from _export_writer(bundle, form, out, run=run, precision=precision)
        return done
    if form not in ("hf", "onnx"):
        raise BundleError(f"{bundle.source}: a classifier has no form {form!r}", hint="--to hf, --to onnx or --to file")
    manifest = bundle.manifest
    if manifest.base is None:
        raise BundleError(
            f"{bundle.source}: candidate {manifest.candidate!r} has no encoder to export",
            hint="its arrays are plain .npy files already; see docs/concepts/bundles.md",
        )
    if manifest.cascade is not None:
        raise BundleError(
            f"{bundle.source}: a cascade ({manifest.cascade.name}) is no single model to export",
            hint="--to file makes one file of the bundle; a build of one candidate alone can be exported",
        )
    model = model_of(bundle, run)
    from alambic.pack import hf, onnx

    {"hf": hf.export, "onnx": onnx.export}[form](model, out)
    return out


def _export_writer(bundle: Bundle, form: str, out: Path, *, run: Path, precision: str | None) -> Work[Path]:
    part = bundle.manifest.part(bundle.manifest.entry)
    if not part.engine.startswith("openvino"):
        raise BundleError(
            f"{bundle.source}: candidate {bundle.manifest.candidate!r} has no model that writes to export",
            hint="--to file makes one file of the bundle",
        )
    if form == "openvino":
        shutil.copytree(bundle.folder(part), out)
        for role in ("adapter", "draft"):  # in folders of their own beside the model's files
            name = getattr(bundle.manifest.writer, role)
            if name is not None:
                shutil.copytree(bundle.folder(bundle.manifest.part(name)), out / role)
        return out
    model = writer_model_of(bundle, run)
    if form == "hf":
        from alambic.pack.writer_hf import export_hf

        return export_hf(model, out)
    if form == "onnx":
        from alambic.pack.writer_onnx import export_onnx

        return export_onnx(model, out)
    if form != "gguf":
        raise PackError(f"form {form!r} is not known", hint="--to gguf, openvino, onnx, hf or file")
    from alambic.pack.gguf import pack

    system = bundle.manifest.writer.system if bundle.manifest.writer else None
    kind = precision or "Q8_0"
    yield from pack(model, out, form=kind, name=bundle.manifest.name, system=system)  # type: ignore[arg-type]
    return out


def writer_model_of(bundle: Bundle, run: Path) -> Path:
    """Find the Model directory that a bundle that writes was packed from: a training of `run`, or the base itself.

    Raises:
        BundleError: it is not in the run folder.
        BaseModelError: the base is not on this machine any more.
    """
    manifest = bundle.manifest
    if manifest.candidate == "base" and manifest.base is not None:
        from alambic.model.bases import resolve

        return resolve(str(manifest.base["name"]), offline=True, kinds=("decoder", "seq2seq")).folder
    wanted = manifest.data["train"]["digest"]
    found = []
    for stage in (run / "stages").glob("sft-*/stage.json"):
        record = json.loads(stage.read_text("utf-8"))
        if record["inputs"].get("train") == wanted:
            found.append(stage)
    if found:
        return max(found, key=lambda path: path.stat().st_mtime).parent / "model"
    raise BundleError(
        f"{run}: the model that {bundle.source} was packed from is not there",
        hint="name the run folder with --run, or build again",
    )


def model_of(bundle: Bundle, run: Path) -> Path:
    """Find the Model directory that `bundle` was packed from among the stages of `run`."""
    packed = _input_of(run, "final", "fit", seal=bundle.manifest.seal)
    model = _input_of(run, None, "model", key=packed) if packed is not None else None
    found = [] if model is None else sorted((run / "stages").glob(f"*-{model}/model"))
    if found:
        return found[0]
    raise BundleError(
        f"{run}: the model that {bundle.source} was packed from is not there",
        hint="name the run folder with --run, or build again",
    )


def _input_of(
    run: Path, name: str | None, wanted: str, *, seal: str | None = None, key: str | None = None
) -> str | None:
    """Return the input `wanted` of the stage of that name or key whose bundle has that seal; None where none is."""
    for path in sorted((run / "stages").glob(f"{name or '*'}-{key or '*'}/stage.json")):
        record = json.loads(path.read_text("utf-8"))
        if wanted in record["inputs"] and (seal is None or record["result"].get("seal") == seal):
            return str(record["inputs"][wanted])
    return None
