"""Time one way of predicting BANKING77 texts in a process of its own: `python alone.py int8|sentence|torch`.

Threads that one library keeps spinning slow another one down in an interleaved run; alone, each shows its best.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import sets
from run import HERE, data_folder

KEPT = HERE.parent / ".bench" / "quality"
_TEXTS = 1000


def predictor(name: str) -> Callable[[list[str]], Any]:
    """Return what predicts a list of texts."""
    if name == "int8":
        import alambic

        return alambic.open(KEPT / "banking77-0-int8.bundle").predict
    import torch

    import latency
    from alambic.model.encoder import Encoder

    torch.inference_mode().__enter__()
    encoder = Encoder.load(KEPT / "banking77-0.model")
    if name == "torch":
        return lambda texts: encoder(*latency.ids(encoder, texts)).argmax(1)
    sentence, head = latency.sentence_transformer(Path(KEPT / "banking77-0.model")), encoder.head
    return lambda texts: head(sentence.encode(texts, convert_to_tensor=True) * encoder.spec.scale)


def main() -> None:
    """Warm up, time each text, print p50 and p95."""
    predict = predictor(sys.argv[1])
    texts = sets.load(data_folder(), "banking77")[2].texts[:_TEXTS]
    for text in texts[:50]:
        predict([text])
    times = []
    for text in texts:
        began = time.perf_counter()
        predict([text])
        times.append(1000 * (time.perf_counter() - began))
    p50, p95 = np.percentile(times, [50, 95])
    print(json.dumps({"p50": p50, "p95": p95, "n": len(texts)}))


if __name__ == "__main__":
    main()
