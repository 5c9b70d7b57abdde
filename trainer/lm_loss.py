"""A causal LM and its training loss as one module, so that DDP and FSDP wrap both.

Axes in tensor names: B sequences, T input tokens. Inputs: token ids, targets and the weights of the targets (loss.py).
Output: the weighted sum of -log p, in nats. The decoder gives hidden states, and `chunked_head` the loss without the
logits of all positions. That is exact only where the model's logits are the product of the hidden states and a weight.
A model with another output layer (a bias, a soft cap, a scale) goes through its own `.logits`. Which of the two it is
gets tested on the model itself when the module is made. Needs torch and transformers; reads and writes nothing.
"""

from typing import Any

import torch

from trainer.chunked_head import chunk_loss, weighted_nll
from trainer.loss import target_nll

# The test enlarges the logits to this size: a soft cap does not change the small logits of new weights.
_LARGEST_LOGIT = 100.0
_PROBE_TOKENS = 4


class CausalLMWithLoss(torch.nn.Module):
    """A causal LM whose forward pass returns the loss.

    Args:
        model: a causal LM of transformers, or a module whose forward pass takes `input_ids` and returns `.logits`.
            It is already on its device, and not sharded yet.

    Attributes:
        model: the causal LM.
        has_plain_head: whether the loss is computed in chunks; false: through `.logits`.
        chunk_loss: computes the loss of a chunk; `blocks.prepare_blocks` replaces it with a compiled one.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model: Any = model
        self.has_plain_head = has_plain_head(model)
        self.chunk_loss = chunk_loss

    def forward(
        self,
        inputs_BT: torch.Tensor,
        targets_BT: torch.Tensor,
        weights_BT: torch.Tensor,
        positions_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes sum(weight * -log p of the target).

        Args:
            inputs_BT: int64 input ids.
            targets_BT: int64 ids to predict.
            weights_BT: float32 weights of the targets.
            positions_BT: int64 positions of the tokens in their documents; None: 0, 1, ... in each sequence.

        Returns:
            A float32 scalar, in nats.
        """
        # A cache would keep transformers from building the mask of the documents.
        extra = {} if positions_BT is None else {"position_ids": positions_BT, "use_cache": False}
        if not self.has_plain_head:
            logits_BTV = self.model(input_ids=inputs_BT, **extra).logits
            return (target_nll(logits_BTV, targets_BT) * weights_BT).sum()
        hidden_BTD = self.model.base_model(input_ids=inputs_BT, **extra)[0]
        # Read here and not kept: FSDP puts the whole weight in its place for the forward pass.
        weight_VD = self.model.get_output_embeddings().weight
        hidden_ND = hidden_BTD.flatten(0, 1)
        return weighted_nll(hidden_ND, weight_VD, targets_BT.flatten(), weights_BT.flatten(), self.chunk_loss)


@torch.no_grad()
def has_plain_head(model: Any) -> bool:
    """Tests whether a model's logits are the product of its decoder's hidden states and the output layer's weight.

    The test runs the model on a few tokens, replaces the hidden states by larger ones, and compares the logits.

    Args:
        model: any module; it stays as it is.
    """
    decoder: Any = getattr(model, "base_model", None)
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if decoder is None or decoder is model or type(head) is not torch.nn.Linear or head.bias is not None:
        return False
    enlarged: list[torch.Tensor] = []

    def enlarge(module: torch.nn.Module, arguments: Any, output: Any) -> Any:
        hidden = output[0]
        enlarged.append(hidden * (_LARGEST_LOGIT / head(hidden).abs().max()))
        if isinstance(output, tuple):
            return (enlarged[0], *output[1:])
        output[next(iter(output))] = enlarged[0]
        return output

    was_training = model.training
    model.train()  # a dropout in front of the output layer would show
    handle = decoder.register_forward_hook(enlarge)
    try:
        tokens_BT = torch.arange(_PROBE_TOKENS, device=head.weight.device)[None] % len(head.weight)
        logits_BTV = model(input_ids=tokens_BT).logits.float()
    finally:
        handle.remove()
        model.train(was_training)
    if not enlarged:  # its forward pass runs a part of `base_model` alone
        return False
    expected_BTV = head(enlarged[0]).float()
    return expected_BTV.shape == logits_BTV.shape and torch.allclose(logits_BTV, expected_BTV, rtol=1e-5, atol=1e-3)
