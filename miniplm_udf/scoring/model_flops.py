"""Sizes of a loaded model that its FLOPs depend on: weights in matrix products, layers, the width of attention.

Input: a model of transformers; output: the numbers that `flops.forward_flops` takes. Executor side and in the trainer;
pure.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from miniplm_udf.scoring.flops import forward_flops


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model that its FLOPs depend on.

    Attributes:
        parameters: weights in matrix products.
        layers: layers with attention; 0 for a model without attention.
        width: heads times the size of a head.
        has_experts: whether a token passes through a part of the weights only (a mixture of experts).
    """

    parameters: int
    layers: int
    width: int
    has_experts: bool

    def forward_flops(self, windows: Sequence[int]) -> float:
        """Returns the model FLOPs of forward passes; all experts count, although a token uses a few.

        Args:
            windows: tokens of each window.
        """
        return forward_flops(self.parameters, self.layers, self.width, windows)


def model_sizes(model: Any) -> ModelSizes:
    """Returns the sizes of a model.

    Args:
        model: a causal LM. Without a config or attention, only the products of its weights are counted.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads, layers, hidden = (
        _number(config, name) for name in ("num_attention_heads", "num_hidden_layers", "hidden_size")
    )
    head_size = _number(config, "head_dim") or (hidden // heads if heads else 0)
    return ModelSizes(matrix_parameters(model), layers if heads else 0, heads * head_size, _has_experts(config))


def matrix_parameters(model: torch.nn.Module) -> int:
    """Returns the number of weights in matrix products: an embedding counts if the output layer shares it, a bias not.

    Args:
        model: a causal LM.
    """
    matrices: dict[int, int] = {}
    for module in model.modules():
        weights = [weight for weight in module.parameters(recurse=False) if weight.dim() >= 2]
        if isinstance(module, torch.nn.Embedding):
            continue
        if not weights and hasattr(module, "in_features"):  # a packed or quantised layer, whose weight is no parameter
            matrices[id(module)] = int(module.out_features) * int(module.in_features)
        matrices |= {id(weight): weight.numel() for weight in weights}
    return sum(matrices.values())


def _number(config: Any, name: str) -> int:
    """A number of a config; 0 where there is none (a few architectures have a list with a number for each layer)."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0


def _has_experts(config: Any) -> bool:
    """Whether a config has a number of experts: num_experts, num_local_experts, n_routed_experts and others."""
    settings = vars(config) if config is not None else {}
    return any("experts" in name and isinstance(value, int) and value > 1 for name, value in settings.items())
