"""The training loss: per-token negative log-likelihood, and the weights that make a batch's loss out of it.

Tensor names carry axes: B sequences, T tokens of input, V entries of the vocabulary, N = B * T.
Inputs: logits_BTV in the forward pass's dtype, targets_BT, mask_BT. Outputs: nats in fp32. Owns no model and no
reduction over ranks: weights are unnormalised and come with the count that normalises them, so that micro-batches and
ranks add up to the loss of the whole batch.
"""

from typing import Any, Literal

import torch

_TILE_ENTRIES = 1 << 24  # logits that are in fp32 at one time: 64 MiB


class _TargetNll(torch.autograd.Function):
    """Cross-entropy that keeps only the logits and a log-sum-exp per token between forward and backward.

    `F.cross_entropy` keeps a log-softmax as large as the logits, in fp32 even where the logits are bf16.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        tile = max(1, _TILE_ENTRIES // logits_NV.shape[1])
        lse_N = torch.cat([torch.logsumexp(part.float(), dim=-1) for part in logits_NV.split(tile)])
        ctx.save_for_backward(logits_NV, targets_N, lse_N)
        return lse_N - logits_NV.gather(1, targets_N[:, None])[:, 0].float()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits_NV, targets_N, lse_N = ctx.saved_tensors
        (gradient_N,) = gradients
        tile = max(1, _TILE_ENTRIES // logits_NV.shape[1])
        result_NV = torch.empty_like(logits_NV)
        for start in range(0, logits_NV.shape[0], tile):
            part = slice(start, start + tile)
            probability = (logits_NV[part].float() - lse_N[part, None]).exp_()
            probability.scatter_add_(1, targets_N[part, None], torch.full_like(lse_N[part, None], -1.0))
            result_NV[part] = probability.mul_(gradient_N[part, None])
        return result_NV, None


def target_nll(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """-log p of each target, in nats.

    Args:
        logits_BTV: float32 or bfloat16.
        targets_BT: int64 ids below V.

    Returns:
        float32 of shape (B, T).
    """
    nll_N: torch.Tensor = _TargetNll.apply(logits_BTV.flatten(0, 1), targets_BT.flatten())
    return nll_N.view(targets_BT.shape)


def target_weights(
    inputs_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    separator_id: int,
    loss: Literal["official", "token_mean"],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights w and a count c such that the loss of a batch is sum(w * nll) / c.

    official: the mean per sequence over targets whose input is not the separator, then the mean over sequences; one
    with no such target (padding only) counts nowhere. token_mean: the mean over all targets.

    Args:
        inputs_BT: int64 input ids.
        mask_BT: 1 where the position has a target.
        separator_id: the document separator.
        loss: which of the two.

    Returns:
        (weights_BT float32, count float64 scalar). Counts of parts of a batch add up.

    Source: the official implementation of arXiv 2410.17215 (mean per instance, separator inputs masked).
    """
    weights_BT = mask_BT.float()
    if loss == "token_mean":
        return weights_BT, weights_BT.sum(dtype=torch.float64)
    weights_BT = weights_BT * (inputs_BT != separator_id)
    targets_B = weights_BT.sum(dim=1, keepdim=True)
    return weights_BT / targets_B.clamp(min=1), (targets_B > 0).sum(dtype=torch.float64)
