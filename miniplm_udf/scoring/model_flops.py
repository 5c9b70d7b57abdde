"""Sizes of a loaded model that its FLOPs depend on: weights in matrix products, layers, the width of attention.

Input: a model of transformers; output: the numbers that `flops.forward_flops` takes. Executor side and in the trainer;
pure.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from miniplm_udf.scoring.flops import forward_flops

# Kinds of layers of transformers whose tokens do not attend to each other: products of a fixed size for each token.
_NO_ATTENTION = frozenset({"linear_attention", "mamba", "conv", "moe", "mlp"})


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model that its FLOPs depend on.

    Attributes:
        parameters: weights in matrix products.
        head_parameters: those of the output layer, if the model has one.
        layers: layers with attention; 0 for a model without attention.
        width: heads times the size of a head.
        has_experts: whether a token passes through a part of the weights only (a mixture of experts).
    """

    parameters: int
    head_parameters: int
    layers: int
    width: int
    has_experts: bool

    def forward_flops(self, windows: Sequence[int], n_scored: int | None = None) -> float:
        """Returns the model FLOPs of forward passes; all experts count, although a token uses a few.

        A layer with a sliding window counts as full attention. Of a layer without attention, such as a state space,
        only the products of its weights count.

        Args:
            windows: tokens of each window.
            n_scored: positions that the output layer computes; None stands for all.
        """
        left_out = 0 if n_scored is None else sum(windows) - n_scored
        whole = forward_flops(self.parameters, self.layers, self.width, windows)
        return whole - forward_flops(self.head_parameters, 0, 0, [left_out])


def model_sizes(model: Any) -> ModelSizes:
    """Returns the sizes of a model.

    Args:
        model: a causal LM. Without a config or attention, only the products of its weights are counted.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads, hidden = _number(config, "num_attention_heads"), _number(config, "hidden_size")
    head_size = _number(config, "head_dim") or (hidden // heads if heads else 0)
    output_layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return ModelSizes(
        parameters=matrix_parameters(model),
        head_parameters=0 if output_layer is None else output_layer.weight.numel(),
        layers=attention_layers(config),
        width=heads * head_size,
        has_experts=_has_experts(config),
    )


def attention_layers(config: Any) -> int:
    """Returns the number of layers with attention: those of `layer_types` if the config has this list, otherwise all.

    Args:
        config: a text config of transformers; None for a model without a config.
    """
    if not _number(config, "num_attention_heads"):
        return 0
    layers = _number(config, "num_hidden_layers")
    kinds = (getattr(config, "layer_types", None) or [])[:layers]
    return sum(kind not in _NO_ATTENTION for kind in kinds) if kinds else layers


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
