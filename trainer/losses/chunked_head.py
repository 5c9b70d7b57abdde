"""From hidden states to the weighted sum of -log p of the targets, with the logits of a few positions at a time.

    loss = sum_n w_n * (logsumexp_v(h_n . W_v) - h_n . W_target(n))

Axes in tensor names: N positions, n positions of a chunk, D hidden size, V entries of the vocabulary. Inputs: hidden
states, the weight of the output layer, targets and their weights. Output: a float32 scalar, in nats. The gradients of
hidden states and weight are computed in the forward pass, chunk by chunk, while the logits of the chunk exist. So
nothing is computed twice, and no more than one chunk of logits is held (docs/training.md, Speed). `chunked_losses` does
this for any losses of a chunk; kd_loss.py has the losses of distillation. Pure; needs torch alone. Products have the
dtype of autocast, or else the dtype of the weight; sums and the weight's gradient are float32.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

# The most positions in a chunk. On a CPU the logits should stay in the cache; a GPU needs large products.
_MOST_POSITIONS = {"cpu": 256, "cuda": 4096}
# With fewer chunks, each chunk would hold too many logits at once. On a GPU, a chunk without compilation has its logits
# in bfloat16 and in float32: 6 bytes each, so that 16 chunks hold 0.094 of all float32 logits.
_FEWEST_CHUNKS = 16
# A smaller chunk saves no memory worth its cost (4 MiB in float32).
_FEWEST_ENTRIES = 1 << 20

ChunkLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
# Computes the losses of a chunk from its positions and logits; overwrites the logits with the gradient of the first
# loss.
PartLosses = Callable[[slice, torch.Tensor], torch.Tensor]


def chunk_positions(n_positions: int, vocab_size: int, device_type: str) -> int:
    """Returns the number of positions whose logits are held at a time.

    Args:
        n_positions: N, positions in one call.
        vocab_size: V, entries of the vocabulary.
        device_type: `cpu` or `cuda`.
    """
    kind = "cpu" if device_type == "cpu" else "cuda"
    share = max(math.ceil(n_positions / _FEWEST_CHUNKS), math.ceil(_FEWEST_ENTRIES / vocab_size))
    return max(1, min(n_positions, share, _MOST_POSITIONS[kind]))


def chunk_loss(
    logits_nV: torch.Tensor, targets_n: torch.Tensor, weights_n: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the loss of a chunk, and its gradient in the place of the logits.

    Args:
        logits_nV: float32 or bfloat16; overwritten with weight * p, the gradient everywhere but at the targets.
        targets_n: int64 ids, each below V.
        weights_n: float32 weights of the targets.

    Returns:
        (sum of weight * -log p, a float32 scalar; the gradient at the targets (n,) in the dtype of the logits).
    """
    wide_nV = logits_nV.float()
    largest_n = wide_nV.amax(dim=1)
    target_n = wide_nV.gather(1, targets_n[:, None])[:, 0] - largest_n
    wide_nV.sub_(largest_n[:, None]).exp_()
    sum_n = wide_nV.sum(dim=1)
    log_p_n = target_n - sum_n.log()
    wide_nV.mul_((weights_n / sum_n)[:, None])
    if wide_nV.dtype != logits_nV.dtype:
        logits_nV.copy_(wide_nV)
    # Computed in float32 from log p: in bfloat16, p - 1 would lose its digits where p is near 1.
    at_target_n = (torch.expm1(log_p_n) * weights_n).to(logits_nV.dtype)
    return -(log_p_n * weights_n).sum(), at_target_n


