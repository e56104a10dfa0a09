"""Where a base model comes from: the catalogue, a local folder, or a Hub id. Safetensors only, never remote code."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alambic.errors import BaseModelError, nearest
from alambic.events import Work, drain
from alambic.model import hub
from alambic.model.bases_weights import PACKED, count_stored
from alambic.model.bases_weights import weight_files as weight_files  # part of this module's interface
from alambic.model.catalogue import (
    KINDS,
    SCRATCH,
    CatalogueEntry,
    Kind,
    catalogue,
    how_to_install,
    packaged,
    remotes,
    select,
)
from alambic.model.catalogue_size import DECODERS, ENCODERS, SEQ2SEQ

if TYPE_CHECKING:
    from alambic.task import BaseSpec

ARCHITECTURES = ENCODERS
_KINDS_OF: dict[Kind, tuple[str, ...]] = {"encoder": ENCODERS, "decoder": DECODERS, "seq2seq": SEQ2SEQ}
_TITLES: dict[Kind, str] = {"encoder": "an encoder", "decoder": "a decoder", "seq2seq": "an encoder-decoder"}
# These number positions from pad_token_id + 1, so they read that many tokens less than the table has rows.
_OFFSET_POSITIONS = ("camembert", "roberta", "xlm-roberta")
# Attention costs grow with the square of the length; a base that could read more is opened to it by base.max_tokens.
_DEFAULT_MAX_TOKENS = 512
_DEFAULT_MAX_TOKENS_WRITER = 4096
_CLASSIFIES: tuple[Kind, ...] = ("encoder",)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOKENIZER_FILES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "sentencepiece.bpe.model", "spm.model",
    "tokenizer.model", "spiece.model", "source.spm", "target.spm",
)  # fmt: skip
_OWN_FILES = (
    "config.json", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "generation_config.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
# An encoder's digest has never held these, and stages of a build are found again by it.
_ONLY_WRITERS = (
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "tokenizer.model", "spiece.model", "source.spm", "target.spm",
)  # fmt: skip


@dataclass(frozen=True)
class Base:
    """A base model that is on disk and checked.

    Attributes:
        name: catalogue name, folder or Hub id, as the task says it.
        folder: Hugging Face layout; what `Encoder.load` takes.
        digest: SHA-256 (hex) over weights, configuration and tokenizer.
        licence: as the base states it, or ``unknown``.
        source: ``package:...``, ``folder`` or ``hub:ID@REVISION``.
        pooling: ``mean`` or ``cls``; of an encoder.
        normalize: the base was made to give L2-normalised embeddings; of an encoder.
        max_tokens: longest input it reads here, special tokens included; of a generator, prompt and answer together.
        languages: as the base states them; may be empty.
        kind: encoder, decoder or seq2seq.
        architecture: `model_type` of its config.json.
        context_tokens: most tokens it was made for; None when its configuration sets no limit.
        parameters: counted in the headers of its weight files.
        has_template: it brings a chat template.
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
    kind: Kind = "encoder"
    architecture: str = "bert"
    context_tokens: int | None = None
    parameters: int = 0
    has_template: bool = False

    def to_dict(self) -> dict[str, str]:
        """Provenance for manifests: name, digest, licence, source."""
        return {"name": self.name, "digest": self.digest, "licence": self.licence, "source": self.source}


def resolve(
    spec: BaseSpec | str,
    *,
    offline: bool = False,
    root: Path | None = None,
    revision: str | None = None,
    kinds: Collection[Kind] = _CLASSIFIES,
) -> Base:
    """Find the base `spec` names and check it; a Hub id is downloaded unless it is already in the cache.

    Args:
        spec: a catalogue name, a local folder (relative to `root`), or a Hub id ``owner/name``.
        offline: never open a connection (HF_HUB_OFFLINE does the same).
        root: folder that relative paths start from; the current one by default.
        revision: commit, branch or tag of a Hub id, when `spec` is a string.
        kinds: what the task can use; ``scratch`` is refused here, `alambic.model.scratch` makes it.

    Raises:
        BaseModelError: it is not found, incomplete, damaged, holds pickled weights only, is of an unsupported
            architecture, or of another kind than `kinds`.
    """
    max_tokens = None
    if not isinstance(spec, str):
        revision, max_tokens, spec = spec.revision, spec.max_tokens, spec.name
    if spec == SCRATCH:
        raise _no_scratch(kinds)
    if spec in catalogue():
        return _known(catalogue()[spec], max_tokens=max_tokens, offline=offline, revision=revision, kinds=kinds)
    folder = (root or Path()) / Path(spec).expanduser()
    if folder.is_dir():
        return _read(spec, folder.resolve(), source="folder", max_tokens=max_tokens, kinds=kinds)
    if spec in remotes():
        raise BaseModelError(
            f"base {spec!r} is a remote model: it can be compared with, not trained or packed",
            hint=_fitting_names(kinds),
        )
    if _HUB_ID.fullmatch(spec) and not spec.startswith("."):
        folder, commit = fetched(spec, revision=revision, offline=offline)
        return _read(spec, folder, source=f"hub:{spec}@{commit}", max_tokens=max_tokens, kinds=kinds)
    raise BaseModelError(
        f"base {spec!r} is neither a known name, nor a folder, nor a Hub id (owner/name)",
        hint=nearest(spec, catalogue()),
    )


