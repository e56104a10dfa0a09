"""Pack models as cached stages, in the form that is fastest on this machine.

Two engines run the same encoders; which one is faster depends on the processor (docs/concepts/engines.md), so the base
is packed for both and timed once, and every float form of the build uses the winner. The int8 form is chosen on the
first fold among both engines' forms, its drop measured on the rows that decide, and kept for the other folds and the
final fit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alambic.build.context import ENGINE_LIBRARIES, Context, Fitted, part_record, parts_of
from alambic.data.dataset import Dataset
from alambic.events import Work
from alambic.manifest import PartSpec
from alambic.workspace import Stage, StageSpec

# A form computed in bf16 must give the vectors of float32: least mean cosine, over this many texts.
_LEAST_LIKENESS, _COMPARED = 0.999, 200
_PACK_LIBRARIES = ("torch", "transformers", "nncf", "onnx", *ENGINE_LIBRARIES)


def pack_base(ctx: Context) -> Work[Fitted]:
    """Pack the frozen base for both engines and keep the faster: it serves the candidates on frozen vectors."""
    from alambic.model.encoder import Encoder
    from alambic.pack import int8

    assert ctx.base is not None
    base = ctx.base
    spec = StageSpec(
        "base",
        {"threads": ctx.threads, "max_tokens": base.max_tokens},
        {"base": base.digest, "rows": ctx.train.digest, "machine": ctx.machine_digest},
        version=2,
        libraries=_PACK_LIBRARIES,
    )

    def work(folder: Path) -> Work[dict[str, Any]]:
        Encoder.load(base).save(folder / "model")
        parts: dict[str, PartSpec] = {}
        for form in int8.suited(int8.FLOAT_FORMS):
            parts[form] = yield from int8.pack_once(form, folder / "model", folder, parts, (), _graphs(ctx))
        packed = {form: (part, int8.folder_of(form, folder)) for form, part in parts.items()}
        texts, seed = ctx.train.texts, ctx.task.seed
        likeness = int8.likeness(packed, texts[:_COMPARED], threads=ctx.threads)
        true = {form: packed[form] for form, share in likeness.items() if share >= _LEAST_LIKENESS}
        times = int8.time_forms(true, texts, threads=ctx.threads, repeats=60, seconds=2.0, seed=seed)
        best = min(times, key=lambda form: times[form])
        record = part_record(*packed[best], folder)
        return {"form": best, "p50_ms": times, "likeness": likeness, "parts": [record]}

    stage = yield from ctx.workspace.run(spec, work)
    return Fitted(
        parts_of(stage.result["parts"], stage.folder), stage.key, {"form": stage.result["form"]}, stage.result
    )


def pack_float(ctx: Context, model: Stage, *, tag: str) -> Work[Fitted]:
    """Pack the trained `model` in the float form that was fastest for its base."""
    base = yield from pack_base(ctx)
    packed = yield from _pack(ctx, model, str(base.refit["form"]), f"pack.{tag}", [])
    return packed


def pack_int8(
    ctx: Context, model: Stage, train: Dataset, dev: Dataset | None, *, form: str | None, tag: str
) -> Work[Fitted]:
    """Pack the trained `model` in 8 bits: in `form` when it is known, else in the form that measures best on `dev`."""
    from alambic.pack import int8

    if form is not None or dev is None:
        packed = yield from _pack(ctx, model, form or next(iter(int8.INT8_FORMS)), f"int8.{tag}", train.texts)
        return Fitted(packed.parts, packed.key, {"int8": form})
    spec = StageSpec(
        f"int8.{tag}",
        {"threads": ctx.threads, "long": ctx.task.data.long},
        {"model": model.key, "train": train.digest, "dev": dev.digest, "machine": ctx.machine_digest},
        version=4,
        libraries=_PACK_LIBRARIES,
    )

    def work(folder: Path) -> Work[dict[str, Any]]:
        options = int8.Options(
            long=ctx.task.data.long, threads=ctx.threads, repeats=60, cache=_graphs(ctx), seed=ctx.task.seed
        )
        choice = yield from int8.choose(
            model.folder / "model", folder / "encoder", dev, calibration=train.texts, options=options
        )
        return {"choice": choice.to_dict(), "parts": [part_record(choice.part, folder / "encoder", folder)]}

    stage = yield from ctx.workspace.run(spec, work)
    choice = stage.result["choice"]
    return Fitted(parts_of(stage.result["parts"], stage.folder), stage.key, {"int8": choice["form"]}, {"int8": choice})


def _pack(ctx: Context, model: Stage, form: str, name: str, texts: list[str]) -> Work[Fitted]:
    from alambic.pack import int8

    spec = StageSpec(name, {"form": form}, {"model": model.key}, version=2, libraries=_PACK_LIBRARIES)

    def work(folder: Path) -> Work[dict[str, Any]]:
        at = folder / "encoder"
        part = yield from int8.pack_form(form, model.folder / "model", at, calibration=texts, cache=_graphs(ctx))
        return {"parts": [part_record(part, at, folder)]}

    stage = yield from ctx.workspace.run(spec, work)
    return Fitted(parts_of(stage.result["parts"], stage.folder), stage.key)


def _graphs(ctx: Context) -> Path:
    """Where traced graphs are kept: the next model of the same architecture only fills in its weights."""
    return ctx.workspace.root / "graphs"
