"""Where the weights of a pre-training are: whole in every process, or cut over the processes (FSDP).

Cut, each process holds some rows of every weight, of its gradient and of its optimiser's state. The weights of a block
are put together before it computes and dropped after it; each backward pass adds the gradients up and leaves every
process its rows (ZeRO stage 3: Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054; Zhao et al. 2023,
https://arxiv.org/abs/2304.11277). It is torch's `fully_shard` with the settings of accelerate's
FullyShardedDataParallelPlugin, so that it obeys `accelerate launch` and `accelerate config`. `Accelerator.prepare` is
not used: it shards on accelerators alone and takes the plugin for data parallel training on CPUs (accelerate 1.15,
`AcceleratorState`), and it averages gradients by process, where ours are divided by the tokens of the whole step.

Checkpoints and models are whole and the same files either way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from alambic._extras import load
from alambic.errors import TrainError
from alambic.train.distributed import exchanging, sum_gradients, world
from alambic.train.pretrain_optimiser import Optimisers

if TYPE_CHECKING:
    from alambic.train.pretrain_loop import Objective

T = TypeVar("T")
_HINT = "of the settings of FSDP only fsdp_reshard_after_forward = true or false is taken; see docs/guides/pretrain.md"


class Replicated:
    """Every process holds all weights; gradients are added up once a step."""

    in_step = False
    muon: type[torch.optim.Optimizer] | None = None

    def __init__(self, objective: Objective) -> None:
        self.model = objective.model

    def run(self, compute: Callable[..., T], *args: Any) -> T:
        """Return what `compute` makes of `args`."""
        return compute(*args)

    look = run

    def clip(self, most: float) -> float:
        """Add up the gradients of all processes and scale them down to a norm of `most`; return what it was."""
        weights = [p for p in self.model.parameters() if p.requires_grad]
        sum_gradients(weights)
        return float(torch.nn.utils.clip_grad_norm_(weights, most))

    def whole(self) -> dict[str, Tensor] | None:
        """Return all weights by name where a file is written; None: those of the model are whole."""
        return None

    def tensors(self, optimisers: Optimisers) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"model": self.model.state_dict(), "optimisers": optimisers.state_dict()}

    def take(self, tensors: dict[str, Any], optimisers: Optimisers) -> None:
        """Go on from what `tensors` gave."""
        self.model.load_state_dict(tensors["model"])
        optimisers.load_state_dict(tensors["optimisers"])


class Sharded:
    """Every process holds some rows of every weight; whoever calls a method, all processes must.

    Attributes:
        in_step: every process makes as many passes as the others, and none saves alone.
        muon: what stands for torch's Muon; None: nothing.

    Args:
        objective: its weights are cut here, so before its optimisers are made.

    Raises:
        MissingExtra: accelerate is not installed.
        TrainError: the launcher asks of FSDP what this training does not do.
    """

    in_step = True

    def __init__(self, objective: Objective) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        again = reshards()
        from alambic.train.pretrain_muon import ShardedMuon

        self.model = objective.model
        self.muon: type[torch.optim.Optimizer] | None = ShardedMuon
        mesh = init_device_mesh(objective.device.type, (world().size,))
        blocks = list(self.model.model.layers)
        for block in blocks:
            block.forward = partial(_inside, block)
            fully_shard(block, mesh=mesh, reshard_after_forward=again)
        # Embeddings, head and norms: needed from the first to the last moment of a pass.
        self._root = fully_shard(_Root(self.model), mesh=mesh, reshard_after_forward=False)
        self._units = [self._root, *blocks]
        for unit in self._units:  # a sum, as without sharding: the divisor is that of the whole step
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        objective.enter = _enter

    def run(self, compute: Callable[..., T], *args: Any) -> T:
        """Return what `compute` makes of `args` with the weights put together as they are needed."""
        made: T = self._root(compute, *args)
        return made

    def look(self, compute: Callable[..., T], *args: Any) -> T:
        """Do the same without a way back."""
        with torch.no_grad(), exchanging():
            made = self.run(compute, *args)
            for unit in self._units:
                unit.reshard()
        return made

    def clip(self, most: float) -> float:
        """Scale the gradients, which are added up already, down to a norm of `most` over all processes; return it."""
        norm = torch.nn.utils.clip_grad_norm_(list(self.model.parameters()), most)
        return float(norm.full_tensor())

    def whole(self) -> dict[str, Tensor] | None:
        """Put all weights together on the CPU of the process that writes; return None in the others."""
        with torch.no_grad(), exchanging():
            made = {id(weight): _whole(weight) for weight in self.model.parameters()}  # tied ones once
        if not world().writes:
            return None
        names = {name: made[id(w)] for name, w in self.model.named_parameters(remove_duplicate=False)}
        return {name: names.get(name, value) for name, value in self.model.state_dict().items()}

    def tensors(self, optimisers: Optimisers) -> dict[str, Any]:
        """Return what a checkpoint keeps; only where it is written is it whole."""
        with torch.no_grad(), exchanging():
            return {"model": self.whole(), "optimisers": _whole(optimisers.state_dict())}

    def take(self, tensors: dict[str, Any], optimisers: Optimisers) -> None:
        """Go on from what either kind of training has kept: each process takes its rows."""
        own = self.model.state_dict()
        with torch.no_grad():
            rows = {name: cut(value, own[name]) if name in own else value for name, value in tensors["model"].items()}
            self.model.load_state_dict(rows)
        for part, state in zip(optimisers.parts, tensors["optimisers"], strict=True):
            weights = [weight for group in part.param_groups for weight in group["params"]]
            kept = {i: {name: cut(value, weights[i]) for name, value in values.items()}
                    for i, values in state["state"].items()}  # fmt: skip
            part.load_state_dict({**state, "state": kept})


def place(objective: Objective, sharding: str) -> Replicated | Sharded:
    """Put the weights of `objective` where ``sharding`` says (``none`` or ``full``); one process holds them all.

    Raises:
        MissingExtra: accelerate is not installed.
        TrainError: the launcher asks of FSDP what this training does not do.
    """
    return Sharded(objective) if sharding == "full" and world().size > 1 else Replicated(objective)


def reshards() -> bool:
    """Return whether a block's weights are dropped between its forward and its backward pass, as the launcher says.

    Raises:
        MissingExtra: accelerate is not installed.
        TrainError: the launcher asks for what this training does not do, or torch is too old.
    """
    load("accelerate")
    fsdp = load("torch.distributed.fsdp")
    if not hasattr(getattr(fsdp, "FSDPModule", None), "set_force_sum_reduction_for_comms"):
        raise TrainError(f"sharding = 'full' needs a newer torch than {torch.__version__}",
                         hint="pip install --upgrade torch")  # fmt: skip
    plugin_of = load("accelerate.utils").FullyShardedDataParallelPlugin
    try:
        plugin = plugin_of(fsdp_version=2)
    except ValueError as error:
        raise TrainError(f"the settings of FSDP given to accelerate are not possible: {error}", hint=_HINT) from error
    asked = {
        "fsdp_offload_params": type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy",
        "fsdp_activation_checkpointing": plugin.activation_checkpointing,
        "fsdp_ignored_modules": plugin.ignored_modules is not None,
    }
    if wrong := [name for name, value in asked.items() if value]:
        raise TrainError(f"accelerate is told {', '.join(wrong)}, which pretrain does not do", hint=_HINT)
    return bool(plugin.reshard_after_forward)


class _Root(nn.Module):  # type: ignore[misc]
    """The whole computation as one module, so that FSDP sees it begin and end."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[..., tuple[Any, ...]], *args: Any) -> tuple[Any, ...]:
        # FSDP hangs its backward pass on what comes out, and warns of views (the two losses are parts of one tensor).
        return tuple(part.clone() if isinstance(part, Tensor) else part for part in compute(*args))


def _inside(block: Any, compute: Callable[[Any, Tensor], Tensor], x: Tensor) -> Tensor:
    """Do what stands for the forward pass of `block`."""
    return compute(block, x)


def _enter(block: Any, compute: Callable[[Any, Tensor], Tensor], x: Tensor) -> Tensor:
    """Compute a block as a call of its module, before and after which FSDP does its work."""
    made: Tensor = block(compute, x)
    return made


def _whole(value: Any) -> Any:
    """Put together every cut tensor of nested `value`: on the CPU of the process that writes, None in the others."""
    if hasattr(value, "full_tensor"):
        full = value.detach().full_tensor()
        return full.cpu() if world().writes else None
    if isinstance(value, dict):
        return {key: _whole(part) for key, part in value.items()}
    return [_whole(part) for part in value] if isinstance(value, list) else value


def cut(full: Any, like: Any) -> Any:
    """Return this process's rows of `full`, cut as `like` is; what has another shape (a count of steps) as it is."""
    from torch.distributed.tensor import distribute_tensor

    if not hasattr(like, "placements") or full.shape != like.shape:
        return full
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
