"""Ask a model behind an address about what a classifier abstains from (`kinds.remote_stage`).

    with alambic.open("runs/tickets/bundle", remote=True) as engine:
        engine.predict(["a text"])[0].answered_by  # "tfidf-svm", or the name of the remote model

Nothing is sent unless the caller asks for it; a text that the remote cannot answer stays what it was, abstained from.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, replace
from typing import Any

from alambic.engines.remote import Prices, Remote, RemoteSpec
from alambic.errors import EngineError
from alambic.kinds.classify import Prediction, Reason
from alambic.kinds.generation import GenerationRequest
from alambic.kinds.remote_stage import RemoteStage, label_in, request_of

Reasons = Callable[[Sequence[str], int], list[tuple[Reason, ...]]]
_ATTEMPTS = 3  # tries of one text
_GIVE_UP = 8  # failures one after the other that end the asking of one batch
_log = logging.getLogger("alambic")


@dataclass(frozen=True)
class Asked:
    """How many texts the remote was asked about, and how many it gave a label, no label, or no answer."""

    texts: int = 0
    labelled: int = 0
    none: int = 0
    failed: int = 0


class LastStage:
    """The remote model of a bundle. Safe to call from several threads; close it when done."""

    def __init__(
        self,
        stage: RemoteStage,
        labels: Sequence[str],
        *,
        scope_label: str | None = None,
        local: str = "",
        reasons: Reasons | None = None,
    ) -> None:
        """Prepare the endpoint; nothing is sent before the first text that needs it.

        Args:
            stage: how it is asked.
            labels: of the bundle.
            scope_label: the label that means "none of the others": an answer of it is no answer.
            local: name of the model of the bundle, where it is no chain.
            reasons: gives the training rows near texts.

        Raises:
            EngineError: the address is unsafe, or the key is absent.
        """
        self.stage = stage
        self.labels = tuple(label for label in labels if label != scope_label)
        self._local, self._reasons = local, reasons
        prices = None
        if stage.usd_per_million_in is not None and stage.usd_per_million_out is not None:
            prices = Prices(stage.usd_per_million_in, stage.usd_per_million_out)
        spec = RemoteSpec(
            stage.api, stage.url, stage.model, key_env=stage.key_env, prices=prices, sampling=stage.sampling,
            timeout_s=stage.timeout_s, attempts=_ATTEMPTS,
        )  # fmt: skip
        self._writer = Remote(spec)
        self._lock = threading.Lock()
        self._asked = Asked()

    @property
    def asked(self) -> Asked:
        """What it was used for so far."""
        with self._lock:
            return self._asked

    @property
    def cost_usd(self) -> float | None:
        """What that cost; None where the prices are not known."""
        return self._writer.totals.cost_usd

    def settle(self, texts: Sequence[str], said: Sequence[Prediction]) -> list[Prediction]:
        """Return `said`, and for each text abstained from what the remote answers, where it gives a label.

        Its confidence stays the bundle's own in that label: a remote tells none that could be trusted.
        """
        found = [replace(one, answered_by=one.answered_by or self._local or None) for one in said]
        open_ = [i for i, one in enumerate(found) if one.abstained]
        if not open_:
            return found
        asked = [texts[i] for i in open_]
        near: list[tuple[Reason, ...]] = [()] * len(asked)
        if self.stage.examples and self._reasons is not None:
            near = self._reasons(asked, self.stage.examples)
        requests = (request_of(self.stage, self.labels, text, rows) for text, rows in zip(asked, near, strict=True))
        labels, errors = self._labels(requests)
        for i, label in zip(open_, labels, strict=False):  # those given up have none
            if label is not None:
                sure = found[i].scores[label]
                model = self.stage.model
                found[i] = replace(found[i], labels=(label,), confidence=sure, because=None, answered_by=model)
        none = labels.count(None) - len(errors)
        failed = len(asked) - len(labels) + len(errors)
        self._count(Asked(len(asked), len(asked) - none - failed, none, failed))
        if errors:
            _log.warning("%d of %d texts stay abstained from: %s", failed, len(asked), errors[-1].message)
        return found

    def _labels(self, requests: Iterable[GenerationRequest]) -> tuple[list[str | None], list[EngineError]]:
        """Return a label or None for each text, fewer when the endpoint is given up, and what failed."""
        labels: list[str | None] = []
        errors: list[EngineError] = []
        in_a_row = 0
        with closing(self._writer.write_each(requests)) as replies:
            for reply in replies:
                if isinstance(reply, EngineError):
                    errors.append(reply)
                    labels.append(None)
                    in_a_row += 1
                    if in_a_row == _GIVE_UP:
                        break
                else:
                    labels.append(label_in(reply.content, self.labels))
                    in_a_row = 0
        return labels, errors

    def _count(self, more: Asked) -> None:
        with self._lock:
            self._asked = Asked(*(a + b for a, b in zip(astuple(self._asked), astuple(more), strict=True)))

    def describe(self) -> dict[str, Any]:
        """Return the endpoint with its totals, and how many texts it was asked about."""
        return {**self._writer.describe(), "asked": vars(self.asked)}

    def sentence(self) -> str:
        """Say what it was used for, and what that cost."""
        asked, cost = self.asked, self.cost_usd
        if not asked.texts:
            return f"{self.stage.model} was asked nothing: every text was answered here"
        price = "" if cost is None else f"; {cost:.4g} USD"
        failed = f", {asked.failed:,} not answered" if asked.failed else ""
        texts = f"{asked.texts:,} text{'s' if asked.texts > 1 else ''}"
        return (
            f"{self.stage.model} was asked about {texts}: {asked.labelled:,} labelled, "
            f"{asked.none:,} fit no label{failed}{price}"
        )

    def close(self) -> None:
        """Drop every connection."""
        self._writer.close()
