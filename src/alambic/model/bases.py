"""Where a base model comes from: the catalogue, a local folder, or a Hub id. Safetensors only, never remote code."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alambic._extras import load as load_extra
from alambic.errors import BaseModelError, nearest

if TYPE_CHECKING:
    from alambic.task import BaseSpec

# `model_type` of config.json: encoders whose forward takes ids and a mask and returns the last hidden states.
ARCHITECTURES = ("bert", "camembert", "deberta-v2", "distilbert", "modernbert", "roberta", "xlm-roberta")
# These number positions from pad_token_id + 1, so they read that many tokens less than the table has rows.
_OFFSET_POSITIONS = ("camembert", "roberta", "xlm-roberta")
# Attention costs grow with the square of the length; a base that could read more is opened to it by base.max_tokens.
_DEFAULT_MAX_TOKENS = 512
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.md", "1_Pooling/config.json"]
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "sentencepiece.bpe.model", "spm.model")
_OWN_FILES = ("config.json", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json", *_TOKENIZER_FILES)


@dataclass(frozen=True)
class Base:
    """A base model that is on disk and checked.

    Attributes:
        name: catalogue name, folder or Hub id, as the task says it.
        folder: Hugging Face layout; what `Encoder.load` takes.
        digest: SHA-256 (hex) over weights, configuration and tokenizer.
        licence: as the base states it, or ``unknown``.
        source: ``package:...``, ``folder`` or ``hub:ID@REVISION``.
        pooling: ``mean`` or ``cls``.
        normalize: the base was made to give L2-normalised embeddings.
        max_tokens: longest input it reads, special tokens included.
        languages: as the base states them; may be empty.
    """

    name: str
    folder: Path
    digest: str
    licence: str
    source: str
    pooling: str
    normalize: bool
    max_tokens: int
    languages: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, str]:
        """Provenance for manifests: name, digest, licence, source."""
        return {"name": self.name, "digest": self.digest, "licence": self.licence, "source": self.source}


@dataclass(frozen=True)
class CatalogueEntry:
    """One line of bases.toml."""

    name: str
    package: str
    folder: str
    hub: str
    sha256: str
    licence: str
    languages: tuple[str, ...]
    max_tokens: int
    summary: str


@cache
def catalogue() -> dict[str, CatalogueEntry]:
    """Return the known bases by name."""
    text = Path(__file__).with_name("bases.toml").read_text(encoding="utf-8")
    rows = tomllib.loads(text)["base"]
    return {row["name"]: CatalogueEntry(**{**row, "languages": tuple(row["languages"])}) for row in rows}


def resolve(
    spec: BaseSpec | str, *, offline: bool = False, root: Path | None = None, revision: str | None = None
) -> Base:
    """Find the base `spec` names and check it; a Hub id is downloaded unless it is already in the cache.

    Args:
        spec: a catalogue name, a local folder (relative to `root`), or a Hub id ``owner/name``.
        offline: never open a connection (HF_HUB_OFFLINE does the same).
        root: folder that relative paths start from; the current one by default.
        revision: commit, branch or tag of a Hub id, when `spec` is a string.

    Raises:
        BaseModelError: it is not found, damaged, holds pickled weights only, or is of an unsupported kind.
    """
    max_tokens = None
    if not isinstance(spec, str):
        revision, max_tokens, spec = spec.revision, spec.max_tokens, spec.name
    if spec in catalogue():
        return _known(catalogue()[spec], max_tokens=max_tokens, offline=offline)
    folder = (root or Path()) / Path(spec).expanduser()
    if folder.is_dir():
        return _read(spec, folder.resolve(), source="folder", max_tokens=max_tokens)
    if _HUB_ID.fullmatch(spec) and not spec.startswith("."):
        folder, commit = _download(spec, revision=revision, offline=offline)
        return _read(spec, folder, source=f"hub:{spec}@{commit}", max_tokens=max_tokens)
    raise BaseModelError(
        f"base {spec!r} is neither a known name, nor a folder, nor a Hub id (owner/name)",
        hint=nearest(spec, catalogue()),
    )


def _known(entry: CatalogueEntry, *, max_tokens: int | None, offline: bool) -> Base:
    found = importlib.util.find_spec(entry.package)  # finds a top-level package without running it
    if found is not None and found.submodule_search_locations:
        folder, source = Path(found.submodule_search_locations[0]) / entry.folder, f"package:{entry.package}"
    else:
        folder, commit = _download(entry.hub, revision=None, offline=offline)
        source = f"hub:{entry.hub}@{commit}"
    base = _read(entry.name, folder, source=source, max_tokens=max_tokens or entry.max_tokens, known=entry)
    return base


def _read(name: str, folder: Path, *, source: str, max_tokens: int | None, known: CatalogueEntry | None = None) -> Base:
    weights = weight_files(folder)
    config = read_json(folder / "config.json")
    _check_architecture(config, folder)
    hashes = {path.name: _sha256(path) for path in weights}
    if known is not None and hashes.get("model.safetensors") != known.sha256:
        raise BaseModelError(
            f"{folder / 'model.safetensors'}: SHA-256 is {hashes.get('model.safetensors')}, "
            f"the catalogue says {known.sha256} for {known.name!r}",
            hint=f"the file is damaged or not genuine: reinstall it (pip install --force-reinstall "
            f"{known.package.replace('_', '-')})",
        )
    hashes |= {f: _sha256(folder / f) for f in _OWN_FILES if (folder / f).is_file()}
    card = _card(folder)
    pooling, normalize = _pooling(folder)
    return Base(
        name=name,
        folder=folder,
        digest=hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest(),
        licence=known.licence if known else str(card.get("license", "unknown")),
        source=source,
        pooling=pooling,
        normalize=normalize,
        max_tokens=_max_tokens(folder, config, wanted=max_tokens),
        languages=known.languages if known else _languages(card),
    )


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of `folder`.

    Raises:
        BaseModelError: there are none; pickled ones are refused because opening them can run code.
    """
    weights = sorted(folder.glob("model*.safetensors"))
    if weights:
        return weights
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.ckpt")])
    if pickled:
        raise BaseModelError(
            f"{folder}: the weights are pickled ({pickled[0].name}), and opening a pickle can run any code",
            hint="where you trust that file, convert it once with transformers: "
            "AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), and copy the tokenizer files along",
        )
    raise BaseModelError(
        f"{folder}: no model.safetensors in this folder", hint="give the folder that holds config.json"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a base or of a model.

    Raises:
        BaseModelError: the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise BaseModelError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _check_architecture(config: dict[str, Any], folder: Path) -> None:
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise BaseModelError(
            f"{folder / 'config.json'}: model_type {kind!r} is not an encoder that alambic can train",
            hint="allowed: " + ", ".join(ARCHITECTURES) + " (code that comes with a model is never run)",
        )


def _pooling(folder: Path) -> tuple[str, bool]:
    """Read sentence-transformers' files; a plain encoder gets the mean, unnormalised."""
    pooling, normalize = "mean", False
    if (folder / "1_Pooling" / "config.json").is_file():
        modes = read_json(folder / "1_Pooling" / "config.json")
        if modes.get("pooling_mode_cls_token") or modes.get("pooling_mode") == "cls":
            pooling = "cls"
        elif not (modes.get("pooling_mode_mean_tokens", True) or modes.get("pooling_mode") == "mean"):
            raise BaseModelError(f"{folder / '1_Pooling/config.json'}: only mean and cls pooling are supported")
    if (folder / "modules.json").is_file():
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        normalize = any(str(module.get("type", "")).endswith("Normalize") for module in modules)
    return pooling, normalize


def _max_tokens(folder: Path, config: dict[str, Any], *, wanted: int | None) -> int:
    positions = int(config.get("max_position_embeddings", _DEFAULT_MAX_TOKENS))
    if config["model_type"] in _OFFSET_POSITIONS:
        positions -= int(config.get("pad_token_id", 1)) + 1
    if wanted is not None:
        if not 8 <= wanted <= positions:
            raise BaseModelError(f"base.max_tokens is {wanted}; {folder.name} allows 8 to {positions}")
        return wanted
    limits = [positions, _DEFAULT_MAX_TOKENS]
    if (folder / "sentence_bert_config.json").is_file():
        stated = read_json(folder / "sentence_bert_config.json").get("max_seq_length")
        limits += [int(stated)] if stated else []
    return min(limits)


def _card(folder: Path) -> dict[str, str]:
    """Read the flat `key: value` lines of a README's front matter; enough for licence and language."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    if not text.startswith("---"):
        return {}
    front = text[3:].partition("\n---")[0]
    values: dict[str, str] = {}
    key = ""
    for line in front.splitlines():
        if found := re.match(r"(\w+):\s*(.*)", line):
            key = found[1]
            values[key] = found[2].strip()
        elif key and (item := re.match(r"\s*-\s+(\S+)$", line)):
            values[key] = f"{values[key]} {item[1]}".strip()
    return values


def _languages(card: dict[str, str]) -> tuple[str, ...]:
    return tuple(re.findall(r"[A-Za-z-]+", card.get("language", "")))


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BaseModelError(f"{path}: cannot be read ({error.strerror})") from error


def _download(hub_id: str, *, revision: str | None, offline: bool) -> tuple[Path, str]:
    hub = load_extra("huggingface_hub")
    hub_errors = load_extra("huggingface_hub.errors")
    offline = offline or bool(load_extra("huggingface_hub.constants").HF_HUB_OFFLINE)
    try:
        with _no_bars(load_extra("huggingface_hub.utils")):
            path = hub.snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_FILES, local_files_only=offline)
    except hub_errors.LocalEntryNotFoundError as error:
        raise BaseModelError(
            f"base {hub_id!r} is not in the local cache" + (" and the Hub is switched off" if offline else
            " and the Hub cannot be reached"),
            hint="once online, run: alambic bases pull " + hub_id + "; or give a local folder as base.name",
        ) from error  # fmt: skip
    except (hub_errors.HfHubHTTPError, hub_errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseModelError(
            f"base {hub_id!r} cannot be downloaded: {reason}",
            hint="check the name, and HF_TOKEN if it is gated; or give a local folder as base.name",
        ) from error
    folder = Path(path)
    return folder, folder.name


@contextmanager
def _no_bars(utils: Any) -> Iterator[None]:
    """Keep the Hub client from drawing progress bars; the library never prints."""
    shown = not utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            utils.enable_progress_bars()
