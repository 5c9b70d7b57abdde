"""The loss of Vanilla KD: the LM loss, mixed with the forward KL divergence from a teacher to the student.

    loss = sum_n w_n ((1 - ratio) * -log p_n(target) + ratio * sum_k q_nk (log q_nk - log p_nk))
    d loss / d logit_nv = w_n (p_nv - ratio * q_nv - (1 - ratio) * [v is the target])

p is the student's softmax over its whole vocabulary, q the teacher's over the ids of the tokenizer. Axes in tensor
names: N positions, n positions of a chunk, V entries of the student's vocabulary, K ids of the tokenizer (K <= V).
Inputs: the logits of both models for a chunk. Outputs: float32 sums, in nats, and the gradient in the place of the
student's logits (chunked_head.py). Neither model's logits are held for more than one chunk. Pure; needs torch alone.

Source: the official implementation of arXiv 2410.17215 (`_get_kd_loss`), which logs the cross-entropy of p under q: the
KL divergence and the entropy of q, which does not depend on the student. The gradients are equal.
"""

from collections.abc import Callable

import torch

from trainer.losses.chunked_head import PartLosses, chunk_positions

# A teacher excludes an entry by the logit -inf, and 0 * inf is not a number. exp(-1e4) is 0 too.
_LOWEST_LOGIT = -1e4
# A chunk has three matrices as large as the student's float32 logits; on a GPU also the student's bfloat16 logits.
_PARTS = {"cpu": 2, "cuda": 4}

KdChunkLoss = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]
]


def kd_chunk_loss(
    logits_nV: torch.Tensor,
    teacher_nK: torch.Tensor,
    targets_n: torch.Tensor,
    weights_n: torch.Tensor,
    ratio: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the losses of a chunk, and the gradient of the mixed loss in the place of the student's logits.

    Args:
        logits_nV: the student's logits, float32 or bfloat16; overwritten with the gradient everywhere but at the
            targets.
        teacher_nK: the teacher's logits of the tokenizer's ids, float32; overwritten.
        targets_n: int64 ids, each below K.
        weights_n: float32 weights of the targets.
        ratio: share of the KL divergence in the loss, 0 to 1.

    Returns:
        (sums of weight * loss as float32 of shape (3,): mixed loss, -log p of the target, KL divergence; the gradient
        at the targets (n,) in the dtype of the student's logits).
    """
    wide_nV, n_ids = logits_nV.float(), teacher_nK.shape[1]
    wide_nV.sub_(wide_nV.amax(dim=1, keepdim=True))
    teacher_nK.sub_(teacher_nK.amax(dim=1, keepdim=True)).clamp_(min=_LOWEST_LOGIT)
    target_n = wide_nV.gather(1, targets_n[:, None])[:, 0]
    teacher_target_n = teacher_nK.gather(1, targets_n[:, None])[:, 0]
    q_nK = teacher_nK.exp()
    q_sum_n = q_nK.sum(dim=1)
    # Differences of logits first: the sum of small numbers keeps more digits than the difference of two large sums.
    kl_n = teacher_nK.sub_(wide_nV[:, :n_ids]).mul_(q_nK).sum(dim=1) / q_sum_n - q_sum_n.log()
    p_sum_n = wide_nV.exp_().sum(dim=1)
    kl_n = kl_n + p_sum_n.log()
    log_p_n, log_q_n = target_n - p_sum_n.log(), teacher_target_n - q_sum_n.log()
    wide_nV.mul_((weights_n / p_sum_n)[:, None])
    wide_nV[:, :n_ids].sub_(q_nK.mul_((ratio * weights_n / q_sum_n)[:, None]))
    if wide_nV.dtype != logits_nV.dtype:
        logits_nV.copy_(wide_nV)
    # Not from the rounded p: p - 1 would lose its digits where p is near 1.
    at_target_n = (1 - ratio) * torch.expm1(log_p_n) + ratio * (log_p_n.exp() - log_q_n.exp())
    lm, kl = -(log_p_n * weights_n).sum(), (kl_n * weights_n).sum()
    losses = torch.stack([(1 - ratio) * lm + ratio * kl, lm, kl])
    return losses, (at_target_n * weights_n).to(logits_nV.dtype)


def kd_losses(
    teacher_logits: Callable[[slice], torch.Tensor],
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
    ratio: float,
    loss_of: KdChunkLoss = kd_chunk_loss,
) -> PartLosses:
    """Returns the function that `chunked_losses` and `losses_of_logits` call for each chunk; it returns three losses.

    Args:
        teacher_logits: computes the teacher's float32 logits (n, K) for some positions, in memory that may be
            overwritten.
        targets_N: int64 ids, each below K.
        weights_N: float32 weights of the targets.
        ratio: share of the KL divergence in the loss, 0 to 1.
        loss_of: `kd_chunk_loss`, or its compiled form.
    """

    def losses_of(part: slice, logits_nV: torch.Tensor) -> torch.Tensor:
        losses, at_target_n = loss_of(logits_nV, teacher_logits(part), targets_N[part], weights_N[part], ratio)
        logits_nV.scatter_(1, targets_N[part, None], at_target_n[:, None])
        return losses

    return losses_of


def kd_chunk_positions(n_positions: int, vocab_size: int, device_type: str) -> int:
    """Returns the number of positions in a chunk, which is smaller than without a teacher.

    Args:
        n_positions: N, positions in one call.
        vocab_size: V, entries of the student's vocabulary.
        device_type: `cpu` or `cuda`.
    """
    parts = _PARTS["cpu" if device_type == "cpu" else "cuda"]
    return max(1, chunk_positions(n_positions, vocab_size, device_type) // parts)
