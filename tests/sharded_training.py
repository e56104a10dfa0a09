"""What each of several processes does in test_pretrain_sharding.py: trainings one after the other, from a list.

torchrun --nproc-per-node 2 tests/sharded_training.py CORPUS OUT JOBS
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from alambic.events import Progress, drain
from alambic.train.distributed import joined
from alambic.train.pretrain import pretrain
from alambic.train.pretrain_model import Causal, new_decoder
from alambic.train.pretrain_optimiser import make_optimisers
from alambic.train.pretrain_params import PretrainParams
from alambic.train.pretrain_sharding import place

BASE = {"name": "tiny", "licence": "CC0"}
# Five windows a step, one at a time: of two processes one has three passes a step, the other two.
PARAMS = PretrainParams(
    hidden=32, layers=2, heads=2, context=32, tokens=12 * 160, batch_tokens=160, micro_tokens=32, threads=1,
    checkpoint_minutes=1e-9, valid_every=5 * 160, valid_tokens=64, learning_rate=1e-2, muon_rate=1e-2, decay=0.25,
    precision="f32", clip=0.3,
)  # fmt: skip


def train(corpus, out, changes, *, stop=None):
    """Train as PARAMS with `changes`; with `stop` the process kills itself after that step."""

    def on(event):
        if isinstance(event, Progress) and event.done == stop:
            os.kill(os.getpid(), signal.SIGKILL)

    return drain(pretrain(corpus / "shards", corpus / "tokenizer", replace(PARAMS, **changes), out, base=BASE), on)


def held():
    """Return how many numbers this process holds of weights, gradients and what Muon and AdamW keep, after a step."""
    model = new_decoder(PARAMS, vocabulary=320, special={})
    objective = Causal(model, PARAMS, end_id=0, device=torch.device("cpu"))
    placed = place(objective, "full")
    optimisers = make_optimisers(model, PARAMS, muon=placed.muon)
    loss, _ = placed.run(objective.loss, np.arange(33, dtype=np.int64)[None], [0])
    loss.backward()
    optimisers.step()
    weights = list(model.parameters())
    kept = [v for part in optimisers.parts for values in part.state.values() for v in values.values() if v.ndim]
    lists = {"weights": weights, "gradients": [w.grad for w in weights], "states": kept}
    return {name: [sum(t.to_local().numel() for t in ts), sum(t.numel() for t in ts)] for name, ts in lists.items()}


if __name__ == "__main__":
    corpus, out, jobs = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    with joined() as world:
        (out / f"held-{world.rank}.json").write_text(json.dumps(held()))
        for name, job in jobs.items():
            train(corpus, out / name, job["changes"], stop=job.get("stop"))
