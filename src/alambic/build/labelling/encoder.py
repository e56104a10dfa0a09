"""The encoder that annotation leans on: a base, packed once for this machine and kept in the user's cache."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alambic.bundle_cache import writable_cache
from alambic.data.annotations import text_id
from alambic.engines import TextReader, open_part
from alambic.events import Note, Work
from alambic.manifest import PartSpec
from alambic.model.bases import Base, resolve
from alambic.model.bases_default import AUTO, default_base
from alambic.task import BaseSpec

_FORM = "openvino-fp16"  # the reference: on any machine, and near enough to the fastest for texts read once


@dataclass(frozen=True)
class TextEncoder:
    """An open encoder, and the digest of what its vectors depend on."""

    name: str
    digest: str
    reader: TextReader

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the vectors [N, H] of `texts`."""
        return self.reader.run(texts)


def open_encoder(base: BaseSpec, texts: Sequence[str], *, root: Path, threads: int | None) -> Work[TextEncoder]:
    """Open the packed form of `base`, packing it the first time (some seconds); `auto` goes by the language of `texts`.

    Raises:
        BaseModelError: the base cannot be had.
        MissingExtra: packing needs the extra `[build]`.
    """
    if base.name == AUTO:
        default = default_base(texts)
        yield Note(default.reason, "warning" if default.missing else "info")
        base = base.model_copy(update={"name": default.name})
    found = resolve(base, root=root)
    part, folder = yield from _packed(found)
    return TextEncoder(found.name, found.digest, open_part(part, folder, long="windows", threads=threads))


def _packed(base: Base) -> Work[tuple[PartSpec, Path]]:
    cache = writable_cache("encoders")
    if cache is None:
        cache = Path(tempfile.mkdtemp(prefix="alambic-"))
        yield Note(f"no cache can be written: the base is packed into {cache} and will be packed again next time")
    home = cache / f"{base.digest[:16]}-{base.max_tokens}"
    record = home / "part.json"
    if not record.is_file():
        yield Note(f"packing {base.name} once for this machine")
        yield from _pack(base, home)
    spec = json.loads(record.read_text("utf-8"))
    return PartSpec(**spec), home / spec["folder"]


def _pack(base: Base, home: Path) -> Work[None]:
    from alambic.model.encoder import Encoder
    from alambic.pack import int8

    work = Path(tempfile.mkdtemp(prefix="packing-", dir=home.parent))
    try:
        Encoder.load(base).save(work / "model")
        part = yield from int8.pack_form(_FORM, work / "model", work / "encoder")
        shutil.rmtree(work / "model")
        (work / "part.json").write_text(json.dumps({**asdict(part), "folder": "encoder"}), "utf-8")
        shutil.rmtree(home, ignore_errors=True)
        work.rename(home)
    finally:
        shutil.rmtree(work, ignore_errors=True)


class VectorCache:
    """Vectors of texts by their ids, kept between runs; a cache that cannot be used costs time and no more."""

    def __init__(self, digest: str, name: str) -> None:
        folder = writable_cache("vectors")
        self._path = None if folder is None else folder / f"{digest[:16]}-{name}.npz"
        self._known: dict[str, NDArray[np.float32]] = {}
        if self._path is not None and self._path.is_file():
            try:
                with np.load(self._path, allow_pickle=False) as kept:
                    self._known = dict(zip(map(str, kept["ids"]), kept["vectors"], strict=True))
            except (OSError, ValueError, KeyError):
                self._known = {}

    def get(self, text: str) -> NDArray[np.float32] | None:
        """Return the vector of `text`, None when it is not known."""
        return self._known.get(text_id(text))

    def keep(self, texts: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """Write the vectors of all `texts`, in place of what was kept."""
        if self._path is None:
            return
        temporary = self._path.with_name(f".{self._path.name}.{np.random.default_rng().integers(1 << 32)}.npz")
        try:
            np.savez(temporary, ids=np.array([text_id(t) for t in texts]), vectors=vectors.astype(np.float32))
            temporary.replace(self._path)
        except OSError:
            temporary.unlink(missing_ok=True)
