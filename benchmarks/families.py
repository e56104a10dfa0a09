"""Every family that writes, on a two-layer random clone of its true configuration: trained, packed, proven.

What is checked for each: one training step lowers the loss; the float32 forms of OpenVINO (its graph, and the engine
that runs it) and of GGUF write the tokens that transformers writes, on 20 prompts; how far the 8-bit and 4-bit forms
are from the model; the golden conversations have the same ids in training, transformers, every packed form and
llama.cpp. Random weights give flat predictions, so the figures of the smaller forms are worse than on real ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from run import ROOT, say

MINUTES = 25
WHAT = "Families of models that write: training, packing and the round trip, on random clones of their configurations"
WIDTH, PROMPTS, TOKENS = 64, 20, 16
_TRAINED = 12  # golden conversations in the one step


def run(store: Any) -> str:
    """Check each family and make the table."""
    import torch

    from alambic.model.clone import ORIGINALS

    torch.set_num_threads(1)
    rows = {name: store.part(name, lambda name=name: check(name)) for name in ORIGINALS}
    heads = ("model", "tokenizer", "loss, one step", "OpenVINO fp32", "engine", "int8", "int4", "GGUF F32", "Q8_0",
             "Q4_0", "same ids in")  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join([name, *cells(row)]) + " |" for name, row in rows.items()]
    lines += ["", *_legend(), *_notes(rows)]
    return "\n".join(lines)


def check(name: str) -> dict[str, Any]:
    """Train, pack and compare a clone of original `name`; what fails is a text instead of a figure."""
    import torch

    from alambic.model.clone import clone
    from alambic.model.seq2seq import Seq2Seq, load_writer

    tokenizers = ROOT.parent / "shared" / "data" / "tokenizers"
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        made = clone(name, root / "base", tokenizers=tokenizers if tokenizers.is_dir() else None, width=WIDTH)
        row: dict[str, Any] = {"tokenizer": made.tokenizer, "real_tokenizer": made.real_tokenizer, "notes": []}
        chats = _chats(root / "base")
        row["loss"] = _tried(lambda: train_step(root, chats))
        folder = root / "trained" if (root / "trained" / "config.json").is_file() else root / "base"
        model = load_writer(folder, dtype=torch.float32)
        row["parameters"], row["pair"] = model.spec.parameters, isinstance(model, Seq2Seq)
        row["openvino"] = _tried(lambda: openvino(folder, root, model, chats, row["notes"]))
        row["gguf"] = "none is made" if row["pair"] else _tried(lambda: gguf(folder, root, model))
        say(f"  {name}: {row}")
    return row


def train_step(root: Path, chats: Sequence[Any]) -> tuple[float, float]:
    """Fine-tune one step on `chats` into `root`/trained; return the loss per token before and after."""
    import torch

    from alambic.events import drain
    from alambic.model.seq2seq import load_writer
    from alambic.train.sft import SftParams, finetune_chats

    before = loss(load_writer(root / "base", dtype=torch.float32), chats)
    params = SftParams(method="full", steps=1, batch_size=len(chats), learning_rate=1e-3, warmup=0.0, threads=1)
    drain(finetune_chats(root / "base", chats, None, params=params, out=root / "trained"))
    return before, loss(load_writer(root / "trained", dtype=torch.float32), chats)


def loss(model: Any, chats: Sequence[Any]) -> float:
    """Return the mean negative log-probability of a token that the assistant says, in nats."""
    import torch

    from alambic.model.seq2seq import Seq2Seq
    from alambic.pack.writer_compare import _seq2seq_logits

    total = count = 0.0
    for chat in chats:
        if isinstance(model, Seq2Seq):
            source, target = model.labelled(chat)
            logits = _seq2seq_logits(model, source, target)
        else:
            ids, learnt = model.labelled(chat)
            where = [i for i in range(1, len(ids)) if learnt[i]]
            logits, target = model.logits(ids)[[i - 1 for i in where]], [ids[i] for i in where]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum"))
        count += len(target)
    return total / count


def openvino(folder: Path, root: Path, model: Any, chats: Sequence[Any], notes: list[str]) -> dict[str, Any]:
    """Pack in fp32, int8 and int4; compare tokens and distributions; prove the round trip."""
    from alambic.engines.bundle_writer import load_writer as load_engine
    from alambic.events import drain
    from alambic.pack.writer_compare import compare_greedy, diverge
    from alambic.pack.writer_openvino import pack_openvino
    from alambic.pack.writer_proof import prove_writer

    prompts = _prompts(model)
    part = drain(pack_openvino(folder, root / "fp32", precision="fp32"))
    result: dict[str, Any] = {"engine": part.engine}
    result["graph"] = compare_greedy(model, root / "fp32", prompts, max_tokens=TOKENS).to_dict()
    engine = load_engine(part, root / "fp32", threads=1)
    try:
        result["written"] = compare_texts(model, engine)
    finally:
        engine.close()
    others = {} if hasattr(model, "source_text") else _llamacpp_ids(folder, root)
    result["proof"] = drain(prove_writer(folder, root / "fp32", part, others=others)).to_dict()
    notes += [f"{form}: {why}" for form, why in result["proof"]["left_out"].items()]
    for precision in ("int8", "int4"):
        out = root / precision
        drain(pack_openvino(folder, out, precision=precision, calibration=chats if precision == "int4" else ()))
        result[precision] = diverge(model, out, chats).to_dict()
    return result


def compare_texts(model: Any, engine: Any) -> dict[str, Any]:
    """Ask the engine as a user does: each answer must be the text of the tokens that transformers writes, or a tie."""
    from alambic.kinds.generation import GenerationRequest, Sampling
    from alambic.pack.writer_compare import TIE, _gaps

    equal = ties = 0
    chats = _golden(model)
    requests = [GenerationRequest(chat=chat, sampling=Sampling(max_tokens=TOKENS)) for chat in chats]
    for request, reply in zip(requests, engine.write(requests), strict=True):
        ids = engine.token_ids(request)
        expected = model.greedy(ids, max_tokens=TOKENS)
        if reply.text.strip("\ufffd") == model.decode(expected).strip("\ufffd"):
            equal += 1
        elif min(_gaps(model, ids, expected)) < TIE:
            ties += 1
    return {"answers": len(requests), "equal": equal, "ties": ties}


def gguf(folder: Path, root: Path, model: Any) -> dict[str, Any]:
    """Write F32, Q8_0 and Q4_0; compare with llama.cpp."""
    from alambic.events import drain
    from alambic.kinds.golden_chats import GOLDEN_CHATS
    from alambic.pack.gguf import write_gguf
    from alambic.pack.gguf.check import opened, template_differences
    from alambic.pack.writer_compare import compare_greedy

    prompts, result = _prompts(model), {}
    for form in ("F32", "Q8_0", "Q4_0"):
        path = root / f"{form}.gguf"
        if not path.exists():
            drain(write_gguf(folder, path, form=form))
        with opened(path, context=512) as server:
            runner = _LlamaCpp(server)
            if form == "F32":
                result[form] = compare_greedy(model, runner, prompts, max_tokens=TOKENS).to_dict()
            else:
                result[form] = likeness(model, server, prompts[:8])
    asked = {name: chat.prompt for name, chat in GOLDEN_CHATS.items() if chat.prompt.messages}
    different = template_differences(root / "F32.gguf", model.template, asked)
    result["template"] = [name for name, _, _ in different]
    return result


def likeness(model: Any, server: Any, prompts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Compare llama.cpp's next token with the model's along its greedy answers."""
    same, away = [], []
    for prompt in prompts:
        written = model.greedy(prompt, max_tokens=8)
        logits = model.logits([*prompt, *written[:-1]])[len(prompt) - 1 :].log_softmax(-1)
        for at, token in enumerate(written):
            best = server.best([*prompt, *written[:at]], 50)
            same.append(best[0][0] == token)
            theirs = dict(best).get(token)
            if theirs is not None:
                away.append(abs(theirs - float(logits[at, token])))
    return {"tokens": len(same), "same_top": sum(same) / len(same), "mean_log_error": sum(away) / max(1, len(away))}


