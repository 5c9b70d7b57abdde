"""The whole state of a model and its optimiser as plain CPU tensors, however the ranks divide them.

Input: a model whose weights are plain tensors or shards (parallel.py), and its optimiser. Output: on rank 0, one
dict of whole tensors by name, which any number of ranks can load. Tied weights are one tensor in it. torch's
`distributed.checkpoint.state_dict` gathers and divides; this module copies what the next step would overwrite, and
compares the ranks.
"""

import hashlib
from collections.abc import Iterable
from typing import Any, TypedDict

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from miniplm_udf.errors import CorpusError
from miniplm_udf.storage import Json
from trainer.ranks.distributed import World


class OptimizerState(TypedDict):
    """The state of an optimiser, as torch's `get_optimizer_state_dict` gives it.

    Attributes:
        state: tensors of each weight (`step`, `exp_avg`, `exp_avg_sq`), by the weight's name.
        param_groups: names of the weights (`params`) and settings of each group.
    """

    state: dict[str, dict[str, torch.Tensor]]
    param_groups: list[Json]


class Tensors(TypedDict):
    """Whole tensors on the CPU.

    Attributes:
        model: weights by name.
        optimizer: the optimiser's state.
    """

    model: dict[str, torch.Tensor]
    optimizer: OptimizerState


def gather(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Tensors | None:
    """Copies the state to the CPU of rank 0. All ranks call it.

    Args:
        model: the transformers model, without the wrapper of DDP.
        optimizer: the model's optimiser.

    Returns:
        The state, which later steps do not change; None on ranks other than 0.
    """
    weights = gather_weights(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    if weights is None:
        return None
    values = [value for state in optimizer.state.values() for value in state.values()]
    return Tensors(model=weights, optimizer=_copied(state, _live(values)))


def gather_weights(model: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """Copies the weights to the CPU of rank 0. All ranks call it.

    Args:
        model: the transformers model, without the wrapper of DDP.

    Returns:
        Whole weights by name; tied weights are one tensor. None on ranks other than 0.
    """
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not state:
        return None
    first_names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        state[name] = state[first_names.setdefault(id(parameter), name)]
    return dict(_copied(state, _live([*model.parameters(), *model.buffers()])))


def set_weights(model: torch.nn.Module, tensors: Tensors | None, world: World) -> None:
    """Gives rank 0's saved weights to the models of all ranks.

    Args:
        model: changed in place; not yet divided.
        tensors: the saved state; None on ranks other than 0.
        world: the place of this process among the ranks.
    """
    set_model_state_dict(model, dict(tensors["model"]) if tensors else {}, options=_from_first(world))


def set_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors | None, world: World
) -> None:
    """Gives rank 0's saved optimiser state to the optimisers of all ranks.

    Args:
        model: the transformers model, divided among the ranks, without the wrapper of DDP.
        optimizer: changed in place.
        tensors: the saved state; None on ranks other than 0.
        world: the place of this process among the ranks.
    """
    set_optimizer_state_dict(
        model, optimizer, dict(tensors["optimizer"]) if tensors else {}, options=_from_first(world)
    )


def check_equal_weights(model: torch.nn.Module, world: World) -> None:
    """Checks that the model has the same weights on every rank.

    Args:
        model: not yet divided.
        world: the place of this process among the ranks.

    Raises:
        CorpusError: on every rank, if the weights differ.
    """
    if world.size == 1:
        return
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).reshape(-1).numpy().data)
    digests = world.from_all(digest.hexdigest())
    others = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if others:
        raise CorpusError(
            f"the weights of rank {others[0]} differ from those of rank 0 before the first step: nothing was trained "
            "or written; install the same versions of torch and transformers on all machines"
        )


def _from_first(world: World) -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=world.size > 1)


def _live(values: Iterable[object]) -> set[int]:
    """Addresses of the memory, on the CPU, of tensors or shards that the next step changes."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return {part.untyped_storage().data_ptr() for part in parts if part.device.type == "cpu"}


def _copied(values: Any, live: set[int]) -> Any:
    """Nested values, with a copy of each tensor whose memory is `live`; a tensor that occurs twice is copied once."""
    copies: dict[tuple[int, torch.Size], torch.Tensor] = {}

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in live:
            return tensor
        key = (tensor.data_ptr(), tensor.shape)
        if key not in copies:
            copies[key] = tensor.detach().clone()
        return copies[key]

    return tree_map_only(torch.Tensor, copy, values)
