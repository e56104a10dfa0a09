"""Decoder: a causal language model, its tokenizer, its chat template and its end tokens. Saved in Hugging Face layout.

    decoder = Decoder.load(Path("qwen2.5-0.5b"))
    ids, learnt = decoder.labelled(chat)      # what to train on, and which ids the assistant says
    prompt = decoder.prompt_ids(chat.prompt)  # what an engine is asked with

Weights are read from safetensors only, and code that comes with a base is never run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn

from alambic import render
from alambic.errors import BaseModelError
from alambic.kinds.chat import Chat
from alambic.model.bases import read_json, weight_files
from alambic.model.encoder import _quiet as quiet
from alambic.model.folder import whole_model
from alambic.model.tokenizer import SPIECE, read_tokenizer
from alambic.render import PLAIN_TEMPLATE, ChatTemplate

FORMAT = 1


@dataclass(frozen=True)
class Family:
    """What differs between the kinds of causal models.

    Attributes:
        head: attribute path of the output matrix.
        body: attribute path of what gives the last hidden states.
    """

    head: str = "lm_head"
    body: str = "model"


# `model_type` of config.json. Mistral3 is a picture model around ministral3 (or mistral): its text part is taken.
FAMILIES: dict[str, Family] = {
    "gemma2": Family(),
    "llama": Family(),
    "ministral3": Family(),
    "mistral": Family(),
    "phi": Family(),
    "qwen2": Family(),
    "stablelm": Family(),
    "starcoder2": Family(),
}
_WRAPPERS = {"mistral3": ("language_model.model.", "model.language_model.")}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class DecoderSpec:
    """What alambic.json says.

    Attributes:
        architecture: `model_type` of config.json.
        context_tokens: most tokens of prompt and answer together.
        parameters: number of weights, tied ones once.
        base: name, digest, licence and source of the base.
    """

    architecture: str
    context_tokens: int
    parameters: int
    base: dict[str, str] = field(default_factory=dict)


class Decoder:
    """A causal model with everything that turns conversations into its ids and back."""

    def __init__(
        self, model: nn.Module, tokenizer: Tokenizer, template: ChatTemplate, spec: DecoderSpec, *, ends: Sequence[int]
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.spec = spec
        self.ends = tuple(ends)
        self.extra_files: tuple[Path, ...] = ()

    @classmethod
    def load(
        cls, folder: Path, *, dtype: torch.dtype | None = None, attention: str = "sdpa", quantization: Any = None
    ) -> Decoder:
        """Open a causal model in Hugging Face layout (a base, or what `save` wrote).

        Args:
            folder: with config.json, safetensors and a tokenizer.
            dtype: of the weights in memory; as stored when None.
            attention: of transformers: ``sdpa`` or ``eager`` (Gemma 2 is always read with ``eager``: the other leaves
                its logit cap out).
            quantization: of transformers, for weights that are rounded as they are read (QLoRA); None rounds nothing.

        Raises:
            BaseModelError: a file is missing or damaged, the weights are pickled or do not fit, the kind is unknown.
            TemplateError: the chat template does not parse.
        """
        config = read_json(folder / "config.json")
        kind, wrapper = check_kind(config, folder)
        check_weights(folder)
        tokenizer = read_tokenizer(folder)
        model = _load_model(folder, kind, dtype=dtype, attention="eager" if kind == "gemma2" else attention,
                            wrapper=wrapper, quantization=quantization)  # fmt: skip
        special = _special(folder, model, tokenizer)
        _check_vocabulary(folder, model, tokenizer)
        template = render.read_template(folder)
        if template is None:
            if "eos_token" not in special:
                raise BaseModelError(
                    f"{folder}: neither a chat template nor an end token (eos_token) is stated",
                    hint="name eos_token in tokenizer_config.json, or eos_token_id in config.json",
                )
            template = render.checked(ChatTemplate(PLAIN_TEMPLATE, special))
        template = replace(template, special={**special, **template.special})
        ends = _ends(folder, model, tokenizer, template)
        texts = tuple(text for text in (tokenizer.id_to_token(i) for i in ends) if text)
        decoder = cls(model, tokenizer, replace(template, ends=texts), _read_spec(folder, kind, model), ends=ends)
        decoder.extra_files = tuple(p for name in SPIECE if (p := folder / name).is_file())
        return decoder

    def save(self, folder: Path, *, dtype: torch.dtype | None = None) -> None:
        """Write Hugging Face layout: beside first, then moved into place, so `folder` is never half-written.

        Args:
            folder: an existing one is replaced.
            dtype: of the written weights; as in memory when None.
        """
        generation = transformers.GenerationConfig(
            bos_token_id=self.model.config.bos_token_id, eos_token_id=list(self.ends), do_sample=False,
            pad_token_id=self.pad_id,
        )  # fmt: skip
        with saved_model(self.model, folder, self.spec, of="decoder", generation=generation, dtype=dtype) as beside:
            save_tokenizer(self.tokenizer, beside, self._tokenizer_config(), copies=self.extra_files)
            (beside / "chat_template.jinja").write_text(self.template.source, encoding="utf-8")

    @property
    def architecture(self) -> str:
        """`model_type` of the text part."""
        return self.spec.architecture

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.spec.context_tokens

    @property
    def pad_id(self) -> int:
        """Id that fills up a batch; masked out, so any valid id does when the base names none."""
        text = self.template.special.get("pad_token")
        found = self.tokenizer.token_to_id(text) if text else self.model.config.pad_token_id
        return int(self.ends[0] if found is None else found)

    @property
    def body(self) -> nn.Module:
        """What gives the last hidden states [B, T, H]."""
        return self.model.get_submodule(FAMILIES[self.architecture].body)

    @property
    def head(self) -> nn.Linear:
        """The output matrix [V, H]."""
        return self.model.get_submodule(FAMILIES[self.architecture].head)

    @property
    def logit_cap(self) -> float | None:
        """Logits are `cap * tanh(logits / cap)` (Gemma 2); None: as they are."""
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return None if cap is None else float(cap)

    def tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of `text` and their [start, stop) in it, without adding special tokens.

        Special tokens written in `text` are read as such: a template writes them.
        """
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def labelled(self, chat: Chat) -> tuple[list[int], list[bool]]:
        """Return the ids of a whole conversation and which of them the assistant says, end tokens included.

        Raises:
            TemplateError: the template refuses the conversation, or rewrites earlier turns.
        """
        return render.labelled(self.template, chat, self.tokenize)

    def prompt_ids(self, chat: Chat) -> list[int]:
        """Return the ids of a conversation up to where the assistant begins to speak: what an engine reads."""
        return self.tokenize(self.template.render(chat, reply=True))[0]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of `ids`."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def turn_end(self) -> int | None:
        """Return the id that the template writes after what the assistant says; None: it writes none.

        A model trained on a template without one never learns to stop.
        """
        said = "alambic"
        text = self.template.render(Chat.of("a", completion=said))
        ids, offsets = self.tokenize(text)
        after = text.rfind(said) + len(said)
        following = [i for i, (start, _) in zip(ids, offsets, strict=True) if start >= after]
        return next((i for i in following if i in self.ends), None)

    def greedy(self, ids: Sequence[int], *, max_tokens: int) -> list[int]:
        """Return the likeliest next tokens one by one, up to and with an end token: the reference of every engine."""
        device = next(self.model.parameters()).device
        step = torch.tensor([list(ids)], device=device)
        written: list[int] = []
        cache = None
        while len(written) < max_tokens:
            with torch.inference_mode():
                out = self.model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            written.append(int(out.logits[0, -1].argmax()))
            if written[-1] in self.ends:
                break
            step = torch.tensor([written[-1:]], device=device)
        return written

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Return the logits [T, V] after each of `ids`, in float32."""
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            return self.model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0].float()

    def _tokenizer_config(self) -> dict[str, Any]:
        # Of an ordinary piece such as a literal <unk>, transformers would make a special token.
        added = {token.content for token in self.tokenizer.get_added_tokens_decoder().values()}
        special = {k: v for k, v in self.template.special.items() if v in added}
        special.setdefault("pad_token", self.tokenizer.id_to_token(self.pad_id))
        if (end := self.turn_end()) is not None:
            special["eos_token"] = self.tokenizer.id_to_token(end)  # what other tools stop at when they know one only
        # The template writes the first token itself where the model has one (`add_bos_token` would double it).
        return {**special, "add_bos_token": False, "add_eos_token": False, "model_max_length": self.context_tokens}


def check_kind(config: dict[str, Any], folder: Path) -> tuple[str, str | None]:
    """Return `model_type` of the text part, and of the model around it when there is one.

    Raises:
        BaseModelError: it is not one of ours.
    """
    kind = config.get("model_type")
    wrapper = kind if kind in _WRAPPERS else None
    if wrapper is not None:
        kind = (config.get("text_config") or {}).get("model_type", "mistral")
    if kind not in FAMILIES:
        raise BaseModelError(
            f"{folder / 'config.json'}: model_type {kind!r} is not a causal model that alambic can train",
            hint="allowed: " + ", ".join([*FAMILIES, *_WRAPPERS]) + " (code that comes with a model is never run)",
        )
    return kind, wrapper


def check_weights(folder: Path) -> None:
    """Refuse a folder without whole safetensors, naming the shards that are missing.

    Raises:
        BaseModelError: no weights, pickled ones only, or an index that names absent files.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set((read_json(index).get("weight_map") or {}).values())
        missing = sorted(name for name in named if not (folder / name).is_file())
        if missing:
            raise BaseModelError(
                f"{folder}: {len(missing)} of {len(named)} weight files are missing: {', '.join(missing)}",
                hint="download them again (alambic bases pull NAME goes on where it stopped)",
            )
    weight_files(folder)


