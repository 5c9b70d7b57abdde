"""Model FLOPs of a training step, and the peak of the chips that MFU compares them with.

    FLOPs per token = 3 (2 P + 2 layers width T) = 6 P + 6 layers width T; a teacher adds its forward pass

P parameters in matrix products, T tokens of a sequence, width of attention: heads times the size of a head. A token
attends to half of its sequence on average; the backward pass has twice the FLOPs of the forward pass. FLOPs that
activation checkpointing repeats do not count. Also owns the number of distillation steps that cost as much as a number
of steps without a teacher. Arithmetic only; needs torch alone.
"""

from typing import Any

import torch

from miniplm_udf.scoring.cpu import PackedLinear
from miniplm_udf.scoring.flops import forward_flops

# Peak of bfloat16 products without sparsity in FLOP/s, by a part of the name that CUDA reports; the first match counts.
# Source: the data sheets of NVIDIA.
_PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
}


def matrix_parameters(model: torch.nn.Module) -> int:
    """Returns the number of weights in matrix products: an embedding counts if the output layer shares it, a bias not.

    Args:
        model: a causal LM.
    """
    matrices: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, PackedLinear):  # its weight is no parameter
            matrices[id(module)] = module.out_features * module.in_features
        elif not isinstance(module, torch.nn.Embedding):
            weights = [weight for weight in module.parameters(recurse=False) if weight.dim() >= 2]
            matrices |= {id(weight): weight.numel() for weight in weights}
    return sum(matrices.values())


def equal_compute_steps(steps: int, student_parameters: int, teacher_parameters: int) -> int:
    """Returns the steps of distillation that cost as much compute as `steps` steps of the student alone.

    A step of the student costs 6 FLOPs for each of its parameters and each token, a forward pass of the teacher 2:
    3 * N_s * steps / (3 * N_s + N_t), rounded.

    Args:
        steps: optimiser steps without a teacher.
        student_parameters: N_s, number of the student's weights.
        teacher_parameters: N_t, number of the teacher's weights.

    Source: arXiv 2410.17215, the baselines of equal training compute.
    """
    student = 3 * student_parameters
    return round(steps * student / (student + teacher_parameters))


def forward_flops_per_token(model: Any, sequence_length: int) -> float:
    """Returns the model FLOPs of a forward pass for one token.

    Args:
        model: a causal LM. Without a config or attention, only the products of its weights are counted.
        sequence_length: T, tokens of a sequence.
    """
    config = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", None) or 0
    head_size = getattr(config, "head_dim", None) or (config.hidden_size // heads if config and heads else 0)
    layers = config.num_hidden_layers if config and heads else 0
    parameters = matrix_parameters(model)
    return forward_flops(parameters, layers, heads * head_size, [sequence_length]) / sequence_length


def training_flops_per_token(model: Any, sequence_length: int, teacher: Any = None) -> float:
    """Returns the model FLOPs of a training step for one token: forward and backward pass, and the teacher's forward.

    Args:
        model: the student.
        sequence_length: T, tokens of a sequence.
        teacher: the causal LM that the student is distilled from; None without a teacher.
    """
    student = 3 * forward_flops_per_token(model, sequence_length)
    return student if teacher is None else student + forward_flops_per_token(teacher, sequence_length)


def peak_flops_per_second(device: torch.device, dtype: torch.dtype) -> float | None:
    """Returns the peak of a chip, or None if it is not known.

    Args:
        device: where the model trains.
        dtype: dtype of the matrix products; only the peak of bfloat16 is known.
    """
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)
