"""The dtype of a training's matrix products, from `train.dtype` and the device. Weights stay float32."""

import contextlib

import torch

from miniplm_udf.config.training import TrainConfig


def product_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Returns the dtype of matrix products: bfloat16 by config, and on a GPU with `dtype: auto`; otherwise float32.

    Args:
        config: `dtype`.
        device: where the model trains.
    """
    is_bfloat16 = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    return torch.bfloat16 if is_bfloat16 else torch.float32


def autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Returns the context of a forward pass.

    Args:
        config: `dtype`.
        device: where the model trains.
    """
    if product_dtype(config, device) == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
