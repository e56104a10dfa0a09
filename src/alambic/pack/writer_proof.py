"""The round-trip proof of writers: training, packed form, engine and server read the same ids, and stop at the same.

    report = drain(prove_writer(model, folder, part))

On the golden conversations, the text that our renderer makes with the part's template must be what transformers' own
`apply_chat_template` makes with the model's; its ids must be the same in the model's tokenizer as training read it, in
transformers, in the part's tokenizer.json, in its OpenVINO graph, and in any other form handed in (a GGUF file, an
engine). Each answer must end with an id that the engine stops at. A failure names the conversation and the first token
that differs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from alambic import _extras
from alambic.engines.graph import source_text
from alambic.engines.tokens import Tokenize
from alambic.errors import EngineError, PackError, TemplateError
from alambic.events import Finished, Note, Progress, Started, Work
from alambic.kinds.chat import Chat
from alambic.kinds.golden_chats import GOLDEN_CHATS
from alambic.manifest import PartSpec
from alambic.model.tokenizer import read_tokenizer
from alambic.pack.openvino import _silent as silent
from alambic.pack.writer_tokenizer import TOKENIZER, read_graph
from alambic.render import PINNED_DAY, PLAIN_TEMPLATE, ChatTemplate

_STAGE = "prove"
_HINT = "the model would be asked with other tokens than it was trained on; pack it again from its own folder"


@dataclass(frozen=True)
class ProofReport:
    """What the proof found; it exists only when it passed.

    Attributes:
        conversations: golden ones.
        texts: rendered and compared: each conversation as a prompt, and whole where it ends with an answer.
        refused: conversations that the template refuses, in transformers too (Gemma's takes no system message).
        tokenizers: forms that gave the same ids on every text.
        left_out: forms that were not compared, and why.
        ends: tokens that the engine stops at, as texts.
        answers: assistant turns whose last token is one of them.
        seconds: what the proof took.
    """

    conversations: int
    texts: int
    refused: tuple[str, ...]
    tokenizers: tuple[str, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    ends: tuple[str, ...] = ()
    answers: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        lists = {name: list(getattr(self, name)) for name in ("refused", "tokenizers", "ends")}
        return {**asdict(self), "left_out": dict(self.left_out), **lists}


@dataclass(frozen=True)
class _Text:
    """A golden conversation as written by a template."""

    name: str
    chat: Chat
    reply: bool
    text: str


def prove_writer(
    model: Path,
    folder: Path,
    part: PartSpec,
    *,
    chats: Mapping[str, Chat] = GOLDEN_CHATS,
    others: Mapping[str, Tokenize] | None = None,
) -> Work[ProofReport]:
    """Compare the packed part in `folder` with the model directory it was made from, and leave proof.json there.

    Args:
        model: folder in Hugging Face layout.
        folder: of the part: tokenizer.json, chat_template.jinja.
        part: its parameters: `special`, `ends`, `end_ids`.
        chats: conversations by name.
        others: more forms, by name: texts -> ids, special tokens read and none added.

    Raises:
        PackError: a token differs, or an answer ends with one that the engine does not stop at.
    """
    yield Started(_STAGE)
    start = time.perf_counter()
    trained = read_tokenizer(model)
    theirs, left_out = _transformers(model)
    paired = part.params.get("shape") == "encoder-decoder"
    if paired:  # it reads one text, and no template writes it
        template = ChatTemplate("")
        texts, refused = _source_texts(chats)
    else:
        template = read_part_template(folder, part)
        texts, refused = _compare_texts(template, theirs, trained, chats)
    yield Progress(_STAGE, 1, 3)
    same = ["trained"]
    for name, tokenize in _forms(model, folder, theirs, trained, others or {}, left_out, raw=paired):
        _compare_ids(name, texts, trained, tokenize, raw=paired)
        same.append(name)
    yield Progress(_STAGE, 2, 3)
    _check_end_ids(part, trained)
    answers = _check_targets(part, trained, texts) if paired else _check_ends(template, part, folder, texts)
    ends = tuple(str(trained.id_to_token(end)) for end in part.params["end_ids"])
    for name, why in left_out.items():
        yield Note(f"not part of the proof: {name}: {why}", "info")
    report = ProofReport(
        conversations=len(chats), texts=len(texts), refused=tuple(refused), tokenizers=tuple(same), left_out=left_out,
        ends=ends, answers=answers, seconds=round(time.perf_counter() - start, 3),
    )  # fmt: skip
    content = json.dumps({**report.to_dict(), "seconds": None}, ensure_ascii=False, indent=1)
    (folder / "proof.json").write_text(content, encoding="utf-8")
    yield Finished(_STAGE, report.seconds)
    return report


def read_part_template(folder: Path, part: PartSpec) -> ChatTemplate:
    """Return the template that an engine renders with.

    Raises:
        PackError: the part has none.
        TemplateError: it does not parse.
    """
    path = folder / "chat_template.jinja"
    if not path.is_file():
        raise PackError(f"{path}: missing")
    return ChatTemplate(path.read_text("utf-8"), part.params.get("special", {}), tuple(part.params.get("ends", ())))


def _transformers(model: Path) -> tuple[Any, dict[str, str]]:
    """Open the model's tokenizer as users of transformers do; what it rebuilds otherwise is said, not compared."""
    transformers = _extras.load("transformers")
    options = {"local_files_only": True, "trust_remote_code": False}
    with silent():
        try:
            auto = transformers.AutoTokenizer.from_pretrained(model, **options)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            why = f"AutoTokenizer cannot open the folder ({(str(error) or type(error).__name__).splitlines()[0]})"
        else:
            auto.model_max_length = 10**9  # it would warn of long texts
            return auto, {}
        plain = transformers.PreTrainedTokenizerFast(tokenizer_object=read_tokenizer(model))
    return plain, {"transformers": why}


def _compare_texts(
    template: ChatTemplate, theirs: Any, trained: Tokenizer, chats: Mapping[str, Chat]
) -> tuple[list[_Text], list[str]]:
    """Render all with our renderer and with transformers; the texts must be equal."""
    texts, refused = [], []
    for name, chat in chats.items():
        variants = [(chat.prompt, True)] if chat.prompt.messages else []
        variants += [(chat, False)] if chat.completion is not None else []
        for spoken, reply in variants:
            ours, why = _ours(template, spoken, reply)
            reference, why_not = _reference(theirs, template, spoken, reply)
            if ours is None and reference is None:
                refused.append(name)
                break
            if ours is None or reference is None:
                who, reason = ("transformers", why_not) if ours is not None else ("the part's template", why)
                raise PackError(f"golden conversation {name!r}: {who} refuses it, the other does not: {reason}",
                                hint=_HINT)  # fmt: skip
            if ours != reference:
                a, b = (
                    trained.encode(ours, add_special_tokens=False),
                    trained.encode(reference, add_special_tokens=False),
                )
                raise PackError(
                    f"golden conversation {name!r}: the part's template writes another text than the model's: "
                    + (_difference(trained, a.ids, b.ids) or _difference_of_texts(ours, reference)),
                    hint=_HINT,
                )
            texts.append(_Text(name, spoken, reply, ours))
    if not texts:
        raise PackError("the template refuses every golden conversation", hint="correct chat_template.jinja")
    return texts, refused


def _ours(template: ChatTemplate, chat: Chat, reply: bool) -> tuple[str | None, str]:
    try:
        return template.render(chat, reply=reply), ""
    except TemplateError as error:
        return None, error.message


def _reference(theirs: Any, template: ChatTemplate, chat: Chat, reply: bool) -> tuple[str | None, str]:
    """Render with transformers, its clock stopped at the day that every template of ours is pinned to."""
    data = chat.to_dict()
    jinja = _extras.load("jinja2")
    named = {} if theirs.chat_template is not None else {"chat_template": PLAIN_TEMPLATE, **template.special}
    try:
        text = theirs.apply_chat_template(
            data["messages"], tools=data.get("tools"), add_generation_prompt=reply, tokenize=False,
            strftime_now=PINNED_DAY.strftime, **named,
        )  # fmt: skip
    except (jinja.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        return None, str(error)
    return str(text), ""


def _forms(
    model: Path,
    folder: Path,
    theirs: Any,
    trained: Tokenizer,
    others: Mapping[str, Tokenize],
    left_out: dict[str, str],
    *,
    raw: bool,
) -> list[tuple[str, Tokenize]]:
    """Return the forms to compare; `left_out` gets the reasons for those that are not."""
    packed = Tokenizer.from_file(str(folder / "tokenizer.json"))
    forms: list[tuple[str, Tokenize]] = [("tokenizer.json", _plain(packed, raw=raw))]
    if "transformers" not in left_out:
        read = _call(theirs, raw=raw)
        why = _rebuilt(model, _call(theirs, raw=False), trained)
        if why is None:
            forms.append(("transformers", read))
        else:
            left_out["transformers"] = why
    if raw:
        left_out[TOKENIZER] = "none is made for encoder-decoders, which OpenVINO GenAI does not run"
    elif not (folder / TOKENIZER).is_file():
        left_out[TOKENIZER] = "it is not exact for this kind of tokenizer, and not shipped"
    elif packed.encode("").ids:
        # The graph adds the first and last token of raw texts, which a template writes itself.
        with_special = read_graph(folder / TOKENIZER)
        forms.append((TOKENIZER, _without(with_special, packed)))
    else:
        forms.append((TOKENIZER, read_graph(folder / TOKENIZER)))
    return [*forms, *others.items()]


def _plain(tokenizer: Tokenizer, *, raw: bool) -> Tokenize:
    return lambda texts: [tokenizer.encode(text, add_special_tokens=raw).ids for text in texts]


def _call(theirs: Any, *, raw: bool) -> Tokenize:
    def tokenize(texts: Sequence[str]) -> list[list[int]]:
        return [list(theirs(text, add_special_tokens=raw)["input_ids"]) for text in texts]

    return tokenize


def _without(tokenize: Tokenize, tokenizer: Tokenizer) -> Tokenize:
    """Take off what the tokenizer puts around a raw text."""
    frame = tokenizer.encode("").ids
    mark = tokenizer.encode("a").ids
    head = next((i for i, (x, y) in enumerate(zip(mark, frame, strict=False)) if x != y), len(frame))
    tail = len(frame) - head

    def bare(texts: Sequence[str]) -> list[list[int]]:
        return [row[head : len(row) - tail] for row in tokenize(texts)]

    return bare


def _rebuilt(model: Path, read: Tokenize, trained: Tokenizer) -> str | None:
    """Say what AutoTokenizer changes where the files themselves agree with us: it builds some kinds anew by their name.

    None: nothing, or the files do not agree either (which the comparison then names).
    """
    path = model / "tokenizer.json"
    for name, chat in GOLDEN_CHATS.items():
        text = "\n".join(message.content for message in chat.messages)
        expected = trained.encode(text, add_special_tokens=False).ids
        got = read([text])[0]
        if got != expected:
            as_it_is = (
                Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids if path.is_file() else None
            )
            if as_it_is is None or as_it_is == expected:
                what = "tokenizer.json" if as_it_is is not None else "SentencePiece"
                return f"AutoTokenizer does not read this tokenizer as {what} does: text of {name!r}: " + (
                    _difference(trained, got, expected) or ""
                )
            return None
    return None


def _compare_ids(
    form: str, texts: Sequence[_Text], trained: Tokenizer, tokenize: Tokenize, *, raw: bool = False
) -> None:
    for entry, got in zip(texts, tokenize([entry.text for entry in texts]), strict=True):
        fault = _difference(trained, list(got), trained.encode(entry.text, add_special_tokens=raw).ids)
        if fault is not None:
            raise PackError(
                f"golden conversation {entry.name!r}: {form} does not give the ids that training saw: {fault}",
                hint=_HINT,
            )


def _source_texts(chats: Mapping[str, Chat]) -> tuple[list[_Text], list[str]]:
    """Return what an encoder-decoder reads, and which conversations it refuses: all but single questions."""
    texts, refused = [], []
    for name, chat in chats.items():
        try:
            texts.append(_Text(name, chat, True, source_text(chat)))
        except EngineError:
            refused.append(name)
    return texts, refused


def _check_end_ids(part: PartSpec, tokenizer: Tokenizer) -> None:
    """The engine must stop at tokens that no text can be."""
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    for end in part.params.get("end_ids", ()):
        if end not in special:
            raise PackError(
                f"the engine would stop at token {end} ({tokenizer.id_to_token(end)!r}), a piece of ordinary text",
                hint="correct eos_token_id in generation_config.json and config.json of the model",
            )


def _check_targets(part: PartSpec, tokenizer: Tokenizer, texts: Sequence[_Text]) -> int:
    """Each answer that an encoder-decoder learns must end with an id that the engine stops at."""
    answers = [(entry.name, entry.chat.completion) for entry in texts if entry.chat.completion is not None]
    for name, answer in answers:
        ids = tokenizer.encode(answer.content).ids
        if not ids or ids[-1] not in part.params["end_ids"]:
            raise _never_stops(name, tokenizer, ids, part)
    return len(answers)


def _check_ends(template: ChatTemplate, part: PartSpec, folder: Path, texts: Sequence[_Text]) -> int:
    """Each answer must end with an id that the engine stops at."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    answers = 0
    for entry in texts:
        if entry.reply:
            continue
        start, stop = template.spans(entry.chat)[-1]
        encoding = tokenizer.encode(entry.text, add_special_tokens=False)
        inside = [i for i, (a, b) in enumerate(encoding.offsets) if a < stop and b > start]
        said = encoding.ids[: inside[-1] + 1] if inside else []
        if not said or said[-1] not in part.params["end_ids"]:
            raise _never_stops(entry.name, tokenizer, said, part)
        answers += 1
    return answers


def _never_stops(name: str, tokenizer: Tokenizer, ids: Sequence[int], part: PartSpec) -> PackError:
    def show(i: int) -> str:
        return f"{i} ({tokenizer.id_to_token(i)!r})"

    last = f"token {len(ids) - 1}, {show(ids[-1])}" if ids else "nothing"
    stops = ", ".join(map(show, part.params.get("end_ids", ()))) or "nothing"
    return PackError(
        f"golden conversation {name!r}: the answer ends with {last}; the engine stops at {stops}",
        hint="the model would never stop: let the template write an end token after each answer, and name its id as "
        "eos_token_id in generation_config.json",
    )


def _difference(trained: Tokenizer, got: Sequence[int], expected: Sequence[int]) -> str | None:
    """Name the first token that differs: position, id and text on both sides."""
    if list(got) == list(expected):
        return None
    pairs = enumerate(zip(got, expected, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(got), len(expected)))
    got_one, expected_one = (
        f"{ids[at]} ({trained.id_to_token(ids[at])!r})" if at < len(ids) else "missing" for ids in (got, expected)
    )
    return f"token {at} is {got_one}, in training it was {expected_one}"


def _difference_of_texts(got: str, expected: str) -> str:
    """Name the first character that differs, for texts whose ids are equal."""
    at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), min(len(got), len(expected)))
    return f"character {at}: {got[at : at + 20]!r} instead of {expected[at : at + 20]!r} (their tokens are equal)"
