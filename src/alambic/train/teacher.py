"""What a teacher answers to texts: computed once for each text and kept by the digest of the text, never by step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from alambic.data.dataset import Dataset, Example
from alambic.events import Progress, Work
from alambic.model.encoder import Encoder
from alambic.train.batches import rows_of
from alambic.train.precision import autocast, threads
from alambic.train.scoring import pooled

_PART = 2_048  # texts answered between two writes


@dataclass(frozen=True)
class Answers:
    """A teacher's logits [N, L] and pooled embeddings [N, H] (float16), one row a text."""

    logits: NDArray[np.float32]
    vectors: NDArray[np.float16]


Ask = Callable[[list[str]], Answers]


def digest_of(text: str) -> str:
    """Return the SHA-256 (hex) that the answers to `text` are kept by."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def teacher_answers(ask: Ask, texts: Sequence[str], folder: Path, *, threads_used: int | None = None) -> Work[Answers]:
    """Return what a teacher answers to `texts`; what `folder` holds already is not computed again.

    The caller gives each teacher a folder of its own. A run that was killed goes on from the last part written.

    Args:
        ask: gives the teacher's answers to some texts.
        texts: any number, doubles allowed.
        folder: where its answers are kept.
        threads_used: of torch; its own choice when None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digests = [digest_of(text) for text in texts]
    known = _read(folder)
    missing = list({d: t for d, t in zip(digests, texts, strict=True) if d not in known}.items())
    with threads(threads_used):
        for start in range(0, len(missing), _PART):
            some = dict(missing[start : start + _PART])
            made = ask(list(some.values()))
            _write(folder, list(some), made)
            known |= {d: (made.logits[i], made.vectors[i]) for i, d in enumerate(some)}
            yield Progress("teacher", min(start + _PART, len(missing)), len(missing))
    return Answers(np.stack([known[d][0] for d in digests]), np.stack([known[d][1] for d in digests]))


def encoder_answers(teacher: Encoder, *, long: str) -> Ask:
    """Return what asks a fine-tuned encoder; `long` is what is done with texts longer than it reads."""
    return lambda texts: _answer(teacher, texts, long=long)


def _answer(teacher: Encoder, texts: list[str], *, long: str) -> Answers:
    """Answer each text; one of several windows gets the mean of their label shares and vectors, by length."""
    spec = teacher.spec
    assert spec.labels is not None, "a teacher of a classifier has a head"
    rows = rows_of(
        teacher, Dataset(tuple(Example(text, ()) for text in texts), spec.labels, multi_label=True), long=long
    )
    shares = torch.zeros(len(texts), len(spec.labels))
    vectors = torch.zeros(len(texts), spec.hidden)
    teacher.eval()
    with torch.no_grad(), autocast():
        for numbers, found in pooled(rows, teacher):
            weights = torch.tensor([rows[i].weight for i in numbers])[:, None]
            owners = torch.tensor([rows[i].text for i in numbers])
            logits = teacher.classify(found).float()
            each = logits.sigmoid() if spec.multi_label else logits.softmax(dim=1)
            shares.index_add_(0, owners, each * weights)
            vectors.index_add_(0, owners, found * weights)
    logits = shares.logit(eps=1e-7) if spec.multi_label else shares.clamp(min=1e-12).log()
    return Answers(logits.numpy(), vectors.numpy().astype(np.float16))


def mean_answers(logits: Sequence[NDArray[np.float32]], *, multi_label: bool) -> NDArray[np.float32]:
    """Return the logits [N, L] of the mean label shares of several teachers."""
    shares = torch.stack([_shares(torch.from_numpy(each), multi_label) for each in logits]).mean(dim=0)
    made = shares.logit(eps=1e-7) if multi_label else shares.clamp(min=1e-12).log()
    out: NDArray[np.float32] = made.numpy()
    return out


def _shares(logits: torch.Tensor, multi_label: bool) -> torch.Tensor:
    return logits.sigmoid() if multi_label else logits.softmax(dim=1)


def _read(folder: Path) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float16]]]:
    known: dict[str, tuple[NDArray[np.float32], NDArray[np.float16]]] = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as part:
            rows = zip(part["digests"].tolist(), part["logits"], part["vectors"], strict=True)
            known |= {digest: (logits, vector) for digest, logits, vector in rows}
    return known


def _write(folder: Path, digests: list[str], made: Answers) -> None:
    """Write one part under a name of its content, beside first: a kill leaves whole parts only."""
    name = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
    beside = folder / f".{name}.partial"
    with beside.open("wb") as file:
        np.savez(file, digests=np.array(digests), logits=made.logits, vectors=made.vectors)
    beside.replace(folder / f"{name}.npz")