class _LlamaCpp:
    """llama.cpp as something that `compare_greedy` takes."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def greedy(self, ids: Sequence[int], *, max_tokens: int, ends: Sequence[int] = ()) -> list[int]:
        from alambic.pack.gguf.check import greedy

        return greedy(self._server, ids, max_tokens)[0]


def _llamacpp_ids(folder: Path, root: Path) -> dict[str, Callable[[Sequence[str]], list[list[int]]]]:
    """Return llama.cpp's own tokenizer; where it is known to read otherwise, the proof must not fail for it."""
    from alambic.errors import PackError
    from alambic.events import Note, drain
    from alambic.pack.gguf import write_gguf
    from alambic.pack.gguf.check import gguf_token_ids

    said: list[Any] = []
    try:
        file = drain(write_gguf(folder, root / "F32.gguf", form="F32"), said.append)
    except PackError:
        return {}
    if file.limits or any(isinstance(event, Note) for event in said):
        return {}
    return {"llama.cpp": lambda texts: gguf_token_ids(root / "F32.gguf", texts)}


def _chats(folder: Path) -> list[Any]:
    """Return answered golden conversations that any family takes: one question, one answer."""
    from alambic.kinds.golden_chats import GOLDEN_CHATS

    found = [chat for chat in GOLDEN_CHATS.values() if chat.completion and chat.completion.content.strip()]
    return [chat for chat in found if [m.role for m in chat.messages] == ["user", "assistant"]][:_TRAINED]


