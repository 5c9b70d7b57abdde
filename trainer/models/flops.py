"""Model FLOPs of a training step; MFU compares them with the peak of the chips (`scoring.peaks`).

    FLOPs per token = 3 (2 P + 2 layers width T) = 6 P + 6 layers width T; a teacher adds its forward pass

P parameters in matrix products, T tokens of a sequence, width of attention: heads times the size of a head. A token
attends to half of its sequence on average; the backward pass has twice the FLOPs of the forward pass. FLOPs that
activation checkpointing repeats do not count. Also owns the number of distillation steps that cost as much as a number
of steps without a teacher. Arithmetic only; needs torch alone.
"""

from typing import Any

from miniplm_udf.scoring.model_flops import model_sizes


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
    return model_sizes(model).forward_flops([sequence_length]) / sequence_length


def training_flops_per_token(model: Any, sequence_length: int, teacher: Any = None) -> float:
    """Returns the model FLOPs of a training step for one token: forward and backward pass, and the teacher's forward.

    Args:
        model: the student.
        sequence_length: T, tokens of a sequence.
        teacher: the causal LM that the student is distilled from; None without a teacher.
    """
    student = 3 * forward_flops_per_token(model, sequence_length)
    return student if teacher is None else student + forward_flops_per_token(teacher, sequence_length)
