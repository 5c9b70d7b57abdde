"""The training loss: negative log-likelihood per token, and the weights that combine it to the loss of a batch.

Axes in tensor names: B sequences, T input tokens, V entries of the vocabulary, N = B * T.
Inputs: logits_BTV in the dtype of the forward pass, targets_BT, mask_BT. Outputs: nats in fp32. The weights are not
normalised; they come with the count that normalises them. So the sums of micro-batches and ranks add up to the loss of
the whole batch. Pure functions on the device of their inputs. `target_nll` is for models whose logits are not a plain
product; the others use chunked_head.py.
"""

from typing import Any, Literal

import torch

_TILE_ENTRIES = 1 << 24  # logits that are converted to fp32 at a time: 64 MiB


class _TargetNll(torch.autograd.Function):
    """Cross-entropy that keeps only the logits and one log-sum-exp per token for the backward pass.

    `F.cross_entropy` keeps a log-softmax as large as the logits, in fp32 even if the logits are bf16.
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
    """Computes -log p of each target, in nats.

    Args:
        logits_BTV: float32 or bfloat16.
        targets_BT: int64 ids, each below V.

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
    """Computes weights w and a count c so that the loss of a batch is sum(w * nll) / c.

    official: the mean over the sequences of each sequence's mean over its targets. Targets whose input is the separator
    do not count, and a sequence without any other target (only padding) does not count. token_mean: the mean over all
    targets.

    Args:
        inputs_BT: int64 input ids.
        mask_BT: 1 where a position has a target.
        separator_id: id of the document separator.
        loss: `official` or `token_mean`.

    Returns:
        (weights_BT float32, count as float64 scalar). The counts of the parts of a batch add up to its count.

    Source: the official implementation of arXiv 2410.17215 (mean per instance, separator inputs masked).
    """
    weights_BT = mask_BT.float()
    if loss == "token_mean":
        return weights_BT, weights_BT.sum(dtype=torch.float64)
    weights_BT = weights_BT * (inputs_BT != separator_id)
    targets_B = weights_BT.sum(dim=1, keepdim=True)
    return weights_BT / targets_B.clamp(min=1), (targets_B > 0).sum(dtype=torch.float64)