def _golden(model: Any) -> list[Any]:
    from alambic.kinds.golden_chats import GOLDEN_CHATS

    plain = [chat.prompt for chat in GOLDEN_CHATS.values() if not chat.tools and chat.prompt.messages]
    single = [chat for chat in plain if len(chat.messages) == 1]
    return (single if hasattr(model, "source_text") else plain)[:PROMPTS]


def _prompts(model: Any) -> list[list[int]]:
    if hasattr(model, "source_text"):
        return [model.source_ids(model.source_text(chat)) for chat in _golden(model)]
    return [model.prompt_ids(chat) for chat in _golden(model)]


def _tried(work: Callable[[], Any]) -> Any:
    from alambic.errors import AlambicError

    try:
        return work()
    except AlambicError as error:
        return f"failed: {error.message}"


def cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of a family's row."""
    losses = row["loss"]
    shown = losses if isinstance(losses, str) else f"{losses[0]:.3f} -> {losses[1]:.3f}"
    out = [("its own: " if row["real_tokenizer"] else "") + row["tokenizer"], shown]
    packed, file = row["openvino"], row["gguf"]
    if isinstance(packed, str):
        out += [packed, "", "", ""]
    else:
        out += [_agreement(packed["graph"]), _written(packed), _divergence(packed["int8"]), _divergence(packed["int4"])]
    if isinstance(file, str):
        out += [file, "", ""]
    else:
        out += [_agreement(file["F32"]), _likeness(file["Q8_0"]), _likeness(file["Q4_0"])]
    out.append("" if isinstance(packed, str) else ", ".join(packed["proof"]["tokenizers"]))
    return [cell.replace("|", "\\|") for cell in out]


def _agreement(found: dict[str, Any]) -> str:
    ties = f", {found['ties']} ties" if found["ties"] else ""
    return f"{found['tokens']} equal{ties}" if found["equal"] else f"differs: {found['difference']}"


def _written(packed: dict[str, Any]) -> str:
    found = packed["written"]
    ties = f", {found['ties']} ties" if found["ties"] else ""
    return f"{packed['engine']}: {found['equal']}/{found['answers']} answers{ties}"


def _divergence(found: dict[str, float]) -> str:
    return f"KL {found['mean_kl']:.2g}, top {100 * found['same_top']:.0f}%"


def _likeness(found: dict[str, float]) -> str:
    return f"{found['mean_log_error']:.2g} nats, top {100 * found['same_top']:.0f}%"


def _legend() -> list[str]:
    return [
        f"Clones: 2 layers, width {WIDTH}. Equal: greedy tokens equal to transformers in float32, {PROMPTS} prompts of "
        f"the golden conversations, {TOKENS} tokens each; a tie is a prompt whose comparison ended where the two best "
        "logits are nearer than 0.001. Engine: the same asked through the engine of the bundle, as text. int8, int4: "
        "mean KL divergence of the next token from float32 in nats, and share of positions with the same likeliest "
        "token. Q8_0, Q4_0: mean error of the log-probability of the model's next token, and the same share. "
        "Same ids in: forms that give the ids of training on every golden conversation.",
    ]


def _notes(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for name, row in rows.items():
        said = [*row["notes"]]
        if isinstance(row["gguf"], dict) and row["gguf"]["template"]:
            said.append("llama.cpp's template engine writes otherwise: " + ", ".join(row["gguf"]["template"]))
        lines += [f"- {name}: {note}" for note in said]
    return ["", "Left out of the comparison of ids, and why:", "", *lines] if lines else []
