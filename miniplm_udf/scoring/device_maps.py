"""Splits a causal LM over the GPUs of one process, by layers: accelerate's `device_map`.

Each GPU computes its layers in turn, so a split model is slow, but it needs no GPU that holds it whole. Input: the
torch devices of the process. Output: arguments of `from_pretrained`, and a check that every weight is on one of the
devices: on the CPU or the disk scoring would take for ever. Executor side; pure, except for the GPUs' free memory.
Loads torch inside the functions.
"""

from collections.abc import Sequence
from typing import Any, TypedDict

from miniplm_udf.errors import ModelLoadError

# GPU memory that weights leave free for a forward pass: a tile of float32 logits (`head`, 128 MiB) with three temporary
# copies, the buffers of cuBLAS, and the activations of a window. A batch that needs more is halved.
MARGIN_BYTES = 1024**3


class SplitError(ModelLoadError):
    """The layers of a split model do not fit on its devices now, even if the sum of the free memory is large enough."""


class SplitOptions(TypedDict, total=False):
    """Arguments of `from_pretrained`. `max_memory` is in bytes by device number."""

    device_map: str | dict[str, str]
    max_memory: dict[int, int]


def split_options(devices: Sequence[str]) -> SplitOptions:
    """The arguments of `from_pretrained` that place a model on devices, balanced, so that all have room to compute.

    Args:
        devices: torch devices: `cuda:N`, or `cpu` alone.
    """
    import torch

    if list(devices) == ["cpu"]:
        return {"device_map": {"": "cpu"}}
    free = {torch.device(device).index: torch.cuda.mem_get_info(device)[0] for device in devices}
    return {
        "device_map": "auto",
        "max_memory": {number: max(0, n_bytes - MARGIN_BYTES) for number, n_bytes in free.items()},
    }


def is_split(model: Any) -> bool:
    """Whether a loaded model is on several devices.

    Args:
        model: a model of transformers.
    """
    return len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1


def check_split(model: Any, devices: Sequence[str]) -> None:
    """Refuses a model that is not on the devices alone.

    Args:
        model: a model of transformers, loaded with `split_options`.
        devices: torch devices.

    Raises:
        SplitError: some of its weights are on the CPU or on the disk.
    """
    import torch

    expected = {torch.device(device) for device in devices}
    outside = [name for name, weight in model.named_parameters() if weight.device not in expected]
    if outside:
        raise SplitError(
            f"device_map: expected all weights on {', '.join(devices)}, found {len(outside)} that do not fit there and "
            f"would be on the CPU or the disk ({outside[0]}, ...), where scoring takes for ever; give the process more "
            f"GPUs, take a smaller dtype, or ask a server that holds the model (backend: openai)"
        )