def fetched(
    hub_id: str, *, revision: str | None, offline: bool, sha256: Mapping[str, str] | None = None
) -> tuple[Path, str]:
    """Return folder and commit of `hub_id`, from the cache or else from the Hub.

    Raises:
        BaseModelError: it is not in the cache and cannot be fetched.
    """
    folder = hub.find_cached(hub_id, revision=revision)
    if folder is None:
        if offline or hub.offline():
            raise BaseModelError(
                f"base {hub_id!r} is not in the local cache and the Hub is switched off",
                hint="once online, run: alambic bases pull " + hub_id + "; or give a local folder as base.name",
            )
        folder = drain(hub.pull(hub_id, revision=revision, sha256=sha256)).folder
    return folder, folder.name


def pull(
    name: str, *, revision: str | None = None, files: Sequence[str] = (), sha256: Mapping[str, str] | None = None
) -> Work[hub.Pulled]:
    """Fetch the base `name` (a catalogue name or a Hub id) into the cache, and check that it can be used.

    Args:
        name: as in a task.
        revision: commit, branch or tag; the catalogue's own by default.
        files: patterns of names to fetch instead of all that a base needs; then nothing more is checked.
        sha256: expected SHA-256 (hex) by file name.

    Raises:
        BaseModelError: see `hub.pull`; or what was fetched is no base that alambic can use.
    """
    entry = catalogue().get(name)
    hub_id = name if entry is None else entry.hub
    if hub_id is None:
        assert entry is not None
        raise (
            _not_installed(entry)
            if packaged(entry) is None
            else BaseModelError(
                f"base {name!r} is installed already, with the package {str(entry.package).replace('_', '-')}"
            )
        )
    if entry is None and not _HUB_ID.fullmatch(name):
        here = name in remotes() or name == SCRATCH or Path(name).is_dir()
        raise BaseModelError(
            f"base {name!r} is no Hub id (owner/name)" + (", and nothing is to be fetched for it" if here else ""),
            hint=None if here else nearest(name, catalogue()),
        )
    expected = dict(sha256 or {})
    known = entry if entry is not None and revision in (None, entry.revision) else None
    if known is not None:
        revision = known.revision
        if known.sha256 and not files:
            expected.setdefault("model.safetensors", known.sha256)
    pulled = yield from hub.pull(hub_id, revision=revision, files=files, sha256=expected)
    if not files:
        _read(name, pulled.folder, source=f"hub:{hub_id}@{pulled.commit}", max_tokens=None, kinds=KINDS, known=known)
    return pulled


def kind_of(architecture: object) -> Kind | None:
    """Return the kind of a `model_type`, None when alambic cannot train it."""
    return next((kind for kind in KINDS if architecture in _KINDS_OF[kind]), None)


def _no_scratch(kinds: Collection[Kind]) -> BaseModelError:
    if "decoder" in kinds:
        return BaseModelError("base 'scratch' is made on the task's own text and has no files to find yet")
    return BaseModelError(
        "base 'scratch' is for tasks that write (generate, chat, extract): an encoder made from nothing "
        "classifies worse than a linear model on the same rows",
        hint=_fitting_names(kinds),
    )


def _known(
    entry: CatalogueEntry, *, max_tokens: int | None, offline: bool, revision: str | None, kinds: Collection[Kind]
) -> Base:
    if entry.kind not in kinds:
        raise _wrong_kind(f"base {entry.name!r}", entry.architecture, entry.kind, kinds)
    found = packaged(entry)
    if found is not None:
        folder, source = found, f"package:{entry.package}"
        if (folder / PACKED).is_file():
            from alambic.model.bases_packed import unpack_folder  # needs numpy; most bases do not

            folder = unpack_folder(folder, sha256=entry.sha256)
    elif entry.hub is None:
        raise _not_installed(entry)
    else:
        wanted = {"model.safetensors": entry.sha256} if entry.sha256 else None
        folder, commit = fetched(entry.hub, revision=revision or entry.revision, offline=offline, sha256=wanted)
        source = f"hub:{entry.hub}@{commit}"
    return _read(entry.name, folder, source=source, max_tokens=max_tokens or entry.max_tokens, kinds=kinds, known=entry)


