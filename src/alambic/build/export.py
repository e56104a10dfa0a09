"""What `alambic export` does for forms that need the trained model, which stays in the run folder."""

from __future__ import annotations

import json
from pathlib import Path

from alambic.bundle import Bundle
from alambic.errors import BundleError
from alambic.pack import hf, onnx

_FORMS = {"hf": hf.export, "onnx": onnx.export}


def export_model(bundle: Bundle, form: str, out: Path, *, run: Path) -> Path:
    """Write the model that `bundle` was packed from as `form` (``hf`` or ``onnx``) under `out`.

    Raises:
        BundleError: the bundle holds no encoder, or its run folder does not hold the model it was made from.
    """
    manifest = bundle.manifest
    if manifest.base is None:
        raise BundleError(
            f"{bundle.source}: candidate {manifest.candidate!r} has no encoder to export",
            hint="its arrays are plain .npy files already; see docs/concepts/bundles.md",
        )
    model = model_of(bundle, run)
    _FORMS[form](model, out)
    return out


def model_of(bundle: Bundle, run: Path) -> Path:
    """Find the Model directory that `bundle` was packed from among the stages of `run`."""
    wanted = bundle.manifest.data["train"]["digest"]
    for stage in sorted((run / "stages").glob("finetune.all-*/stage.json")):
        record = json.loads(stage.read_text("utf-8"))
        if record["inputs"].get("train") == wanted:
            return stage.parent / "model"
    raise BundleError(
        f"{run}: the model that {bundle.source} was packed from is not there",
        hint="name the run folder with --run, or build again",
    )