@contextmanager
def saved_model(
    model: nn.Module,
    folder: Path,
    spec: DecoderSpec,
    *,
    of: Literal["decoder", "seq2seq"],
    generation: transformers.GenerationConfig,
    dtype: torch.dtype | None,
) -> Iterator[Path]:
    """Write what every model that writes has (weights, settings of generation, alambic.json) as `folder`, whole.

    The block writes the rest, its tokenizer, into the folder that it is given.
    """
    with whole_model(folder) as beside:
        save_weights(model, beside, dtype=dtype)
        generation.save_pretrained(beside)
        save_spec(beside, asdict(spec), of=of)
        yield beside


def save_spec(folder: Path, spec: Mapping[str, Any], *, of: Literal["decoder", "seq2seq"]) -> None:
    """Write alambic.json, with the fields of `DecoderSpec`."""
    whole = {"format": FORMAT, "type": of, **spec}
    (folder / "alambic.json").write_text(json.dumps(whole, ensure_ascii=False, indent=1), encoding="utf-8")


def save_weights(model: nn.Module, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write config.json and safetensors of `model`, converted to `dtype` one weight at a time."""
    config = model.config
    written = next(model.parameters()).dtype if dtype is None else dtype
    attention, config._attn_implementation = config._attn_implementation, "sdpa"
    before, config.dtype = config.dtype, written
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - dict(model.named_parameters()).keys()
    state = {
        name: tensor.detach().to("cpu", written if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    try:
        with quiet():
            model.save_pretrained(folder, state_dict=state, max_shard_size="4GB")
    finally:
        config._attn_implementation, config.dtype = attention, before
    # `save_pretrained` states the type in memory, whatever was written.
    path = folder / "config.json"
    stated = json.loads(path.read_text(encoding="utf-8"))
    stated["dtype"] = str(written).removeprefix("torch.")
    path.write_text(json.dumps(stated, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # save_file makes files that only their owner can read


def save_tokenizer(tokenizer: Tokenizer, folder: Path, config: dict[str, Any], *, copies: Sequence[Path] = ()) -> None:
    """Write tokenizer.json and tokenizer_config.json so that transformers reads the first as it is."""
    tokenizer.save(str(folder / "tokenizer.json"))
    whole = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
             "model_input_names": ["input_ids", "attention_mask"], **config}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(whole, ensure_ascii=False, indent=1), encoding="utf-8")
    for path in copies:
        shutil.copyfile(path, folder / path.name)


def _load_model(
    folder: Path, kind: str, *, dtype: torch.dtype | None, attention: str, wrapper: str | None, quantization: Any = None
) -> nn.Module:
    options: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype, "attn_implementation": attention}
    if quantization is not None:
        options["quantization_config"] = quantization
    if wrapper is not None:
        text = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False).text_config
        options |= {"config": text, "key_mapping": {f"^{prefix}": "model." for prefix in _WRAPPERS[wrapper]}}
        options["key_mapping"] |= {"^language_model.lm_head": "lm_head"}
    return load_weights(transformers.AutoModelForCausalLM, folder, **options)


def load_weights(kind: Any, folder: Path, **options: Any) -> nn.Module:
    """Read config.json and safetensors by transformers' class `kind`; code that comes with them is never run.

    Raises:
        BaseModelError: they are damaged, or weights are missing.
    """
    try:
        with quiet():
            model, info = kind.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True,
                output_loading_info=True, **options,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(f"{folder}: the weights cannot be loaded ({error})") from error
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise BaseModelError(f"{folder}: {len(info['missing_keys'])} weights are missing, the first is {first!r}",
                             hint="the weights do not belong to this config.json")  # fmt: skip
    model.eval()
    return model


def _read_spec(folder: Path, kind: str, model: Any) -> DecoderSpec:
    parameters = model.num_parameters()  # two 4-bit weights are stored as one
    positions = getattr(model.config, "max_position_embeddings", None) or 2048
    spec = DecoderSpec(kind, int(positions), parameters)
    path = folder / "alambic.json"
    if not path.is_file():
        return spec
    raw = read_json(path)
    if raw.get("format") != FORMAT:
        raise BaseModelError(f"{path}: format {raw.get('format')!r}; this version of alambic reads format {FORMAT}")
    return replace(spec, context_tokens=int(raw.get("context_tokens", positions)), base=raw.get("base") or {})


def _special(folder: Path, model: nn.Module, tokenizer: Tokenizer) -> dict[str, str]:
    """Return the texts of the special tokens, from the tokenizer's files or else from the ids in config.json."""
    found = render.special_tokens(folder)
    for name in ("bos_token", "eos_token", "pad_token"):
        number = getattr(model.config, f"{name}_id", None)
        number = number[0] if isinstance(number, list) and number else number
        text = tokenizer.id_to_token(number) if isinstance(number, int) else None
        if text is not None:
            found.setdefault(name, text)
    return found


def _ends(folder: Path, model: nn.Module, tokenizer: Tokenizer, template: ChatTemplate) -> tuple[int, ...]:
    """Return every id that ends an answer: those stated, and the special one that the template writes after a turn."""
    stated: list[Any] = [model.config.eos_token_id]
    if (folder / "generation_config.json").is_file():
        stated.append(read_json(folder / "generation_config.json").get("eos_token_id"))
    ids = [i for value in stated for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
    if text := template.special.get("eos_token"):
        ids.append(tokenizer.token_to_id(text))
    ids += [found] if (found := _after_turn(tokenizer, template)) is not None else []
    return tuple(dict.fromkeys(i for i in ids if i is not None and tokenizer.id_to_token(i) is not None))


def _after_turn(tokenizer: Tokenizer, template: ChatTemplate) -> int | None:
    said = "alambic"
    text = template.render(Chat.of("a", completion=said))
    tail = text[text.rfind(said) + len(said) :]
    added: dict[int, AddedToken] = tokenizer.get_added_tokens_decoder()
    ids = tokenizer.encode(tail, add_special_tokens=False).ids
    return next((i for i in ids if i in added and added[i].special), None)


def _check_vocabulary(folder: Path, model: nn.Module, tokenizer: Tokenizer) -> None:
    rows, known = model.get_input_embeddings().weight.shape[0], tokenizer.get_vocab_size(with_added_tokens=True)
    if known > rows:
        raise BaseModelError(
            f"{folder}: the tokenizer has {known:,} tokens, the model {rows:,}",
            hint="tokenizer and weights are of two different models",
        )