def _read(
    name: str,
    folder: Path,
    *,
    source: str,
    max_tokens: int | None,
    kinds: Collection[Kind],
    known: CatalogueEntry | None = None,
) -> Base:
    weights = weight_files(folder)
    config = read_json(folder / "config.json")
    kind = _check_architecture(config, folder, kinds)
    hashes = {path.name: _sha256(path) for path in weights}
    if known is not None and known.sha256 is not None and hashes.get("model.safetensors") != known.sha256:
        raise _not_genuine(known, folder, hashes.get("model.safetensors"))
    if kind != "encoder":
        _check_tokenizer(folder)
    hashes |= {
        file: _sha256(folder / file)
        for file in (*_OWN_FILES, *_TOKENIZER_FILES)
        if (kind != "encoder" or file not in _ONLY_WRITERS) and (folder / file).is_file()
    }
    card = _card(folder)
    pooling, normalize = _pooling(folder) if kind == "encoder" else ("mean", False)
    return Base(
        name=name,
        folder=folder,
        digest=hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest(),
        licence=known.licence if known else str(card.get("license", "unknown")),
        source=source,
        pooling=pooling,
        normalize=normalize,
        max_tokens=_max_tokens(folder, config, kind, wanted=max_tokens),
        languages=known.languages if known else _languages(card),
        kind=kind,
        architecture=str(config["model_type"]),
        context_tokens=_context_tokens(config),
        parameters=count_stored(weights),
        has_template=_has_template(folder),
    )


def _not_installed(entry: CatalogueEntry) -> BaseModelError:
    package = str(entry.package).replace("_", "-")
    return BaseModelError(
        f"base {entry.name!r} comes with the package {package} and is nowhere to be fetched alone",
        hint=how_to_install(entry),
    )


def _not_genuine(known: CatalogueEntry, folder: Path, found: str | None) -> BaseModelError:
    again = f"pip install --force-reinstall {known.package.replace('_', '-')}" if known.package else (
        f"delete {folder} and run: alambic bases pull {known.name}"
    )  # fmt: skip
    return BaseModelError(
        f"{folder / 'model.safetensors'}: SHA-256 is {found}, the catalogue says {known.sha256} for {known.name!r}",
        hint=f"the file is damaged or not genuine: reinstall it ({again})",
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


def _check_architecture(config: dict[str, Any], folder: Path, kinds: Collection[Kind]) -> Kind:
    path, architecture = folder / "config.json", config.get("model_type")
    kind = kind_of(architecture)
    if kind is None:
        allowed = [name for known in KINDS if known in kinds for name in _KINDS_OF[known]]
        raise BaseModelError(
            f"{path}: model_type {architecture!r} is not {_titles(kinds)} that alambic can train",
            hint="allowed: " + ", ".join(allowed) + " (code that comes with a model is never run)",
        )
    if kind not in kinds:
        raise _wrong_kind(str(path), str(architecture), kind, kinds)
    if "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method", "a")
        raise BaseModelError(
            f"{path}: the weights are stored in {method} form, which can be neither trained nor packed",
            hint="take the release of the same model that is not quantised (bf16, fp16 or fp32)",
        )
    return kind


def _wrong_kind(where: str, architecture: str, kind: Kind, kinds: Collection[Kind]) -> BaseModelError:
    return BaseModelError(
        f"{where}: model_type {architecture!r} is {_TITLES[kind]}, and this task needs {_titles(kinds)}",
        hint=_fitting_names(kinds),
    )


def _titles(kinds: Collection[Kind]) -> str:
    return " or ".join(_TITLES[kind] for kind in KINDS if kind in kinds)


def _fitting_names(kinds: Collection[Kind]) -> str:
    """List a few bases that fit, smallest first, and how to see them all."""
    fitting = [entry for kind in KINDS if kind in kinds for entry in select(catalogue().values(), kind=kind)]
    names = [entry.name for entry in sorted(fitting, key=lambda entry: entry.parameters)]
    more = " ..." if len(names) > 6 else ""
    command = " or ".join(f"alambic bases --kind {kind}" for kind in KINDS if kind in kinds)
    return f"fits: {', '.join(names[:6])}{more} (all: {command})"


def _check_tokenizer(folder: Path) -> None:
    if any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return
    program = sorted(folder.glob("tokenization_*.py"))
    said = f": its tokenizer is a program ({program[0].name}), which is never run" if program else ""
    raise BaseModelError(
        f"{folder}: no tokenizer in this folder{said}",
        hint="put a tokenizer.json beside config.json (the tokenizers library writes one from any vocabulary)",
    )


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(read_json(path).get("chat_template"))


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


def _context_tokens(config: Mapping[str, Any]) -> int | None:
    """Return the most tokens a configuration provides for, None when it sets no limit."""
    text = config.get("text_config")
    config = text if isinstance(text, Mapping) else config
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if not isinstance(positions, int):
        return None
    if config.get("model_type") in _OFFSET_POSITIONS:
        positions -= int(config.get("pad_token_id", 1)) + 1
    return positions


def _max_tokens(folder: Path, config: dict[str, Any], kind: Kind, *, wanted: int | None) -> int:
    default = _DEFAULT_MAX_TOKENS if kind == "encoder" else _DEFAULT_MAX_TOKENS_WRITER
    positions = _context_tokens(config) or default
    if wanted is not None:
        if not 8 <= wanted <= positions:
            raise BaseModelError(f"base.max_tokens is {wanted}; {folder.name} allows 8 to {positions}")
        return wanted
    limits = [positions, default]
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