@functools.cache
def _adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch can add a product of matrices of this dtype to a float32 matrix in one call on this device."""
    matrix = torch.ones(16, 16, device=device, dtype=dtype)
    total = torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, matrix, matrix, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # this torch or this device has no such product
        return False
    return bool((total == 17).all())


def _add_product(total_VD: torch.Tensor, left_Vn: torch.Tensor, right_nD: torch.Tensor) -> None:
    """Adds a product of matrices to a float32 matrix."""
    if left_Vn.dtype == torch.float32:
        total_VD.addmm_(left_Vn, right_nD)
    elif _adds_to_float32(total_VD.device, left_Vn.dtype):
        torch.addmm(total_VD, left_Vn, right_nD, out_dtype=torch.float32, out=total_VD)
    else:
        total_VD += left_Vn @ right_nD


class _ChunkedLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, losses_of: PartLosses, n_losses: int, size: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        dtype = _product_dtype(weight_VD)
        left_ND, right_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        losses_K = torch.zeros(n_losses, dtype=torch.float32, device=hidden_ND.device)
        d_hidden_ND = torch.empty_like(left_ND)
        d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for part in _parts(len(left_ND), size):
                gradient_nV = left_ND[part] @ right_VD.T  # the logits, until `losses_of` overwrites them
                losses_K += losses_of(part, gradient_nV)
                torch.mm(gradient_nV, right_VD, out=d_hidden_ND[part])
                _add_product(d_weight_VD, gradient_nV.T, left_ND[part])
                del gradient_nV  # before the next chunk's logits are made
        ctx.gradients = d_hidden_ND.to(hidden_ND.dtype), d_weight_VD.to(weight_VD.dtype)
        return _outputs(ctx, losses_K)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_hidden_ND, d_weight_VD = ctx.gradients
        ctx.gradients = None  # a second reference would make autograd copy the weight's gradient
        return d_hidden_ND.mul_(outputs[0]), d_weight_VD.mul_(outputs[0]), None, None, None


class _LossesOfLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: torch.Tensor, losses_of: PartLosses, n_losses: int, size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses_K = torch.zeros(n_losses, dtype=torch.float32, device=logits_NV.device)
        gradient_NV = logits_NV.clone()
        with torch.autocast(logits_NV.device.type, enabled=False):
            for part in _parts(len(logits_NV), size):
                losses_K += losses_of(part, gradient_NV[part])
        ctx.gradient = gradient_NV
        return _outputs(ctx, losses_K)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient_NV, ctx.gradient = ctx.gradient, None
        return gradient_NV.mul_(outputs[0]), None, None, None


def _outputs(ctx: Any, losses_K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss that is differentiated, and the others, which are for the log alone."""
    others_K = losses_K[1:].clone()
    ctx.mark_non_differentiable(others_K)
    return losses_K[0].clone(), others_K


def chunked_losses(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, losses_of: PartLosses, n_losses: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes losses of the logits hidden_ND weight_VD^T, chunk by chunk, and the gradient of the first loss.

    Args:
        hidden_ND: hidden states in front of the output layer, float32 or bfloat16.
        weight_VD: weight of the output layer, which has no bias.
        losses_of: computes the losses of a chunk, and overwrites its logits with their gradient.
        n_losses: K, losses that `losses_of` returns.
        size: positions in a chunk.

    Returns:
        (the first loss, a float32 scalar; backward may be called on it once; the other K - 1 losses, float32, without a
        gradient).
    """
    losses: tuple[torch.Tensor, torch.Tensor] = _ChunkedLosses.apply(hidden_ND, weight_VD, losses_of, n_losses, size)
    return losses


def losses_of_logits(
    logits_NV: torch.Tensor, losses_of: PartLosses, n_losses: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the losses of `chunked_losses` for a model whose logits are not just hidden states times a weight.

    Args:
        logits_NV: the model's own logits, float32 or bfloat16; they stay as they are.
        losses_of, n_losses, size: see `chunked_losses`.

    Returns:
        The first loss and the other losses, as `chunked_losses` returns them.
    """
    losses: tuple[torch.Tensor, torch.Tensor] = _LossesOfLogits.apply(logits_NV, losses_of, n_losses, size)
    return losses


def weighted_nll(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
    loss_of: ChunkLoss = chunk_loss,
) -> torch.Tensor:
    """Computes sum(weight * -log p) over all positions. Backward may be called on the result once.

    Args:
        hidden_ND: hidden states in front of the output layer, float32 or bfloat16.
        weight_VD: weight of the output layer, which has no bias.
        targets_N: int64 ids, each below V.
        weights_N: float32 weights of the targets.
        loss_of: `chunk_loss`, or its compiled form.

    Returns:
        A float32 scalar, in nats.
    """

    def losses_of(part: slice, logits_nV: torch.Tensor) -> torch.Tensor:
        loss, at_target_n = loss_of(logits_nV, targets_N[part], weights_N[part])
        logits_nV.scatter_(1, targets_N[part, None], at_target_n[:, None])
        return loss

    size = chunk_positions(len(hidden_ND), len(weight_VD), hidden_ND.device.type)
    if torch.is_grad_enabled():
        return chunked_losses(hidden_ND, weight_VD, losses_of, 1, size)[0]
    total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    for part in _parts(len(hidden_ND), size):
        logits_nV = torch.nn.functional.linear(hidden_ND[part], weight_VD)
        nll_n = torch.nn.functional.cross_entropy(logits_nV.float(), targets_N[part], reduction="none")
        total += (nll_n * weights_N[part]).sum()
    return total


def _parts(n_positions: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, n_positions, size)]


def _product_dtype(weight: torch.Tensor) -> torch.dtype:
    device_type = weight.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype
