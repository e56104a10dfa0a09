"""Model -> GGUF: one file for llama.cpp, Ollama and everything built on them.

    spec = drain(pack(model, out, form="Q8_0"))                     # a part folder for the engine `llamacpp`
    file = drain(write_gguf(model, Path("model.gguf"), form="F16"))  # the file alone

Tensors are read from safetensors, changed and written a few rows at a time, so memory stays low for any size. Nothing
of torch is needed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alambic._extras import load
from alambic.errors import PackError, WorkspaceError
from alambic.events import Finished, Note, Progress, Started, Work
from alambic.manifest import PartSpec
from alambic.pack.gguf import families, quantise
from alambic.pack.gguf.modelfile import modelfile
from alambic.pack.gguf.quantise import Form, Streamed
from alambic.pack.gguf.source import Source, Tensor
from alambic.pack.gguf.tokenizer import Vocabulary, adds_bos, special_ids, vocabulary
from alambic.pack.scratch import whole_folder

__all__ = ["Form", "GgufFile", "pack", "write_gguf"]

FILE = "model.gguf"


@dataclass(frozen=True)
class GgufFile:
    """What was written.

    Attributes:
        path: the file.
        form: number format of the large tensors.
        architecture: llama.cpp's name of the family.
        parameters: number of weights.
        bytes: size of the file.
        context_tokens: most tokens of prompt and answer together that it states.
        tokenizer: llama.cpp's tokenizer: its model and its pre-tokenizer.
        limits: what llama.cpp leaves out of the tokenizer.
    """

    path: Path
    form: str
    architecture: str
    parameters: int
    bytes: int
    context_tokens: int
    tokenizer: tuple[str, str]
    limits: tuple[str, ...] = ()


def pack(
    model: Path, out: Path, *, form: Form, name: str = "model", threads: int = 1, system: str | None = None
) -> Work[PartSpec]:
    """Write the part folder `out` for the engine `llamacpp`: model.gguf, tokenizer.json, template and Modelfile.

    Args:
        model: folder in Hugging Face layout.
        out: folder to make; nothing is left there on failure.
        form: number format of the large tensors.
        name: of the model, as its metadata state it.
        threads: of the quantiser of K-forms.
        system: system message of the Modelfile.

    Raises:
        PackError: the family, the tokenizer or the form cannot be written.
        BaseModelError: a file of the model is missing or damaged.
        WorkspaceError: `out` cannot be written.
    """
    quantise.check_form(form)
    source = Source.read(model)
    with whole_folder(out) as folder:
        file = yield from write_gguf(model, folder / FILE, form=form, name=name, threads=threads, source=source)
        (folder / "tokenizer.json").write_text(source.tokenizer.to_str(), encoding="utf-8")
        (folder / "chat_template.jinja").write_text(source.template.source, encoding="utf-8")
        text = modelfile(source.template, FILE, context_tokens=file.context_tokens, system=system)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
    params = {
        "architecture": source.kind,
        "parameters": file.parameters,
        "precision": form,
        "tokenizer": "tokenizer.json",
        "special": dict(source.template.special),
        "ends": list(source.template.ends),
        "end_ids": list(source.ends),
        "context_tokens": file.context_tokens,
        "properties": {},
    }
    return PartSpec("writer", "llamacpp", "writer", params)


def write_gguf(
    model: Path, out: Path, *, form: Form, name: str = "model", threads: int = 1, source: Source | None = None
) -> Work[GgufFile]:
    """Write one GGUF file: weights, tokenizer, chat template and everything that llama.cpp needs to know.

    Args:
        model: folder in Hugging Face layout.
        out: file to make; an existing one is refused, nothing is left there on failure.
        form: number format of the large tensors; vectors stay F32.
        name: of the model, as its metadata state it.
        threads: of the quantiser of K-forms.
        source: what `Source.read(model)` gave, where it is at hand.

    Raises:
        PackError: the family, the tokenizer or the form cannot be written, or `out` exists.
        BaseModelError: a file of the model is missing or damaged.
        WorkspaceError: `out` cannot be written.
    """
    quantise.check_form(form)
    if out.exists():
        raise PackError(f"{out}: exists already", hint="give another file, or remove it first")
    stage = f"pack.gguf.{form.lower()}"
    yield Started(stage)
    began = time.perf_counter()
    source = Source.read(model) if source is None else source
    words = vocabulary(source.tokenizer, rows=source.tensors["model.embed_tokens.weight"].shape[0])
    for limit in words.limits:
        yield Note(f"GGUF: {limit}; the engine llamacpp of alambic reads the model's own tokens all the same")
    beside, plain = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.plain")
    try:
        first = beside if form in quantise.OWN_FORMS else plain
        yield from _write(source, words, first, form=form, name=name, stage=stage)
        if first is plain:
            quantise.requantise(plain, beside, form, threads=threads)
        os.replace(beside, out)
    except OSError as error:
        raise WorkspaceError(
            f"{out}: cannot be written: {error.strerror or error}; nothing was left there",
            hint="free some space, or choose another folder",
        ) from error
    finally:
        beside.unlink(missing_ok=True)
        plain.unlink(missing_ok=True)
    yield Finished(stage, time.perf_counter() - began)
    family = families.family_of(source.kind)
    return GgufFile(
        path=out,
        form=form,
        architecture=family.architecture,
        parameters=sum(int(np.prod(tensor.shape)) for tensor in source.tensors.values()),
        bytes=out.stat().st_size,
        context_tokens=_metadata(source)["context_length"],
        tokenizer=(words.model, words.pre),
        limits=words.limits,
    )


def _write(source: Source, words: Vocabulary, path: Path, *, form: str, name: str, stage: str) -> Work[None]:
    gguf = load("gguf")
    family = families.family_of(source.kind)
    writer = gguf.GGUFWriter(path, family.architecture)
    try:
        writer.add_type("model")
        writer.add_name(name)
        if source.licence:
            writer.add_license(source.licence)
        writer.add_file_type(quantise.file_type(form))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in _metadata(source).items():
            _add(writer, f"{family.architecture}.{key}", value)
        _add_tokenizer(writer, source, words)
        stored = list(_stored(source, form if form in quantise.OWN_FORMS else "F32"))
        for new, shape, kind, content in stored:
            writer.add_tensor_info(new, shape, np.dtype(np.float32), content.nbytes, gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, (_, _, _, content) in enumerate(stored):
            writer.write_tensor_data(content)
            yield Progress(stage, done + 1, len(stored))
    finally:
        writer.close()


def _metadata(source: Source) -> dict[str, Any]:
    rows = source.tensors["model.embed_tokens.weight"].shape[0]
    config = {**source.config, "vocab_size": rows}
    return families.metadata(families.family_of(source.kind), config, context_tokens=source.context_tokens)


def _add(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds[type(value)](key, value)


def _add_tokenizer(writer: Any, source: Source, words: Vocabulary) -> None:
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.scores:
        writer.add_token_scores(words.scores)
    if words.merges:
        writer.add_token_merges(words.merges)
    if words.charsmap:
        writer.add_precompiled_charsmap(words.charsmap)
    if words.model == "t5":
        writer.add_remove_extra_whitespaces(words.remove_extra_whitespaces)
    writer.add_add_space_prefix(words.add_space_prefix)
    writer.add_add_bos_token(adds_bos(source.template, source.tokenizer))
    writer.add_add_eos_token(False)
    for key, number in special_ids(source.template, source.tokenizer, source.ends).items():
        getattr(writer, f"add_{key}_token_id")(number)
    writer.add_chat_template(source.template.source)


def _stored(source: Source, form: str) -> Iterator[tuple[str, tuple[int, ...], str, Streamed]]:
    """Give `(name, shape, form, content)` of each tensor as it is stored."""
    gguf = load("gguf")
    family = families.family_of(source.kind)
    architecture = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == family.architecture)
    names = gguf.get_tensor_name_map(architecture, int(source.config["num_hidden_layers"]))
    factors = families.rope_factors(source.config)
    if factors is not None:
        yield "rope_freqs.weight", factors.shape, "F32", quantise.stored(factors.shape, "F32", _rows_of(factors))
    for tensor in source.tensors.values():
        new = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise PackError(
                f"{source.folder}: tensor {tensor.name!r} has no name in GGUF for {family.architecture}",
                hint="is it a model of this family, unchanged?",
            )
        kind = quantise.tensor_form(new, tensor.shape, form, tied=source.tied)
        rows = _changed(tensor, family, source)
        yield new, tensor.shape, kind, quantise.stored(tensor.shape, kind, rows)


def _changed(tensor: Tensor, family: families.Family, source: Source) -> Any:
    """Return what reads the rows of `tensor` as llama.cpp wants them."""
    if ".q_proj." not in tensor.name and ".k_proj." not in tensor.name:  # no other transform moves rows
        return lambda start, stop: family.transform(tensor.name, tensor.rows(start, stop), source.config)

    def rows(start: int, stop: int) -> NDArray[np.float32]:
        return family.transform(tensor.name, tensor.rows(0, tensor.shape[0]), source.config)[start:stop]

    return rows


def _rows_of(values: NDArray[np.float32]) -> Any:
    return lambda start, stop: values[start:stop]
