"""Divides a model among ranks: DDP, FSDP2 or HSDP (`train.parallel`), and keeps them equal to one process.

Input: a whole module on each rank with equal weights. Output: the module that the loop calls. DDP adds up gradients in
the last micro-batch of a step. FSDP shards each transformer block; the rest (embeddings, last norm, head) is one more
group, so that tied weights stay one tensor and a loss inside the module sees the whole head. Sharded gradients are
added up in every micro-batch, because a whole gradient would cost the memory that sharding saves; HSDP adds up the
copies in the last one only. Everything is gathered and reduced in float32, so the sums are the same as with DDP.
"""

import contextlib
import typing
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from miniplm_udf.config.training import TrainConfig
from miniplm_udf.errors import ConfigError
from trainer.ranks.distributed import World


def divide(module: torch.nn.Module, config: TrainConfig, world: World) -> torch.nn.Module:
    """Divides a module among the ranks. With one rank it stays as it is.

    Args:
        module: holds a transformers model, is on `world.device`, and has the same weights on every rank. FSDP replaces
            its weights by shards in place, so an optimiser is made afterwards.
        config: `parallel` and `shard_ranks`.
        world: the place of this process among the ranks.

    Returns:
        The module to call in the training loop.

    Raises:
        ConfigError: `shard_ranks` does not divide the number of ranks.
    """
    if world.size == 1:
        return module
    if config.parallel == "ddp":
        return DistributedDataParallel(module)
    mesh = _mesh(config, world)
    for block in _blocks(module):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def undivided(module: torch.nn.Module) -> Any:
    """Returns the module that was given to `divide`; with FSDP its weights are shards.

    Args:
        module: the result of `divide`.
    """
    return module.module if isinstance(module, DistributedDataParallel) else module


def _mesh(config: TrainConfig, world: World) -> DeviceMesh:
    """The ranks in one dimension (FSDP), or as copies × shards (HSDP)."""
    if config.parallel == "fsdp":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    shards = config.shard_ranks or world.size // world.nodes
    if world.size % shards:
        raise ConfigError(
            f"train.shard_ranks: expected a divisor of the number of ranks ({world.size}), found {shards}"
        )
    return init_device_mesh(world.device.type, (world.size // shards, shards), mesh_dim_names=("copy", "shard"))


def _blocks(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The outermost modules that transformers says must not be split: the blocks of the model."""
    names = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    blocks: list[torch.nn.Module] = []

    def collect(part: torch.nn.Module) -> None:
        for child in part.children():
            if type(child).__name__ in names:
                blocks.append(child)
            else:
                collect(child)

    collect(module)
    return blocks


def gradient_sums(module: torch.nn.Module, last: bool) -> contextlib.AbstractContextManager[object]:
    """Returns a context for one micro-batch, in which ranks add up gradients as described above.

    Args:
        module: the result of `divide`.
        last: whether this is the last micro-batch of the step.
    """
    if isinstance(module, DistributedDataParallel) and not last:
        return typing.cast(contextlib.AbstractContextManager[object], module.no_sync())
    if isinstance(module, FSDPModule):
        module.set_requires_all_reduce(last)
    return contextlib.nullcontext()


def clip_gradient(module: torch.nn.Module, limit: float) -> torch.Tensor:
    """Scales the gradient of all ranks down to a norm of at most `limit`.

    Args:
        module: the result of `divide`.
        limit: largest norm; infinite leaves the gradient as it is.

    Returns:
        The norm of the whole gradient before clipping, equal on every rank; on the module's device.
    """
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
